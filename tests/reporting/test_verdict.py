"""The verdict and the headline: an untrained student gets a bad one, whatever the AR model corrects."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opdlm.cli.main import main
from opdlm.reporting.card import measured_values
from opdlm.reporting.pages import headline, read_retention
from opdlm.reporting.tables import print_report
from opdlm.reporting.verdict import MIN_GAIN, timed_lossless, verdict

TRAINED = [
    *("optimizer.warmup_steps=2", "train.num_steps=40", "rollout.prompts_per_step=8"),
    *("train.rows_per_update=8", "train.micro_batch_rows=8", "data.path=bundled:prompts.jsonl"),
]
MEASURED = ["eval.limit=1", "eval.agreement=false", "eval.timed_prompts=5", "eval.decode.max_new_tokens=48"]
UNTRAINED = [
    *("optimizer.learning_rate=1e-12", "optimizer.warmup_steps=0", "train.num_steps=1"),
    *("rollout.prompts_per_step=2", "train.rows_per_update=2", "train.micro_batch_rows=2", *MEASURED),
]


def mode_row(
    name: str, per_forward: float, share: float, replaced: float | None = None, from_ar: float | None = None
) -> dict[str, Any]:
    return {
        "name": name,
        "accuracy": share,
        "retention": share,
        "against_teacher": {"all": {"retention_interval": [share, share]}},
        "identical_to_teacher": share / 2,
        "common_prefix": share / 4,
        "tokens_per_forward": per_forward,
        "replaced": replaced,
        "from_ar": from_ar,
        "num_prompts": 100,
    }


def report_of(per_forward: float, ratio: float | None, alone: float = 0.12, **changes: Any) -> dict[str, Any]:
    """Values of a `preserve` report with the entries that a verdict reads."""
    report = {
        "settings": {
            "block_diffusion": {"format": "preserve"},
            "seeds": [0],
            "config": {"eval": {"path": "tasks.jsonl"}},
        },
        "teacher": mode_row("teacher", 1.0, 1.0),
        "student": [
            mode_row("static", 0.8, 1.0, 0.06, 1.0),
            mode_row("static, alone", 0.95, 0.5, None, 0.9),
            mode_row("threshold", 1.2, 1.0, 0.29, 0.8),
            mode_row("threshold, alone", 2.4, alone, None, 0.46),
            mode_row("lossless", 1.4, 1.0),
        ],
        "num_answered": 100,
    }
    lossless = {"name": "lossless", "batch_size": 1, "tokens_per_second": 8.0, "speedup": 0.9}
    lossless |= {"over_fastest_ar": ratio, "tokens_per_forward": per_forward, "identical": 1.0}
    if ratio is not None:
        report["speed"] = {"settings": {"prompts": 8, "repeats": 2}, "rows": [lossless]}
    return report | changes


@pytest.mark.parametrize(
    ("per_forward", "ratio", "said"),
    [
        (1.02, 0.80, "1.02 tokens per forward, 0.80 × the fastest AR decoding here: nothing was gained"),
        (1.30, 1.01, "1.30 tokens per forward, 1.01 × the fastest AR decoding here: nothing was gained"),
        (1.04, 1.30, "1.30 × the fastest AR decoding here: nothing was gained"),  # the clock's noise
        (2.10, 0.90, "0.90 × the fastest AR decoding here: forwards were saved, but no time"),
        (2.77, 1.90, "2.77 tokens per forward, 1.90 × the fastest AR decoding here: it is faster"),
        (1.40, None, "1.40 tokens per forward (not timed)"),
    ],
)
def test_the_verdict_begins_with_the_speed_of_lossless_decoding(
    per_forward: float, ratio: float | None, said: str
) -> None:
    sentence = verdict(report_of(per_forward, ratio))
    assert sentence.startswith("Lossless decoding writes ") and said in sentence
    assert sentence.endswith(
        "the student alone keeps 12 % of the teacher's accuracy (threshold, 2.40 tokens per forward, 46 % of "
        "the tokens the AR model's)."
    )


def test_without_answers_the_verdict_tells_agreement_with_the_teacher() -> None:
    agreement = "the student alone repeats 40 % of the teacher's responses and 20 % of their tokens"
    assert agreement in verdict(report_of(1.0, 0.8, 0.8, num_answered=0))
    no_right_answer = report_of(1.0, 0.8, 0.8, teacher=mode_row("teacher", 1.0, 0.0))
    assert agreement in verdict(no_right_answer)


def test_the_verdict_on_sdar_is_what_the_student_keeps() -> None:
    report = report_of(1.0, None, settings={"block_diffusion": {"format": "sdar"}})
    report["student"] = [mode_row("static", 1.0, 0.9), mode_row("threshold", 1.7, 0.8)]
    assert verdict(report) == (
        "The student keeps 80 % of the teacher's accuracy (threshold, 1.70 tokens per forward)."
    )


def test_a_report_of_an_earlier_version_does_not_praise_what_the_ar_model_corrected() -> None:
    report = report_of(2.77, None)
    report["student"] = [
        {key: mode[key] for key in mode if key != "replaced"}
        for mode in report["student"]
        if "alone" not in mode["name"]
    ]
    report["student"][-1] |= {"tokens_per_forward": 2.77}
    assert verdict(report) == (
        "Lossless decoding writes 2.77 tokens per forward (not timed); the student alone was not measured."
    )


def test_no_headline_or_metric_is_about_a_decoding_that_the_ar_model_corrects() -> None:
    report = report_of(1.02, 0.8)
    lines = headline(report)
    assert lines[0] == verdict(report)
    assert [line.split(":")[0] for line in lines[1:]] == ["static, alone", "threshold, alone"]
    metrics = [name for _, name in measured_values(report)]
    assert metrics[:2] == [
        "tokens per forward (lossless)",
        "speed over the fastest AR decoding (lossless)",
    ]
    assert "accuracy (threshold, alone)" in metrics and "accuracy (threshold)" not in metrics


def test_the_terminal_shows_narrow_tables_and_the_verdict_last() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    print_report(report_of(1.02, 0.8), console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    for name, cells in {
        "threshold": "29.0 %   80.0 %     1.20",
        "threshold, alone": "–   46.0 %     2.40",
    }.items():
        assert [line for line in lines if line.startswith(f" {name} ") and line.endswith(cells)]
    text = " ".join(" ".join(lines).split())
    assert text.index("Lossless decoding speed") < text.index("Retention on 100 prompts")
    assert text.endswith(verdict(report_of(1.02, 0.8)))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result folder of `opdlm convert tiny` with a learning rate that teaches nothing."""
    output = tmp_path_factory.mktemp("untrained")
    assert main(["convert", "tiny", f"output_dir={output}", *UNTRAINED]) == 0
    return output / "model"


def test_an_untrained_student_gets_a_bad_report(untrained: Path) -> None:
    report = read_retention(untrained)
    assert report is not None
    rows = {row["name"]: row for row in report["student"]}
    timed = {row["name"]: row for row in report["speed"]["rows"]}
    assert timed["lossless"]["tokens_per_forward"] < 1.5
    assert timed["lossless"]["over_fastest_ar"] < MIN_GAIN
    assert rows["threshold, alone"]["retention"] < 0.5
    assert rows["threshold, alone"]["common_prefix"] < 0.5
    for mode in ("static", "threshold"):  # what used to be shown
        assert rows[mode]["retention"] > 0.9 and rows[mode]["replaced"] > 0.02
        assert rows[f"{mode}, alone"]["retention"] < rows[mode]["retention"]
    said = verdict(report)
    assert "nothing was gained" in said and re.search(r"keeps \d\d? % of the teacher's accuracy", said)
    card, page = (untrained / "README.md").read_text(), (untrained / "report.md").read_text()
    assert card.index(said) < card.index("| transformers.generate |") < card.index("| teacher |")
    assert page.index(said) < page.index("speed.png") < page.index("retention.png")
    assert "second" not in (untrained / "retention.json").read_text()  # no times


@pytest.mark.slow
def test_a_trained_student_gets_a_better_report(untrained: Path, tmp_path: Path) -> None:
    assert main(["convert", "tiny", f"output_dir={tmp_path}", *TRAINED, *MEASURED]) == 0
    before, after = read_retention(untrained), read_retention(tmp_path / "model")
    assert before is not None and after is not None
    speeds = [timed["tokens_per_forward"] for r in (before, after) if (timed := timed_lossless(r))]
    assert speeds[1] > speeds[0] + 0.05
    for name in ("static, alone", "threshold, alone"):
        rows = [row for r in (before, after) for row in r["student"] if row["name"] == name]
        for key in ("retention", "common_prefix"):
            assert rows[1][key] > rows[0][key] + 0.2
    for name in ("static", "threshold"):
        rows = [row for r in (before, after) for row in r["student"] if row["name"] == name]
        assert rows[1]["replaced"] < rows[0]["replaced"] / 2
