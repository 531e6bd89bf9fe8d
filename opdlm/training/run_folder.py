"""The run folder, its owner and its settings: may a command continue the run that `output_dir` holds?"""

from __future__ import annotations

import datetime
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from opdlm.config.loader import flat, read_recipe
from opdlm.config.sections import RunConfig
from opdlm.errors import ConfigError
from opdlm.files import write_atomic
from opdlm.training.checkpoint import find_checkpoints
from opdlm.training.metrics import complete_rows

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
CHANGES_FILE = "changes.jsonl"
"""A line for every change of settings while the run went on: the step it was at, old and new values."""
FREE_SETTINGS = (
    *("eval.", "output_dir", "train.save_every", "train.save_total_limit", "train.report_to"),
    *("train.resume_from_checkpoint", "train.micro_batch_rows", "train.gradient_checkpointing"),
    "train.time_limit",
)
"""Settings or prefixes of settings that may differ when a run resumes: they do not affect the weights."""
MAY_GROW = ("train.num_steps",)
MAY_SHRINK = ("optimizer.learning_rate", "optimizer.max_grad_norm")
"""Settings that affect the weights, and may change in one direction when a run resumes."""
log = logging.getLogger(__name__)


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
        changed = changed_settings(read_recipe(saved), config.to_dict(), type(config)().to_dict())
        refused = [name for name, values in changed.items() if not may_change(name, *values)]
        if refused:
            raise ConfigError(
                f"output_dir ({output_dir}) holds a run with other settings ({', '.join(refused[:3])}; see "
                f"{saved}). Choose another output_dir, or start over with train.resume_from_checkpoint=false."
            )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if writes:
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


def may_change(name: str, old: Any, new: Any) -> bool:
    """Whether a run may go on with another value of a setting."""
    if name in (*MAY_GROW, *MAY_SHRINK) and isinstance(old, int | float):
        return new > old if name in MAY_GROW else new < old
    return name.startswith(FREE_SETTINGS)
