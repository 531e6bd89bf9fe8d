"""The run folder and its settings: may a command continue the run that `output_dir` holds?"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from opdlm.config.loader import read_recipe
from opdlm.config.sections import RunConfig
from opdlm.errors import ConfigError
from opdlm.files import write_atomic
from opdlm.training.checkpoint import find_checkpoints

CONFIG_FILE = "config.yaml"
FREE_SETTINGS = (
    *("eval.", "output_dir", "train.save_every", "train.save_total_limit", "train.report_to"),
    *("train.resume_from_checkpoint", "train.micro_batch_rows", "train.gradient_checkpointing"),
)
"""Settings or prefixes of settings that may differ when a run resumes: they do not affect the weights."""


def prepare_output(config: RunConfig, *, writes: bool = True) -> Path:
    """Create the run folder and write `config.yaml`; only the rank with `writes` writes.

    ConfigError if the folder holds a run with other settings, or cannot be written.
    """
    output_dir = Path(config.output_dir)
    saved = output_dir / CONFIG_FILE
    if saved.is_file() and find_checkpoints(output_dir):
        changed = changed_settings(read_recipe(saved), config.to_dict(), type(config)().to_dict())
        if changed:
            raise ConfigError(
                f"output_dir ({output_dir}) holds a run with other settings ({', '.join(changed[:3])}; see "
                f"{saved}). Choose another output_dir, or delete the folder to start over."
            )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if writes:
            write_atomic(saved, config.to_yaml())
    except OSError as error:
        raise ConfigError(
            f"output_dir ({output_dir}) cannot be written: {error.strerror}. Choose another output_dir."
        ) from error
    return output_dir


def start_date(day: str, output_dir: str) -> str:
    """The day that chat templates print in the run of a folder: `day` where it is set, else the one on which
    the run began.
    """
    saved = Path(output_dir) / CONFIG_FILE
    if day or not saved.is_file():
        return day or datetime.date.today().isoformat()
    return str((read_recipe(saved).get("data") or {}).get("date", ""))


def changed_settings(
    old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any], prefix: str = ""
) -> list[str]:
    """Dotted keys that differ and affect the trained weights. A key that `old` lacks, since an earlier
    version wrote it, counts as its default. More steps than before continue a run (`loop.resume`).
    """
    changed = []
    for key, value in new.items():
        name, before = f"{prefix}{key}", old.get(key, defaults.get(key))
        if isinstance(value, dict):
            changed += changed_settings(old.get(key) or {}, value, defaults.get(key) or {}, f"{prefix}{key}.")
        elif name == "train.num_steps" and value >= before:
            continue
        elif before != value and not name.startswith(FREE_SETTINGS):
            changed.append(name)
    return changed
