"""Atomic saving, finding and resuming of a run's state. safetensors and JSON only.

A `checkpoint-N/` holds the trainable weights (and their average), the optimiser's moments, counters, and
rollouts that are used again: everything else (prompts,
random draws, curriculum) is a function of (seed, step), so a run that continues is bit for bit the run that
never stopped. A folder is written beside its final name and renamed when it is complete. Tensors are whole,
however many ranks hold pieces of them: a run may continue on another number of ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from opdlm.errors import DataError
from opdlm.files import atomic_folder

PREFIX = "checkpoint-"
AVERAGE_FILE = "average.safetensors"
SHARED = ("qmap1", "qmap2")
"""Tables that all 8-bit moments share; a safetensors file holds no tensor twice."""


def trainable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and counters as `index.name` -> tensor; bitsandbytes nests its own and shares some."""
    state = flat_state(optimizer.state_dict()["state"])
    return {key: value.clone() if key.endswith(SHARED) else value for key, value in state}


def whole_tensors(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Gather sharded tensors, one at a time; ranks that do not `keep` them only send theirs."""
    whole = {}
    for name, tensor in tensors:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor().cpu() if keep else tensor.full_tensor()
        if keep:
            whole[name] = tensor.contiguous()
    return whole


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
    average: Mapping[str, Tensor],
    *,
    writes: bool = True,
) -> None:
    """Write `checkpoint-{step}` and delete the oldest beyond `keep`. One rank writes, all take part."""
    weights = whole_tensors(trainable_weights(model).items(), keep=writes)
    averages = whole_tensors(average.items(), keep=writes)
    moments = whole_tensors(optimizer_tensors(optimizer).items(), keep=writes)
    if not writes:
        return
    with atomic_folder(output_dir / f"{PREFIX}{step}") as folder:
        save_file(weights, folder / "trainable.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        if averages:
            save_file(averages, folder / AVERAGE_FILE)
        (folder / "progress.json").write_text(json.dumps({"step": step} | progress))
    for old in find_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(old)


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in output_dir.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore weights and optimiser in place; returns the progress record (`step` and totals)."""
    load_weights(folder, model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = load_file(folder / "optimizer.safetensors")
    state = nested_state({k: share_of(v, parameters[int(k.split(".")[0])]) for k, v in saved.items()})
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / "progress.json").read_text())


@torch.no_grad()
def load_weights(folder: Path, model: nn.Module) -> None:
    """Put the trained weights of a checkpoint into a model, sharded or not."""
    weights = load_file(folder / "trainable.safetensors")
    parameters = trainable_weights(model)
    if set(weights) != set(parameters) or any(weights[n].shape != p.shape for n, p in parameters.items()):
        raise DataError(
            f"{folder} belongs to a different model or adapter: continue with the settings of that run "
            "(its config.yaml), or choose another output_dir."
        )
    for name, parameter in parameters.items():
        parameter.copy_(share_of(weights[name], parameter))


@torch.no_grad()
def load_average(folder: Path, average: Mapping[str, Tensor]) -> None:
    """Restore the running average of the weights in place."""
    for name, saved in load_file(folder / AVERAGE_FILE).items():
        average[name].copy_(share_of(saved, average[name]))


def share_of(whole: Tensor, part: Tensor) -> Tensor:
    """This rank's piece of a tensor that is laid out like `part`; counters are whole everywhere."""
    if not isinstance(part, DTensor) or whole.shape != part.shape:
        return whole
    return distribute_tensor(whole.to(part.device), part.device_mesh, part.placements, src_data_rank=None)
