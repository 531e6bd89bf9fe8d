"""The denoising states of a rollout that are trained, and the slots that represent them.

A state of a block is given by its masked positions. Let v_1 < ... < v_T be the distinct unmask steps of a
block: state k masks {i : unmask_step_i >= v_k}. Selections: `all` takes every state of the trajectory,
`one_per_block` draws one per block (OPDLM, arXiv 2606.06712), `complementary` takes a random mask and its
complement, `random_mask` a random mask (`masking.MaskRates`) without a trajectory. All states of a rollout
share one clean half (docs/concepts.md, "Denoising states").

Shape suffixes: B rollouts, C copies (states), N blocks, T positions of a block, L clean row, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opdlm.config.sections import Selection
from opdlm.decoding.rollout import NEVER, Rollout
from opdlm.modeling.diffusion_lm import DiffusionSpec
from opdlm.modeling.slots import Slots, clean_slots, join_slots, make_slots, pack_documents
from opdlm.objectives.masking import ANY_RATE, MaskRates, draw_masks


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBatch:
    """Training rows: the input of the teacher and that of the student."""

    text: Slots
    """The teacher's input: the clean text, token-causal. The column is the position in the document."""
    slots: Slots
    """The student's input: the states as noised slots, in `sdar` after the clean text that they see."""
    target_BS: Tensor
    """The position that a supervised slot predicts, -1 elsewhere."""
    masked_fraction_BS: Tensor
    """Masked fraction of the response positions of the slot's block in this state."""

    @property
    def is_supervised_BS(self) -> Tensor:
        return self.target_BS >= 0

    @property
    def num_columns(self) -> int:
        """Number of columns that the two forward passes compute."""
        return self.text.ids_BS.numel() + self.slots.ids_BS.numel()

    def to(self, device: torch.device) -> StateBatch:
        return StateBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def without_targets(self) -> StateBatch:
        """The same rows without supervised slots."""
        return replace(self, target_BS=torch.full_like(self.target_BS, -1))


@dataclass(frozen=True, slots=True)
class BlockTable:
    """The blocks of a batch of rollouts that contain response positions, `[B, N, T]`."""

    ids_BNT: Tensor
    positions_BNT: Tensor
    step_BNT: Tensor
    """Unmask step; -1 for prompt tokens."""
    is_response_BNT: Tensor
    """Response positions up to and including the stop token."""
    is_inside_BNT: Tensor
    """Positions of the row: prompt, response, and the rest of the last block; False for padding."""


def text_to_rollout(prompt_ids: Sequence[int], response_ids: Sequence[int], spec: DiffusionSpec) -> Rollout:
    """A rollout of given text, revealed from left to right; the rest of its last block is [MASK]."""
    last = len(prompt_ids) + len(response_ids) - 1
    end = spec.block_grid.block_start(last, len(prompt_ids)) + spec.block_size
    rest = end - last - 1
    return Rollout(
        prompt_ids=tuple(prompt_ids),
        response_ids=(*response_ids, *[spec.mask_token_id] * rest),
        unmask_step=(*range(1, len(response_ids) + 1), *[NEVER] * rest),
        num_response=len(response_ids),
        finish_reason="stop",
    )


def block_table(rollouts: Sequence[Rollout], spec: DiffusionSpec) -> BlockTable:
    """The blocks from the first to the last response position of each rollout, padded to the same number."""
    grid, size = spec.block_grid, spec.block_size
    starts = [grid.block_start(len(r.prompt_ids), len(r.prompt_ids)) for r in rollouts]
    ends = [len(r.prompt_ids) + r.num_response for r in rollouts]
    num_blocks = max(-(-(end - start) // size) for start, end in zip(starts, ends, strict=True))
    width = num_blocks * size
    ids_BW = torch.full((len(rollouts), width), spec.mask_token_id)
    step_BW = torch.full((len(rollouts), width), NEVER)
    for i, (rollout, start) in enumerate(zip(rollouts, starts, strict=True)):
        remainder = rollout.prompt_ids[start:]
        row = (remainder + rollout.response_ids)[:width]
        ids_BW[i, : len(row)] = torch.tensor(row)
        step_BW[i, : len(row)] = torch.tensor(((-1,) * len(remainder) + rollout.unmask_step)[:width])
    start_B1 = torch.tensor(starts)[:, None]
    positions_BW = start_B1 + torch.arange(width)
    num_prompt_B1 = torch.tensor([len(r.prompt_ids) for r in rollouts])[:, None]
    end_B1 = torch.tensor(ends)[:, None]
    last_block_end_B1 = grid.block_start(end_B1 - 1, num_prompt_B1) + size
    is_response_BW = (positions_BW >= num_prompt_B1) & (positions_BW < end_B1)
    is_inside_BW = positions_BW < last_block_end_B1
    shape = (len(rollouts), num_blocks, size)
    return BlockTable(*(x.view(shape) for x in (ids_BW, positions_BW, step_BW, is_response_BW, is_inside_BW)))


def select_masks(
    table: BlockTable, selection: Selection, rng: torch.Generator, rates: MaskRates = ANY_RATE
) -> Tensor:
    """Masked positions of the selected states: bool `[B, C, N, T]`. A block without masks has no state in
    that copy. `rng` is a CPU generator.
    """
    can_mask_BNT = (table.step_BNT >= 0) & table.is_inside_BNT
    match selection:
        case "one_per_block":
            return trajectory_masks(table, can_mask_BNT, rng, every=False)
        case "all":
            return trajectory_masks(table, can_mask_BNT, rng, every=True)
        case "complementary":
            masked_BNT = draw_masks(can_mask_BNT, rates, rng, at_least_one=True).is_masked
            return torch.stack([masked_BNT, can_mask_BNT & ~masked_BNT], 1)
        case "random_mask":
            return draw_masks(can_mask_BNT, rates, rng, at_least_one=True).is_masked[:, None]


def trajectory_masks(table: BlockTable, can_mask_BNT: Tensor, rng: torch.Generator, *, every: bool) -> Tensor:
    """Masked positions of the states of the trajectory: all of them if `every`, else one drawn per block;
    bool `[B, C, N, T]`.
    """
    step_BNT = table.step_BNT.masked_fill(~can_mask_BNT, NEVER)
    sorted_BNT = step_BNT.sort(-1).values
    is_new_BNT = torch.ones_like(sorted_BNT, dtype=torch.bool)
    is_new_BNT[..., 1:] = sorted_BNT[..., 1:] != sorted_BNT[..., :-1]
    is_new_BNT &= sorted_BNT != NEVER
    if every:
        threshold_BNT = torch.where(is_new_BNT, sorted_BNT, NEVER + 1)
        masked_BNTT = can_mask_BNT[:, :, None, :] & (step_BNT[:, :, None, :] >= threshold_BNT[..., None])
        return masked_BNTT.transpose(1, 2)
    score_BNT = torch.rand(is_new_BNT.shape, generator=rng) * is_new_BNT - (~is_new_BNT).float()
    pick_BN1 = score_BNT.argmax(-1, keepdim=True)
    has_state_BN1 = is_new_BNT.any(-1, keepdim=True)
    threshold_BN1 = torch.where(has_state_BN1, sorted_BNT.gather(-1, pick_BN1), NEVER + 1)
    return (can_mask_BNT & (step_BNT >= threshold_BN1))[:, None]


def select_states(
    rollouts: Sequence[Rollout],
    spec: DiffusionSpec,
    selection: Selection,
    rng: torch.Generator,
    rates: MaskRates = ANY_RATE,
) -> StateBatch:
    """Select the denoising states to train, one row per rollout. `rng` is a CPU generator."""
    table = block_table(rollouts, spec)
    states = make_states(rollouts, table, select_masks(table, selection, rng, rates), spec)
    return with_noise(states, spec, rng)


def select_drafts(
    rollouts: Sequence[Rollout], spec: DiffusionSpec, anchors_per_row: int | None, rng: torch.Generator
) -> StateBatch:
    """The slots of drafts as lossless decoding makes them: `block_size - 1` masks, or uniformly drawn ids,
    after a token of the response that the draft does not see, behind the known text before it.

    `anchors_per_row` distinct tokens of every response, drawn by `rng` (a CPU generator) from all but the
    last; None: a token for every `block_size` of the response. A response of one token gets no draft.
    """
    size = spec.block_size
    starts = []
    for rollout in rollouts:
        first, num_anchors = len(rollout.prompt_ids), max(rollout.num_response - 1, 0)
        wanted = anchors_per_row or -(-rollout.num_response // size)
        chosen = torch.randperm(num_anchors, generator=rng)[:wanted]
        starts.append(first + chosen.sort().values)
    start_BN = F.pad(pad_sequence(starts, batch_first=True, padding_value=-1), (0, 1), value=-1)
    positions_BNT = start_BN[..., None] + torch.arange(size)
    end_B = torch.tensor([len(r.prompt_ids) + r.num_response for r in rollouts])
    is_response_BNT = (start_BN >= 0)[..., None] & (positions_BNT < end_B[:, None, None])
    table = BlockTable(
        ids_BNT=torch.full_like(positions_BNT, spec.mask_token_id),
        positions_BNT=positions_BNT,
        step_BNT=torch.zeros_like(positions_BNT),
        is_response_BNT=is_response_BNT,
        is_inside_BNT=is_response_BNT,
    )
    states = make_states(rollouts, table, torch.ones_like(is_response_BNT)[:, None], spec)
    return with_noise(states, spec, rng)


def with_noise(states: StateBatch, spec: DiffusionSpec, rng: torch.Generator) -> StateBatch:
    """The states with uniformly drawn ids in place of their masks, if the student takes such."""
    if spec.noise_vocab_size is None:
        return states
    slots = states.slots
    drawn_BS = torch.randint(spec.noise_vocab_size, slots.ids_BS.shape, generator=rng)
    is_unknown_BS = slots.is_noised_BS & (slots.ids_BS == spec.mask_token_id)
    return replace(states, slots=replace(slots, ids_BS=torch.where(is_unknown_BS, drawn_BS, slots.ids_BS)))


def make_states(
    rollouts: Sequence[Rollout], table: BlockTable, masked_BCNT: Tensor, spec: DiffusionSpec
) -> StateBatch:
    """Training rows for the states with these masked positions, one row per rollout."""
    noised, target_BS, fraction_BS = noised_slots(table, masked_BCNT, spec)
    lengths_B = torch.tensor([len(r.prompt_ids) + r.num_response for r in rollouts])
    ids = [torch.tensor(r.prompt_ids + r.text_ids) for r in rollouts]
    ids_BL = pad_sequence(ids, batch_first=True)
    num_prompt_B = torch.tensor([len(r.prompt_ids) for r in rollouts])
    context = clean_context(ids_BL, noised, num_prompt_B, spec)
    width = context.ids_BS.shape[1]
    return StateBatch(
        text=clean_slots(ids_BL, lengths_B, num_prompt_B, spec.block_grid, "preserve"),
        slots=join_slots(context, noised),
        target_BS=F.pad(target_BS, (width, 0), value=-1),
        masked_fraction_BS=F.pad(fraction_BS, (width, 0)),
    )


def clean_context(ids_BL: Tensor, noised: Slots, num_prompt_B: Tensor, spec: DiffusionSpec) -> Slots:
    """The clean slots that the student computes: none in `preserve`, whose student reads the teacher's cache.

    In `sdar` they are the text before the last block that carries loss; no slot sees the rest.
    """
    lengths_B = noised.visible_until_BS.amax(1) + 1
    if spec.format == "preserve":
        lengths_B = torch.zeros_like(lengths_B)
    ids_BL = ids_BL[:, : int(lengths_B.max())]
    return clean_slots(ids_BL, lengths_B, num_prompt_B, spec.block_grid, spec.format)


def pack_states(batches: Sequence[StateBatch]) -> StateBatch:
    """Concatenate batches of one rollout each into one row without padding."""
    starts = [0, *accumulate(batch.text.ids_BS.shape[1] for batch in batches)][:-1]
    num_groups = max(int(batch.slots.group_BS.max()) for batch in batches)
    return StateBatch(
        text=pack_documents([batch.text for batch in batches], starts, num_groups),
        slots=pack_documents([batch.slots for batch in batches], starts, num_groups),
        target_BS=torch.cat([batch.target_BS for batch in batches], 1),
        masked_fraction_BS=torch.cat([batch.masked_fraction_BS for batch in batches], 1),
    )


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bin packing by first-fit decreasing: indices of `sizes` in bins of total size `capacity` at most."""
    bins: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = (b for b, left in enumerate(free) if sizes[index] <= left)
        chosen = next(fitting, len(bins))
        if chosen == len(bins):
            bins.append([])
            free.append(capacity)
        bins[chosen].append(index)
        free[chosen] -= sizes[index]
    return bins


def noised_slots(table: BlockTable, masked_BCNT: Tensor, spec: DiffusionSpec) -> tuple[Slots, Tensor, Tensor]:
    """The student's slots of these states, the position that each predicts (-1: none), and the masked
    fraction of its block; `[B, S]` each.

    `sdar`: the slots are the whole block, and slot i predicts token i. `preserve`: slot i predicts token i +
    1, and the slots are those from the first [MASK] to the last position but one. The first masked token
    itself is predicted by the clean slot before it, that is, by the teacher, and carries no loss.
    """
    num_copies, size = masked_BCNT.shape[1], spec.block_size
    offset_T = torch.arange(size)
    learnable_BCNT = masked_BCNT & table.is_response_BNT[:, None]
    if spec.format == "preserve":
        first_BCN1 = masked_BCNT.long().argmax(-1, keepdim=True)
        is_slot_BCNT = (offset_T >= first_BCN1) & (offset_T < size - 1)
        predicts_BCNT = learnable_BCNT.roll(-1, -1) & is_slot_BCNT
        anchor_BCN1 = table.positions_BNT[:, None, :, :1] + first_BCN1 - 1
        shift = 1
    else:
        is_slot_BCNT = table.is_inside_BNT[:, None].expand_as(masked_BCNT)
        predicts_BCNT = learnable_BCNT
        anchor_BCN1 = table.positions_BNT[:, None, :, :1].expand_as(masked_BCNT[..., :1]) - 1
        shift = 0
    is_slot_BCNT = is_slot_BCNT & predicts_BCNT.any(-1, keepdim=True)  # a block without loss gets no slots
    positions_BCNT = table.positions_BNT[:, None].expand_as(masked_BCNT)
    ids_BCNT = torch.where(masked_BCNT, spec.mask_token_id, table.ids_BNT[:, None])
    target_BCNT = torch.where(predicts_BCNT, positions_BCNT + shift, -1)
    num_blocks = masked_BCNT.shape[2]
    group_CN = spec.first_group + torch.arange(num_copies * num_blocks).view(num_copies, num_blocks)
    group_BCNT = group_CN[None, :, :, None].expand_as(masked_BCNT)
    response_BCN1 = table.is_response_BNT[:, None].sum(-1, keepdim=True).clamp_min(1)
    fraction_BCNT = (learnable_BCNT.sum(-1, keepdim=True) / response_BCN1).expand_as(masked_BCNT)

    columns_BS, valid_BS = compact_columns(is_slot_BCNT.flatten(1))
    ids_BS, positions_BS, visible_until_BS, group_BS, target_BS, fraction_BS = (
        x.flatten(1).gather(1, columns_BS)
        for x in (
            ids_BCNT,
            positions_BCNT,
            anchor_BCN1.expand_as(masked_BCNT),
            group_BCNT,
            target_BCNT,
            fraction_BCNT,
        )
    )
    slots = make_slots(ids_BS, positions_BS, visible_until_BS, group_BS, valid_BS)
    return slots, torch.where(valid_BS, target_BS, -1), fraction_BS


def compact_columns(keep_BX: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the kept entries of each row, left-aligned `[B, S]`, and which of them are not padding."""
    counts_B = keep_BX.sum(1)
    width = max(int(counts_B.max()), 1)
    order_BS = keep_BX.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    return order_BS, torch.arange(width) < counts_B[:, None]
