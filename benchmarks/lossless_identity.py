"""Is greedy lossless output that of `transformers.generate`? Counts responses, and explains each difference.

    python benchmarks/lossless_identity.py runs/smollm2/model prompts.jsonl --dtype float32 --out result.json

Both decode the same prompts in the same precision. A slot costs next to nothing (`--forward-overhead`), so
that drafts are made whether or not they pay here. Where two responses part, the plain model is run once over
the text up to there, without a cache, and the logits of the two tokens are compared. `spacings` is their
difference in units of the precision's spacing at that size: a few are a rounding tie, more would be a bug.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from opdlm.checkpoints.load import load, load_causal_lm
from opdlm.data.prompts import load_tasks
from opdlm.data.rows import evenly_spaced
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.generate import generate
from opdlm.evaluation.retention import versions
from opdlm.evaluation.speed import hf_responses
from opdlm.files import write_atomic
from opdlm.training.metrics import PhaseProgress


@torch.inference_mode()
def difference(model: PreTrainedModel, text: list[int], ours: int, theirs: int) -> dict[str, Any]:
    """The two tokens that follow `text`, and how far their logits lie apart."""
    logits_V = model(input_ids=torch.tensor([text])).logits[0, -1].float()
    left, right = float(logits_V[ours]), float(logits_V[theirs])
    bits = -math.log2(torch.finfo(model.dtype).eps)
    spacing = 2.0 ** (math.floor(math.log2(max(abs(left), abs(right), 1e-6))) - bits)
    return {
        "ours": ours,
        "theirs": theirs,
        "logits": [left, right],
        "largest": float(logits_V.max()),
        "spacings": abs(left - right) / spacing,
    }


def compare(
    folder: str, prompts: str, dtype: str, limit: int, max_new_tokens: int, forward_overhead: float
) -> dict[str, Any]:
    """Decode with both and explain every response that differs."""
    model, tokenizer = load(folder, dtype)
    plain = load_causal_lm(folder, dtype)
    ids = evenly_spaced(
        [task.prompt.ids for task in load_tasks(prompts, tokenizer, model.spec.mask_token_id)], limit
    )
    config = DecodeConfig(
        mode="lossless", max_new_tokens=max_new_tokens, batch_size=8, forward_overhead=forward_overhead
    )
    with PhaseProgress(f"lossless and generate, {dtype}", len(ids), Console(stderr=True)) as progress:
        differences, rollouts = [], []
        for first in range(0, len(ids), config.batch_size):
            batch = ids[first : first + config.batch_size]
            ours = generate(model, batch, config)
            theirs = hf_responses(plain, model, batch, config)
            rollouts += ours
            for prompt, rollout, response in zip(batch, ours, theirs, strict=True):
                pairs = zip(rollout.text_ids, response, strict=False)
                place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
                if place is not None:
                    text = [*prompt, *response[:place]]
                    found = difference(plain, text, rollout.text_ids[place], response[place])
                    differences.append({"place": place} | found)
            progress.advance(len(batch))
    return {
        "folder": Path(folder).parent.name,
        "prompts": Path(prompts).name,
        "dtype": str(plain.dtype).removeprefix("torch."),
        "num_prompts": len(ids),
        "num_identical": len(ids) - len(differences),
        "max_new_tokens": max_new_tokens,
        "forward_overhead": forward_overhead,
        "tokens_per_forward": DecodeStats.of(rollouts).tokens_per_forward,
        "most_spacings": max((found["spacings"] for found in differences), default=0.0),
        "differences": differences,
        "versions": versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("prompts")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--forward-overhead", type=float, default=1000.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = compare(
        options.folder,
        options.prompts,
        options.dtype,
        options.limit,
        options.max_new_tokens,
        options.forward_overhead,
    )
    print({key: value for key, value in result.items() if key not in ("differences", "versions")})
    if options.out is not None:
        write_atomic(options.out, json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
