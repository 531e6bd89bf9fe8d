"""Prompts in, rollouts out: continuous batching around one step per mode.

Waiting prompts join as rows finish, shortest first, and their prefill rides in the same forward as everyone
else's step; at most `batch_size` rows are active and the cache is allocated once. Greedy output and random
draws of a row depend on its prompt and seed, not on the rows beside it (up to floating-point rounding). Not
here: which prompts, what to train on, text.

Shape suffixes: B rows, L row capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .blocks import Format, Grid
from .cache import DecodeCache
from .denoise import denoise_step
from .diffusion import DiffusionLM
from .lossless import Economy, lossless_step
from .records import FinishReason, Rollout
from .rows import DecodeConfig, Rows
from .rows import Mode as Mode

OnStep = Callable[[Tensor, Tensor, Tensor], None]
FindEnd = Callable[[Sequence[int]], int | None]
Seeds = torch.Generator | Sequence[int] | None


@torch.inference_mode()
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
    waiting = waiting_rows(prompts, rng)
    if not waiting:
        return []
    if any(model.spec.mask_token_id in ids for ids in prompts):
        check_can_infill(model, config)
    grid = Grid(block_size=1) if config.mode in ("ar", "lossless") else model.spec.block_grid
    block_size = model.spec.block_size
    longest = max(len(ids) for _, ids, _ in waiting)
    capacity = longest + config.max_new_tokens + 2 * block_size + 1
    num_rows = min(config.batch_size, len(waiting))
    cache = DecodeCache(num_rows, capacity + block_size * block_size, model.device)
    start = partial(
        Rows.start,
        capacity=capacity,
        mask_token_id=model.spec.mask_token_id,
        max_new_tokens=config.max_new_tokens,
        draft_length=block_size - 1,
    )
    step = step_of(model, cache, config, grid)
    finished: dict[int, Rollout] = {}
    rows = start(waiting[:num_rows])
    waiting = waiting[num_rows:]
    while len(rows):
        before_BL = rows.tokens_BL.clone() if on_step is not None else rows.tokens_BL
        step(rows)
        if on_step is not None:
            on_step(rows.index_B, rows.tokens_BL, rows.tokens_BL != before_BL)
        done_B = collect_finished(rows, model, config, grid, finished, find_end)
        if done_B.any():
            rows.keep(~done_B, cache)
            num_joining = min(num_rows - len(rows), len(waiting))
            if num_joining:
                rows.join(start(waiting[:num_joining]))
                waiting = waiting[num_joining:]
    return [finished[i] for i in range(len(prompts))]


def check_can_infill(model: DiffusionLM, config: DecodeConfig) -> None:
    """A template's text after a gap must survive, but what the AR model judges is cut off there."""
    if config.mode in ("ar", "lossless"):
        raise ValueError(
            f"a prompt holds mask tokens (id {model.spec.mask_token_id}), and mode {config.mode!r} writes "
            "from left to right only: fill gaps with static, threshold, entropy or left_to_right."
        )
    if model.spec.format == "preserve" and config.veto_below > 0:
        raise ValueError(
            f"a prompt holds mask tokens (id {model.spec.mask_token_id}), and the AR veto (veto_below "
            f"{config.veto_below}) would take back the text after a gap: set veto_below=0."
        )


def waiting_rows(prompts: Sequence[Sequence[int]], rng: Seeds) -> list[tuple[int, Sequence[int], int]]:
    """(index, ids, seed) of every prompt, shortest first."""
    if not isinstance(rng, Sequence):
        device = rng.device if rng is not None else "cpu"
        rng = torch.randint(2**62, (len(prompts),), generator=rng, device=device).tolist()
    return sorted(zip(range(len(prompts)), prompts, rng, strict=True), key=lambda row: len(row[1]))


def step_of(
    model: DiffusionLM, cache: DecodeCache, config: DecodeConfig, grid: Grid
) -> Callable[[Rows], None]:
    """The function that advances the rows by one forward."""
    if config.mode == "lossless":
        assert model.spec.format == "preserve", "only preserve computes clean slots with the AR weights"
        overhead = config.forward_overhead
        if overhead is None:
            overhead = 32.0 if model.device.type == "cpu" else 512.0
        economy = Economy(model.spec.block_size - 1, overhead)
        return lambda rows: lossless_step(model, rows, cache, config, economy)
    fmt: Format = "preserve" if config.mode == "ar" else model.spec.format
    return lambda rows: denoise_step(model, rows, cache, config, grid, fmt)


def collect_finished(
    rows: Rows,
    model: DiffusionLM,
    config: DecodeConfig,
    grid: Grid,
    finished: dict[int, Rollout],
    find_end: FindEnd | None,
) -> Tensor:
    """Record rows whose known prefix holds a stop or reached its limit; bool `[B]`: which."""
    frontier_B = torch.minimum(rows.frontier(model.spec.mask_token_id), rows.final_B)
    column_L = torch.arange(rows.tokens_BL.shape[1])
    in_response_BL = (column_L >= rows.num_prompt_B[:, None]) & (column_L < frontier_B[:, None])
    is_stop_BL = torch.isin(rows.tokens_BL, torch.tensor(model.spec.stop_token_ids)) & in_response_BL
    has_stop_B = is_stop_BL.any(1)
    num_response_B = torch.where(has_stop_B, is_stop_BL.long().argmax(1) + 1, frontier_B) - rows.num_prompt_B
    if find_end is not None:
        for row, (first, count) in enumerate(
            zip(rows.num_prompt_B.tolist(), num_response_B.tolist(), strict=True)
        ):
            end = find_end(rows.tokens_BL[row, first : first + count].tolist())
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
    rows: Rows, row: int, num_response: int, reason: FinishReason, grid: Grid, logprobs: bool
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
