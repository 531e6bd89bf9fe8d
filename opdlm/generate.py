"""The one decode loop: every step is one forward over [new clean slots | slots of the block being denoised].

The clean slots commit what the last step completed, so the commit costs no forward of its own, and the
prompt's prefill is simply the first commit. Modes are one loop: `static` and `threshold` denoise blocks; `ar`
is `preserve` with blocks of one token, where nothing is ever noised. `preserve` predicts the first unknown
token of a block from a clean slot, so that prediction *is* the AR model's. Lossless decoding
(`generate_lossless`) drafts and verifies. METHOD parts 3 and 8. Not here: which prompts, what to train on,
text.

Shape suffixes: B rows, L row capacity, S slots, T positions of a block, M masked positions, D draft length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .attention import SlotCache
from .blocks import CLEAN, Format, Grid, Slots, clean_reach, join_slots, make_slots
from .diffusion import DiffusionLM, DiffusionSpec
from .records import NEVER, FinishReason, Rollout
from .unmasking import Remasking, Rng, choose_revealed, draw, num_to_reveal, propose_tokens, sampling_probs

Mode = Literal["ar", "static", "threshold", "lossless"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """How to decode. Temperature 0 is arg-max; `max_new_tokens` counts response tokens, the stop token
    included.
    """

    mode: Mode = "threshold"
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    denoising_steps: int | None = None
    """Steps per block at most; None = block_size, one token a step."""
    confidence_threshold: float = 0.9
    veto_below: float = 0.1
    """Static and threshold mode of `preserve`: the AR model takes back a revealed token that it finds less
    likely than this, in the forward that commits it, and puts its own there. 0 = never."""
    one_forward: bool = True
    """Lossless: verify and draft in one forward (False: one forward each)."""

    @property
    def remasking(self) -> Remasking:
        return "low_confidence_dynamic" if self.mode == "threshold" else "low_confidence_static"


@dataclass(slots=True)
class DecodeStats:
    """What decoding cost. `num_forwards` counts every forward pass that a row took part in, prefill
    included.
    """

    num_tokens: int = 0
    num_forwards: int = 0
    num_steps: int = 0
    """Denoising steps (forwards that revealed tokens of the block), summed over rows."""

    @property
    def tokens_per_forward(self) -> float:
        return self.num_tokens / max(1, self.num_forwards)

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens / max(1, self.num_steps)

    def __add__(self, other: DecodeStats) -> DecodeStats:
        return DecodeStats(
            self.num_tokens + other.num_tokens,
            self.num_forwards + other.num_forwards,
            self.num_steps + other.num_steps,
        )


@dataclass(slots=True)
class Rows:
    """The rows still being decoded. Unknown positions of `tokens_BL` hold the mask id."""

    index_B: Tensor
    tokens_BL: Tensor
    unmask_step_BL: Tensor
    num_prompt_B: Tensor
    committed_B: Tensor
    """Positions whose clean keys and values are in the cache."""
    final_B: Tensor
    """Positions that no later step can take back."""
    block_step_B: Tensor
    num_forwards_B: Tensor
    num_steps_B: Tensor
    cache: SlotCache

    @classmethod
    def start(
        cls, prompts: Sequence[Sequence[int]], capacity: int, mask_token_id: int, device: torch.device
    ) -> Rows:
        tokens_BL = torch.full((len(prompts), capacity), mask_token_id)
        for i, ids in enumerate(prompts):
            tokens_BL[i, : len(ids)] = torch.tensor(ids)
        zeros_B = torch.zeros(len(prompts), dtype=torch.long, device=device)
        return cls(
            index_B=torch.arange(len(prompts), device=device),
            tokens_BL=tokens_BL.to(device),
            unmask_step_BL=torch.full(tokens_BL.shape, NEVER, device=device),
            num_prompt_B=torch.tensor([len(ids) for ids in prompts], device=device),
            committed_B=zeros_B,
            final_B=zeros_B.clone(),
            block_step_B=zeros_B.clone(),
            num_forwards_B=zeros_B.clone(),
            num_steps_B=zeros_B.clone(),
            cache=SlotCache(len(prompts), capacity),
        )

    def rng_at(self, rng: Rng, row_M: Tensor) -> Rng:
        """The generator of each entry, where every prompt has its own."""
        return [rng[i] for i in self.index_B[row_M].tolist()] if isinstance(rng, Sequence) else rng

    def keep(self, keep_B: Tensor) -> None:
        rows_N = keep_B.nonzero()[:, 0]
        if len(rows_N) == len(keep_B):
            return
        self.index_B, self.num_prompt_B = self.index_B[rows_N], self.num_prompt_B[rows_N]
        self.tokens_BL, self.unmask_step_BL = self.tokens_BL[rows_N], self.unmask_step_BL[rows_N]
        self.final_B = self.final_B[rows_N]
        self.committed_B, self.block_step_B = self.committed_B[rows_N], self.block_step_B[rows_N]
        self.num_forwards_B, self.num_steps_B = self.num_forwards_B[rows_N], self.num_steps_B[rows_N]
        self.cache.keep_rows(rows_N)

    def frontier(self, mask_token_id: int) -> Tensor:
        """First unknown position of each row `[B]`: everything before it is known."""
        return (self.tokens_BL == mask_token_id).long().argmax(1)


@torch.no_grad()
def generate(
    model: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    rng: Rng = None,
    on_step: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[list[Rollout], DecodeStats]:
    """Decode a batch of prompts (token ids, each at least one token). Rows come back in order.

    `on_step(row indices, tokens)` is called after every step, for live display. Deterministic given `rng`, of
    which lossless decoding takes one for the batch.
    """
    if not prompts:
        return [], DecodeStats()
    if config.mode == "lossless":
        assert not isinstance(rng, Sequence)
        return generate_lossless(model, prompts, config, rng)
    fmt: Format = "preserve" if config.mode == "ar" else model.spec.format
    grid = Grid(block_size=1) if config.mode == "ar" else model.spec.block_grid
    rows = start_rows(model, prompts, config, grid)
    finished: dict[int, tuple[Rollout, DecodeStats]] = {}
    while len(rows.index_B):
        denoise_step(model, rows, config, grid, fmt, rng)
        if on_step is not None:
            on_step(rows.index_B, rows.tokens_BL)
        collect_finished(rows, model, config, grid, finished)
    return in_order(finished)


def start_rows(
    model: DiffusionLM, prompts: Sequence[Sequence[int]], config: DecodeConfig, grid: Grid
) -> Rows:
    """Rows with room for the longest prompt, the response and one block more."""
    longest = max(len(ids) for ids in prompts)
    capacity = longest + config.max_new_tokens + 2 * max(grid.block_size, model.spec.block_size) + 1
    return Rows.start(prompts, capacity, model.spec.mask_token_id, model.device)


def denoise_step(
    model: DiffusionLM, rows: Rows, config: DecodeConfig, grid: Grid, fmt: Format, rng: Rng
) -> None:
    """Commit what is newly known, propose tokens for each row's block, reveal some of them."""
    mask_id, block_size = model.spec.mask_token_id, grid.block_size
    frontier_B = rows.frontier(mask_id)
    start_B = grid.block_start(frontier_B, rows.num_prompt_B)
    if fmt == "preserve":  # slot i-1 predicts token i; the frontier's prediction comes from a clean slot
        clean_from_B = torch.minimum(rows.committed_B, frontier_B - 1)
        clean_to_B, noised_from_B, noised_to_B = frontier_B, frontier_B, start_B + block_size - 1
    else:
        clean_from_B, clean_to_B = rows.committed_B, start_B
        noised_from_B, noised_to_B = start_B, start_B + block_size
    clean = span_slots(rows, clean_from_B, clean_to_B, grid, fmt, group=CLEAN)
    noised = span_slots(rows, noised_from_B, noised_to_B, grid, fmt, group=1)
    hidden_BSH, num_forwards = model.decode_hidden(join_slots(clean, noised), rows.cache)
    rows.committed_B = clean_to_B
    rows.num_forwards_B = rows.num_forwards_B + num_forwards
    rows.num_steps_B = rows.num_steps_B + 1
    vetoed_B = torch.zeros_like(frontier_B, dtype=torch.bool)
    checks = fmt == "preserve" and config.mode != "ar" and config.veto_below > 0
    if checks:
        vetoed_B = veto(model, rows, clean, hidden_BSH, frontier_B, config, rng)

    positions_BT = start_B[:, None] + torch.arange(block_size, device=start_B.device)
    masked_BT = (rows.tokens_BL.gather(1, positions_BT) == mask_id) & ~vetoed_B[:, None]
    row_M, offset_M = masked_BT.nonzero(as_tuple=True)
    target_M = positions_BT[row_M, offset_M]
    num_clean = clean.ids_BS.shape[1]
    if fmt == "preserve":
        from_noised_M = num_clean + target_M - 1 - frontier_B[row_M]
        from_clean_M = (clean_to_B - clean_from_B)[row_M] - 1
        column_M = torch.where(target_M == frontier_B[row_M], from_clean_M, from_noised_M)
    else:
        column_M = num_clean + offset_M
    is_clean_M = (target_M == frontier_B[row_M]) if model.spec.format == "preserve" else None
    logits_MV = model.logits(hidden_BSH[row_M, column_M], is_clean_M)
    rng = rows.rng_at(rng, row_M)
    ids_M, confidence_M = propose_tokens(logits_MV, config.temperature, config.top_k, config.top_p, rng)

    reveal(rows, masked_BT, (row_M, offset_M, target_M), (ids_M, confidence_M), config)
    unjudged_B = frontier_B + 1 if checks else rows.frontier(mask_id)
    rows.final_B = torch.where(vetoed_B, rows.final_B, unjudged_B)


def reveal(
    rows: Rows,
    masked_BT: Tensor,
    places: tuple[Tensor, Tensor, Tensor],
    proposals: tuple[Tensor, Tensor],
    config: DecodeConfig,
) -> None:
    """Write the proposed tokens that the remasking rule chooses.

    `places`: row, offset in the block and position of every masked token; `proposals`: token and confidence.
    """
    (row_M, offset_M, position_M), (ids_M, confidence_M) = places, proposals
    block_size = masked_BT.shape[1]
    confidence_BT = torch.zeros(masked_BT.shape, device=masked_BT.device)
    confidence_BT[row_M, offset_M] = confidence_M
    steps = min(config.denoising_steps or block_size, block_size)
    num_B = num_to_reveal(rows.block_step_B, block_size, steps)
    revealed_BT = choose_revealed(
        confidence_BT, masked_BT, num_B, config.remasking, config.confidence_threshold
    )
    chosen_M = revealed_BT[row_M, offset_M]
    row_N, position_N = row_M[chosen_M], position_M[chosen_M]
    rows.tokens_BL[row_N, position_N] = ids_M[chosen_M]
    rows.unmask_step_BL[row_N, position_N] = rows.num_steps_B[row_N]
    is_block_done_B = (revealed_BT == masked_BT).all(1)
    rows.block_step_B = torch.where(is_block_done_B, 0, rows.block_step_B + 1)


def veto(
    model: DiffusionLM,
    rows: Rows,
    clean: Slots,
    hidden_BSH: Tensor,
    frontier_B: Tensor,
    config: DecodeConfig,
    rng: Rng,
) -> Tensor:
    """Take back what the AR model does not believe; bool `[B]`: rows where that happened.

    The clean slot of token t - 1 holds the AR model's prediction of token t, so committing a draft also
    judges it. The first token below the floor is replaced by the AR model's own, and everything after it is
    masked again.
    """
    mask_id = model.spec.mask_token_id
    judged_BS = clean.positions_BS + 1
    is_draft_BS = (clean.group_BS == CLEAN) & (judged_BS < frontier_B[:, None])
    is_draft_BS &= judged_BS >= rows.num_prompt_B[:, None]
    row_M, column_M = is_draft_BS.nonzero(as_tuple=True)
    position_M = judged_BS[row_M, column_M]
    logits_MV = model.logits(hidden_BSH[row_M, column_M], torch.ones_like(row_M, dtype=torch.bool))
    token_M = rows.tokens_BL[row_M, position_M]
    is_bad_M = logits_MV.softmax(-1).gather(-1, token_M[:, None])[:, 0] < config.veto_below
    is_bad_M &= token_M != logits_MV.argmax(-1)
    bad_BL = torch.zeros_like(rows.tokens_BL, dtype=torch.bool)
    bad_BL[row_M[is_bad_M], position_M[is_bad_M]] = True
    vetoed_B = bad_BL.any(1)
    first_B = bad_BL.long().argmax(1)
    is_first_M = is_bad_M & (position_M == first_B[row_M])
    row_N, position_N = row_M[is_first_M], position_M[is_first_M]
    rng = rows.rng_at(rng, row_N)
    ids_N, _ = propose_tokens(logits_MV[is_first_M], config.temperature, config.top_k, config.top_p, rng)

    column_L = torch.arange(rows.tokens_BL.shape[1], device=frontier_B.device)
    retract_BL = vetoed_B[:, None] & (column_L >= first_B[:, None])
    rows.tokens_BL = rows.tokens_BL.masked_fill(retract_BL, mask_id)
    rows.unmask_step_BL = rows.unmask_step_BL.masked_fill(retract_BL, NEVER)
    rows.tokens_BL[row_N, position_N] = ids_N
    rows.unmask_step_BL[row_N, position_N] = rows.num_steps_B[row_N]
    rows.committed_B = torch.where(vetoed_B, first_B, rows.committed_B)
    rows.final_B = torch.where(vetoed_B, first_B + 1, rows.final_B)
    return vetoed_B


def span_slots(rows: Rows, from_B: Tensor, to_B: Tensor, grid: Grid, fmt: Format, group: int) -> Slots:
    """Slots for the positions [from, to) of each row, left-aligned, padded to the widest row."""
    width = max(int((to_B - from_B).max()), 0)
    positions_BS = from_B[:, None] + torch.arange(width, device=from_B.device)
    valid_BS = positions_BS < to_B[:, None]
    positions_BS = torch.where(valid_BS, positions_BS, 0)
    if group == CLEAN:
        reach_BS = clean_reach(positions_BS, rows.num_prompt_B[:, None], grid, fmt)
    else:
        reach_BS = (from_B - 1)[:, None].expand_as(positions_BS)
    group_BS = torch.full_like(positions_BS, group)
    return make_slots(rows.tokens_BL.gather(1, positions_BS), positions_BS, reach_BS, group_BS, valid_BS)


def collect_finished(
    rows: Rows,
    model: DiffusionLM,
    config: DecodeConfig,
    grid: Grid,
    finished: dict[int, tuple[Rollout, DecodeStats]],
) -> None:
    """Move rows whose known prefix holds a stop token or reached the length cap out of `rows`."""
    frontier_B = torch.minimum(rows.frontier(model.spec.mask_token_id), rows.final_B)
    column_L = torch.arange(rows.tokens_BL.shape[1], device=frontier_B.device)
    in_response_BL = (column_L >= rows.num_prompt_B[:, None]) & (column_L < frontier_B[:, None])
    stops = torch.tensor(model.spec.stop_token_ids, device=frontier_B.device)
    is_stop_BL = torch.isin(rows.tokens_BL, stops) & in_response_BL
    has_stop_B = is_stop_BL.any(1)
    num_response_B = torch.where(has_stop_B, is_stop_BL.long().argmax(1) + 1, frontier_B) - rows.num_prompt_B
    done_B = has_stop_B | (num_response_B >= config.max_new_tokens)
    if not done_B.any():
        return
    for row in done_B.nonzero()[:, 0].tolist():
        num_prompt = int(rows.num_prompt_B[row])
        num_response = min(int(num_response_B[row]), config.max_new_tokens)
        reason: FinishReason = "stop" if has_stop_B[row] and num_response == num_response_B[row] else "length"
        last = num_prompt + num_response - 1
        end = int(grid.block_start(last, num_prompt)) + grid.block_size
        tokens = rows.tokens_BL[row].tolist()
        rollout = Rollout(
            prompt_ids=tuple(tokens[:num_prompt]),
            response_ids=tuple(tokens[num_prompt:end]),
            unmask_step=tuple(rows.unmask_step_BL[row, num_prompt:end].tolist()),
            num_response=num_response,
            finish_reason=reason,
            num_forwards=int(rows.num_forwards_B[row]),
            num_steps=int(rows.num_steps_B[row]),
        )
        stats = DecodeStats(num_response, rollout.num_forwards, rollout.num_steps)
        finished[int(rows.index_B[row])] = (rollout, stats)
    rows.keep(~done_B)


def in_order(finished: dict[int, tuple[Rollout, DecodeStats]]) -> tuple[list[Rollout], DecodeStats]:
    pairs = [finished[i] for i in sorted(finished)]
    return [rollout for rollout, _ in pairs], sum((stats for _, stats in pairs), DecodeStats())


@dataclass(slots=True)
class Draft:
    """Proposed tokens after each row's last known token, and (sampling) the distributions they were drawn
    from.
    """

    ids_BD: Tensor
    probs_BDV: Tensor | None = None

    @property
    def length(self) -> int:
        return self.ids_BD.shape[1]


@torch.no_grad()
def generate_lossless(
    model: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    rng: torch.Generator | None = None,
) -> tuple[list[Rollout], DecodeStats]:
    """Draft with noised slots, verify with clean ones: exactly the AR model's output, in fewer forwards.

    One-forward form: after the clean slots [u, d_1 .. d_m] stands one group of masks per possible number k of
    accepted tokens, so the forward that verifies a draft also holds the draft that follows. Two-forward form:
    only the forwards without a draft to verify carry a group. Needs the `preserve` format.
    """
    assert model.spec.format == "preserve", "only preserve computes clean slots with the AR weights"
    grid = Grid(block_size=1)
    rows = start_rows(model, prompts, config, grid)
    draft = Draft(torch.zeros((len(prompts), 0), dtype=torch.long, device=model.device))
    finished: dict[int, tuple[Rollout, DecodeStats]] = {}
    while len(rows.index_B):
        draft = verify_and_draft(model, rows, draft, config, rng)
        active_B = rows.index_B
        collect_finished(rows, model, config, grid, finished)
        kept_B = torch.isin(active_B, rows.index_B)
        probs_BDV = draft.probs_BDV[kept_B] if draft.probs_BDV is not None else None
        draft = Draft(draft.ids_BD[kept_B], probs_BDV)
    return in_order(finished)


def verify_and_draft(
    model: DiffusionLM, rows: Rows, draft: Draft, config: DecodeConfig, rng: torch.Generator | None
) -> Draft:
    """One step: accept the draft's valid prefix and one token more; return the next draft."""
    mask_id, num_draft = model.spec.mask_token_id, draft.length
    frontier_B = rows.frontier(mask_id)
    batch_B = torch.arange(len(frontier_B), device=frontier_B.device)
    drafted_BD = frontier_B[:, None] + torch.arange(num_draft, device=frontier_B.device)
    rows.tokens_BL.scatter_(1, drafted_BD, draft.ids_BD)
    clean_from_B = torch.minimum(rows.committed_B, frontier_B - 1)
    one_grid = Grid(block_size=1)
    slots = span_slots(rows, clean_from_B, frontier_B + num_draft, one_grid, "preserve", group=CLEAN)
    num_clean = slots.ids_BS.shape[1]
    has_groups = config.one_forward or num_draft == 0
    if has_groups:
        slots = join_slots(slots, draft_groups(frontier_B, num_draft, model.spec))
    hidden_BSH, num_forwards = model.decode_hidden(slots, rows.cache)
    rows.num_forwards_B = rows.num_forwards_B + num_forwards
    rows.num_steps_B = rows.num_steps_B + 1

    anchor_B = frontier_B - 1 - clean_from_B
    columns_BD = anchor_B[:, None] + torch.arange(num_draft + 1, device=frontier_B.device)
    teacher_BDV = model.logits(
        hidden_BSH.gather(1, spread(columns_BD, hidden_BSH)), torch.ones_like(columns_BD, dtype=torch.bool)
    )
    accepted_B, next_B = accept(teacher_BDV, draft, config, rng)

    rows.tokens_BL.scatter_(
        1, drafted_BD, torch.where(drafted_BD < (frontier_B + accepted_B)[:, None], draft.ids_BD, mask_id)
    )
    rows.tokens_BL[batch_B, frontier_B + accepted_B] = next_B
    rows.unmask_step_BL = torch.where(
        (rows.tokens_BL != mask_id) & (rows.unmask_step_BL == NEVER),
        rows.num_steps_B[:, None],
        rows.unmask_step_BL,
    )
    rows.committed_B = frontier_B + accepted_B
    rows.final_B = frontier_B + accepted_B + 1
    if not has_groups:
        return Draft(draft.ids_BD[:, :0])
    group_size = model.spec.block_size - 1
    first_B = num_clean + accepted_B * group_size
    group_BD = first_B[:, None] + torch.arange(group_size, device=first_B.device)
    student_BDV = model.logits(hidden_BSH.gather(1, spread(group_BD, hidden_BSH)))
    return propose_draft(student_BDV, config, rng)


def draft_groups(frontier_B: Tensor, num_draft: int, spec: DiffusionSpec) -> Slots:
    """For each k in 0..num_draft: block_size - 1 masks after the token that follows k accepted ones."""
    size = spec.block_size - 1
    accepted_S = torch.arange(num_draft + 1, device=frontier_B.device).repeat_interleave(size)
    offset_S = torch.arange(size, device=frontier_B.device).repeat(num_draft + 1)
    reach_BS = frontier_B[:, None] - 1 + accepted_S
    positions_BS = reach_BS + 1 + offset_S
    ids_BS = torch.full_like(positions_BS, spec.mask_token_id)
    group_BS = (accepted_S + 1).expand_as(positions_BS)
    return make_slots(ids_BS, positions_BS, reach_BS, group_BS, torch.ones_like(ids_BS, dtype=torch.bool))


def accept(
    teacher_BDV: Tensor, draft: Draft, config: DecodeConfig, rng: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """How many draft tokens survive `[B]`, and the teacher's token after them `[B]`.

    Greedy: the longest prefix equal to the arg-max. Sampling: accept d with probability min(1, p(d)/q(d));
    the first rejected place is drawn from max(p - q, 0), so the output follows p exactly (speculative
    sampling, arXiv 2211.17192).
    """
    num_draft = draft.length
    batch_B = torch.arange(len(teacher_BDV), device=teacher_BDV.device)
    if config.temperature == 0:
        best_BD = teacher_BDV.argmax(-1)
        accepted_B = (best_BD[:, :num_draft] == draft.ids_BD).long().cumprod(1).sum(1)
        return accepted_B, best_BD[batch_B, accepted_B]
    shape = teacher_BDV.shape
    p_BDV = sampling_probs(teacher_BDV.flatten(0, 1), config.temperature, config.top_k, config.top_p).view(
        shape
    )
    if num_draft == 0:
        return torch.zeros_like(batch_B), draw(p_BDV[:, 0], rng)
    assert draft.probs_BDV is not None
    p_BD = p_BDV[:, :num_draft].gather(-1, draft.ids_BD[..., None])[..., 0]
    q_BD = draft.probs_BDV.gather(-1, draft.ids_BD[..., None])[..., 0]
    coin_BD = torch.rand(p_BD.shape, generator=rng, device=p_BD.device)
    accepted_B = (coin_BD * q_BD < p_BD).long().cumprod(1).sum(1)
    q_padded_BDV = torch.cat([draft.probs_BDV, torch.zeros_like(p_BDV[:, :1])], 1)
    rest_BV = (p_BDV[batch_B, accepted_B] - q_padded_BDV[batch_B, accepted_B]).clamp_min(0)
    # p == q up to rounding leaves nothing to draw from; then p itself is the right distribution.
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, p_BDV[batch_B, accepted_B])
    return accepted_B, draw(rest_BV, rng)


def propose_draft(student_BDV: Tensor, config: DecodeConfig, rng: torch.Generator | None) -> Draft:
    if config.temperature == 0:
        return Draft(student_BDV.argmax(-1))
    flat_MV = student_BDV.flatten(0, 1)
    probs_MV = sampling_probs(flat_MV, config.temperature, config.top_k, config.top_p)
    ids_BD = draw(probs_MV, rng).view(student_BDV.shape[:2])
    return Draft(ids_BD, probs_MV.view(student_BDV.shape))


def spread(columns_BD: Tensor, hidden_BSH: Tensor) -> Tensor:
    """Column indices in the shape that `gather` wants."""
    return columns_BD[..., None].expand(-1, -1, hidden_BSH.shape[-1])
