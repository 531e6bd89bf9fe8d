"""Attention over slots: one attention function for models of transformers, with three backends.

`sdpa` adds a dense mask `[B, 1, Q, K]`. `flex` compiles `visible` into a FlexAttention kernel (CUDA). `flash`
computes chunks of queries over only the keys that they see: no tensor has Q x K elements, and a causal layout
takes half the work. All three take the mask from `slots.visible`, sliding windows included. A forward with
few queries, such as a decoding step, uses `sdpa` in any case (docs/concepts.md, "Attention backends").

Masks are built once per forward and passed to every layer as a keyword of the model's forward. They are never
changed in place, because a checkpointed backward reads them again.

Shape suffixes: B batch, S current slots, K keys, Q queries, H heads, D head dimension, N a flat selection,
C queries of a chunk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .dot_product import Scoring, dot_product_attention
from .kv_cache import DecodeCache, SlotCache
from .slots import Slots, join_slots, visible

logger = logging.getLogger(__name__)
ATTENTION_NAME = "opdlm"
CHUNK = 128
"""Queries per chunk of `flash`. A forward of at most two chunks uses `sdpa`, which is as fast there."""
KEPT_BYTES = 64 * 2**20
"""Largest total size of the `flash` masks that are kept between layers."""
FLEX_MIN_HEAD_DIM = 16

Backend = Literal["sdpa", "flex", "flash"]
AttentionChoice = Literal["auto", "sdpa", "flex", "flash"]


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """The attention type of each layer in the words of transformers, such as `sliding_attention`."""
    text_config = config.get_text_config()
    values = text_config.to_dict()
    if values.get("layer_types") is not None:
        return list(values["layer_types"])
    kind = "sliding_attention" if values.get("sliding_window") else "full_attention"
    return [kind] * text_config.num_hidden_layers


def layer_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """The sliding window of each layer in positions; None where the layer has none."""
    window = config.get_text_config().to_dict().get("sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_kinds(config))


def choose_backend(choice: AttentionChoice, device: torch.device, config: PreTrainedConfig) -> Backend:
    """The backend for a choice: `auto` selects flex where it is supported and works, else flash."""
    if choice != "auto":
        return choice
    reason = unsupported_reason("flex", device, config)
    if reason and device.type == "cuda":
        note_fallback(reason)
    return "flash" if reason else "flex"


@cache
def note_fallback(reason: str) -> None:
    """Say once why `auto` is not flex on a GPU."""
    logger.warning("model.attention=auto is flash: %s", reason)


def unsupported_reason(choice: AttentionChoice, device: torch.device, config: PreTrainedConfig) -> str | None:
    """Why this backend cannot train this model on this device; None if it can."""
    if choice != "flex":
        return None
    text_config = config.get_text_config()
    num_heads = text_config.num_attention_heads
    num_kv = getattr(text_config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // num_heads
    if config.model_type == "gpt_oss":
        return "FlexAttention rounds the share of learned sinks in 16-bit formats"
    if device.type != "cuda":
        return f"FlexAttention has no backward pass on {device.type}; choose flash or sdpa"
    if head_dim < FLEX_MIN_HEAD_DIM:
        return (
            f"FlexAttention needs heads of {FLEX_MIN_HEAD_DIM} or more dimensions; here they have {head_dim}"
        )
    return flex_failure(device, num_heads, num_kv, head_dim, text_config.dtype or torch.float32)


@cache
def flex_failure(
    device: torch.device, num_heads: int, num_kv: int, head_dim: int, dtype: torch.dtype
) -> str | None:
    """Why a small forward and backward of FlexAttention fails with heads like these; None if it works.

    Compilers fail in many ways, so every exception counts.
    """
    num_queries = 2 * CHUNK + 1
    try:
        with torch.inference_mode(False), torch.enable_grad():
            zeros_1Q = torch.zeros((1, num_queries), dtype=torch.long, device=device)
            columns_1Q = zeros_1Q + torch.arange(num_queries, device=device)
            slots = Slots(zeros_1Q, columns_1Q, columns_1Q, zeros_1Q, zeros_1Q)
            query, key, value = (
                torch.ones(1, heads, num_queries, head_dim, dtype=dtype, device=device, requires_grad=True)
                for heads in (num_heads, num_kv, num_kv)
            )
            out, _ = flex_attention_forward(nn.Module(), query, key, value, block_mask(slots, slots, None))
            out.sum().backward()
            float(query.grad.sum())  # type: ignore[union-attr]  # waits for the kernels
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return f"FlexAttention does not work here ({type(error).__name__}: {reason}); choose flash or sdpa"
    return None


def additive_mask(seen_BQK: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask to be added to scores, `[B, 1, Q, K]`: 0 where `seen_BQK` is true, the lowest number elsewhere.

    sdpa accepts booleans too, but numbers are faster on CPUs.
    """
    mask_BQK = torch.zeros(seen_BQK.shape, dtype=dtype, device=seen_BQK.device)
    return mask_BQK.masked_fill_(~seen_BQK, torch.finfo(dtype).min)[:, None]


def slots_at(slots: Slots, *index: Any) -> Slots:
    """The slots with every tensor indexed by `index`."""
    return Slots(*(getattr(slots, field.name)[index] for field in fields(slots)))


def block_mask(queries: Slots, keys: Slots, window: int | None) -> BlockMask:
    """`visible` as FlexAttention's BlockMask."""

    def mask_mod(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen_111 = visible(
            slots_at(queries, row[None, None], query[None, None]),
            slots_at(keys, row[None, None], key[None, None]),
            window,
        )
        return seen_111[0, 0, 0]

    (num_rows, num_queries), num_keys = queries.ids_BS.shape, keys.ids_BS.shape[1]
    device = queries.ids_BS.device
    create = compiled_block_mask() if device.type == "cuda" else create_block_mask
    return create(mask_mod, num_rows, None, num_queries, num_keys, device=device)


@cache
def compiled_block_mask() -> Any:
    """`create_block_mask`, compiled so that it allocates no tensor of Q x K elements."""
    return torch.compile(create_block_mask)


@dataclass(frozen=True, slots=True)
class QueryChunks:
    """The keys that the queries of each chunk see. The mask of a chunk is built when it is needed; up to
    KEPT_BYTES of masks are kept for other layers and the backward.
    """

    queries: Slots
    keys: Slots
    window: int | None
    parts: tuple[tuple[slice, Tensor], ...]
    """For each chunk: its queries, and the key columns `[N]` that any of them sees."""
    kept: dict[Any, Tensor] = field(default_factory=dict)
    """Masks by chunk, repeats and dtype."""

    @classmethod
    def of(cls, queries: Slots, keys: Slots, window: int | None) -> QueryChunks:
        """Split the queries into chunks and find the keys of each."""
        parts = []
        for first in range(0, queries.ids_BS.shape[1], CHUNK):
            rows = slice(first, first + CHUNK)
            seen_K = visible(slots_at(queries, ..., rows), keys, window).any(1).any(0)
            seen_K[0] |= ~seen_K.any()  # a chunk of padding sees no key, but a softmax needs one
            parts.append((rows, seen_K.nonzero()[:, 0]))
        return cls(queries, keys, window, tuple(parts))

    def with_masks(self, num_repeats: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For each chunk: its queries, its key columns and its mask `[B, 1, num_repeats * C, N]`."""
        for number, (rows, columns_N) in enumerate(self.parts):
            mask = self.kept.get((number, num_repeats, dtype))
            if mask is None:
                seen_BCN = visible(
                    slots_at(self.queries, ..., rows), slots_at(self.keys, ..., columns_N), self.window
                )
                mask = additive_mask(seen_BCN, dtype).repeat(1, 1, num_repeats, 1)
                if mask.nbytes + sum(other.nbytes for other in self.kept.values()) <= KEPT_BYTES:
                    self.kept[number, num_repeats, dtype] = mask
            yield rows, columns_N, mask


class ChunkedAttention(torch.autograd.Function):
    """Attention chunk by chunk: queries `[B, H, Q, D]`, keys and values `[B, KV heads, K, D]` ->
    `[B, Q, H, D]`.

    Query heads that share keys are stacked as queries of one head, so keys are never repeated. The backward
    builds masks again that were not kept. Everything else that is saved for it is linear in Q and K.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chunks: QueryChunks,
        scale: float | None,
        softcap: float | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        shared = query.shape[1] // key.shape[1]
        out = value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        log_sums = []
        for rows, columns_N, mask in chunks.with_masks(shared, query.dtype):
            part, log_sum = attend(
                stack_heads(query[:, :, rows], shared),
                key[:, :, columns_N],
                value[:, :, columns_N],
                mask,
                Scoring(scale, softcap, sinks_H),
            )
            out[:, rows] = unstack_heads(part, shared).transpose(1, 2)
            log_sums.append(log_sum)
        ctx.save_for_backward(query, key, value, sinks_H, out, *log_sums)
        ctx.chunks, ctx.scale, ctx.softcap = chunks, scale, softcap
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks_H, out, *log_sums = ctx.saved_tensors
        shared = query.shape[1] // key.shape[1]
        grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
        grad_sinks_H = None if sinks_H is None else torch.zeros_like(sinks_H)
        chunks = ctx.chunks.with_masks(shared, query.dtype)
        for (rows, columns_N, mask), log_sum in zip(chunks, log_sums, strict=True):
            part_query, part_key, part_value, *part_sinks = attend_backward(
                stack_heads(grad[:, rows].transpose(1, 2), shared),
                stack_heads(query[:, :, rows], shared),
                key[:, :, columns_N],
                value[:, :, columns_N],
                stack_heads(out[:, rows].transpose(1, 2), shared),
                log_sum,
                mask,
                Scoring(ctx.scale, ctx.softcap, sinks_H),
            )
            grad_query[:, :, rows] = unstack_heads(part_query, shared)
            grad_key.index_add_(2, columns_N, part_key)
            grad_value.index_add_(2, columns_N, part_value)
            if grad_sinks_H is not None:
                grad_sinks_H += part_sinks[0]
        return grad_query, grad_key, grad_value, None, None, None, grad_sinks_H


def stack_heads(heads_BHCD: Tensor, shared: int) -> Tensor:
    """`[B, KV heads * shared, C, D]` -> `[B, KV heads, shared * C, D]`."""
    return heads_BHCD.unflatten(1, (-1, shared)).flatten(2, 3)


def unstack_heads(stacked: Tensor, shared: int) -> Tensor:
    """The inverse of `stack_heads`."""
    return stacked.unflatten(2, (shared, -1)).flatten(1, 2)


def has_flash_kernel(query: Tensor, value: Tensor, scoring: Scoring) -> bool:
    """Whether torch has a flash kernel for these scores that accepts a mask: on CPUs only."""
    return scoring.is_plain and query.device.type == "cpu" and query.shape[3] == value.shape[3]


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor | None]:
    """The output `[B, H, Q, D]` and, with the flash kernel, the log-sum-exp of the scores, else None."""
    if has_flash_kernel(query, value, scoring):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, attn_mask=mask, scale=scoring.scale)
    return dot_product_attention(query, key, value, mask, scoring), None


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor | None,
    mask: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, and of sinks. Without `log_sum` the forward is computed again."""
    if log_sum is not None:
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        scale = scoring.scale
        return flash_backward(grad, query, key, value, out, log_sum, 0.0, False, attn_mask=mask, scale=scale)
    sinks = [] if scoring.sinks_H is None else [scoring.sinks_H]
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value, *sinks)]
        scoring = scoring._replace(sinks_H=inputs[3] if sinks else None)
        again = dot_product_attention(inputs[0], inputs[1], inputs[2], mask, scoring)
    return torch.autograd.grad(again, inputs, grad)


class UnsupportedModel(ValueError):
    """A model whose attention these functions do not compute. The message ends a sentence about it."""


LayerMask = Tensor | BlockMask | QueryChunks


def make_mask(
    queries: Slots, keys: Slots, window: int | None, dtype: torch.dtype, backend: Backend
) -> LayerMask:
    """`visible` in the form that the backend takes."""
    if backend == "sdpa" or queries.ids_BS.shape[1] <= 2 * CHUNK:
        return additive_mask(visible(queries, keys, window), dtype)
    return block_mask(queries, keys, window) if backend == "flex" else QueryChunks.of(queries, keys, window)


def keys_with_cache(slots: Slots, cache_length: int) -> Slots:
    """The keys of a cached forward: every column of the buffer as a clean slot, then the current slots.

    Current clean slots are padding here, because they have just been written to the buffer and are read
    there.
    """
    num_rows = slots.ids_BS.shape[0]
    columns_BK = torch.arange(cache_length, device=slots.ids_BS.device).expand(num_rows, -1)
    zeros_BK = torch.zeros_like(columns_BK)
    buffer = Slots(zeros_BK, columns_BK, columns_BK, zeros_BK, zeros_BK)
    return join_slots(buffer, slots.only(slots.is_noised_BS))


@dataclass(frozen=True, slots=True)
class SlotForward:
    """The data that the attention layers of one forward pass share."""

    masks: dict[int | None, LayerMask]
    """Mask of each sliding window."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer."""
    cache: SlotCache | None
    attend: Callable[..., Tensor] | None = None
    """`DecodeCache.attend`, or `compiled.Layout.attend` in a compiled forward; None in training."""


def start_forward(
    slots: Slots,
    windows: tuple[int | None, ...],
    dtype: torch.dtype,
    backend: Backend,
    cache: SlotCache | None,
) -> SlotForward:
    """The masks of a training forward over `slots`. With a cache, its clean slots are written there."""
    keys = slots
    if cache is not None:
        last = max(int((slots.start_BS + slots.visible_until_BS).max()), 0)
        cache.begin(slots, min(last + 1, cache.capacity))
        keys = keys_with_cache(slots, cache.length)
    masks = {window: make_mask(slots, keys, window, dtype, backend) for window in set(windows)}
    return SlotForward(masks, windows, cache)


def start_decode(windows: tuple[int | None, ...], dtype: torch.dtype, cache: DecodeCache) -> SlotForward:
    """The masks of the packed forward for which `cache.begin` has been called."""
    cache.lay_out()
    masks: dict[int | None, LayerMask] = {window: cache.mask(window, dtype) for window in set(windows)}
    return SlotForward(masks, windows, cache=None, attend=cache.attend)


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    slot_forward: SlotForward | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that models call: queries `[B, H, Q, D]` -> `[B, Q, H, D]`. Without a
    `slot_forward` it computes the model's own attention. UnsupportedModel if no mask can be set.
    """
    scoring = Scoring(kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux"))
    if slot_forward is None:
        if attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:
            raise UnsupportedModel(
                "its layers do not pass keywords on to the attention function: no mask can be set"
            )
        return dense_attention(module, query, key, value, attention_mask, scoring, **kwargs)
    mask = slot_forward.masks[slot_forward.windows[module.layer_idx]]
    if slot_forward.attend is not None:
        return slot_forward.attend(module.layer_idx, query[0], key[0], value[0], mask, scoring), None
    if slot_forward.cache is not None:
        key, value = slot_forward.cache.extend(module.layer_idx, key, value)
    if isinstance(mask, Tensor):
        return dense_attention(module, query, key, value, mask, scoring, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast may leave them in float32
    if isinstance(mask, BlockMask):
        return flex_attention_forward(module, query, key, value, mask, **kwargs)
    assert not kwargs.get("dropout"), "dropout would differ when the backward computes a chunk again"
    return ChunkedAttention.apply(query, key, value, mask, *scoring), None


def dense_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa, for every scoring. The mask `[B, 1, Q, K]` is additive or boolean; None: causal."""
    if scoring.is_plain:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    assert not kwargs.get("dropout"), "explicit scores are computed without dropout"
    num_queries, num_keys, shared = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    if mask is None:
        seen_QK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = seen_QK.tril(num_keys - num_queries)[None, None]
    if mask.dtype == torch.bool:
        mask = additive_mask(mask[:, 0], query.dtype)
    stacked = stack_heads(query, shared)
    out = dot_product_attention(stacked, key, value, mask.repeat(1, 1, shared, 1), scoring)
    return unstack_heads(out, shared).transpose(1, 2), None


def no_mask(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The `attention_mask` argument of models: it has four dimensions, so that they build none themselves."""
    return torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)


def use_slot_attention(model: PreTrainedModel) -> None:
    """Make a model call `slot_attention`. The config does not store this: call it after every load."""
    AttentionInterface.register(ATTENTION_NAME, slot_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    model.set_attn_implementation(ATTENTION_NAME)
