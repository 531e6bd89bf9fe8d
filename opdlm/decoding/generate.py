"""The decode loop with continuous batching: prompts to rollouts, one step of the mode at a time.

At most `batch_size` rows are active, in a cache that is allocated once. When rows finish, waiting prompts
join, and their prefill shares the forward pass with the steps of the other rows, unless its mask would be too
large: then `prefill` computes the prompts before, in parts. A server computes a long prompt in parts of which
a step takes one, so that the other rows go on (chunked prefill). The output of a row depends on its prompt
and seed only, not on the other rows (up to floating-point rounding).

Shape suffixes: B rows, L row capacity.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from ..modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from ..modeling.kv_cache import DecodeCache, Packed, PrefixCache
from ..modeling.slots import CLEAN, Format, Grid
from .decode_config import DecodeConfig, Mode, check_is_read
from .decode_state import DecodeState, LogitsProcessor, Processors, Request
from .denoise import denoise_step
from .draft_policy import DraftPolicy, ForwardCost, clock, measure_forward_cost
from .lossless import NUM_CANDIDATES, lossless_step
from .rollout import FinishReason, Rollout

OnStep = Callable[[Tensor, Tensor, Tensor], None]
"""(index of the request [B], tokens [B, L], revealed [B, L]), called after every step."""
FindEnd = Callable[[Sequence[int]], int | None]
"""Response ids -> the number of tokens to keep if the response is complete, else None."""
Seeds = torch.Generator | Sequence[int] | None
PROCESSED_MODES = ("ar", "lossless")
"""Modes in which logits processors act: every token is the AR model's."""
PREFILL_PAIRS = 2**25
"""Largest number of (slot, key) pairs in the mask of a forward that computes prompts."""


@dataclass(slots=True)
class Joining:
    """A row whose prompt is computed in parts, in a cache row behind the active ones."""

    row: int
    state: DecodeState
    end_B: Tensor
    """Where its prompt ends (`prompt_end`)."""

    @property
    def num_left(self) -> int:
        return int(self.end_B - self.state.committed_B)


class Decoder:
    """Active rows and waiting requests. `generate` decodes a fixed list of requests; a server adds requests
    while it decodes.
    """

    def __init__(
        self,
        model: DiffusionLM,
        config: DecodeConfig,
        num_rows: int,
        max_length: int,
        on_step: OnStep | None = None,
        prefill_slots: int | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """`config`: what the requests share (`Request.config`: what they do not). `num_rows`: largest number
        of active rows. `max_length`: largest number of tokens of a prompt and its response together.
        `prefill_slots`: prompt tokens that join a step; longer prompts are computed in parts of half as many.
        With it, `prefixes` lends what earlier texts have in common with a prompt, in format preserve.
        """
        spec = model.spec
        self.model, self.config, self.num_rows, self.on_step = model, config, num_rows, on_step
        self.grid, self.format = grid_of(config.mode, spec), format_of(config.mode, spec)
        longest_draft = max(spec.block_size - 1, config.lookup_length)
        capacity = max_length + longest_draft + spec.block_size + 2
        num_noised = (longest_draft + 1) * spec.block_size
        self.cache = DecodeCache(num_rows, capacity + num_noised, model.device)
        self.waiting: deque[Request] = deque()
        self.joining: list[Joining] = []
        self.prefill_slots, self.prefixes = prefill_slots, prefixes if self.format == "preserve" else None
        self.find_end: dict[int, FindEnd] = {}
        """By index of the request."""
        self.processors: dict[int, LogitsProcessor] = {}
        self._start = partial(
            DecodeState.start,
            capacity=capacity,
            mask_token_id=spec.mask_token_id,
            draft_length=longest_draft,
            num_candidates=NUM_CANDIDATES if config.draft_sampling == "rejection" else 0,
        )
        self._advance = step_of(
            model, self.cache, config, self.grid, self.format, self.processors, self.is_closed
        )
        self.state = self._start([])

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.joining) or len(self.state) > 0

    def is_closed(self) -> bool:
        """Whether no request waits. In a server one may always come."""
        return self.prefill_slots is None and not self.waiting

    @torch.inference_mode()
    def step(self) -> dict[int, Rollout]:
        """Add waiting requests to free rows and advance every row by one step. Returns the rollouts that are
        complete now, by index of the request.
        """
        free_rows = {*range(len(self.state), self.num_rows)} - {one.row for one in self.joining}
        requests = [self.waiting.popleft() for _ in range(min(len(free_rows), len(self.waiting)))]
        self.processors |= {one.index: one.logits_processor for one in requests if one.logits_processor}
        if self.prefill_slots is not None:
            rows = sorted(free_rows, reverse=True)
            for row, request in zip(rows, requests, strict=False):
                state = self._start([request])
                end_B = prompt_end(state, self.model.spec, self.grid, self.format)
                if self.prefixes is not None:
                    known = self.prefixes.load(request.ids[: int(end_B)], self.cache, row)
                    state.committed_B = torch.full_like(end_B, known)
                self.joining.append(Joining(row, state, end_B))
            self._join_in_parts(self.prefill_slots)
        elif requests:
            first_row = len(self.state)
            self.state.join(self._start(requests))
            prefill(self.model, self.state, self.cache, first_row, self.grid, self.format)
        if not len(self.state):
            return {}
        state, finished = self.state, dict[int, Rollout]()
        before_BL = state.tokens_BL.clone() if self.on_step is not None else state.tokens_BL
        self._advance(state)
        max_steps_B = state.max_steps(self.grid.block_size)
        assert (state.num_steps_B <= max_steps_B).all(), "no token can be revealed: every logit is -inf"
        if self.on_step is not None:
            self.on_step(state.index_B, state.tokens_BL, state.tokens_BL != before_BL)
        done_B = collect_finished(state, self.model, self.grid, finished, self.find_end)
        if self.prefixes is not None:
            for row in done_B.nonzero()[:, 0].tolist():
                ids = state.tokens_BL[row, : int(state.committed_B[row])].tolist()
                self.prefixes.save(ids, self.cache, row)
        if done_B.any():
            state.keep(~done_B, self.cache)
        self._forget(finished)
        return finished

    def _join_in_parts(self, num_slots: int) -> None:
        """Let the shortest prompts join the next step, of at most `num_slots` tokens together, and compute a
        part of the oldest of the others.
        """
        shortest_first = sorted(self.joining, key=lambda one: one.num_left)
        totals = accumulate(one.num_left for one in shortest_first)
        for one in [one for one, total in zip(shortest_first, totals, strict=True) if total <= num_slots]:
            self._activate(one)
        for one in self.joining[:1]:
            rows, width = range(one.row, one.row + 1), max(num_slots // 2, self.grid.block_size)
            compute_part(self.model, one.state, self.cache, rows, one.end_B, width, self.grid, self.format)

    def _activate(self, one: Joining) -> None:
        """Move a row behind the active ones."""
        last, first_free = one.row, len(self.state)
        length = max(int(other.state.committed_B) for other in self.joining)
        rows_2 = torch.tensor([last, first_free])
        self.cache.move(rows_2, rows_2.flip(0), length)
        self.joining.remove(one)
        for other in self.joining:
            if other.row == first_free:
                other.row = last
        self.state.join(one.state)

    def _forget(self, indices: Collection[int]) -> None:
        for index in indices:
            self.find_end.pop(index, None)
            self.processors.pop(index, None)

    @torch.inference_mode()
    def drop(self, indices: Collection[int]) -> None:
        """Cancel the requests with these indices, active or waiting."""
        self._forget(indices)
        self.waiting = deque(request for request in self.waiting if request.index not in indices)
        self.joining = [one for one in self.joining if int(one.state.index_B) not in indices]
        keep_B = ~torch.isin(self.state.index_B, torch.tensor([*indices], dtype=torch.long))
        self.state.keep(keep_B, self.cache)


def generate(
    model: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    rng: Seeds = None,
    on_step: OnStep | None = None,
    find_end: FindEnd | Sequence[FindEnd] | None = None,
    logits_processors: Sequence[LogitsProcessor | None] | None = None,
) -> list[Rollout]:
    """Decode prompts of at least one token id each; rollouts in the order of the prompts.

    A prompt that contains mask ids is a template whose gaps are filled: ValueError in modes that cannot fill
    gaps. `on_step` is called after every step; its `revealed` marks the positions that the step changed.
    `find_end`, one or one per prompt, ends responses, for example at stop strings. `rng` draws the seed of
    each prompt or lists the seeds; the output is deterministic given the seeds. `logits_processors`, one per
    prompt, change the AR model's logits: ValueError in modes other than `ar` and `lossless`. Every row ends
    within `DecodeState.max_steps`.
    """
    requests = make_requests(prompts, rng, config, logits_processors)
    if not requests:
        return []
    if config.mode not in PROCESSED_MODES and any(logits_processors or ()):
        raise ValueError(f"`mode={config.mode}` takes no logits processors: use ar or lossless.")
    if any(model.spec.mask_token_id in ids for ids in prompts):
        check_can_infill(model, config)
    longest = max(len(ids) for ids in prompts)
    num_rows = min(config.batch_size, len(requests))
    decoder = Decoder(model, config, num_rows, longest + config.max_new_tokens, on_step)
    decoder.waiting.extend(sorted(requests, key=lambda request: len(request.ids)))
    if find_end is not None:
        ends = find_end if isinstance(find_end, Sequence) else [find_end] * len(prompts)
        decoder.find_end = dict(enumerate(ends))
    finished: dict[int, Rollout] = {}
    while decoder.is_busy:
        finished |= decoder.step()
    return [finished[i] for i in range(len(prompts))]


def check_settings(config: DecodeConfig, spec: DiffusionSpec) -> None:
    """ValueError for settings by which the checkpoint cannot decode."""
    if config.mode == "lossless" and spec.format == "sdar":
        raise ValueError(
            "`mode=lossless` needs a preserve checkpoint; this one is sdar. Use static or threshold."
        )
    check_is_read(config, ["draft_sampling"], is_sampled=True)
    if config.mode not in ("ar", "lossless") and not spec.can_denoise:
        raise ValueError(
            f"`mode={config.mode}` denoises blocks in part, and this student computes whole drafts only "
            "(format.noise=uniform or format.draft_attention=causal): use `mode=lossless`."
        )
    if config.denoising_steps is not None and config.denoising_steps > spec.block_size:
        raise ValueError(
            f"denoising_steps ({config.denoising_steps}) must lie between 1 and the block size "
            f"({spec.block_size})."
        )


def check_can_infill(model: DiffusionLM, config: DecodeConfig) -> None:
    """ValueError for modes in which the text after a gap of a template would be lost."""
    if config.mode in ("ar", "lossless"):
        raise ValueError(
            f"a prompt contains mask tokens (id {model.spec.mask_token_id}), and mode {config.mode!r} writes "
            "from left to right only: fill gaps with static, threshold, entropy or left_to_right."
        )
    if model.spec.format == "preserve" and config.ar_accept_threshold > 0:
        raise ValueError(
            f"a prompt contains mask tokens (id {model.spec.mask_token_id}), and ar_accept_threshold "
            f"({config.ar_accept_threshold}) would mask the text after a gap: set ar_accept_threshold=0."
        )


def make_requests(
    prompts: Sequence[Sequence[int]],
    rng: Seeds,
    config: DecodeConfig,
    logits_processors: Sequence[LogitsProcessor | None] | None = None,
) -> list[Request]:
    """One request per prompt; its index is that of the prompt."""
    logits_processors = logits_processors or [None] * len(prompts)
    if not isinstance(rng, Sequence):
        device = rng.device if rng is not None else "cpu"
        rng = torch.randint(2**62, (len(prompts),), generator=rng, device=device).tolist()
    return [
        Request(index, ids, seed, config, logits_processor=processor)
        for index, (ids, seed, processor) in enumerate(zip(prompts, rng, logits_processors, strict=True))
    ]


def grid_of(mode: Mode, spec: DiffusionSpec) -> Grid:
    """The block grid of a mode: blocks of one token where the AR model decodes or verifies."""
    return Grid(block_size=1) if mode in ("ar", "lossless") else spec.block_grid


def format_of(mode: Mode, spec: DiffusionSpec) -> Format:
    """The format of the slots of a mode."""
    return "preserve" if mode in ("ar", "lossless") else spec.format


def prefill(
    model: DiffusionLM, state: DecodeState, cache: DecodeCache, first_row: int, grid: Grid, fmt: Format
) -> None:
    """Compute the prompts of the rows from `first_row` on, up to what their first step needs, in forwards of
    at most PREFILL_PAIRS pairs; nothing if the step itself can compute them within that limit.
    """
    end_B = prompt_end(state, model.spec, grid, fmt)
    longest = int(end_B[first_row:].max())
    if (len(state) - first_row) * longest**2 <= PREFILL_PAIRS:
        return
    num_rows = max(1, PREFILL_PAIRS // longest**2)
    width = max(PREFILL_PAIRS // (num_rows * longest), grid.block_size)
    row_B = torch.arange(len(state))
    for first in range(first_row, len(state), num_rows):
        last = min(first + num_rows, len(state))
        stop_B = torch.where((row_B >= first) & (row_B < last), end_B, state.committed_B)
        while (state.committed_B < stop_B).any():
            compute_part(model, state, cache, range(last), stop_B, width, grid, fmt)


def prompt_end(state: DecodeState, spec: DiffusionSpec, grid: Grid, fmt: Format) -> Tensor:
    """The end `[B]` of what is computed of each prompt before the first step."""
    frontier_B = state.frontier(spec.mask_token_id)
    return frontier_B - 1 if fmt == "preserve" else grid.block_start(frontier_B, state.num_prompt_B)


def compute_part(
    model: DiffusionLM,
    state: DecodeState,
    cache: DecodeCache,
    rows: range,
    stop_B: Tensor,
    width: int,
    grid: Grid,
    fmt: Format,
) -> None:
    """Compute up to `width` more tokens of each prompt, in the cache rows `rows`."""
    next_B = grid.block_start(state.committed_B + width, state.num_prompt_B)  # blocks stay whole
    next_B = torch.minimum(stop_B, next_B)
    packed, _ = Packed.of(state.span(state.committed_B, next_B, grid, fmt, group=CLEAN))
    packed = replace(packed, row_N=packed.row_N + rows.start)
    _, num_forwards = model.packed_hidden(packed, rows.stop, cache)
    state.num_forwards_B = state.num_forwards_B + num_forwards * (next_B > state.committed_B)
    state.committed_B = next_B


def step_of(
    model: DiffusionLM,
    cache: DecodeCache,
    config: DecodeConfig,
    grid: Grid,
    fmt: Format,
    processors: Processors,
    is_closed: Callable[[], bool],
) -> Callable[[DecodeState], None]:
    """The function that advances a state by one step of the mode."""
    if config.mode == "lossless":
        assert model.spec.format == "preserve", "only preserve computes clean slots with the AR weights"
        policy = policy_for(model, config)

        def step(state: DecodeState) -> None:
            started = clock(model.device)
            is_prefill = bool((state.num_steps_B == 0).any())
            lossless_step(model, state, cache, config, policy, processors, is_closed=is_closed())
            if policy.follows_clock and not is_prefill:
                policy.settle(clock(model.device) - started)

        return step
    return lambda state: denoise_step(model, state, cache, config, grid, fmt, processors)


def policy_for(model: DiffusionLM, config: DecodeConfig) -> DraftPolicy:
    """A new policy for a given cost of a forward; else the model's own, which goes on learning."""
    draft_length = model.spec.block_size - 1
    if config.forward_overhead is not None:
        return DraftPolicy(draft_length, ForwardCost.linear(config.forward_overhead))
    known: dict[bool, DraftPolicy] = model.draft_policies
    copies = config.lookup_length > 0
    if copies not in known:
        other = known.get(not copies)
        cost = other.cost if other else measure_forward_cost(model)
        known[copies] = DraftPolicy(draft_length, cost, follows_clock=True)
    return known[copies]


def collect_finished(
    state: DecodeState,
    model: DiffusionLM,
    grid: Grid,
    finished: dict[int, Rollout],
    find_end: Mapping[int, FindEnd],
) -> Tensor:
    """Add to `finished` the rows whose final tokens contain a stop or fill the limit; bool `[B]`: which."""
    frontier_B = torch.minimum(state.frontier(model.spec.mask_token_id), state.final_B)
    column_L = torch.arange(state.tokens_BL.shape[1])
    in_response_BL = (column_L >= state.num_prompt_B[:, None]) & (column_L < frontier_B[:, None])
    in_response_BL &= ~state.ignore_eos_B[:, None]
    is_stop_BL = torch.isin(state.tokens_BL, torch.tensor(model.spec.stop_token_ids)) & in_response_BL
    has_stop_B = is_stop_BL.any(1)
    num_response_B = torch.where(has_stop_B, is_stop_BL.long().argmax(1) + 1, frontier_B) - state.num_prompt_B
    for row, index in enumerate(state.index_B.tolist() if find_end else ()):
        if index in find_end:
            first, count = int(state.num_prompt_B[row]), int(num_response_B[row])
            end = find_end[index](state.tokens_BL[row, first : first + count].tolist())
            if end is not None:
                has_stop_B[row], num_response_B[row] = True, end
    done_B = has_stop_B | (num_response_B >= state.limit_B)
    for row in done_B.nonzero()[:, 0].tolist():
        num_response = min(int(num_response_B[row]), int(state.limit_B[row]))
        is_stop = bool(has_stop_B[row]) and num_response == int(num_response_B[row])
        finished[int(state.index_B[row])] = make_rollout(
            state, row, num_response, "stop" if is_stop else "length", grid
        )
    return done_B


def make_rollout(
    state: DecodeState, row: int, num_response: int, reason: FinishReason, grid: Grid
) -> Rollout:
    """The rollout of one row, up to the end of its last block."""
    num_prompt = int(state.num_prompt_B[row])
    last = num_prompt + num_response
    end = int(grid.block_start(last - 1, num_prompt)) + grid.block_size
    tokens = state.tokens_BL[row].tolist()
    return Rollout(
        prompt_ids=tuple(tokens[:num_prompt]),
        response_ids=tuple(tokens[num_prompt:end]),
        unmask_step=tuple(state.unmask_step_BL[row, num_prompt:end].tolist()),
        num_response=num_response,
        finish_reason=reason,
        logprobs=tuple(state.logprob_BL[row, num_prompt:last].tolist()) if state.has_logprobs_B[row] else (),
        num_forwards=int(state.num_forwards_B[row]),
        num_steps=int(state.num_steps_B[row]),
        num_replaced=int(state.is_replaced_BL[row, num_prompt:last].sum()),
    )
