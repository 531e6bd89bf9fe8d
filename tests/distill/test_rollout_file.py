"""`opdlm rollout`: interrupted or not, one file; and training on it is training on the rollouts it holds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from finished_runs import assert_same_run, metrics
from tiny_checkpoints import failing_after_a_save, tiny_overrides, write_checkpoint, write_rows

from opdlm.checkpoints.load import load
from opdlm.cli.main import main
from opdlm.config.rules import load_config
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Rollout
from opdlm.distill import recording
from opdlm.distill import rollouts as rollout_sources
from opdlm.distill.rollout_file import COLUMNS, RolloutFile, log_path_of, recorded_date, write_rollouts
from opdlm.objectives.mask_theory import ngram_signal_weights, optimal_t
from opdlm.seeds import seed_of
from opdlm.training import metrics as progress

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher`, `preserve/model` converted from it, and twelve prompts (two alike)."""
    root = tmp_path_factory.mktemp("rollout")
    write_checkpoint(root / "teacher")
    verbs = ("add", "sub", "mul")
    prompts = [{"prompt": f"{verb} {i} {7 * i % 10}"} for verb in verbs for i in range(4)]
    prompts[-1] = prompts[0]
    write_rows(root / "prompts.jsonl", prompts)
    assert main(convert(root, root / "preserve")) == 0
    return root


def convert(root: Path, output: Path, *overrides: str) -> list[str]:
    """Three steps over twelve prompts: each is answered once."""
    settings = tiny_overrides(root / "teacher", root, output)[1:]
    return ["convert", str(root / "teacher"), *settings, "train.num_steps=3", *overrides]


def rollout(root: Path, out: Path, *flags: str, model: str = "preserve/model") -> list[str]:
    """Batches of one prompt, so three pieces of four."""
    command = ["rollout", str(root / model), str(root / "prompts.jsonl"), "--out", str(out)]
    return [*command, "--max-new-tokens", "10", "--batch-size", "1", *flags]


MODES = {
    "threshold": ["--mode", "threshold", "--threshold", "0.1"],
    "lossless": ["--mode", "lossless", "--top-k", "5"],
    "ar": ["--mode", "ar", "--top-p", "0.9"],
}


@pytest.mark.parametrize("mode", MODES)
def test_the_file_holds_what_generate_returns_for_seeds_of_their_own(
    place: Path, tmp_path: Path, mode: str
) -> None:
    out = tmp_path / "r.parquet"
    assert main(rollout(place, out, *MODES[mode], "--seed", "3")) == 0
    model, tokenizer = load(place / "preserve" / "model")
    rows, file = pyarrow.parquet.read_table(out).to_pylist(), RolloutFile(out)
    config = DecodeConfig(
        mode=mode,
        max_new_tokens=10,
        batch_size=1,
        temperature=1.0,
        confidence_threshold=0.1 if mode == "threshold" else 0.9,
        top_k=5 if mode == "lossless" else None,
        top_p=0.9 if mode == "ar" else None,
        ar_accept_threshold=0.0,
        logprobs=True,
    ).repeatable()
    prompts = [file[i].prompt_ids for i in range(NUM_PROMPTS)]
    pieces = [range(first, first + 4) for first in range(0, NUM_PROMPTS, 4)]
    expected = [
        one
        for piece in pieces
        for one in generate(model, [prompts[i] for i in piece], config, [seed_of(3, i) for i in piece])
    ]
    assert file[:] == expected
    assert [row["response"] for row in rows] == [
        tokenizer.decode(list(one.text_ids), skip_special_tokens=True) for one in expected
    ]
    texts = [json.loads(line)["prompt"] for line in (place / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == texts
    assert list(rows[0]) == COLUMNS.names
    assert file[0].text_ids != file[NUM_PROMPTS - 1].text_ids  # the same prompt, another seed


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_file_is_the_uninterrupted_one(
    place: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second of three pieces."""
    whole, out = tmp_path / "whole.parquet", tmp_path / "cut.parquet"
    assert main(rollout(place, whole, *MODES[mode])) == 0
    pieces: list[int] = []

    def interrupted(model: Any, prompts: Any, *rest: Any) -> Any:
        pieces.append(len(prompts))
        if len(pieces) == 2:
            raise KeyboardInterrupt
        return generate(model, prompts, *rest)

    monkeypatch.setattr(recording, "generate", interrupted)
    assert main(rollout(place, out, *MODES[mode])) == 130
    assert not out.exists()
    assert main(rollout(place, out, *MODES[mode])) == 0
    assert pieces == [4, 4, 4, 4]
    assert out.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.parquet", "cut.parquet"}
    pieces.clear()
    assert main(rollout(place, out, *MODES[mode])) == 0
    assert not pieces


def test_a_killed_command_continues_to_the_same_bytes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    assert main(rollout(place, whole)) == 0
    log = log_path_of(out)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *rollout(place, out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (log.is_file() and log.read_bytes().count(b"\n") >= 5):  # the settings and a piece
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lines = log.read_bytes().splitlines(keepends=True)
    assert not out.exists() and len(lines) < 1 + NUM_PROMPTS
    log.write_bytes(b"".join(lines[:4]) + lines[4][:50])  # as a kill within the first write would leave it
    decoded: list[int] = []

    def counting(model: Any, prompts: Any, *rest: Any) -> Any:
        decoded.append(len(prompts))
        return generate(model, prompts, *rest)

    monkeypatch.setattr(recording, "generate", counting)
    assert main(rollout(place, out)) == 0
    assert decoded == [4, 4, 4]  # the piece that was cut is decoded as it was: beside the same prompts
    assert out.read_bytes() == whole.read_bytes()


def test_a_file_of_an_earlier_version_has_no_counts(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.parquet"
    assert main(rollout(place, out, *MODES["threshold"])) == 0
    whole, table = RolloutFile(out)[:], pyarrow.parquet.read_table(out)
    pyarrow.parquet.write_table(table.drop_columns(["num_replaced"]), out)
    assert RolloutFile(out)[:] == [replace(one, num_replaced=0) for one in whole]


def test_a_log_counts_responses_inside_a_piece(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert main(rollout(place, tmp_path / "r.parquet", "--mode", "ar")) == 0
    counted = [
        int(number) for number in re.findall(r"^rollout (\d+)/12 ", capsys.readouterr().out, re.MULTILINE)
    ]
    assert counted == sorted(counted) and {0, 1, 4, 11, 12} <= set(counted)


def test_a_file_keeps_the_day_that_its_prompts_were_written_for(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.parquet"
    assert main([*rollout(place, out, *MODES["ar"]), "data.date=2020-01-01"]) == 0
    assert main(rollout(place, out, *MODES["ar"])) == 0
    assert "is finished already" in capsys.readouterr().out
    assert recorded_date(out) == "2020-01-01"
    assert main([*rollout(place, out, *MODES["ar"]), "data.date=2021-01-01"]) == 2
    assert "holds rollouts of other settings (date" in capsys.readouterr().err


def test_another_model_does_not_continue_a_file(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.parquet"
    assert main(rollout(place, out, "--mode", "ar")) == 0
    assert main(rollout(place, out, "--mode", "ar", model="teacher")) == 2
    assert "holds rollouts of other settings (model, checkpoint" in capsys.readouterr().err
    log_path_of(out).write_text(json.dumps({"settings": {"seed": 7}}) + "\n")
    out.unlink()
    assert main(rollout(place, out)) == 2
    assert ".r.parquet.partial holds rollouts of other settings" in capsys.readouterr().err


SETTINGS = {
    "preserve": ["states.selection=all"],
    "sdar": ["format.name=sdar", "states.selection=one_per_block", "train.epochs_per_rollout=2"],
    "stale": ["states.selection=all", "train.max_staleness=1", "format.grid=response"],
    "random": ["loss.objective=opd_random", "train.ema_decay=0.9"],
}


def record_live_run(
    place: Path, output: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Any]:
    """Train live and write what was rolled out, in the order of the prompts."""
    made: dict[int, Rollout] = {}
    generate_rollouts = rollout_sources.generate_rollouts

    def recording(model: Any, prompts: Any, section: Any, **options: Any) -> Any:
        rollouts = generate_rollouts(model, prompts, section, **options)
        made.update(zip((prompt.index for prompt in prompts), rollouts, strict=True))
        return rollouts

    with monkeypatch.context() as patch:
        patch.setattr(rollout_sources, "generate_rollouts", recording)
        assert main(convert(place, output, *settings)) == 0
    assert sorted(made) == list(range(NUM_PROMPTS))
    model, tokenizer = load(output / "model")
    file = output.parent / "live.parquet"
    record = {"mode": "threshold", "block_size": model.spec.block_size, "grid": model.spec.grid}
    write_rollouts(file, [""] * NUM_PROMPTS, [made[i] for i in sorted(made)], tokenizer, record)
    return file, made


@pytest.mark.parametrize("name", SETTINGS)
def test_training_on_a_file_is_the_live_run_that_made_its_rollouts(
    place: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*SETTINGS[name], "lora.merge=false"]
    file, _ = record_live_run(place, tmp_path / "live", settings, monkeypatch)
    monkeypatch.delattr(rollout_sources, "generate_rollouts")
    offline = [*settings, f"rollout.path={file}", "data.path="]
    assert main(convert(place, tmp_path / "offline", *offline)) == 0
    assert metrics(tmp_path / "offline") == metrics(tmp_path / "live")
    for name in ("adapter/adapter_model.safetensors", "model.safetensors"):
        pair = [tmp_path / run / "model" / name for run in ("offline", "live")]
        assert pair[0].read_bytes() == pair[1].read_bytes(), name


def test_teacher_responses_from_the_command_train_as_live_ones(place: Path, tmp_path: Path) -> None:
    """From the outside only: a plain checkpoint in mode ar, then off_policy on the file and without it."""
    file, prompts = tmp_path / "teacher.parquet", str(place / "prompts.jsonl")
    command = ["rollout", str(place / "teacher"), prompts, "--out", str(file), "--mode", "ar"]
    assert main([*command, "--temperature", "0", "--max-new-tokens", "10"]) == 0
    settings = ["loss.objective=off_policy", "rollout.decode.temperature=0"]
    assert main(convert(place, tmp_path / "live", *settings)) == 0
    assert main(convert(place, tmp_path / "offline", *settings, f"rollout.path={file}")) == 0
    assert metrics(tmp_path / "offline") == metrics(tmp_path / "live")


@pytest.mark.slow
def test_a_compiled_decoder_writes_the_same_rollouts_and_trains_on_them(place: Path, tmp_path: Path) -> None:
    plain, compiled = tmp_path / "plain.parquet", tmp_path / "compiled.parquet"
    assert main(rollout(place, plain, "--threshold", "0.1")) == 0
    assert main(rollout(place, compiled, "--threshold", "0.1", "--compile")) == 0
    for one, other in zip(RolloutFile(plain), RolloutFile(compiled), strict=True):
        assert (one.response_ids, one.unmask_step) == (other.response_ids, other.unmask_step)
    for ahead in ("false", "true"):
        runs = [tmp_path / f"{ahead}-{compiles}" for compiles in ("false", "true")]
        for run in runs:
            settings = [f"rollout.asynchronous={ahead}", f"rollout.compile={run.name.split('-')[1]}"]
            assert main(convert(place, run, *settings)) == 0
        for one, other in zip(*map(metrics, runs), strict=True):
            assert one["rollout_tokens"] == other["rollout_tokens"]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_student_learns_from_its_own_recorded_trajectories(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.parquet"
    assert main(rollout(place, file, "--threshold", "0.1")) == 0
    settings = [f"rollout.path={file}", "states.selection=all", "rollout.prompts_per_step=6"]
    assert main(convert(place, tmp_path / "run", *settings, "train.num_steps=6")) == 0
    rows = metrics(tmp_path / "run")
    numbers = [RolloutFile(file)[i].num_response for i in range(NUM_PROMPTS)]
    assert rows[-1]["rollout_tokens"] == 3 * sum(numbers)  # the whole file in each pass
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_run_on_a_file_resumes_bit_for_bit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own.parquet"
    assert main(rollout(place, file)) == 0
    settings = [f"rollout.path={file}", "train.num_steps=4", "train.save_every=2", "train.max_staleness=1"]
    assert main(convert(place, tmp_path / "whole", *settings)) == 0
    with failing_after_a_save(monkeypatch):
        assert main(convert(place, tmp_path / "run", *settings)) == 2
    assert main(convert(place, tmp_path / "run", *settings)) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("objective", ["sft", "off_policy", "opd_random", "opd"])
def test_every_objective_with_random_masks_draws_them_from_masking(
    place: Path, tmp_path: Path, objective: str
) -> None:
    """At t = 1 each pass supervises every response token, at t = 0.3 fewer."""
    file = tmp_path / "own.parquet"
    assert main(rollout(place, file)) == 0
    settings = [f"loss.objective={objective}", "states.selection=random_mask", f"rollout.path={file}"]
    settings += ["format.name=sdar", "lora.merge=false"]
    for t in (1, 0.3):
        assert main(convert(place, tmp_path / f"{t}", *settings, f"masking.windows=[[{t},{t}]]")) == 0
    total = sum(RolloutFile(file)[i].num_response for i in range(NUM_PROMPTS))
    tokens = [metrics(tmp_path / f"{t}")[-1]["loss_tokens"] for t in (1, 0.3)]
    assert tokens[0] == total and 0.2 * total < tokens[1] < 0.7 * total


def test_automatic_windows_come_from_the_rollouts_and_are_explained(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "own.parquet", tmp_path / "run"
    assert main(rollout(place, file)) == 0
    rollouts = [RolloutFile(file)[i] for i in range(NUM_PROMPTS)]
    best = optimal_t(ngram_signal_weights([r.prompt_ids + r.text_ids for r in rollouts]))
    settings = ["states.selection=random_mask", f"rollout.path={file}", "masking.windows=auto"]
    for _ in range(2):  # the second time nothing is left to do, and the settings are found unchanged
        assert main(convert(place, run, *settings, "masking.auto_width=0.2")) == 0
    saved = load_config(run / "config.yaml").masking
    assert saved.windows == (pytest.approx((best - 0.1, best + 0.1), abs=6e-4),)
    assert f"t* = {best:.3f}" in capsys.readouterr().out
    assert (run / "mask_window.png").stat().st_size > 10_000
