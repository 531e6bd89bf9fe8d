"""Decoding with a forward pass compiled by `torch.compile`.

A step of a small model, or of few rows on a GPU, spends its time on kernel launches and Python calls rather
than arithmetic. The compiled forward is one call; on CUDA its kernels are recorded once per shape and
replayed (CUDA graphs; not yet run on a GPU). The compiled code accepts tensors of any size; on CUDA sizes are
padded to a few values, so that few graphs are recorded. The number of clean slots is data, not a shape. A
forward in which a prompt joins is not compiled.

Results equal those of the plain forward up to rounding. Not part of the remote code of result folders.

Shape suffixes: N packed slots, B rows, W queries of a row, K keys, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from opdlm.errors import ConfigError
from opdlm.modeling.attention import SlotForward
from opdlm.modeling.diffusion_lm import DiffusionLM, PackedForward, run_backbone
from opdlm.modeling.dot_product import Scoring
from opdlm.modeling.gate import Gate
from opdlm.modeling.kv_cache import DecodeCache, attend_rows, store

WIDE = 4
"""A forward in which a row has more slots than this many blocks contains a prompt and is not compiled."""
NUM_VARIANTS = 64
"""Largest number of compiled variants in a process: every model, and every size of 1, has its own."""
Buffers = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Layout:
    """`DecodeCache.attend` for rows of equal width, as operations on tensors only."""

    layers: Buffers
    write_N: Tensor
    source_BW: Tensor
    """The packed slot of each padded query."""
    back_N: Tensor
    """The padded query of each packed slot."""

    def attend(
        self,
        layer: int,
        query_HND: Tensor,
        key_HND: Tensor,
        value_HND: Tensor,
        mask: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """`[1, N, heads, head_dim]`; `mask` is `[B, 1, W, K]`."""
        num_rows, num_kv = mask.shape[0], key_HND.shape[0]
        num_heads = query_HND.shape[0]
        keys_BHKD, values_BHKD = store(self.layers[layer], key_HND, value_HND, self.write_N, mask.shape[-1])
        padded_BWHD = query_HND.transpose(0, 1)[self.source_BW]
        mixed_NHD = attend_rows(
            padded_BWHD.unflatten(2, (num_kv, -1)),
            keys_BHKD[:num_rows],
            values_BHKD[:num_rows],
            mask.repeat(1, 1, num_heads // num_kv, 1),
            scoring,
        )
        return mixed_NHD.index_select(0, self.back_N)[None]


def forward(
    model: PreTrainedModel,
    gate: Gate | None,
    windows: tuple[int | None, ...],
    embedded_NH: Tensor,
    positions_N: Tensor,
    is_open_N1: Tensor,
    layout: Layout,
    masks: dict[int | None, Tensor],
) -> Tensor:
    """The function that is compiled: hidden states `[N, H]`."""
    if gate is not None:
        gate.is_open_N1 = is_open_N1
    slot_forward = SlotForward(dict(masks), windows, None, layout.attend)
    hidden = run_backbone(model, embedded_NH[None], positions_N[None], slot_forward)
    if gate is not None:
        gate.is_open_N1 = None
    return hidden[0]


class CompiledForward:
    """Replaces `PackedForward.run`. ConfigError where torch cannot compile the model."""

    def __init__(self, block_size: int, backend: str = "inductor", pads: bool | None = None) -> None:
        """`backend` of `torch.compile`. `pads`: whether sizes are padded to a few values; None: on CUDA."""
        self.block_size, self.backend, self.pads = block_size, backend, pads
        self._forward: Callable[..., Tensor] | None = None
        self._marked: DecodeCache | None = None

    def __call__(self, call: PackedForward) -> Tensor:
        cache, device = call.cache, call.embedded_NH.device
        if not cache.layers or int(cache.count_B.max()) > WIDE * self.block_size:
            return call.run()
        is_cuda = device.type == "cuda"
        if self._forward is None:
            mode = "reduce-overhead" if is_cuda and self.backend == "inductor" else None
            self._forward = torch.compile(forward, fullgraph=True, backend=self.backend, mode=mode)
        inputs = self.padded(call, is_cuda if self.pads is None else self.pads)
        if is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with torch._dynamo.config.patch(recompile_limit=NUM_VARIANTS):
                hidden_NH = self._forward(call.model, call.gate, call.windows, *inputs)
        except TorchDynamoException as error:
            reason = " ".join(str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split())[:300]
            raise ConfigError(
                f"torch.compile fails on {type(call.model).__name__} ({reason}): leave out --compile, or "
                "set rollout.compile=false."
            ) from error
        hidden_NH = hidden_NH[: len(call.packed)]
        return hidden_NH.clone() if is_cuda else hidden_NH  # the next replay overwrites this memory

    def padded(self, call: PackedForward, pads: bool) -> tuple[Any, ...]:
        """The arguments of `forward` after the windows, padded if `pads`."""
        packed, cache, device = call.packed, call.cache, call.embedded_NH.device
        # torch compiles sizes of 1 separately: avoid them, except in a cache of one row
        num_slots, width = max(len(packed), 2), max(int(cache.count_B.max()), 2)
        num_rows = max(cache.num_active, min(cache.num_rows, 2))
        if pads:
            num_rows = min(rounded(num_rows), cache.num_rows)
            num_slots, width = rounded(num_slots), rounded(width)
        extra = num_slots - len(packed)
        source_BW = torch.zeros((num_rows, width), dtype=torch.long)
        source_BW[packed.row_N, cache.place_N] = torch.arange(len(packed))
        source_BW = source_BW.to(device)
        masks = {}
        for window in set(call.windows):
            mask_NK = cache.mask(window, call.embedded_NH.dtype)[0, 0]
            num_keys = mask_NK.shape[1]
            more = min(rounded(num_keys), cache.capacity) - num_keys if pads else 0
            mask_NK = F.pad(mask_NK, (0, more), value=torch.finfo(mask_NK.dtype).min)
            masks[window] = mask_NK[source_BW][:, None]
            mark_sizes(masks[window], 0, 2, 3)
        is_open_N1 = (torch.arange(num_slots) >= packed.num_clean)[:, None].to(device)
        flat = [
            F.pad(call.embedded_NH, (0, 0, 0, extra)),
            F.pad(packed.positions_N, (0, extra)).contiguous().to(device),
            is_open_N1,
            F.pad(cache.write_N, (0, extra), value=cache.capacity).to(device),
            F.pad(packed.row_N * width + cache.place_N, (0, extra)).to(device),
        ]
        for tensor in flat:
            mark_sizes(tensor, 0)
        mark_sizes(source_BW, 0, 1)
        if cache is not self._marked:
            self._marked = cache
            for buffer in (buffer for pair in cache.layers.values() for buffer in pair):
                mark_sizes(buffer, 0, 1)
                if device.type == "cuda":
                    torch._dynamo.mark_static_address(buffer)
        embedded_NH, positions_N, is_open_N1, write_N, back_N = flat
        layout = Layout(cache.layers, write_N, source_BW, back_N)
        return embedded_NH, positions_N, is_open_N1, layout, masks


def mark_sizes(tensor: Tensor, *dims: int) -> None:
    """Mark dimensions whose size varies between calls."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def rounded(size: int) -> int:
    """The next of a few sizes: a multiple of 8, at most a quarter larger."""
    step = max(8, 1 << max(size.bit_length() - 3, 0))
    return -(-size // step) * step


@contextmanager
def compiled_decoding(model: DiffusionLM, wanted: bool = True, **options: Any) -> Iterator[None]:
    """Inside the block the model decodes with a compiled forward, if `wanted`; the first steps wait for the
    compiler. Further options are those of `CompiledForward`.
    """
    if wanted:
        model.run_packed = CompiledForward(model.spec.block_size, **options)
    try:
        yield
    finally:
        model.run_packed = PackedForward.run
