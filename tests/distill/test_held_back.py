"""Prompts that a conversion without `eval.path` keeps from training: which, when measured, what is said."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoints import tiny_overrides, write_checkpoint, write_data, write_rows

import opdlm
from opdlm.cli.main import main
from opdlm.data.prompts import hold_back
from opdlm.distill.trainer import StudentLoss
from opdlm.errors import DataError
from opdlm.evaluation import evaluate as evaluation
from opdlm.files import find_damage
from opdlm.training import metrics


@given(st.lists(st.integers(0, 30), min_size=1, max_size=80), st.integers(1, 20))
def test_held_back_prompts_are_not_trained_on(items: list[int], number: int) -> None:
    kept, chosen = hold_back(items, lambda item: (item,), number)
    distinct = len(set(items))
    if distinct < 8:
        assert kept == items and set(chosen) <= {(item,) for item in items}
    else:
        assert len(chosen) == len(set(chosen)) == min(number, distinct // 8)
        assert kept == [item for item in items if (item,) not in chosen]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("held_back")
    write_checkpoint(root / "teacher")
    write_data(root)
    write_rows(root / "prompts.jsonl", [{"prompt": f"add {i} {7 * i % 10}"} for i in range(24)])
    return root


def settings(root: Path, output: Path, *overrides: str) -> list[str]:
    return [*tiny_overrides(root / "teacher", root, output)[1:], "eval.held_back=32", *overrides]


def test_a_conversion_ends_with_numbers_on_prompts_that_it_kept_from_training(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(metrics, "STEP_LINE_SECONDS", 0.0)
    assert (
        main(["convert", str(root / "teacher"), *settings(root, run, "optimizer.learning_rate=1e-12")]) == 0
    )
    printed = capsys.readouterr().out
    assert "21 prompts (21 distinct)" in printed
    assert "This run learnt nothing" in printed and "before training" in printed
    for what in ("write responses", "update 1/", "measure"):
        assert re.search(rf"^step 1/\d+  {what}", printed, re.MULTILINE), printed
    assert "measure before training 1/1" in printed
    assert "nothing was gained" in printed and f"next: opdlm chat {run / 'model'}" in printed
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["held_back_tokens_per_forward"] > 0 for row in rows)
    held_back = [json.loads(line) for line in (run / "model" / "held_back.jsonl").read_text().splitlines()]
    assert len(held_back) == 3
    report = opdlm.evaluate(run / "model", modes=["lossless"])
    assert report["teacher"]["num_prompts"] == 3
    assert report["student"][0]["identical_to_teacher"] == 1.0


def test_a_finished_conversion_is_not_measured_again_and_an_interrupted_measurement_goes_on(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second of the responses of three modes; then the command, twice."""
    command = ["convert", str(root / "teacher"), *settings(root, tmp_path / "run")]
    decoded: list[int] = []
    generate = evaluation.generate

    def interrupted(model: Any, prompts: Any, *rest: Any) -> Any:
        decoded.append(len(prompts))
        if prompts and sum(map(bool, decoded)) == 2:
            raise KeyboardInterrupt
        return generate(model, prompts, *rest)

    monkeypatch.setattr(evaluation, "generate", interrupted)
    assert main(command) == 130
    folder = tmp_path / "run" / "model"
    adapter, card = folder / "adapter" / "adapter_model.safetensors", folder / "README.md"
    written = adapter.stat().st_mtime_ns
    assert adapter.is_file() and not card.exists()
    assert main(command) == 0
    assert [number for number in decoded if number] == [3, 3, 3, 3, 3]
    assert adapter.stat().st_mtime_ns == written
    report, first = (folder / "retention.json").read_bytes(), capsys.readouterr().out
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # part of the versions beside a result
    try:
        assert main(command) == 0
    finally:
        torch.set_num_threads(threads)
    second = capsys.readouterr().out
    assert len([number for number in decoded if number]) == 5
    assert (folder / "retention.json").read_bytes() == report
    assert f"{folder} is finished" in second and "evaluate" not in second
    assert first.splitlines()[-3:] == second.splitlines()[-3:]  # what was found, and what comes next
    assert main([*command, "train.num_steps=9"]) == 0  # more steps: another result
    assert adapter.stat().st_mtime_ns > written and len([number for number in decoded if number]) > 5
    adapter.write_bytes(adapter.read_bytes()[:-1])
    assert main([*command, "train.num_steps=9"]) == 0  # damaged: written again
    assert not find_damage(folder)


def test_an_update_without_enough_memory_is_repeated_with_smaller_micro_batches(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The allocator refuses what the first forward asks for; and what every forward asks for."""

    def losses(name: str) -> list[float]:
        folder = tmp_path / name
        opdlm.convert(root / "teacher", overrides=settings(root, folder, "train.micro_batch_rows=2"))
        return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    plain, forward, widths, always = losses("plain"), StudentLoss.forward, list[int](), False

    def starved(self: StudentLoss, states: Any, weights_M: torch.Tensor) -> Any:
        widths.append(states.num_columns)
        if len(widths) == 1 or always:
            torch.empty(2**50, dtype=torch.uint8)
        return forward(self, states, weights_M)

    monkeypatch.setattr(StudentLoss, "forward", starved)
    with caplog.at_level(logging.WARNING):
        assert losses("starved") == pytest.approx(plain, rel=1e-5)
    assert "train.micro_batch_rows=1" in caplog.text
    assert max(widths[1:]) < widths[0]
    always = True
    with pytest.raises(DataError, match=r"memory does not suffice for train\.micro_batch_rows \(1\): lower"):
        losses("hopeless")


@pytest.mark.parametrize("change", ["eval.held_back=0", "eval.path={root}/prompts.jsonl"])
def test_which_prompts_are_held_back_cannot_change_on_the_way(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    """They are not trained on; nothing of the run is touched."""
    command = ["convert", str(root / "teacher"), *settings(root, tmp_path / "run", "train.num_steps=1")]
    assert main(command) == 0
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    change = change.format(root=root)
    assert main([*command, "train.num_steps=2", change]) == 2
    assert f"holds a run with other settings ({change.partition('=')[0]};" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert not (tmp_path / "run" / "changes.jsonl").exists()
    assert main([*command, "train.num_steps=2"]) == 0
