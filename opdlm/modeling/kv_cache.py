"""Key-value caches: `DecodeCache` for decoding, `SlotCache` for training (docs/concepts.md, "Caches").

A forward pass of decoding is *packed*: the slots of all rows form one sequence, clean ones first, so linear
layers compute no padding; only attention pads, in `DecodeCache.attend`. Every forward writes its keys and
values into one buffer per layer, clean slots at their positions and noised slots behind the longest row, and
attends to views of the buffer: tensors are not concatenated, and heads that share keys are not repeated.
Entries that are no longer valid (rejected drafts, noised slots of earlier forwards, rows that finished) are
not removed: they lie beyond every `visible_until` until they are overwritten.

Shape suffixes: N packed slots, B rows, S padded slots, W padded queries of a row, K keys, J noised slots of a
row, H heads (of keys; queries come in groups G that share them), D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .dot_product import Scoring, dot_product_attention
from .slots import CAUSAL, CLEAN, Slots


@dataclass(frozen=True, slots=True)
class Packed:
    """The slots of all rows without padding: first the clean ones, then the noised ones, both row by row."""

    num_clean: int
    row_N: Tensor
    """Row of each slot."""
    ids_N: Tensor
    positions_N: Tensor
    visible_until_N: Tensor
    group_N: Tensor

    @classmethod
    def of(cls, slots: Slots) -> tuple[Packed, Tensor]:
        """Pack slots `[B, S]`. Also returns the column `[N]` of each packed slot in the input."""
        clean_N = (slots.group_BS == CLEAN).flatten().nonzero()[:, 0]
        flat_N = torch.cat([clean_N, slots.is_noised_BS.flatten().nonzero()[:, 0]])
        fields = (slots.ids_BS, slots.positions_BS, slots.visible_until_BS, slots.group_BS)
        width = slots.ids_BS.shape[1]
        packed = cls(len(clean_N), flat_N // width, *(field.flatten()[flat_N] for field in fields))
        return packed, flat_N % width

    def split(self) -> list[Packed]:
        """The clean slots and the noised slots apart, for models that compute them with different weights."""
        fields = (self.row_N, self.ids_N, self.positions_N, self.visible_until_N, self.group_N)
        return [
            Packed(self.num_clean, *(field[: self.num_clean] for field in fields)),
            Packed(0, *(field[self.num_clean :] for field in fields)),
        ]

    def __len__(self) -> int:
        return len(self.row_N)


def place_in_row(row_N: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """For a sorted `row_N`: the index of each entry within its row `[N]`, and the length of each row
    `[B]`.
    """
    count_B = row_N.bincount(minlength=num_rows)
    first_B = count_B.cumsum(0) - count_B
    return torch.arange(len(row_N)) - first_B[row_N], count_B


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring rows that attend in one call, padded to the widest of them."""

    first: int
    last: int
    """First row and end (exclusive)."""
    source_N: Tensor | None
    """The packed slot of each padded query (slot 0 for padding); None: all packed slots in order."""

    def pad(self, packed: Tensor) -> Tensor:
        """The padded queries of this segment, from a tensor whose first dimension is packed slots."""
        return packed if self.source_N is None else packed.index_select(0, self.source_N)


class DecodeCache:
    """Keys and values of decoding: one buffer per layer, indexed by row and position, allocated once."""

    def __init__(self, num_rows: int, capacity: int, device: torch.device) -> None:
        """`capacity`: positions of each row, noised slots included."""
        self.num_rows, self.capacity, self.device = num_rows, capacity, device
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer: keys and values `[rows, capacity + 1, kv heads, head_dim]` from the first forward on."""
        self._padded: dict[int, list[Tensor]] = {}
        self._segments: list[Segment] = []

    def begin(self, packed: Packed, num_rows: int, length: int) -> None:
        """Prepare the next forward pass over the first `num_rows` rows. It reads `length` positions of each
        row; noised slots are stored behind them.
        """
        self.packed, self.num_active, self._padded = packed, num_rows, {}
        self._length = length
        num_clean = packed.num_clean
        noised_row_N = packed.row_N[num_clean:]
        clean_place_N, clean_count_B = place_in_row(packed.row_N[:num_clean], num_rows)
        noised_place_N, noised_count_B = place_in_row(noised_row_N, num_rows)
        width = int(noised_count_B.max())
        assert self._length + width <= self.capacity
        noised_2BJ = torch.full((2, num_rows, width), -1)  # groups and positions
        noised_2BJ[0, noised_row_N, noised_place_N] = packed.group_N[num_clean:]
        noised_2BJ[1, noised_row_N, noised_place_N] = packed.positions_N[num_clean:]
        self._noised_2BJ = noised_2BJ.to(self.device)
        numbers = (packed.row_N, packed.positions_N, packed.visible_until_N, packed.group_N)
        self._numbers_4N = torch.stack(numbers).to(self.device)
        index_N = torch.cat([packed.positions_N[:num_clean], self._length + noised_place_N])
        self.write_N = packed.row_N * (self.capacity + 1) + index_N
        self.place_N = torch.cat([clean_place_N, clean_count_B[noised_row_N] + noised_place_N])
        self.count_B = clean_count_B + noised_count_B

    def lay_out(self) -> None:
        """Compute the padding of the queries. Rows that joined last are wide: they may form a segment of
        their own.
        """
        row_N, num_rows, count_B = self.packed.row_N, self.num_active, self.count_B
        self._write_N = self.write_N.to(self.device)
        start = int(row_N.min())  # rows before it have no slots: a part of a prompt is computed on its own
        if num_rows == start + 1:  # nothing to pad
            self._segments, self._back_N = [Segment(start, num_rows, None)], None
            return
        bounds = [start, *(start + cut for cut in best_split(count_B[start:])), num_rows]
        self._segments, offset = [], 0
        self._back_N = torch.zeros_like(row_N)
        for first, last in pairwise(bounds):
            width = int(count_B[first:last].max())
            inside_N = (row_N >= first) & (row_N < last)
            padded_N = (row_N - first) * width + self.place_N
            source_N = torch.zeros((last - first) * width, dtype=torch.long)
            source_N[padded_N[inside_N]] = inside_N.nonzero()[:, 0]
            self._back_N = torch.where(inside_N, padded_N + offset, self._back_N)
            self._segments.append(Segment(first, last, source_N.to(self.device)))
            offset += len(source_N)
        self._back_N = self._back_N.to(self.device)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask `[1, 1, N, K]` of the current forward; keys are those of the query's own row. It is
        computed on the device, from four integers per slot and two per noised key.
        """
        row_N, position_N, visible_until_N, group_N = self._numbers_4N
        noised_group_NJ, noised_position_NJ = self._noised_2BJ[:, row_N]
        key_K = torch.arange(self._length, device=self.device)
        seen_NK = key_K <= visible_until_N[:, None]
        ahead_NJ = noised_position_NJ > position_N[:, None]
        seen_NJ = (noised_group_NJ == group_N[:, None]) & ~(ahead_NJ & (noised_group_NJ >= CAUSAL))
        if window is not None:
            seen_NK &= position_N[:, None] - key_K < window
            seen_NJ &= position_N[:, None] - noised_position_NJ < window
        seen_NK = torch.cat([seen_NK, seen_NJ], 1)
        mask_NK = torch.zeros(seen_NK.shape, dtype=dtype, device=self.device)
        return mask_NK.masked_fill_(~seen_NK, torch.finfo(dtype).min)[None, None]

    def attend(
        self,
        layer: int,
        query_HND: Tensor,
        key_HND: Tensor,
        value_HND: Tensor,
        mask: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """Store the keys and values of a layer and attend: `[1, N, heads, head_dim]`."""
        if layer not in self.layers:
            self.layers[layer] = (self._buffer(key_HND), self._buffer(value_HND))
        keys_BHKD, values_BHKD = store(self.layers[layer], key_HND, value_HND, self._write_N, mask.shape[-1])
        num_kv, share = key_HND.shape[0], query_HND.shape[0] // key_HND.shape[0]
        query_NHD = query_HND.transpose(0, 1)
        results = []
        for segment, padded_mask in zip(self._segments, self._padded_masks(mask, share), strict=True):
            rows = slice(segment.first, segment.last)
            query_BWHGD = segment.pad(query_NHD).view(
                segment.last - segment.first, -1, num_kv, share, query_HND.shape[2]
            )
            results.append(attend_rows(query_BWHGD, keys_BHKD[rows], values_BHKD[rows], padded_mask, scoring))
        padded = results[0] if len(results) == 1 else torch.cat(results)
        return (padded if self._back_N is None else padded.index_select(0, self._back_N))[None]

    def _buffer(self, new_HND: Tensor) -> Tensor:
        """The last column is never read: a compiled forward stores its padding there."""
        return new_HND.new_zeros(self.num_rows, self.capacity + 1, new_HND.shape[0], new_HND.shape[2])

    def _padded_masks(self, mask: Tensor, share: int) -> list[Tensor]:
        """The mask of each segment, repeated for the query heads that share keys; built once per forward."""
        if id(mask) not in self._padded:
            self._padded[id(mask)] = [
                segment.pad(mask[0, 0])
                .view(segment.last - segment.first, 1, -1, mask.shape[-1])
                .repeat(1, 1, share, 1)
                for segment in self._segments
            ]
        return self._padded[id(mask)]

    def move(self, from_N: Tensor, to_N: Tensor, length: int | None = None) -> None:
        """Copy `length` positions of the rows `from_N` to the rows `to_N`; None: those that the last forward
        read.
        """
        for buffers in self.layers.values():
            for buffer in buffers:
                num = self._length if length is None else length
                buffer[to_N, :num] = buffer[from_N, :num]


MOST_TEXTS = 64
"""How many past requests a `PrefixCache` keeps: each new prompt is compared with all of them."""


class PrefixCache:
    """Keys and values of the texts of past requests, at most `max_tokens` tokens together. Only for clean
    slots that see no later token: their keys and values do not depend on what follows.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens, self.num_tokens, self.num_hits, self.num_reused = max_tokens, 0, 0, 0
        self.texts: dict[tuple[int, ...], dict[int, tuple[Tensor, Tensor]]] = {}
        """By token ids, the latest used last: keys and values of each layer `[tokens, kv heads, D]`."""

    def save(self, ids: Sequence[int], cache: DecodeCache, row: int) -> None:
        """Keep the text of a row, in place of those that it begins with."""
        for old in [old for old in self.texts if tuple(ids[: len(old)]) == old]:
            self._drop(old)
        self.num_tokens += len(ids)
        self.texts[tuple(ids)] = {
            layer: (keys[row, : len(ids)].clone(), values[row, : len(ids)].clone())
            for layer, (keys, values) in cache.layers.items()
        }
        while self.num_tokens > self.max_tokens or len(self.texts) > MOST_TEXTS:
            self._drop(next(iter(self.texts)))

    def load(self, ids: Sequence[int], cache: DecodeCache, row: int) -> int:
        """Copy the longest known beginning of `ids` into a row; its number of tokens."""
        shared = {text: num_shared(ids, text) for text in self.texts} if cache.layers else {}
        text = max(shared, key=lambda text: shared[text], default=())
        num = shared.get(text, 0)
        if num:
            self.texts[text] = layers = self.texts.pop(text)
            for layer, stored in layers.items():
                for buffer, kept in zip(cache.layers[layer], stored, strict=True):
                    buffer[row, :num] = kept[:num]
        self.num_hits += num > 0
        self.num_reused += num
        return num

    def _drop(self, text: tuple[int, ...]) -> None:
        del self.texts[text]
        self.num_tokens -= len(text)


def num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def store(
    buffers: tuple[Tensor, Tensor], key_HND: Tensor, value_HND: Tensor, write_N: Tensor, num_keys: int
) -> tuple[Tensor, Tensor]:
    """Write new keys and values at the flat indices `write_N`; returns views of the buffers
    `[B, H, num_keys, D]`.
    """
    views = []
    for buffer, new_HND in zip(buffers, (key_HND, value_HND), strict=True):
        buffer.view(-1, *buffer.shape[2:]).index_copy_(0, write_N, new_HND.transpose(0, 1))
        views.append(buffer[:, :num_keys].transpose(1, 2))
    return views[0], views[1]


def attend_rows(
    query_BWHGD: Tensor, keys_BHKD: Tensor, values_BHKD: Tensor, mask: Tensor, scoring: Scoring
) -> Tensor:
    """Attention of rows with W queries each, whose heads come in groups G that share keys and values:
    `[B * W, heads, head_dim]`. The mask `[B, 1, G * W, K]` is repeated for each group; keys and values are
    not.
    """
    num_rows, width, num_kv, share, dim = query_BWHGD.shape
    folded = query_BWHGD.permute(0, 2, 3, 1, 4).reshape(num_rows, num_kv, share * width, dim)
    mixed = dot_product_attention(folded, keys_BHKD, values_BHKD, mask, scoring)
    mixed = mixed.view(num_rows, num_kv, share, width, mixed.shape[-1]).permute(0, 3, 1, 2, 4)
    return mixed.reshape(num_rows * width, num_kv * share, mixed.shape[-1])


def best_split(count_B: Tensor) -> list[int]:
    """The row at which to split the batch so that its padded size shrinks by at least a third; [] if none."""
    num_rows = len(count_B)
    before_B, after_B = count_B.cummax(0).values, count_B.flip(0).cummax(0).values.flip(0)
    cut_B = torch.arange(1, num_rows)
    area_B = cut_B * before_B[:-1] + (num_rows - cut_B) * after_B[1:]
    best = int(area_B.argmin())
    return [best + 1] if int(area_B[best]) * 3 <= int(before_B[-1]) * num_rows * 2 else []


class SlotCache:
    """Keys and values of clean slots in training: one buffer `[B, kv heads, capacity, head_dim]` per layer,
    indexed by the column of the clean row.

    A forward pass writes its clean slots at their columns and reads the columns [0, length); the mask
    restricts them further (`attention.keys_with_cache`).
    """

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.num_rows, self.capacity, self.length = num_rows, capacity, 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._write: tuple[Tensor, Tensor, Tensor] | None = None

    def begin(self, slots: Slots, length: int) -> None:
        """Prepare the next forward pass: it writes the clean slots of `slots` and reads `length` columns."""
        assert length <= self.capacity
        rows_N, slots_N = (slots.group_BS == CLEAN).nonzero(as_tuple=True)
        self._write = (rows_N, slots_N, slots.key_columns_BS[rows_N, slots_N]) if len(rows_N) else None
        self.length = length

    def extend(self, layer: int, keys_BHSD: Tensor, values_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the clean slots of a layer; returns the buffer and the current slots, `[B, H, K, D]` each for
        keys and values.
        """
        if layer not in self._layers:
            shape = (self.num_rows, keys_BHSD.shape[1], self.capacity)
            self._layers[layer] = (
                keys_BHSD.new_zeros(*shape, keys_BHSD.shape[3]),
                values_BHSD.new_zeros(*shape, values_BHSD.shape[3]),
            )
        stored = self._layers[layer]
        if self._write is not None:
            rows_N, slots_N, columns_N = self._write
            stored[0][rows_N, :, columns_N] = keys_BHSD[rows_N, :, slots_N]
            stored[1][rows_N, :, columns_N] = values_BHSD[rows_N, :, slots_N]
        keys_BHKD = torch.cat([stored[0][:, :, : self.length], keys_BHSD], 2)
        return keys_BHKD, torch.cat([stored[1][:, :, : self.length], values_BHSD], 2)
