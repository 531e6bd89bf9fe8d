"""Prompts in, rollouts out: continuous batching around one step per mode.

Waiting prompts join as rows finish, and their prefill rides in the same forward as everyone else's step; at
most `batch_size` rows are active and the cache is allocated once. Greedy output and random draws of a row
depend on its prompt and seed, not on the rows beside it (up to floating-point rounding). Not here: which
prompts, what to train on, text.

Shape suffixes: B rows, L row capacity.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from ..modeling.kv_cache import DecodeCache
from ..modeling.slots import Format, Grid
from .decode_config import DecodeConfig, Mode
from .decode_state import DecodeState, Request
from .denoise import denoise_step
from .lossless import DraftPolicy, lossless_step
from .rollout import FinishReason, Rollout

OnStep = Callable[[Tensor, Tensor, Tensor], None]
FindEnd = Callable[[Sequence[int]], int | None]
Seeds = torch.Generator | Sequence[int] | None


class Decoder:
    """Rows that decode together, and requests that wait for their places. `generate` runs one to its end; a
    server feeds it while it runs.
    """

    def __init__(
        self,
        model: DiffusionLM,
        config: DecodeConfig,
        num_rows: int,
        max_length: int,
        on_step: OnStep | None = None,
    ) -> None:
        """At most `num_rows` at once; `max_length` bounds prompt and response of a request together."""
        spec = model.spec
        self.model, self.config, self.num_rows, self.on_step = model, config, num_rows, on_step
        self.grid = grid_of(config.mode, spec)
        capacity = max_length + 2 * spec.block_size + 1
        self.cache = DecodeCache(num_rows, capacity + spec.block_size**2, model.device)
        self.waiting: deque[Request] = deque()
        self.find_end: dict[int, FindEnd] = {}
        """Of the requests that have one."""
        self._start = partial(
            DecodeState.start,
            capacity=capacity,
            mask_token_id=spec.mask_token_id,
            draft_length=spec.block_size - 1,
        )
        self._advance = step_of(model, self.cache, config, self.grid)
        self.rows = self._start([])

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting) or len(self.rows) > 0

    @torch.inference_mode()
    def step(self) -> dict[int, Rollout]:
        """Let requests join, one forward for every row; the responses that are complete now, by index."""
        num_joining = min(self.num_rows - len(self.rows), len(self.waiting))
        if num_joining:
            self.rows.join(self._start([self.waiting.popleft() for _ in range(num_joining)]))
        rows, finished = self.rows, dict[int, Rollout]()
        before_BL = rows.tokens_BL.clone() if self.on_step is not None else rows.tokens_BL
        self._advance(rows)
        if self.on_step is not None:
            self.on_step(rows.index_B, rows.tokens_BL, rows.tokens_BL != before_BL)
        done_B = collect_finished(rows, self.model, self.config, self.grid, finished, self.find_end)
        if done_B.any():
            rows.keep(~done_B, self.cache)
        for index in finished:
            self.find_end.pop(index, None)
        return finished

    @torch.inference_mode()
    def drop(self, indices: Collection[int]) -> None:
        """Forget requests that nobody waits for any more."""
        for index in indices:
            self.find_end.pop(index, None)
        self.waiting = deque(request for request in self.waiting if request.index not in indices)
        keep_B = ~torch.isin(self.rows.index_B, torch.tensor([*indices], dtype=torch.long))
        self.rows.keep(keep_B, self.cache)


def generate(
    model: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    rng: Seeds = None,
    on_step: OnStep | None = None,
    find_end: FindEnd | None = None,
) -> list[Rollout]:
    """Decode prompts (token ids, each at least one token). Rollouts come back in the order of the prompts.

    A prompt with mask ids in it is a template whose gaps are filled (ValueError where that cannot be).
    `on_step(prompt indices [B], tokens [B, L], revealed [B, L])` is called after every step; `revealed` marks
    what the step wrote. `find_end(response ids)` returns how many tokens to keep once a response is complete,
    else None: stop strings. Deterministic given `rng`, which seeds each row or is the seed of each prompt.
    """
    requests = make_requests(prompts, rng, config.max_new_tokens)
    if not requests:
        return []
    if any(model.spec.mask_token_id in ids for ids in prompts):
        check_can_infill(model, config)
    longest = max(len(ids) for ids in prompts)
    num_rows = min(config.batch_size, len(requests))
    decoder = Decoder(model, config, num_rows, longest + config.max_new_tokens, on_step)
    decoder.waiting.extend(sorted(requests, key=lambda request: len(request.ids)))
    if find_end is not None:
        decoder.find_end = dict.fromkeys(range(len(prompts)), find_end)
    finished: dict[int, Rollout] = {}
    while decoder.is_busy:
        finished |= decoder.step()
    return [finished[i] for i in range(len(prompts))]


def check_can_infill(model: DiffusionLM, config: DecodeConfig) -> None:
    """A template's text after a gap must survive, but what the AR model judges is cut off there."""
    if config.mode in ("ar", "lossless"):
        raise ValueError(
            f"a prompt holds mask tokens (id {model.spec.mask_token_id}), and mode {config.mode!r} writes "
            "from left to right only: fill gaps with static, threshold, entropy or left_to_right."
        )
    if model.spec.format == "preserve" and config.ar_accept_threshold > 0:
        raise ValueError(
            f"a prompt holds mask tokens (id {model.spec.mask_token_id}), and ar_accept_threshold "
            f"({config.ar_accept_threshold}) would take back the text after a gap: set ar_accept_threshold=0."
        )


def make_requests(prompts: Sequence[Sequence[int]], rng: Seeds, max_new_tokens: int) -> list[Request]:
    """One per prompt, named by its place."""
    if not isinstance(rng, Sequence):
        device = rng.device if rng is not None else "cpu"
        rng = torch.randint(2**62, (len(prompts),), generator=rng, device=device).tolist()
    return [
        Request(place, ids, seed, max_new_tokens)
        for place, (ids, seed) in enumerate(zip(prompts, rng, strict=True))
    ]


def grid_of(mode: Mode, spec: DiffusionSpec) -> Grid:
    """The blocks that a mode writes in: the AR model commits token by token."""
    return Grid(block_size=1) if mode in ("ar", "lossless") else spec.block_grid


def step_of(
    model: DiffusionLM, cache: DecodeCache, config: DecodeConfig, grid: Grid
) -> Callable[[DecodeState], None]:
    """The function that advances the rows by one forward."""
    if config.mode == "lossless":
        assert model.spec.format == "preserve", "only preserve computes clean slots with the AR weights"
        overhead = config.forward_overhead
        if overhead is None:
            overhead = 32.0 if model.device.type == "cpu" else 512.0
        policy = DraftPolicy(model.spec.block_size - 1, overhead)
        return lambda rows: lossless_step(model, rows, cache, config, policy)
    fmt: Format = "preserve" if config.mode == "ar" else model.spec.format
    return lambda rows: denoise_step(model, rows, cache, config, grid, fmt)


def collect_finished(
    rows: DecodeState,
    model: DiffusionLM,
    config: DecodeConfig,
    grid: Grid,
    finished: dict[int, Rollout],
    find_end: Mapping[int, FindEnd],
) -> Tensor:
    """Record rows whose known prefix holds a stop or reached its limit; bool `[B]`: which."""
    frontier_B = torch.minimum(rows.frontier(model.spec.mask_token_id), rows.final_B)
    column_L = torch.arange(rows.tokens_BL.shape[1])
    in_response_BL = (column_L >= rows.num_prompt_B[:, None]) & (column_L < frontier_B[:, None])
    is_stop_BL = torch.isin(rows.tokens_BL, torch.tensor(model.spec.stop_token_ids)) & in_response_BL
    has_stop_B = is_stop_BL.any(1)
    num_response_B = torch.where(has_stop_B, is_stop_BL.long().argmax(1) + 1, frontier_B) - rows.num_prompt_B
    for row, index in enumerate(rows.index_B.tolist() if find_end else ()):
        if index in find_end:
            first, count = int(rows.num_prompt_B[row]), int(num_response_B[row])
            end = find_end[index](rows.tokens_BL[row, first : first + count].tolist())
            if end is not None:
                has_stop_B[row], num_response_B[row] = True, end
    done_B = has_stop_B | (num_response_B >= rows.limit_B)
    for row in done_B.nonzero()[:, 0].tolist():
        num_response = min(int(num_response_B[row]), int(rows.limit_B[row]))
        is_stop = bool(has_stop_B[row]) and num_response == int(num_response_B[row])
        finished[int(rows.index_B[row])] = make_rollout(
            rows, row, num_response, "stop" if is_stop else "length", grid, config.logprobs
        )
    return done_B


def make_rollout(
    rows: DecodeState, row: int, num_response: int, reason: FinishReason, grid: Grid, logprobs: bool
) -> Rollout:
    num_prompt = int(rows.num_prompt_B[row])
    last = num_prompt + num_response
    end = int(grid.block_start(last - 1, num_prompt)) + grid.block_size
    tokens = rows.tokens_BL[row].tolist()
    return Rollout(
        prompt_ids=tuple(tokens[:num_prompt]),
        response_ids=tuple(tokens[num_prompt:end]),
        unmask_step=tuple(rows.unmask_step_BL[row, num_prompt:end].tolist()),
        num_response=num_response,
        finish_reason=reason,
        logprobs=tuple(rows.logprob_BL[row, num_prompt:last].tolist()) if logprobs else (),
        num_forwards=int(rows.num_forwards_B[row]),
        num_steps=int(rows.num_steps_B[row]),
    )
