"""The run folder, its owner, its settings and its state: may a command continue the run in `output_dir`?"""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from opdlm.config.loader import flat, read_recipe
from opdlm.config.sections import RunConfig
from opdlm.errors import ConfigError, DataError
from opdlm.files import write_atomic
from opdlm.training.checkpoint import find_checkpoints
from opdlm.training.metrics import complete_rows, read_metrics

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
CHANGES_FILE = "changes.jsonl"
"""A line for every change of settings while the run went on: the step it was at, old and new values."""
SELF_PROMPTS_FILE, PARTIAL_PROMPTS_FILE = "self_prompts.jsonl", "self_prompts.partial.jsonl"
"""Prompts that the model has written itself: all of them, and those of an interrupted run."""
OF_ONE_RUN = (CHANGES_FILE, SELF_PROMPTS_FILE, PARTIAL_PROMPTS_FILE)
"""Files that a run which starts over must not inherit."""
FREE_SETTINGS = (
    *("eval.", "output_dir", "train.save_every", "train.save_total_limit", "train.report_to"),
    *("train.resume_from_checkpoint", "train.micro_batch_rows", "train.gradient_checkpointing"),
    "train.time_limit",
)
"""Settings or prefixes of settings that may differ when a run resumes: they do not affect the weights, unless
they change which prompts are held back (`num_held_back`).
"""
MAY_GROW = ("train.num_steps",)
MAY_SHRINK = ("optimizer.learning_rate", "optimizer.max_grad_norm")
"""Settings that affect the weights, and may change in one direction when a run resumes."""
DEPTH = 3
"""Levels of folders below the one that is given in which runs are found."""
RECENT = 10
"""Steps whose mean time tells how long the rest takes."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What became of a run so far."""

    folder: Path
    verb: Literal["convert", "train"]
    state: Literal["running", "finished", "stopped"]
    step: int
    num_steps: int
    seconds_left: float | None
    """At the speed of the last steps; None: nothing is left, or no step was made."""
    last: dict[str, Any]
    """The last line of metrics.jsonl."""


def read_runs(folder: Path) -> list[RunState]:
    """The runs in a folder and below it, by name. DataError if there is none."""
    patterns = ["/".join([*("*" * depth), CONFIG_FILE]) for depth in range(DEPTH + 1)]
    found = sorted({file.parent for pattern in patterns for file in folder.glob(pattern)})
    if not found:
        raise DataError(f"{folder} holds no run: no {CONFIG_FILE} is there. Name the folder of a run.")
    return [read_run(run) for run in found]


def read_run(folder: Path) -> RunState:
    """The state of one run. DataError if the folder holds none."""
    saved = folder / CONFIG_FILE
    if not saved.is_file():
        raise DataError(f"{folder} holds no run: there is no {CONFIG_FILE}. `opdlm runs` lists the runs.")
    settings = read_recipe(saved)
    rows = read_metrics(folder / "metrics.jsonl")
    step, num_steps = int(rows[-1]["step"]) if rows else 0, int(settings["train"]["num_steps"])
    result = folder / "model" / "all_results.json"
    is_finished = bool(rows) and result.is_file() and json.loads(result.read_text()).get("step") == step
    seconds = [row["seconds"] for row in rows[-RECENT:]]
    num_left = 0 if is_finished else num_steps - step  # a run may also end early (eval.patience)
    return RunState(
        folder=folder,
        verb="train" if "objective" in settings else "convert",
        state="running" if is_owned(folder) else "finished" if is_finished else "stopped",
        step=step,
        num_steps=num_steps,
        seconds_left=num_left * sum(seconds) / len(seconds) if seconds and num_left > 0 else None,
        last=rows[-1] if rows else {},
    )


def is_owned(folder: Path) -> bool:
    """Whether a command works in the run folder now."""
    file = folder / LOCK_FILE
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False  # the folder cannot be written, so no command can own it


@contextmanager
def owned(output_dir: Path, *, writes: bool = True) -> Iterator[None]:
    """Inside the block no other command can have the run folder, which is created. The operating system frees
    the lock of a process that ends, however it ends. Only the rank with `writes` locks.

    ConfigError if another process has the folder, or it cannot be written.
    """
    if not writes:
        yield
        return
    file, is_new = output_dir / LOCK_FILE, not output_dir.exists()
    lock = FileLock(file, timeout=0)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        file.write_text(f"process {os.getpid()} on {platform.node()}")
    except Timeout as error:
        owner = "another process"
        with suppress(OSError):  # it may just have ended
            owner = file.read_text() or owner
        raise ConfigError(
            f"output_dir ({output_dir}) is in use by {owner}. Wait for its end, or choose another output_dir."
        ) from error
    except OSError as error:
        raise unwritable(output_dir, error) from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):
                output_dir.rmdir()  # nothing was written


def prepare_output(config: RunConfig, *, writes: bool = True) -> Path:
    """Create the run folder, write `config.yaml`, and record what has changed since the run began; only the
    rank with `writes` writes.

    ConfigError if the folder holds a run with other settings, or cannot be written.
    """
    output_dir = Path(config.output_dir)
    saved = output_dir / CONFIG_FILE
    changed: dict[str, tuple[Any, Any]] = {}
    if saved.is_file() and config.train.resume_from_checkpoint:
        old, new, defaults = read_recipe(saved), config.to_dict(), type(config)().to_dict()
        changed = changed_settings(old, new, defaults)
        refused = [name for name, values in changed.items() if not may_change(name, *values)]
        if num_held_back(flat(defaults) | flat(old)) != num_held_back(flat(new)):
            refused += [name for name in ("eval.path", "eval.held_back") if name in changed]
        if refused:
            raise ConfigError(
                f"output_dir ({output_dir}) holds a run with other settings ({', '.join(refused[:3])}; see "
                f"{saved}). Choose another output_dir, or start over with train.resume_from_checkpoint=false."
            )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if writes:
            for name in () if config.train.resume_from_checkpoint else OF_ONE_RUN:
                (output_dir / name).unlink(missing_ok=True)
            record_changes(output_dir, changed)
            write_atomic(saved, config.to_yaml())
    except OSError as error:
        raise unwritable(output_dir, error) from error
    return output_dir


def record_changes(output_dir: Path, changed: dict[str, tuple[Any, Any]]) -> None:
    """Append changed settings to `CHANGES_FILE`, and tell of those that affect the weights."""
    if not changed:
        return
    done = [int(folder.name.rpartition("-")[2]) for folder in find_checkpoints(output_dir)]
    with (output_dir / CHANGES_FILE).open("a") as file:
        file.write(json.dumps({"step": max(done, default=0), "changed": changed}) + "\n")
    for name, (old, new) in changed.items():
        if not name.startswith(FREE_SETTINGS):
            log.warning(f"{output_dir} goes on with another {name}: {new} instead of {old} ({CHANGES_FILE})")


def read_changes(output_dir: Path) -> list[dict[str, Any]]:
    """The changes of settings while the run went on, oldest first."""
    return complete_rows(output_dir / CHANGES_FILE)


def unwritable(output_dir: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"output_dir ({output_dir}) cannot be written: {error.strerror}. Choose another output_dir."
    )


def start_date(day: str, output_dir: str) -> str:
    """The day that chat templates print in the run of a folder: `day` where it is set, else the one on which
    the run began.
    """
    saved = Path(output_dir) / CONFIG_FILE
    if day or not saved.is_file():
        return day or datetime.date.today().isoformat()
    return str((read_recipe(saved).get("data") or {}).get("date", ""))


def changed_settings(
    old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Old and new value of the dotted keys that differ, but for `output_dir`. A key that `old` lacks, since
    an earlier version wrote it, counts as its default.
    """
    before = flat(defaults) | flat(old)
    return {
        name: (before.get(name), value)
        for name, value in flat(new).items()
        if before.get(name) != value and name != "output_dir"
    }


def num_held_back(settings: dict[str, Any]) -> int:
    """How many prompts a run with these dotted settings was to keep from training."""
    return 0 if settings["eval.path"] else int(settings.get("eval.held_back", 0))


def may_change(name: str, old: Any, new: Any) -> bool:
    """Whether a run may go on with another value of a setting."""
    if name in (*MAY_GROW, *MAY_SHRINK) and isinstance(old, int | float):
        return new > old if name in MAY_GROW else new < old
    return name.startswith(FREE_SETTINGS)
