"""Is lossless decoding AR decoding, over many prompts, and what does the cache buy rollouts?

    python benchmarks/decoding.py MODEL PROMPTS.jsonl --limit 1000 --json out.json

Greedy: lossless against `transformers.generate`; a difference counts as a tie where, at the first differing
token, the AR model's two best logits lie within 1e-4. Sampling: lossless against AR decoding with the same
seed, response by response. Rollouts: threshold decoding at temperature 1 against the same decoding that
prefills each row again in every step (`tests/simple_loop.py`, one row at a time). Speed tables: `opdlm
bench`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from simple_loop import simple_denoise

from opdlm.bench import hf_responses
from opdlm.data import load_tasks
from opdlm.diffusion import DiffusionLM, backbone
from opdlm.generate import DecodeConfig, generate, waiting_rows
from opdlm.models import load, load_causal_lm

Ids = tuple[int, ...]


def is_tie(model: DiffusionLM, prompt: Ids, ours: Ids, theirs: Ids) -> bool:
    """Whether the AR model's two best logits are equal up to rounding where the responses part."""
    place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    with model.teacher_weights() as teacher:
        ids_1L = torch.tensor([[*prompt, *theirs[:place]]])
        hidden_1LH = backbone(teacher)(input_ids=ids_1L, use_cache=False).last_hidden_state
    best, second = model.logits(hidden_1LH[0, -1:], torch.tensor([True]))[0].topk(2).values.tolist()
    return best - second < 1e-4


def check_greedy(model: DiffusionLM, folder: str, prompts: list[Ids]) -> dict[str, int]:
    config = DecodeConfig(mode="lossless", max_new_tokens=80)
    ours = [rollout.text_ids for rollout in generate(model, prompts, config)[0]]
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
        )[0]
        for mode in ("lossless", "ar")
    )
    same = sum(a.text_ids == b.text_ids for a, b in zip(lossless, ar, strict=True))
    return {"prompts": len(prompts), "identical": same}


def time_rollouts(model: DiffusionLM, prompts: list[Ids]) -> dict[str, float]:
    """CPU seconds per response of both sides."""
    config = DecodeConfig(mode="threshold", max_new_tokens=80, temperature=1.0, veto_below=0.0)
    seeds = {index: seed for index, _, seed in waiting_rows(prompts, torch.Generator().manual_seed(0))}
    few = min(16, len(prompts))
    started = time.process_time()
    simple = [simple_denoise(model, prompts[i], config, seeds[i]) for i in range(few)]
    simple_seconds = (time.process_time() - started) / few
    started = time.process_time()
    rollouts, _ = generate(model, prompts, config, torch.Generator().manual_seed(0))
    engine_seconds = (time.process_time() - started) / len(prompts)
    same = sum(rollouts[i].text_ids == simple[i] for i in range(few))
    return {
        "simple_seconds": simple_seconds,
        "engine_seconds": engine_seconds,
        "speedup": simple_seconds / engine_seconds,
        "identical": same / few,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder")
    parser.add_argument("prompts")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--json")
    options = parser.parse_args()
    model, tokenizer = load(options.folder)
    tasks = load_tasks(options.prompts, tokenizer, model.spec.mask_token_id, limit=None)
    prompts = [task.prompt.ids for task in tasks][:: max(1, len(tasks) // options.limit)][: options.limit]
    results = {
        "greedy": check_greedy(model, options.folder, prompts),
        "sampling": check_sampling(model, prompts),
        "rollouts": time_rollouts(model, prompts[:256]),
    }
    print(json.dumps(results, indent=2))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
