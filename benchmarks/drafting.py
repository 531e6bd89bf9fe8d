"""How well drafts fare on prompts that nobody trained on: FOLDER/drafting.json (runs/drafting).

    python benchmarks/drafting.py off_policy=runs/a/model draft=runs/b/model --data DATA --out FOLDER

Greedy lossless decoding with the fewest forwards, so that the numbers say what was learnt and not what it
costs here; `with_copies`: where the text repeats itself, drafts are copied from it. DATA holds
gsm8k/test.jsonl, mt_bench/question.jsonl and humaneval/HumanEval.jsonl. Intervals are 95 % over resampled
prompts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import opdlm
from opdlm.data.prompts import load_tasks
from opdlm.data.rows import evenly_spaced
from opdlm.decoding.decode_config import COPIED, DecodeConfig
from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.draft_policy import MOST_DRAFTS
from opdlm.decoding.rollout import Rollout
from opdlm.evaluation.bench import acceptance_by_place
from opdlm.evaluation.intervals import NUM_RESAMPLES, percentiles
from opdlm.evaluation.retention import versions
from opdlm.files import write_atomic

KINDS = {
    "gsm8k": ("gsm8k/test.jsonl", lambda row: row["question"]),
    "mt_bench": ("mt_bench/question.jsonl", lambda row: row["turns"][0]),
    "humaneval": ("humaneval/HumanEval.jsonl", lambda row: row["prompt"]),
}


def prompts_of(data: Path, kind: str, limit: int, out: Path) -> str:
    """A file of `limit` prompts, evenly spaced over the source."""
    name, text_of = KINDS[kind]
    rows = [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]
    path = out / f"{kind}.jsonl"
    chosen = evenly_spaced(rows, limit)
    write_atomic(path, "".join(json.dumps({"prompt": text_of(row)}) + "\n" for row in chosen))
    return str(path)


def tokens_per_forward(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The mean over all forwards, and its interval over resampled prompts."""
    counts = np.array([(one.num_response, one.num_forwards) for one in rollouts])
    rng = np.random.default_rng(0)
    drawn_RB = rng.integers(len(counts), size=(NUM_RESAMPLES, len(counts)))
    sums_R2 = counts[drawn_RB].sum(1)
    interval = percentiles(sums_R2[:, 0] / sums_R2[:, 1], 0.95)
    return {"tokens_per_forward": DecodeStats.of(rollouts).tokens_per_forward, "interval": interval}


def measure(folder: str, files: dict[str, str], max_new_tokens: int) -> dict[str, Any]:
    """All kinds of prompts, decoded by one folder."""
    model, tokenizer = opdlm.load(folder)
    config = DecodeConfig(
        mode="lossless", max_new_tokens=max_new_tokens, batch_size=4, forward_overhead=MOST_DRAFTS
    )
    found = {}
    for kind, file in files.items():
        tasks = load_tasks(file, tokenizer, model.spec.mask_token_id)
        rollouts = opdlm.generate(model, [task.prompt.ids for task in tasks], config)
        acceptance = acceptance_by_place(rollouts, model.spec.block_size - 1)
        copying = replace(config, prompt_lookup_num_tokens=COPIED)
        found[kind] = tokens_per_forward(rollouts) | {
            "acceptance": [round(share, 3) for share in acceptance],
            "with_copies": tokens_per_forward(
                opdlm.generate(model, [task.prompt.ids for task in tasks], copying)
            ),
        }
        print(folder, kind, json.dumps(found[kind]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=24, help="prompts of each kind")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/drafting"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    files = {kind: prompts_of(options.data, kind, options.limit, options.out) for kind in KINDS}
    students = {
        name: measure(folder, files, options.max_new_tokens)
        for name, _, folder in (pair.partition("=") for pair in options.folders)
    }
    settings = {"limit": options.limit, "max_new_tokens": options.max_new_tokens, "versions": versions()}
    result = {"settings": settings, "students": students}
    write_atomic(options.out / "drafting.json", json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
