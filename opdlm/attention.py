"""Visibility -> the mask a model reads: an additive float mask `[B, 1, Q, K]` for sdpa, one per layer type.

Booleans would be right for sdpa and silently wrong for eager, which *adds* its mask; additive floats are
right for both and faster on CPU. A 4D mask replaces everything the model would build, so sliding windows are
put into it here. Masks are built fresh for every forward and never changed in place: a checkpointed backward
reads them again.

Shape suffixes: B batch, S current slots, K keys, Q queries, H heads, D head dimension, N a flat selection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .blocks import CLEAN, Slots, join_slots, visible
from .cache import DecodeCache

ATTENTION_NAME = "opdlm"

LayerMasks = Tensor | dict[str, Tensor]


def attention_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Layer type -> sliding window (None = everything). One entry where all layers are alike."""
    text_config = config.get_text_config()
    window = text_config.to_dict().get("sliding_window")
    layer_types = text_config.to_dict().get("layer_types")
    if layer_types is None:
        return {"sliding_attention": window} if window else {"full_attention": None}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(layer_types))}


def additive_mask(seen_BQK: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed, the most negative number elsewhere: `[B, 1, Q, K]`."""
    mask_BQK = torch.zeros(seen_BQK.shape, dtype=dtype, device=seen_BQK.device)
    return mask_BQK.masked_fill_(~seen_BQK, torch.finfo(dtype).min)[:, None]


def layer_masks(
    queries: Slots, keys: Slots, windows: dict[str, int | None], dtype: torch.dtype
) -> LayerMasks:
    """Masks for every layer type of a model; a plain tensor where there is only one."""
    masks = {kind: additive_mask(visible(queries, keys, window), dtype) for kind, window in windows.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


class SlotCache:
    """Keys and values of clean slots, one buffer per layer, indexed by position: no cropping, no
    reallocation.

    For training; decoding has `DecodeCache`. A forward pass writes its clean slots at their positions and
    reads `[0, length)`; the mask decides who sees what (`buffer_slots`). Tensors are `[B, kv heads, capacity,
    head_dim]`.
    """

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.num_rows, self.capacity, self.length = num_rows, capacity, 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._write: tuple[Tensor, Tensor, Tensor] | None = None

    def begin(self, slots: Slots, length: int) -> None:
        """Announce the next forward pass: which of its slots are written, how many positions it reads."""
        assert length <= self.capacity
        rows_N, columns_N = (slots.group_BS == CLEAN).nonzero(as_tuple=True)
        self._write = (rows_N, columns_N, slots.positions_BS[rows_N, columns_N]) if len(rows_N) else None
        self.length = length

    def extend(self, layer: int, keys_BHSD: Tensor, values_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Store this layer's clean slots; return buffer ++ current."""
        if layer not in self._layers:
            shape = (self.num_rows, keys_BHSD.shape[1], self.capacity, keys_BHSD.shape[3])
            self._layers[layer] = (keys_BHSD.new_zeros(shape), values_BHSD.new_zeros(shape))
        stored = self._layers[layer]
        if self._write is not None:
            rows_N, columns_N, positions_N = self._write
            stored[0][rows_N, :, positions_N] = keys_BHSD[rows_N, :, columns_N]
            stored[1][rows_N, :, positions_N] = values_BHSD[rows_N, :, columns_N]
        keys_BHKD = torch.cat([stored[0][:, :, : self.length], keys_BHSD], 2)
        return keys_BHKD, torch.cat([stored[1][:, :, : self.length], values_BHSD], 2)


def keys_with_cache(slots: Slots, cache_length: int) -> Slots:
    """Keys of a cached forward: every buffer position as a clean slot, then the current slots.

    Current clean slots are turned off as keys here: they were just written to the buffer and are seen there.
    """
    num_rows = slots.ids_BS.shape[0]
    positions_BK = torch.arange(cache_length, device=slots.ids_BS.device).expand(num_rows, -1)
    zeros_BK = torch.zeros_like(positions_BK)
    buffer = Slots(zeros_BK, positions_BK, positions_BK, zeros_BK)
    return join_slots(buffer, slots.only(slots.is_noised_BS))


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    slot_cache: SlotCache | None = None,
    decode_cache: DecodeCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention that reads and fills a cache passed as a forward keyword."""
    if decode_cache is not None:
        assert attention_mask is not None
        scale = kwargs.get("scaling")
        return decode_cache.attend(module.layer_idx, query[0], key[0], value[0], attention_mask, scale), None
    if slot_cache is not None:
        key, value = slot_cache.extend(module.layer_idx, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def use_slot_attention(model: PreTrainedModel) -> None:
    """Make a stock model call `slot_attention`. Not stored in its config: done after every load."""
    AttentionInterface.register(ATTENTION_NAME, slot_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    model.set_attn_implementation(ATTENTION_NAME)
