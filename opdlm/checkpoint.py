"""Atomic saving, finding and resuming of a run's state. safetensors and JSON only.

A `checkpoint-N/` holds the trainable weights, the optimiser's moments and counters: everything else (prompts,
random draws, curriculum) is a function of (seed, step), so a run that continues is bit for bit the run that
never stopped. A folder is written beside its final name and renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opdlm.errors import DataError

PREFIX = "checkpoint-"
SHARED = ("qmap1", "qmap2")
"""Tables that all 8-bit moments share; a safetensors file holds no tensor twice."""


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A folder that appears under `final` only when the block ends without an error."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DataError(
            f"{final} cannot be written: {error}. Free some disk space; the same command then continues."
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_atomic(path: Path, text: str) -> None:
    """A text file that is either the old or the new one, never half."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights that training changes, by name."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and counters as `index.name` -> tensor; bitsandbytes nests its own and shares some."""
    return {
        key: value.clone(memory_format=torch.contiguous_format)
        if key.endswith(SHARED)
        else value.contiguous()
        for key, value in flat_state(optimizer.state_dict()["state"])
    }


def flat_state(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Leaves of nested mappings by dotted name; a Python counter becomes an int64 tensor."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat_state(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", torch.as_tensor(value)


def nested_state(flat: dict[str, Tensor]) -> dict[int, dict[str, Any]]:
    """What `flat_state` took apart."""
    state: dict[Any, Any] = {}
    for key, value in flat.items():
        index, *path, name = key.split(".")
        values = state.setdefault(int(index), {})
        for part in path:
            values = values.setdefault(part, {})
        is_counter = value.dtype == torch.int64 and value.dim() == 0
        values[name] = int(value) if is_counter else value
    return state


def save_checkpoint(
    output_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    keep: int,
) -> Path:
    """Write `checkpoint-{step}` and delete the oldest beyond `keep`."""
    final = output_dir / f"{PREFIX}{step}"
    with atomic_folder(final) as folder:
        save_file(trainable_state(model), folder / "trainable.safetensors")
        save_file(optimizer_tensors(optimizer), folder / "optimizer.safetensors")
        (folder / "progress.json").write_text(json.dumps({"step": step} | progress))
    for old in find_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in output_dir.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore weights and optimiser in place; returns the progress record (`step` and totals)."""
    weights = load_file(folder / "trainable.safetensors")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(weights) != set(parameters) or any(weights[n].shape != p.shape for n, p in parameters.items()):
        raise DataError(
            f"{folder} belongs to a different model or adapter: continue with the settings of that run "
            "(its config.yaml), or choose another output_dir."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    state = nested_state(load_file(folder / "optimizer.safetensors"))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / "progress.json").read_text())
