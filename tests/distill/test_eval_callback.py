"""Retention during training: evaluated weights, unchanged training, early stopping, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import failing_after_a_save, tiny_overrides, write_checkpoint, write_data, write_rows
from tiny_models import make_lm

from opdlm.cli.main import main
from opdlm.config.sections import Config, EvalSection
from opdlm.decoding.rollout import Prompt
from opdlm.distill.trainer import start_run
from opdlm.training.checkpoint import find_checkpoints
from opdlm.training.loop import has_stalled
from opdlm.training.run_folder import read_run

TIMES = {
    *("rollout_tokens_per_second", "rollout_wait_seconds", "rollout_share_of_time", "seconds"),
    *("cpu_seconds", "eval_seconds"),
}
WEIGHTS = ("adapter/adapter_model.safetensors", "mask_embedding.safetensors")
AVERAGED = "train.ema_decay=0.9"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eval_callback")
    write_checkpoint(root / "teacher")
    write_data(root)
    write_rows(root / "tasks.jsonl", [{"prompt": f"add {i} {7 * i % 10}"} for i in range(8)])
    return root


def command(root: Path, output: Path, *overrides: str) -> list[str]:
    """Four steps with checkpoints after two; every decoding is the student's own."""
    settings = tiny_overrides(root / "teacher", root, output)[1:]
    return [
        *("convert", str(root / "teacher"), *settings, "train.num_steps=4", "train.save_every=2"),
        *(
            f"eval.path={root / 'tasks.jsonl'}",
            "eval.modes=[static,threshold]",
            "eval.decode.ar_accept_threshold=0",
        ),
        *("eval.agreement=false", "eval.decode.confidence_threshold=0.08", *overrides),
    ]


def rows_of(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def evaluated(root: Path) -> Path:
    assert main(command(root, root / "evaluated", "eval.every=1", AVERAGED)) == 0
    return root / "evaluated"


def test_the_last_measurement_is_the_report_of_the_result(evaluated: Path) -> None:
    """With an average of the weights, which the result holds and training does not."""
    report, last = json.loads((evaluated / "model" / "retention.json").read_text()), rows_of(evaluated)[-1]
    assert last["retention"] == pytest.approx(min(mode["retention"] for mode in report["student"]))
    for mode in report["student"]:
        assert last[f"retention_{mode['name']}"] == pytest.approx(mode["retention"])
        assert last[f"tokens_per_forward_{mode['name']}"] == pytest.approx(mode["tokens_per_forward"])
    assert len({row["tokens_per_forward_threshold"] for row in rows_of(evaluated)}) > 1


def test_measuring_changes_nothing_that_is_trained(root: Path, evaluated: Path) -> None:
    without_evaluations = root / "without_evaluations"
    assert main(command(root, without_evaluations, AVERAGED)) == 0
    expected = rows_of(without_evaluations)
    measured = [
        {key: value for key, value in row.items() if key in expected[0]} for row in rows_of(evaluated)
    ]
    assert measured == expected
    for name in WEIGHTS:
        assert (evaluated / "model" / name).read_bytes() == (
            without_evaluations / "model" / name
        ).read_bytes()


def test_a_run_with_evaluations_resumes_bit_for_bit(
    root: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("eval.every=1", AVERAGED)
    with failing_after_a_save(monkeypatch):
        assert main(command(root, tmp_path, *settings)) == 2
    assert main(command(root, tmp_path, *settings)) == 0
    assert rows_of(tmp_path) == rows_of(evaluated)
    for name in WEIGHTS:
        assert (tmp_path / "model" / name).read_bytes() == (evaluated / "model" / name).read_bytes()
    progress = [
        json.loads((run / "checkpoint-4" / "progress.json").read_text()) for run in (tmp_path, evaluated)
    ]
    assert progress[0] == progress[1] and len(progress[0]["scores"]) == 4


def test_the_subset_is_fixed_and_spread_over_all_prompts(root: Path, tmp_path: Path) -> None:
    tasks = [
        {"prompt": f"add {i} 1", "skill": f"s{i // 4}", "answer": "wrong" if i % 4 else None}
        for i in range(8)
    ]
    path = write_rows(tmp_path / "tasks.jsonl", tasks)  # without an answer the teacher is right
    subset = ("eval.every=2", "eval.subset=2", f"eval.path={path}", "optimizer.learning_rate=1e-9")
    assert main(command(root, tmp_path / "run", *subset, "eval.modes=[ar]")) == 0
    assert [row.get("retention") for row in rows_of(tmp_path / "run")] == [None, 1.0, None, 1.0]


def test_training_stops_when_retention_does_not_rise_and_stays_stopped(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student that learns nothing is measured once as the best, once as no better."""
    stopping = command(root, tmp_path, "eval.every=1", "eval.patience=1", "optimizer.learning_rate=1e-30")
    for _ in range(2):
        assert main(stopping) == 0
        assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]
        assert (tmp_path / "checkpoint-2").is_dir() and (tmp_path / "model" / "retention.json").is_file()
        assert (read_run(tmp_path).state, read_run(tmp_path).seconds_left) == ("finished", None)
    assert "no improvement in 1 evaluations (eval.patience): stopped at step 2" in capsys.readouterr().out


def test_scores_of_other_measurements_are_not_compared(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Patience counts anew from the step at which the measurement has changed."""
    stopping = command(root, tmp_path, "eval.every=1", "eval.patience=1", "optimizer.learning_rate=1e-30")
    assert main(stopping) == 0
    assert main([*stopping, "eval.modes=[static]"]) == 0
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]
    assert "earlier scores are not compared" in capsys.readouterr().out


def test_the_best_step_can_be_the_result(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate that destroys the student, also after a break and when it is asked for again."""
    settings = command(
        root,
        tmp_path,
        *("eval.every=1", "eval.load_best_model_at_end=true", "optimizer.learning_rate=1"),
        *("train.save_total_limit=1", "train.save_every=10", AVERAGED),
    )
    with failing_after_a_save(monkeypatch):
        assert main(settings) == 2
    for _ in range(2):
        assert main(settings) == 0
        scores = json.loads((tmp_path / "checkpoint-4" / "progress.json").read_text())["scores"]
        best = scores.index(max(scores)) + 1
        assert best < 4 and {path.name for path in find_checkpoints(tmp_path)} == {
            f"checkpoint-{best}",
            "checkpoint-4",
        }
        assert f"the result is checkpoint-{best}" in capsys.readouterr().out
        written, kept = (
            load_file(tmp_path / name)["mask_embedding"]
            for name in ("model/mask_embedding.safetensors", f"checkpoint-{best}/average.safetensors")
        )
        assert torch.equal(written, kept)
    assert main([*settings, "eval.load_best_model_at_end=false"]) == 0
    assert "the result is checkpoint" not in capsys.readouterr().out
    written = load_file(tmp_path / "model" / "mask_embedding.safetensors")["mask_embedding"]
    last = load_file(tmp_path / "checkpoint-4" / "average.safetensors")["mask_embedding"]
    assert torch.equal(written, last)


@pytest.mark.parametrize(
    ("scores", "patience", "stalled"),
    [
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.5], 1, True),
        ([0.5, 0.6], 1, False),
        ([0.5, 0.6, 0.4], 2, False),
        ([0.5, 0.6, 0.4, 0.6], 2, True),
        ([0.9, 0.1, 0.1, 0.1], None, False),
    ],
)
def test_stalling_counts_from_the_best_measurement(
    scores: list[float], patience: int | None, stalled: bool, tmp_path: Path
) -> None:
    section = EvalSection(every=1, patience=patience)
    run = start_run(
        make_lm("lora"), [Prompt(ids=(5,), index=0)], Config(eval=section, output_dir=str(tmp_path))
    )
    run.scores = scores
    assert has_stalled(run) is stalled
