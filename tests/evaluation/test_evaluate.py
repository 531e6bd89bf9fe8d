"""The retention report: scores against plain counting, and resuming after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_checkpoints import tiny_overrides, write_checkpoint, write_data, write_rows

from opdlm.checkpoints.load import load
from opdlm.cli.main import main
from opdlm.config.sections import CONFIG_COPY
from opdlm.evaluation import evaluate as evaluation
from opdlm.evaluation import scoring
from opdlm.evaluation.generation_log import GenerationLog
from opdlm.evaluation.retention import eval_config, load_eval_tasks

ROOT = Path(__file__).parents[2]
TASKS = [
    {"prompt": f"{verb} {i} {7 * i % 10}", "answer": str(i), "skill": verb, "held_out": verb == "mul"}
    for verb in ("add", "mul")
    for i in range(4)
] + [{"prompt": f"what is {i}", "skill": "open"} for i in range(4)]
TIMING = ("seconds",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted tiny checkpoint; its tasks lie in `tasks.jsonl` beside the run."""
    root = tmp_path_factory.mktemp("eval")
    write_data(root)
    write_rows(root / "tasks.jsonl", TASKS)
    settings = tiny_overrides(write_checkpoint(root / "teacher"), root, root / "run")
    assert main(["convert", str(root / "teacher"), *settings[1:]]) == 0
    return root / "run" / "model"


def eval_command(folder: Path, out: Path, *overrides: str) -> list[str]:
    tasks = folder.parent.parent / "tasks.jsonl"
    return [
        "eval",
        str(folder),
        f"eval.path={tasks}",
        "eval.decode.batch_size=1",
        *overrides,
        "--out",
        str(out),
    ]


def without_timing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_timing(item) for key, item in value.items() if key not in TIMING}
    return [without_timing(item) for item in value] if isinstance(value, list) else value


def read_report(out: Path) -> Any:
    return json.loads((out / "retention.json").read_text())


def read_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]


def num_equal(first: list[int], second: list[int]) -> int:
    """Length of the longest common prefix."""
    return max(n for n in range(len(second) + 1) if first[:n] == second[:n])


def test_scores_are_what_the_raw_generations_say(folder: Path, tmp_path: Path) -> None:
    assert main(eval_command(folder, tmp_path, "eval.modes=static,threshold")) == 0
    report, lines = read_report(tmp_path), read_lines(tmp_path)
    names = ("teacher", "static", "static, alone", "threshold", "threshold, alone")
    assert [row["name"] for row in report["student"]] == list(names[1:])
    by_mode = {mode: [x for x in lines if x["mode"] == mode] for mode in names}
    teacher = {x["prompt"]: x for x in by_mode["teacher"]}
    for row in [report["teacher"], *report["student"]]:
        mine = by_mode[row["name"]]
        assert len(mine) == len(TASKS) == row["num_prompts"]
        for skill, share in row["by_skill"].items():
            hits = [
                x["response"] == (x["answer"] or teacher[x["prompt"]]["response"])
                for x in mine
                if x["skill"] == skill
            ]
            assert share == sum(hits) / len(hits)
            low, high = row["by_skill_interval"][skill]
            assert low <= share <= high
        tokens, forwards = sum(x["num_response"] for x in mine), sum(x["num_forwards"] for x in mine)
        assert row["tokens_per_forward"] == tokens / forwards
        assert row["mean_response_tokens"] == tokens / len(TASKS)
        held_out = [x for x in mine if x["skill"] == "mul"]
        assert row["tokens_per_forward_held_out"] == sum(x["num_response"] for x in held_out) / sum(
            x["num_forwards"] for x in held_out
        )
        same = [x["response_ids"][: x["num_response"]] for x in mine]
        expected = [
            teacher[x["prompt"]]["response_ids"][: teacher[x["prompt"]]["num_response"]] for x in mine
        ]
        assert row["identical_to_teacher"] == sum(a == b for a, b in zip(same, expected, strict=True)) / len(
            mine
        )
        shares = [num_equal(a, b) / len(b) for a, b in zip(same, expected, strict=True)]
        assert row["common_prefix"] == pytest.approx(sum(shares) / len(mine))
        replaced = sum(x["num_replaced"] for x in mine)
        assert row["replaced"] == (replaced / tokens if row["name"] in ("static", "threshold") else None)
        assert bool(replaced) == bool(row["replaced"])
        steps = [x["unmask_step"][: x["num_response"]] for x in mine]
        from_ar = sum(all(s < step for s in x[:i]) for x in steps for i, step in enumerate(x))
        assert row["from_ar"] == (
            from_ar / tokens if row["name"].startswith(("static", "threshold")) else None
        )
        assert from_ar >= replaced
        assert set(row["against_teacher"]) == {"all", "seen", "held_out"}
        assert row["against_teacher"]["all"]["difference"] == pytest.approx(
            row["accuracy"] - report["teacher"]["accuracy"]
        )
    assert report["teacher"]["by_skill"]["open"] == 1.0  # its own output is the reference there
    assert report["num_answered"] == 8


def test_the_student_alone_needs_no_second_row_where_nothing_is_replaced(
    folder: Path, tmp_path: Path
) -> None:
    assert main(eval_command(folder, tmp_path, "eval.decode.ar_accept_threshold=0")) == 0
    names = [(row["name"], row["replaced"]) for row in read_report(tmp_path)["student"]]
    assert names == [("static", None), ("threshold", None), ("lossless", None)]


def test_the_score_is_the_speed_of_lossless_decoding_or_the_worst_that_the_student_keeps_alone(
    folder: Path,
) -> None:
    model, tokenizer = load(folder)
    settings = ["eval.decode.confidence_threshold=0.08", f"eval.path={folder.parent.parent / 'tasks.jsonl'}"]
    config = eval_config(folder, settings)
    tasks = load_eval_tasks(model, tokenizer, config)
    report, _ = evaluation.evaluate(model, tokenizer, tasks, config.eval)
    assert evaluation.score_of(report) == report.student[-1].tokens_per_forward
    assert report.student[-1].name == "lossless"
    slower = dataclasses.replace(report, student=report.student[:-1])
    alone = [mode for mode in slower.student if mode.name.endswith(", alone")]
    worth = [report.retention(mode) * mode.tokens_per_forward for mode in alone]
    assert evaluation.score_of(slower) == min(worth)


def test_an_interrupted_piece_is_decoded_again_beside_the_same_prompts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of four batches, here of one prompt; Ctrl-C in the second."""
    settings = ["eval.modes=static", "eval.decode.ar_accept_threshold=0"]
    assert main(eval_command(folder, tmp_path / "whole", *settings)) == 0
    pieces: list[int] = []
    generate = evaluation.generate

    def interrupted(model: Any, prompts: Any, *rest: Any) -> Any:
        pieces.append(len(prompts))
        if len(pieces) == 2:
            raise KeyboardInterrupt
        return generate(model, prompts, *rest)

    monkeypatch.setattr(evaluation, "generate", interrupted)
    assert main(eval_command(folder, tmp_path / "cut", *settings)) == 130
    assert len(read_lines(tmp_path / "cut")) == 4
    assert main(eval_command(folder, tmp_path / "cut", *settings)) == 0
    assert [size for size in pieces if size] == [4, 4, 4, 4, 4, 4, 4]
    assert without_timing(read_lines(tmp_path / "cut")) == without_timing(read_lines(tmp_path / "whole"))


@pytest.mark.slow
def test_a_killed_evaluation_continues_without_repeating_a_prompt(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert main(eval_command(folder, whole)) == 0
    log = out / "generations.jsonl"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *eval_command(folder, out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (log.is_file() and log.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with log.open("a") as file:
        file.write('{"key": "half a li')  # what a kill in the middle of a write leaves
    before = read_finished_keys(log)
    total = 6 * len(TASKS)
    assert 3 <= len(before) < total and not (out / "retention.json").exists()

    decoded: list[tuple[int, ...]] = []
    generate = evaluation.generate

    def counting(model: Any, prompts: Any, *settings: Any) -> Any:
        decoded.extend(prompts)
        return generate(model, prompts, *settings)

    monkeypatch.setattr(evaluation, "generate", counting)
    assert main(eval_command(folder, out)) == 0
    assert len(decoded) == total - len(before)
    assert read_report(out) == read_report(whole)
    assert without_timing(read_lines(out)) == without_timing(read_lines(whole))
    assert before <= {line["key"] for line in read_lines(out)}

    decoded.clear()
    assert main(eval_command(folder, out, "eval.limit=2", "eval.modes=static")) == 0
    assert not decoded  # a part of what is there
    assert (
        main(eval_command(folder, out, "eval.decode.confidence_threshold=0.5", "eval.modes=threshold")) == 0
    )
    assert len(decoded) > 0  # another decoding is not taken for the one that is there


def read_finished_keys(log: Path) -> set[str]:
    return {json.loads(line)["key"] for line in log.read_text().splitlines() if line.endswith("}")}


def test_the_log_tells_checkpoints_decodings_and_prompts_apart(tmp_path: Path) -> None:
    first, second = GenerationLog(tmp_path / "a", "one"), GenerationLog(tmp_path / "b", "two")
    keys = [
        first.key({"mode": "ar"}, [1, 2]),
        first.key({"mode": "static"}, [1, 2]),
        first.key({"mode": "ar"}, [1, 3]),
        second.key({"mode": "ar"}, [1, 2]),
    ]
    assert len(set(keys)) == 4


def test_responses_of_an_earlier_version_are_decoded_again(tmp_path: Path) -> None:
    """It did not count the tokens that the AR model replaced."""
    rollout = {"prompt_ids": [1], "response_ids": [2], "unmask_step": [1], "num_response": 1}
    record = rollout | {"finish_reason": "length", "seconds": 1.0}
    lines = [{"key": "old"} | record, {"key": "new", "num_replaced": 0} | record]
    path = write_rows(tmp_path / "generations.jsonl", lines)
    assert set(GenerationLog(path, "one").finished) == {"new"}


def test_the_report_holds_agreement_and_likelihood_and_reads_as_markdown(
    folder: Path, tmp_path: Path
) -> None:
    settings = ["eval.modes=static,lossless", "eval.likelihood_samples=2", "eval.decode.batch_size=8"]
    assert main(eval_command(folder, tmp_path, *settings)) == 0
    report = read_report(tmp_path)
    assert set(report["agreement"]) == {"static", "static, alone", "lossless"}
    assert report["agreement"]["lossless"]["argmax_agreement"] == 1.0
    tokens = sum(x["num_response"] for x in read_lines(tmp_path) if x["mode"] == "teacher")
    assert report["likelihood"]["num_tokens"] == tokens
    text = (tmp_path / "report.md").read_text()
    assert "| lossless | " in text and "100.0 % [100.0, 100.0]" in text
    assert "KL(teacher ‖ student)" in text and "student at most" in text


def test_gsm8k_reports_strict_and_flexible_scores(folder: Path, tmp_path: Path) -> None:
    rows = [{"question": f"what is {i}", "answer": f"#### {i}"} for i in range(3)]
    path = write_rows(tmp_path / "gsm.jsonl", rows)
    command = ["eval", str(folder), f"eval.path={path}", "eval.scoring=gsm8k", "eval.agreement=false"]
    assert main([*command, "eval.modes=static", "--out", str(tmp_path / "out")]) == 0
    report = read_report(tmp_path / "out")
    assert report["teacher"]["accuracy_flexible"] is not None and "agreement" not in report
    assert set(report["teacher"]["by_skill"]) == {"gsm8k"}


def test_tasks_without_the_harness_say_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from opdlm.evaluation import lm_eval

    lm_eval.harness_class.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    assert main(["eval", str(folder), "--tasks", "gsm8k"]) == 2
    assert "pip install 'opdlm[eval]'" in capsys.readouterr().err


def with_settings_of(folder: Path, copy: Path, **settings: Any) -> Path:
    """A copy of a converted folder whose run had other `eval.*` settings."""
    shutil.copytree(folder, copy)
    record = yaml.safe_load((copy / CONFIG_COPY).read_text())
    record["eval"] |= settings
    (copy / CONFIG_COPY).write_text(yaml.safe_dump(record))
    (copy / "manifest.json").unlink()
    return copy


def test_a_folder_cannot_allow_itself_to_run_code(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_rows(tmp_path / "code.jsonl", [{"prompt": "add 1 2", "answer": "assert True"}]))
    other = with_settings_of(folder, tmp_path / "copy", scoring="code", run_code=True, path=path)
    assert main(["eval", str(other)]) == 2
    assert "set eval.run_code=true if you want that" in capsys.readouterr().err
    assert main(["eval", str(other), "eval.run_code=true", "--modes", "static", "--max-new-tokens", "4"]) == 0


def test_bench_reads_the_questions_of_the_run_as_the_run_did(folder: Path, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "gsm.jsonl", [{"question": "add 1 2", "answer": "#### 3"}]))
    other = with_settings_of(folder, tmp_path / "copy", scoring="gsm8k", path=path)
    short = ["--modes", "static", "--batch-sizes", "1", "--repeats", "1", "--max-new-tokens", "4"]
    assert main(["bench", str(other), *short, "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["settings"]["file"] == path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gsm8k", "--temperature", "1"], "eval.decode.temperature has no effect with --tasks"),
        (["--tasks", "gsm8k", "--seeds", "3"], "eval.seeds has no effect with --tasks"),
        (["--tasks", "gsm8k", "--teacher", "other"], "--teacher has no effect with --tasks"),
        (["--chat-template"], "--include-path, --num-fewshot and --chat-template belong to --tasks"),
    ],
)
def test_what_tasks_do_not_read_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["eval", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_every_program_runs_once_and_shows_progress(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report, the examples and the log name a response several times; lossless ones are the teacher's."""
    rows = [{"prompt": f"add {i} 2", "answer": f"assert {i} >= 0  # of this test"} for i in range(3)]
    path = str(write_rows(tmp_path / "code.jsonl", rows))
    command = ["eval", str(folder), f"eval.path={path}", "eval.scoring=code", "eval.run_code=true"]
    before = scoring.passes_once.cache_info().misses
    assert main([*command, "--modes", "lossless", "--max-new-tokens", "4", "--out", str(tmp_path)]) == 0
    assert scoring.passes_once.cache_info().misses - before == len(rows)
    assert "run tests 6/6" in capsys.readouterr().err
