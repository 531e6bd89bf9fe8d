"""Save, find and load the checkpoints of a run, as safetensors and JSON.

`checkpoint-N/` holds the trainable weights (and their average), the optimiser's moments, the counters, and
the rollouts that later steps use again. Everything else (prompts, random draws, schedules) is a function of
(seed, step), so a resumed run equals an uninterrupted one bit for bit. A folder is written under a temporary
name and renamed when it is complete, with a manifest by which damage is found before it is used. Tensors are
saved unsharded, so a run may resume on another number of ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from opdlm.errors import DataError
from opdlm.files import atomic_folder, find_damage

PREFIX = "checkpoint-"
AVERAGE_FILE = "average.safetensors"
SHARED_TABLES = ("qmap1", "qmap2")
"""Quantisation tables that all 8-bit moments share; they are cloned, as safetensors refuses shared memory."""


def trainable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and counters as `index.name` -> tensor; bitsandbytes nests and shares some."""
    state = flat_state(optimizer.state_dict()["state"])
    return {key: value.clone() if key.endswith(SHARED_TABLES) else value for key, value in state}


def whole_tensors(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Gather sharded tensors, one at a time. A rank without `keep` sends its shards and returns nothing."""
    whole = {}
    for name, tensor in tensors:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor().cpu() if keep else tensor.full_tensor()
        if keep:
            whole[name] = tensor.contiguous()
    return whole


def flat_state(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Leaves of nested mappings by dotted name. A Python integer becomes an int64 tensor."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat_state(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", torch.as_tensor(value)


def nested_state(flat: dict[str, Tensor]) -> dict[int, dict[str, Any]]:
    """Inverse of `flat_state`, by parameter index."""
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
    best_step: int,
    average: Mapping[str, Tensor],
    *,
    writes: bool = True,
) -> None:
    """Write `checkpoint-{step}` and delete all but the newest `keep` and that of `best_step`. Every rank must
    call this, since sharded tensors are gathered; only the one with `writes` writes files.
    """
    weights = whole_tensors(trainable_weights(model).items(), keep=writes)
    averages = whole_tensors(average.items(), keep=writes)
    moments = whole_tensors(optimizer_tensors(optimizer).items(), keep=writes)
    if not writes:
        return
    with atomic_folder(checkpoint_of(output_dir, step)) as folder:
        save_file(weights, folder / "trainable.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        if averages:
            save_file(averages, folder / AVERAGE_FILE)
        (folder / "progress.json").write_text(json.dumps({"step": step} | progress))
    best = checkpoint_of(output_dir, best_step)
    for old in find_checkpoints(output_dir)[:-keep]:
        if old != best:
            shutil.rmtree(old)


def checkpoint_of(output_dir: Path, step: int) -> Path:
    return output_dir / f"{PREFIX}{step}"


def find_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [p for p in output_dir.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def set_aside_damaged(output_dir: Path, tell: Callable[[str], None]) -> None:
    """Rename the newest checkpoint while it is damaged, so that the one before it is used, and say so."""
    while found := find_checkpoints(output_dir):
        newest, *before = reversed(found)
        damage = find_damage(newest)
        if not damage:
            return
        names = (newest.with_name(f"{newest.name}.damaged{number or ''}") for number in count())
        aside = newest.rename(next(name for name in names if not name.exists()))
        going_on = f"{before[0].name} is used" if before else "the run starts over, as there is no other"
        tell(f"{newest.name} is damaged ({' '.join(damage[0])}): kept as {aside.name}; {going_on}")


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore weights and optimiser in place; return `progress.json` (`step`, counters, totals).

    DataError if the weights do not belong to this model.
    """
    load_weights(folder, model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = load_file(folder / "optimizer.safetensors")
    state = nested_state({k: local_shard(v, parameters[int(k.split(".")[0])]) for k, v in saved.items()})
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / "progress.json").read_text())


@torch.no_grad()
def load_weights(folder: Path, model: nn.Module) -> None:
    """Copy the trained weights of a checkpoint into a model; DataError if they do not match."""
    weights = load_file(folder / "trainable.safetensors")
    parameters = trainable_weights(model)
    if set(weights) != set(parameters) or any(weights[n].shape != p.shape for n, p in parameters.items()):
        raise DataError(
            f"{folder} belongs to a different model or adapter: continue with the settings of that run "
            "(its config.yaml), or choose another output_dir."
        )
    for name, parameter in parameters.items():
        parameter.copy_(local_shard(weights[name], parameter))


@torch.no_grad()
def load_average(folder: Path, average: Mapping[str, Tensor]) -> None:
    """Restore the running average of the weights in place."""
    for name, saved in load_file(folder / AVERAGE_FILE).items():
        average[name].copy_(local_shard(saved, average[name]))


def local_shard(whole: Tensor, part: Tensor) -> Tensor:
    """This rank's shard of `whole`, laid out like `part`. Counters are never sharded."""
    if not isinstance(part, DTensor) or whole.shape != part.shape:
        return whole
    return distribute_tensor(whole.to(part.device), part.device_mesh, part.placements, src_data_rank=None)
