"""The block grid, slots, and the rule that defines every attention mask. Index arithmetic without a model.

A *slot* is one column of a forward pass: a token id at a position. Clean slots carry known text and have
group 0. Noised slots carry a denoising state of one block; the slots of one state of one block form a group.
Two integers per slot define the masks of training rows, cached decoding and lossless decoding:

    visible(q, k) = k is clean and position(k) <= visible_until(q)      or      group(k) == group(q) != 0

In the groups from CAUSAL on, `position(k) <= position(q)` is required as well.

`visible_until` of a clean slot is its own position (`preserve`: token-causal, as in the AR model) or the end
of its block (`sdar`: block-causal). `visible_until` of a noised slot is the *anchor* of its group, the last
clean token before it (docs/concepts.md, "Slots and masks"; layout of BD3LM, arXiv 2503.09573).

Several documents may share a row. Each slot stores the column at which the clean text of its document starts,
and positions count from there; group numbers are never shared between documents.

Shape suffixes: B batch, S slots, Q query slots, K key slots, L clean row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

Format = Literal["preserve", "sdar"]
DraftAttention = Literal["bidirectional", "causal"]
GridKind = Literal["absolute", "response"]
Position = TypeVar("Position", int, Tensor)

CLEAN = 0
"""The group of clean slots."""
CAUSAL = 2**20
"""The first group whose slots see only those of them at or before their own position."""
FAR = 2**30
"""The key column of a padding slot: beyond every `visible_until`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which positions form a block. `absolute`: blocks are counted from token 0. `response`: the response
    starts a block.
    """

    block_size: int
    kind: GridKind = "absolute"

    def block_start(self, position: Position, num_prompt: Position) -> Position:
        """First position of the block that contains `position`; ints or tensors that broadcast. Training and
        decoding both use this function.
        """
        origin = num_prompt % self.block_size if self.kind == "response" else num_prompt * 0
        return (position - origin) // self.block_size * self.block_size + origin


@dataclass(frozen=True, slots=True)
class Slots:
    """The columns of one forward pass; all tensors are int64 `[B, S]`.

    A padding slot has position 0, key column FAR and a negative group of its own: it sees only itself, and no
    other slot sees it.
    """

    ids_BS: Tensor
    positions_BS: Tensor
    visible_until_BS: Tensor
    group_BS: Tensor
    start_BS: Tensor
    """Column of the clean row at which the document of the slot starts; 0 if the row holds one document."""

    @property
    def is_noised_BS(self) -> Tensor:
        return self.group_BS > CLEAN

    @property
    def key_columns_BS(self) -> Tensor:
        """Columns of the slots in the clean row; FAR for padding."""
        return (self.start_BS + self.positions_BS).masked_fill(self.group_BS < CLEAN, FAR)

    def only(self, keep_BS: Tensor) -> Slots:
        """The same slots, with those outside `keep_BS` replaced by padding."""
        keep_BS = keep_BS & (self.group_BS >= CLEAN)
        slots = make_slots(self.ids_BS, self.positions_BS, self.visible_until_BS, self.group_BS, keep_BS)
        return replace(slots, start_BS=self.start_BS)

    def to(self, device: torch.device) -> Slots:
        return Slots(*(x_BS.to(device) for x_BS in self.tensors))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.ids_BS, self.positions_BS, self.visible_until_BS, self.group_BS, self.start_BS


def make_slots(
    ids_BS: Tensor, positions_BS: Tensor, visible_until_BS: Tensor, group_BS: Tensor, valid_BS: Tensor
) -> Slots:
    """Slots of one document per row; those outside `valid_BS` become padding."""
    column_S = torch.arange(ids_BS.shape[1], device=ids_BS.device)
    return Slots(
        torch.where(valid_BS, ids_BS, 0),
        torch.where(valid_BS, positions_BS, 0),
        torch.where(valid_BS, visible_until_BS, -1),
        torch.where(valid_BS, group_BS, -1 - column_S),
        torch.zeros_like(ids_BS),
    )


def join_slots(first: Slots, second: Slots) -> Slots:
    """The slots of `second` after those of `first`, row by row; padding groups stay unique."""
    shifted = torch.where(second.group_BS < CLEAN, second.group_BS - first.ids_BS.shape[1], second.group_BS)
    second = replace(second, group_BS=shifted)
    return Slots(*(torch.cat(pair, 1) for pair in zip(first.tensors, second.tensors, strict=True)))


def pack_documents(documents: Sequence[Slots], starts: Sequence[int], num_groups: int) -> Slots:
    """Concatenate the slots of documents, `[1, S_i]` each, into one row `[1, S]`.

    `starts` are the columns in the clean row at which the documents start. `num_groups` is at least the
    largest number of groups in a document.
    """
    moved = [
        replace(
            slots,
            group_BS=torch.where(slots.is_noised_BS, slots.group_BS + i * num_groups, slots.group_BS),
            start_BS=slots.start_BS + start,
        ).tensors
        for i, (slots, start) in enumerate(zip(documents, starts, strict=True))
    ]
    return Slots(*(torch.cat(parts, 1) for parts in zip(*moved, strict=True)))


def clean_visible_until(positions: Tensor, num_prompt: Tensor, grid: Grid, fmt: Format) -> Tensor:
    """The last position that a clean slot sees: its own (`preserve`) or the end of its block (`sdar`)."""
    if fmt == "preserve":
        return positions
    return grid.block_start(positions, num_prompt) + grid.block_size - 1


def clean_slots(ids_BL: Tensor, lengths_B: Tensor, num_prompt_B: Tensor, grid: Grid, fmt: Format) -> Slots:
    """Right-padded sequences as clean slots; `lengths_B` counts the tokens without padding."""
    positions_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
    valid_BL = positions_BL < lengths_B[:, None]
    visible_until_BL = clean_visible_until(positions_BL, num_prompt_B[:, None], grid, fmt)
    return make_slots(ids_BL, positions_BL, visible_until_BL, torch.zeros_like(ids_BL), valid_BL)


def visible(queries: Slots, keys: Slots, window: int | None = None) -> Tensor:
    """Bool `[B, Q, K]`: the keys that each query attends to. A sliding `window` keeps those whose position is
    less than `window` before the query's.

    FlexAttention compiles this function, and its compiler accepts no operation in place.
    """
    position_BQK = keys.key_columns_BS[:, None, :] - queries.start_BS[:, :, None]  # in the query's document
    keys_clean_BQK = (position_BQK >= 0) & (position_BQK <= queries.visible_until_BS[:, :, None])
    keys_clean_BQK = keys_clean_BQK & (keys.group_BS == CLEAN)[:, None, :]
    same_group_BQK = queries.group_BS[:, :, None] == keys.group_BS[:, None, :]
    ahead_BQK = position_BQK > queries.positions_BS[:, :, None]
    same_group_BQK = same_group_BQK & ~(ahead_BQK & (queries.group_BS >= CAUSAL)[:, :, None])
    seen_BQK = keys_clean_BQK | (same_group_BQK & (queries.group_BS != CLEAN)[:, :, None])
    if window is not None:
        seen_BQK = seen_BQK & (queries.positions_BS[:, :, None] - position_BQK < window)
    return seen_BQK
