"""An interrupted run continues to the same weights, bit for bit, however it was interrupted."""

from __future__ import annotations

import copy
import datetime
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from finished_runs import assert_same_run, metrics
from tiny_checkpoints import (
    TEMPLATE,
    failing_after_a_save,
    tiny_overrides,
    tiny_tokenizer,
    write_checkpoint,
    write_data,
)

from opdlm.cli.main import main
from opdlm.config.loader import read_recipe
from opdlm.config.sections import Config
from opdlm.distill import trainer as trainer
from opdlm.training.metrics import MetricsLog
from opdlm.training.run_folder import changed_settings, start_date

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, prompts, and `whole/`: the run that nothing interrupted."""
    root = tmp_path_factory.mktemp("resume")
    write_checkpoint(root / "llama")
    write_data(root)
    assert main(command(root, root / "whole")) == 0
    return root


DRAFT = [
    *("loss.objective=draft", "loss.reach_weights=true", "states.selection=all", "states.anchors_per_row=3"),
    *("rollout.decode.mode=lossless", "loss.divergence=total_variation"),
    "loss.divergence_schedule=[[0,forward_kl],[2,total_variation]]",
    *("format.noise=uniform", "format.draft_attention=causal", "format.draft_head=4"),
]


SOURCES = "data.path=[{{path: {0}, weight: 3, limit: 5}}, {{path: {0}, limit: 2}}]"


@pytest.fixture(scope="module", params=["synchronous", "asynchronous", "draft", "sources"])
def way(place: Path, request: pytest.FixtureRequest) -> tuple[Path, list[str]]:
    """Another uninterrupted run, and what it sets beside the settings of `place`."""
    if request.param == "synchronous":
        return place / "whole", []
    settings = {
        "asynchronous": ["rollout.asynchronous=true"],
        "draft": DRAFT,
        "sources": [SOURCES.format(place / "prompts.jsonl")],
    }[request.param]
    assert main(command(place, place / request.param, *settings)) == 0
    assert metrics(place / request.param) != metrics(place / "whole")
    return place / request.param, settings


def command(root: Path, output: Path, *overrides: str) -> list[str]:
    """Four steps, a checkpoint after the second; rollouts are sampled, so random draws must continue too."""
    settings = tiny_overrides(root / "llama", root, output)[1:]
    return [
        *("convert", str(root / "llama"), *settings, "train.num_steps=4", "train.save_every=2"),
        *("train.epochs_per_rollout=2", "rollout.decode.temperature=1.0", "rollout.start_new_tokens=4"),
        *("rollout.ramp_steps=3", "states.selection=one_per_block", "optimizer.warmup_steps=2", *overrides),
    ]


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("checkpoint-*"))


def test_four_steps_equal_two_and_two_more(
    place: Path, way: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, settings = way
    with failing_after_a_save(monkeypatch):
        assert main(command(place, tmp_path / "run", *settings)) == 2
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    assert main(command(place, tmp_path / "run", *settings)) == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_is_continued_by_more_steps_and_says_what_became_of_its_schedule(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(place / "whole", output)
    finished = (output / "model" / "adapter" / "adapter_model.safetensors").read_bytes()
    recipe = ["convert", str(output / "config.yaml"), f"output_dir={output}"]
    assert main([*recipe, "train.num_steps=6"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "resumed at step 4 of 6" in printed
    assert "the first 16 updates followed a cosine over 16 updates, the others follow one over 24" in printed
    rows = metrics(output)
    assert rows[:4] == metrics(place / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[4]["learning_rate"] > rows[3]["learning_rate"]
    assert (output / "model" / "adapter" / "adapter_model.safetensors").read_bytes() != finished
    assert main([*recipe, "train.num_steps=4"]) == 2
    assert "holds a run with other settings (train.num_steps;" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from opdlm.training import checkpoint as checkpoint
from opdlm.cli.main import main
save_file, calls = checkpoint.save_file, []
def save_and_die(tensors, path):
    save_file(tensors, path)
    calls.append(path)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = save_and_die
main(sys.argv[1:])
"""


def test_a_run_killed_while_it_saves_continues_to_the_same_weights(
    place: Path, way: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """SIGKILL in the middle of the second checkpoint: steps since the first are done again."""
    output, (whole, settings) = tmp_path / "run", way
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    program = [sys.executable, "-c", KILLED, *command(place, output, *settings)]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoints(output) == ["checkpoint-2"]
    assert not (output / "model").exists()
    assert main(command(place, output, *settings)) == 0
    assert_same_run(output, whole)


@pytest.fixture
def foreground() -> Iterator[None]:
    """Ctrl-C as a terminal delivers it; a test run in the background inherits an ignored SIGINT."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("foreground")
def test_ctrl_c_saves_the_step_it_is_in_and_the_same_command_continues(
    place: Path,
    way: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, settings = way
    train_step = trainer.train_step

    def press_in_step_3(run: trainer.Run, step: int) -> dict[str, float]:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return train_step(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", press_in_step_3)
        assert main(command(place, tmp_path / "run", *settings)) == 130
    output = capsys.readouterr()
    assert output.err == "opdlm: interrupted. The same command continues from the last checkpoint.\n"
    assert "Ctrl-C again stops at once" in output.out
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "run" / "model").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main(command(place, tmp_path / "run", *settings)) == 0
    assert "resumed at step 3 of 4" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.usefixtures("foreground")
def test_a_second_ctrl_c_does_not_wait(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press_twice(run: trainer.Run, step: int) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("unreachable")

    monkeypatch.setattr(trainer, "train_step", press_twice)
    assert main(command(place, tmp_path / "run")) == 130
    assert checkpoints(tmp_path / "run") == []


def test_a_metrics_line_cut_off_by_a_crash_is_written_again(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(place / "whole" / "checkpoint-2", output / "checkpoint-2")
    lines = (place / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:40])
    assert main(command(place, output)) == 0
    assert_same_run(output, place / "whole")


def test_older_checkpoints_are_deleted(place: Path, tmp_path: Path) -> None:
    overrides = ("train.save_every=1", "train.save_total_limit=2")
    assert main(command(place, tmp_path / "run", *overrides)) == 0
    assert checkpoints(tmp_path / "run") == ["checkpoint-3", "checkpoint-4"]


def test_a_finished_run_is_not_trained_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "whole", tmp_path / "run")
    monkeypatch.delattr(trainer, "train_step")
    assert main(command(place, tmp_path / "run")) == 0
    assert_same_run(tmp_path / "run", place / "whole")


def test_settings_that_do_not_train_may_change_when_a_run_continues(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "whole", tmp_path / "run")
    overrides = [f"eval.path={place / 'eval.jsonl'}", "eval.decode.batch_size=1", "train.save_every=3"]
    assert main(command(place, tmp_path / "run", *overrides)) == 0
    assert (tmp_path / "run" / "model" / "retention.json").is_file()
    assert main(command(place, tmp_path / "run", "train.seed=1")) == 2


def test_a_run_does_not_continue_on_other_data(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "whole", tmp_path / "run")
    lines = (place / "prompts.jsonl").read_text().splitlines(keepends=True)
    changed = tmp_path / "prompts.jsonl"
    recipe = tmp_path / "run" / "config.yaml"
    recipe.write_text(recipe.read_text().replace(str(place / "prompts.jsonl"), str(changed)))
    for text, code in (("".join(lines), 0), ("".join(reversed(lines)), 2), ("".join(lines[:-1]), 2)):
        changed.write_text(text)
        assert main(command(place, tmp_path / "run", f"data.path={changed}")) == code
    assert (
        f"the training data are not those of {tmp_path / 'run' / 'checkpoint-4'}" in capsys.readouterr().err
    )
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-4"]


def test_a_run_that_continues_on_another_day_keeps_the_date_of_its_prompts(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "llama", tmp_path / "llama")
    write_data(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }} " + TEMPLATE
    tokenizer.save_pretrained(tmp_path / "llama")
    with failing_after_a_save(monkeypatch):
        assert main(command(tmp_path, tmp_path / "run", "data.date=2020-01-01")) == 2
    assert main(command(tmp_path, tmp_path / "run")) == 0
    assert read_recipe(tmp_path / "run" / "config.yaml")["data"]["date"] == "2020-01-01"


def test_the_date_of_a_run_is_that_of_its_start(tmp_path: Path) -> None:
    assert start_date("", str(tmp_path)) == datetime.date.today().isoformat()
    for written, date in (("data: {date: '2020-01-01'}", "2020-01-01"), ("data: {path: x}", "")):
        (tmp_path / "config.yaml").write_text(written)
        assert start_date("", str(tmp_path)) == date
        assert start_date("1999-12-31", str(tmp_path)) == "1999-12-31"


def test_without_resuming_a_run_starts_over(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[int] = []
    start = MetricsLog.start
    monkeypatch.setattr(
        MetricsLog,
        "start",
        lambda log, num_steps, first: (starts.append(first), start(log, num_steps, first)),
    )
    output = tmp_path / "run"
    (output / "checkpoint-9").mkdir(parents=True)
    for _ in range(2):
        assert main(command(place, output, "train.resume_from_checkpoint=false")) == 0
        assert checkpoints(output) == ["checkpoint-2", "checkpoint-4"]
    assert starts == [0, 0]
    assert metrics(tmp_path / "run") == metrics(place / "whole")


def test_a_setting_that_is_newer_than_the_run_had_its_default() -> None:
    defaults = Config().to_dict()
    old = copy.deepcopy(defaults)
    del old["rollout"]["asynchronous"]
    new = copy.deepcopy(defaults)
    assert not changed_settings(old, new, defaults)
    new["rollout"]["asynchronous"] = True
    new["train"]["seed"] = 5
    assert set(changed_settings(old, new, defaults)) == {"rollout.asynchronous", "train.seed"}
