"""Whether lossless decoding equals AR decoding over many prompts, and how much the cache speeds up rollouts.

    python benchmarks/decoding.py MODEL PROMPTS.jsonl --limit 1000 --json out.json

Greedy: lossless against `transformers.generate`. A difference is a tie if the AR model's two best logits at
the first differing token are within 1e-4. Sampling: lossless against AR decoding with the same seed, response
by response.

Rollouts: threshold decoding at temperature 1, 80 tokens each, at batch sizes 1, 8 and 64. Prompts are used as
they are, and lengthened to --prompt-tokens by the prompts before them. The engine is compared with
- `speedup`: `reprefill`, our packed forward in fixed batches, which prefills every row again in every step;
- `simple_speedup`: the simple loop of the tests, one row at a time without packing;
- `upper_bound`: the speedup over `reprefill` if a rollout cost only the AR model's forward over as many
  tokens as ours has slots, without cache, adapter and LM head.
With --compile a compiled forward is timed as well. For speed tables use `opdlm bench`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opdlm.checkpoints.load import load, load_causal_lm
from opdlm.data.prompts import load_tasks
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import DecodeState
from opdlm.decoding.denoise import denoise_step
from opdlm.decoding.generate import collect_finished, generate, make_requests
from opdlm.decoding.rollout import Rollout
from opdlm.evaluation.speed import hf_responses
from opdlm.modeling.compiled import compiled_decoding
from opdlm.modeling.diffusion_lm import DiffusionLM, PackedForward
from opdlm.modeling.kv_cache import DecodeCache

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))
from simple_loop import simple_denoise

Ids = tuple[int, ...]
ROLLOUT = DecodeConfig(mode="threshold", max_new_tokens=80, temperature=1.0, ar_accept_threshold=0.0)
BATCH_SIZES = {1: 8, 8: 32, 64: 128}
"""Batch size -> number of prompts."""


def is_tie(model: DiffusionLM, prompt: Ids, ours: Ids, theirs: Ids) -> bool:
    """Whether the AR model's two best logits at the first differing token are equal up to rounding."""
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    with model.teacher_weights() as teacher:
        ids_1L = torch.tensor([[*prompt, *theirs[:place]]])
        hidden_1LH = teacher.base_model(input_ids=ids_1L, use_cache=False).last_hidden_state
    best, second = model.logits(hidden_1LH[0, -1:], torch.tensor([True]))[0].topk(2).values.tolist()
    return best - second < 1e-4


def check_greedy(model: DiffusionLM, folder: str, prompts: list[Ids]) -> dict[str, int]:
    config = DecodeConfig(mode="lossless", max_new_tokens=80)
    ours = [rollout.text_ids for rollout in generate(model, prompts, config)]
    theirs = hf_responses(load_causal_lm(folder, "float32"), model, prompts, config)
    different = [row for row in zip(prompts, ours, theirs, strict=True) if row[1] != row[2]]
    return {
        "prompts": len(prompts),
        "identical": len(prompts) - len(different),
        "ties": sum(is_tie(model, *row) for row in different),
    }


def check_sampling(model: DiffusionLM, prompts: list[Ids]) -> dict[str, int]:
    lossless, ar = (
        generate(
            model,
            prompts,
            DecodeConfig(mode=mode, max_new_tokens=80, temperature=1.0),
            torch.Generator().manual_seed(0),
        )
        for mode in ("lossless", "ar")
    )
    same = sum(a.text_ids == b.text_ids for a, b in zip(lossless, ar, strict=True))
    return {"prompts": len(prompts), "identical": same}


@torch.inference_mode()
def reprefill(model: DiffusionLM, prompts: list[Ids], config: DecodeConfig) -> list[Rollout]:
    """A simple sampler: fixed batches in the given order, nothing cached between steps."""
    requests = make_requests(prompts, torch.Generator().manual_seed(0), config)
    block_size, grid = model.spec.block_size, model.spec.block_grid
    finished: dict[int, Rollout] = {}
    for first in range(0, len(prompts), config.batch_size):
        batch = requests[first : first + config.batch_size]
        capacity = max(len(request.ids) for request in batch) + config.max_new_tokens + 2 * block_size + 1
        cache = DecodeCache(len(batch), capacity, model.device)
        rows = DecodeState.start(batch, capacity, model.spec.mask_token_id, block_size - 1)
        while len(rows):
            rows.committed_B = torch.zeros_like(rows.committed_B)
            denoise_step(model, rows, cache, config, grid, model.spec.format)
            done_B = collect_finished(rows, model, grid, finished, {})
            rows.keep(~done_B, cache)
    return [finished[i] for i in range(len(prompts))]


@torch.inference_mode()
def tokens_per_second_of_simple_loop(model: DiffusionLM, prompts: list[Ids]) -> float:
    """Tokens per CPU second, one prompt after the other."""
    requests = make_requests(prompts, torch.Generator().manual_seed(0), ROLLOUT)
    started = time.process_time()
    responses = [simple_denoise(model, request.ids, ROLLOUT, request.seed) for request in requests]
    return sum(map(len, responses)) / (time.process_time() - started)


def bare_seconds(ar_model: Any, num_slots: list[int]) -> float:
    """CPU seconds of forwards of the AR model's backbone over `num_slots` tokens each."""
    started = time.process_time()
    with torch.inference_mode():
        for num in num_slots:
            ar_model.base_model(input_ids=torch.ones(1, num, dtype=torch.long), use_cache=False)
    return time.process_time() - started


@contextmanager
def counting(model: DiffusionLM) -> Iterator[list[int]]:
    """Records the number of slots of every forward."""
    num_slots: list[int] = []

    def run(forward: PackedForward) -> torch.Tensor:
        num_slots.append(len(forward.packed))
        return forward.run()

    model.run_packed = run
    yield num_slots
    model.run_packed = PackedForward.run


def time_rollouts(
    model: DiffusionLM, ar_model: Any, prompts: list[Ids], compiles: bool
) -> list[dict[str, float]]:
    """Speed of all samplers on the same prompts and seeds, without stop tokens, so that lengths are equal."""
    found, spec = [], model.spec
    model.spec = replace(spec, stop_token_ids=())
    simple_rate = tokens_per_second_of_simple_loop(model, prompts[: BATCH_SIZES[1]])
    for batch_size, count in BATCH_SIZES.items():
        config, some = replace(ROLLOUT, batch_size=batch_size), prompts[:count]
        started = time.process_time()
        simple = reprefill(model, some, config)
        middle = time.process_time()
        with counting(model) as num_slots:
            rollouts = generate(model, some, config, torch.Generator().manual_seed(0))
        ended = time.process_time()
        same = sum(a.text_ids == b.text_ids for a, b in zip(rollouts, simple, strict=True))
        num_tokens = sum(rollout.num_response for rollout in rollouts)
        compiled = {}
        if compiles:
            with compiled_decoding(model):
                generate(model, some, config, torch.Generator().manual_seed(0))  # compiles
                restarted = time.process_time()
                generate(model, some, config, torch.Generator().manual_seed(0))
                compiled = {"compiled_speedup": (middle - started) / (time.process_time() - restarted)}
        row = {
            "batch_size": batch_size,
            "prompts": len(some),
            "engine_tokens_per_second": num_tokens / (ended - middle),
            "reprefill_tokens_per_second": num_tokens / (middle - started),
            "speedup": (middle - started) / (ended - middle),
            "simple_speedup": num_tokens / (ended - middle) / simple_rate,
            "identical": same / len(some),
            "upper_bound": (middle - started) / bare_seconds(ar_model, num_slots),
            **compiled,
        }
        found.append({key: round(value, 4) for key, value in row.items()})
    model.spec = spec
    return found


def lengthened(prompts: list[Ids], num_tokens: int) -> list[Ids]:
    """Each prompt preceded by the prompts before it (cyclically), cut to its last `num_tokens` tokens."""
    longest = []
    for place in range(len(prompts)):
        ids: Ids = ()
        for back in range(len(prompts)):
            if len(ids) >= num_tokens:
                break
            ids = (*prompts[place - back], *ids)
        longest.append(ids[-num_tokens:])
    return longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder")
    parser.add_argument("prompts")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--only-rollouts", action="store_true", help="time them, check nothing else")
    parser.add_argument("--compile", action="store_true", help="time a compiled forward too")
    parser.add_argument("--json")
    options = parser.parse_args()
    model, tokenizer = load(options.folder)
    tasks = load_tasks(options.prompts, tokenizer, model.spec.mask_token_id, limit=None)
    prompts = [task.prompt.ids for task in tasks][:: max(1, len(tasks) // options.limit)][: options.limit]
    ar_model = load_causal_lm(options.folder, "float32")
    results: dict[str, Any] = {}
    if not options.only_rollouts:
        results["greedy"] = check_greedy(model, options.folder, prompts)
        results["sampling"] = check_sampling(model, prompts)
    results["rollouts"] = time_rollouts(model, ar_model, prompts, options.compile)
    longer = lengthened(prompts, options.prompt_tokens)
    results[f"rollouts after {options.prompt_tokens} tokens"] = time_rollouts(
        model, ar_model, longer, options.compile
    )
    print(json.dumps(results, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
