"""A run folder has one owner, continues only as it was begun, and outlives signals, NaN and damaged files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import assert_same_run, metrics
from tiny_checkpoints import failing_after_a_save, tiny_overrides, write_checkpoint, write_data

from opdlm.cli.main import main
from opdlm.config.sections import seconds_of
from opdlm.distill import pipeline, trainer
from opdlm.errors import ConfigError
from opdlm.interrupts import interruptible
from opdlm.training.run_folder import owned, read_changes, read_run

ROOT = Path(__file__).parents[2]
TrainStep = Callable[[trainer.Run, int], dict[str, float]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, prompts, and `whole/`: the run that nothing interrupted."""
    root = tmp_path_factory.mktemp("folders")
    write_checkpoint(root / "llama")
    write_data(root)
    assert main(command(root, root / "whole")) == 0
    return root


def command(root: Path, output: Path, *overrides: str) -> list[str]:
    settings = tiny_overrides(root / "llama", root, output)[1:]
    ours = ("train.num_steps=4", "train.save_every=1", "train.save_total_limit=4", "train.ema_decay=0.9")
    return ["convert", str(root / "llama"), *settings, *ours, *overrides]


def interrupted(place: Path, output: Path, steps: int = 3) -> Path:
    """A run that has `steps` checkpoints and no result."""
    for step in range(1, steps + 1):
        shutil.copytree(place / "whole" / f"checkpoint-{step}", output / f"checkpoint-{step}")
    lines = (place / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(lines[:steps]))
    recipe = (place / "whole" / "config.yaml").read_text()
    (output / "config.yaml").write_text(recipe.replace(str(place / "whole"), str(output)))
    return output


def flip(path: Path, place: float = 0.9) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def swap(path: Path) -> None:
    other = path.parent.with_name("checkpoint-2") / path.name
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize("harm", [flip, cut, zero, Path.unlink])
@pytest.mark.parametrize("name", ["trainable.safetensors", "progress.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_continues(
    harm: Any, name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = interrupted(place, tmp_path / "run")
    harm(output / "checkpoint-3" / name)
    assert main(command(place, output)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"checkpoint-3 is damaged ({name} " in printed
    assert "kept as checkpoint-3.damaged; checkpoint-2 is used" in printed
    assert "resumed at step 2 of 4" in printed
    assert (output / "checkpoint-3.damaged").is_dir()
    assert_same_run(output, place / "whole")


def test_the_newest_intact_checkpoint_is_found_behind_several_damaged_ones(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exchanged files damage both checkpoints; with none left the run starts over, and says so."""
    output = interrupted(place, tmp_path / "run")
    swap(output / "checkpoint-3" / "optimizer.safetensors")
    assert main(command(place, output)) == 0
    assert "resumed at step 1 of 4" in capsys.readouterr().out
    assert_same_run(output, place / "whole")
    for step in (1, 2, 3, 4):
        zero(output / f"checkpoint-{step}" / "manifest.json")
    assert main(command(place, output)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "kept as checkpoint-3.damaged1; checkpoint-2 is used" in printed
    assert "checkpoint-1 is damaged" in printed and "the run starts over" in printed
    assert_same_run(output, place / "whole")


def test_a_checkpoint_of_an_earlier_version_has_no_manifest_and_continues(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = interrupted(place, tmp_path / "run")
    (output / "checkpoint-3" / "manifest.json").unlink()
    assert main(command(place, output)) == 0
    assert "resumed at step 3 of 4" in capsys.readouterr().out
    assert_same_run(output, place / "whole")


HOLDS = """
import sys, time
from pathlib import Path
from opdlm.training.run_folder import owned
with owned(Path(sys.argv[1])):
    print("has it", flush=True)
    time.sleep(60)
"""


def test_a_second_command_in_a_run_folder_refuses_until_the_first_has_ended(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the first is killed, which leaves its lock file behind."""
    output = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(output)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "has it\n"
        assert main(command(place, output)) == 2
        said = capsys.readouterr().err
        assert (
            f"output_dir ({output}) is in use by process {holder.pid} on " in said and said.count("\n") == 1
        )
    finally:
        holder.kill()
        holder.wait()
    assert {path.name for path in output.iterdir()} == {".lock"}
    assert main(command(place, output)) == 0
    assert not (output / ".lock").exists()
    assert_same_run(output, place / "whole")


def test_a_folder_in_which_nothing_was_written_is_not_left_behind(tmp_path: Path) -> None:
    with owned(tmp_path / "a"), pytest.raises(ConfigError, match="in use by process"), owned(tmp_path / "a"):
        pass
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"), owned(tmp_path / "file"):
        pass


def test_settings_are_compared_before_the_first_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", lambda run, step: 1 / 0)
        assert main(command(place, output)) == 1
    assert main(command(place, output, "train.seed=1")) == 2
    assert "holds a run with other settings (train.seed;" in capsys.readouterr().err
    assert main(command(place, output, "train.seed=1", "train.resume_from_checkpoint=false")) == 0
    assert metrics(output) != metrics(place / "whole")


def with_broken_weights(train_step: TrainStep) -> TrainStep:
    """A step whose loss is NaN."""

    def broken(run: trainer.Run, step: int) -> dict[str, float]:
        assert run.model.mask_embedding is not None
        with torch.no_grad():
            run.model.mask_embedding.fill_(torch.nan)
        return train_step(run, step)

    return broken


def test_the_advice_after_nan_works_and_is_recorded(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run breaks before its first checkpoint, as with a learning rate that is far too large."""
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", with_broken_weights(trainer.train_step))
        assert main(command(place, output, "optimizer.learning_rate=5", "train.save_every=4")) == 2
    said = capsys.readouterr().err
    assert "Lower optimizer.learning_rate (5): the same command then starts again from the begin" in said
    assert main(command(place, output)) == 0
    result = json.loads((output / "model" / "all_results.json").read_text())
    (change,) = result["changed_settings"]
    assert change["step"] == 0 and change["changed"]["optimizer.learning_rate"] == [5, 1e-2]
    assert "another optimizer.learning_rate: 0.01 instead of 5.0 (changes.jsonl)" in caplog.text
    assert_same_run(output, place / "whole")


def test_after_nan_a_lower_learning_rate_continues_from_the_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = interrupted(place, tmp_path / "run", 2)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", with_broken_weights(trainer.train_step))
        assert main(command(place, output)) == 2
    said = capsys.readouterr().err
    assert "the same command then continues from checkpoint-2" in said and said.count("\n") == 1
    assert not (output / "checkpoint-3").exists()
    assert main(command(place, output, "optimizer.learning_rate=5e-3", "optimizer.max_grad_norm=2")) == 2
    assert "other settings (optimizer.max_grad_norm;" in capsys.readouterr().err
    assert main(command(place, output, "optimizer.learning_rate=5e-3")) == 0
    assert "resumed at step 2 of 4" in capsys.readouterr().out
    rows, whole = metrics(output), metrics(place / "whole")
    assert rows[:2] == whole[:2] and rows[2]["learning_rate"] == whole[2]["learning_rate"] / 2
    assert [change["step"] for change in read_changes(output)] == [2]


def with_distorted_weights(train_step: TrainStep) -> TrainStep:
    """From the fourth step on, adapters far from where they were."""

    def distorted(run: trainer.Run, step: int) -> dict[str, float]:
        if step >= 3:
            torch.manual_seed(step)
            with torch.no_grad():
                for parameter in run.model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(std=10)
        return train_step(run, step)

    return distorted


def test_a_loss_that_rises_and_stays_ends_the_run_and_the_advice_works(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    longer = ("train.num_steps=8", "train.save_every=3", "optimizer.learning_rate=1e-4")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", with_distorted_weights(trainer.train_step))
        assert main(command(place, output, *longer)) == 2
    said = capsys.readouterr().err
    assert "the loss has risen to" in said and "than 2 times that of the first steps" in said
    assert "the same command then continues from checkpoint-3" in said and said.count("\n") == 1
    assert [row["step"] for row in metrics(output)] == [1, 2, 3, 4, 5]
    assert main(command(place, output, *longer, "optimizer.learning_rate=5e-5")) == 0
    assert len(metrics(output)) == 8


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_ends_even_where_ctrl_c_is_ignored(
    number: signal.Signals, code: int, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under nohup. The signal may come twice: schedulers send it to the group and to the launcher."""
    output, train_step = tmp_path / "run", trainer.train_step

    def signalled_in_step_3(run: trainer.Run, step: int) -> dict[str, float]:
        if step == 2:
            signal.raise_signal(number)
            signal.raise_signal(number)
        return train_step(run, step)

    inherited = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "train_step", signalled_in_step_3)
            assert main(command(place, output, "train.save_every=4")) == code
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert signal.getsignal(number) is signal.SIG_DFL
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"]
    assert main(command(place, output)) == 0
    assert_same_run(output, place / "whole")


@pytest.mark.parametrize("phase", ["load_inputs", "write_record"])
def test_a_signal_outside_the_training_loop_ends_in_one_sentence(
    phase: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While loading, and while the result is half written. The second signal disturbs no cleaning up."""
    output = tmp_path / "run"
    ended = list[str]()

    def signalled(*_: Any) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            ended.append(phase)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, phase, signalled)
        assert main(command(place, output)) == 143
    said = capsys.readouterr().err
    assert said == "opdlm: interrupted. The same command continues from the last checkpoint.\n"
    assert ended and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not (output / "model").exists() and not list(output.glob(".*"))
    assert main(command(place, output)) == 0
    assert_same_run(output, place / "whole")


def test_a_run_stops_in_time_and_the_same_command_continues(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    for step in (1, 2, 3):
        assert main(command(place, output, "train.time_limit=0.01s", "train.save_every=4")) == 124
        assert (
            f"opdlm: train.time_limit (0.01s) leaves no time for another step: saved after step {step} of 4. "
            "The same command continues.\n"
        ) in capsys.readouterr().err
    assert main(command(place, output, "train.time_limit=2h")) == 0
    assert_same_run(output, place / "whole")


def test_a_time_limit_is_seconds_or_a_duration(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    durations = {"": 0, "90": 90, "0.5s": 0.5, "2h30m": 9000, "1d2h": 93600, "1m30s": 90, "45m": 2700}
    assert {text: seconds_of(text) for text in durations} == durations
    for wrong in ("soon", "2.5h", "30m2h", "-5"):
        assert main(command(place, place / "none", f"train.time_limit={wrong}")) == 2
        assert "train.time_limit (" in (said := capsys.readouterr().err) and "2h30m" in said


def test_metrics_are_appended_and_read_once_per_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after step 3, whose checkpoint is lost: the third line is written twice."""
    output = interrupted(place, tmp_path / "run")
    shutil.rmtree(output / "checkpoint-3")
    before = (output / "metrics.jsonl").read_bytes()
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill
    assert main(command(place, output)) == 0
    content = (output / "metrics.jsonl").read_bytes()
    assert content.startswith(before)
    assert [line.split(b",")[0] for line in content.splitlines()] == [
        *(b'{"step": 1', b'{"step": 2', b'{"step": 3', b'{"step": 4', b'{"step": 3', b'{"step": 4'),
    ]
    assert_same_run(output, place / "whole")


def test_a_disk_that_fails_after_a_save_leaves_a_run_that_verify_finds_intact(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with failing_after_a_save(monkeypatch):
        assert main(command(place, tmp_path / "run")) == 2
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run' / 'checkpoint-1'}: intact\n"


def test_runs_are_listed_and_continued_without_the_long_command(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = interrupted(place, tmp_path / "deep" / "stopped")
    shutil.copytree(place / "whole", tmp_path / "whole")
    with owned(tmp_path / "deep" / "busy"):
        shutil.copy(stopped / "config.yaml", tmp_path / "deep" / "busy")
        capsys.readouterr()
        assert main(["runs", str(tmp_path)]) == 0
        rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "convert" in line]
    assert [(row[0].split("/")[-1], *row[1:4]) for row in rows] == [
        ("busy", "convert", "running", "0/4"),
        ("stopped", "convert", "stopped", "3/4"),
        ("whole", "convert", "finished", "4/4"),
    ]
    assert rows[1][4] != "–" == rows[0][4] == rows[2][4]
    monkeypatch.chdir(tmp_path)
    assert main(["resume", "deep/stopped"]) == 0
    assert_same_run(place / "whole", stopped)
    assert read_run(stopped).state == "finished"
    longer = stopped / "metrics.jsonl"
    *lines, last = longer.read_text().splitlines(keepends=True)
    longer.write_text("".join([*lines, last, last.replace('"step": 4', '"step": 5')]))
    assert read_run(stopped).state == "stopped", "made longer, and killed before its result was written"
    longer.write_text("".join([*lines, last]))
    assert main(["resume", "deep/stopped", "optimizer.learning_rate=1"]) == 2
    assert main(["resume", "nowhere"]) == 2
    assert "nowhere holds no run" in capsys.readouterr().err


def test_a_signal_that_a_library_turns_into_an_error_of_its_own_still_stops() -> None:
    with pytest.raises(KeyboardInterrupt) as stopped, interruptible():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
    assert stopped.value.args == (signal.SIGTERM,)
    with pytest.raises(ValueError, match="no signal"), interruptible():
        raise ValueError("no signal came")


def test_a_signal_that_is_lost_in_a_callback_still_stops(capsys: pytest.CaptureFixture[str]) -> None:
    class Leaves:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt) as stopped, interruptible():
        Leaves()
        time.sleep(10)
    assert stopped.value.args == (signal.SIGTERM,)
    assert not capsys.readouterr().err
