"""Is a draft token accepted as often as total variation says? docs/results/real/acceptance.json.

    python benchmarks/acceptance.py runs/mine/model prompts.jsonl --limit 24 --out docs/results/real

Sampling at temperature 1 with `draft_sampling=rejection` and the fewest forwards. At every draft token that
was reached, q being the draft's distribution and p the AR model's, 1 - TV(p, q) is the probability that it is
accepted (arXiv 2211.17192, corollary 3.6). By place in the draft: the mean of that, and how often it happened
with its 95 % interval (Wilson).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

import opdlm
from opdlm.data.prompts import load_tasks
from opdlm.decoding import lossless
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import DecodeState
from opdlm.decoding.draft_policy import MOST_DRAFTS
from opdlm.decoding.unmasking import scale_logits
from opdlm.evaluation.retention import versions
from opdlm.files import write_atomic
from opdlm.reporting.plots import DPI, new_figure


class Watched:
    """Stands before `lossless.accept_or_replace` and notes, by place, what it was told and what it did."""

    def __init__(self, draft_length: int) -> None:
        self.inner = lossless.accept_or_replace
        self.predicted: list[list[float]] = [[] for _ in range(draft_length)]
        self.accepted: list[list[bool]] = [[] for _ in range(draft_length)]

    def __call__(
        self,
        logits_MV: Tensor,
        state: DecodeState,
        row_M: Tensor,
        place_M: Tensor,
        position_M: Tensor,
        num_verified_B: Tensor,
    ) -> Tensor:
        chosen_M = self.inner(logits_MV, state, row_M, place_M, position_M, num_verified_B)
        p_MV = scale_logits(logits_MV, state.sampling_B3[row_M]).softmax(-1)
        is_reached = dict.fromkeys(range(len(state)), True)
        for index, (row, place) in enumerate(zip(row_M.tolist(), place_M.tolist(), strict=True)):
            if place >= num_verified_B[row] or not is_reached[row]:
                continue
            p_V, q_V = p_MV[index], torch.zeros_like(p_MV[index])
            probs_C = state.candidate_probs_BDC[row, place].to(p_V)
            q_V.scatter_add_(-1, state.candidates_BDC[row, place].to(p_V.device), probs_C)
            is_reached[row] = bool(chosen_M[index] == state.draft_BD[row, place])
            self.predicted[place].append(float(torch.minimum(p_V, q_V).sum()))
            self.accepted[place].append(is_reached[row])
        return chosen_M


def summarise(watched: Watched) -> list[dict[str, Any]]:
    """A row per place of the draft."""
    rows = []
    for place, (predicted, accepted) in enumerate(zip(watched.predicted, watched.accepted, strict=True)):
        if not accepted:
            continue  # no draft came so far
        interval = binomtest(sum(accepted), len(accepted)).proportion_ci(method="wilson")
        rows.append(
            {
                "place": place + 1,
                "tokens": len(accepted),
                "predicted": sum(predicted) / len(predicted),
                "measured": sum(accepted) / len(accepted),
                "interval": [float(interval.low), float(interval.high)],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted and measured acceptance by place."""
    figure, axes = new_figure(1, 4.5, 3)
    axis: Any = axes[0][0]
    places, measured = [row["place"] for row in rows], [row["measured"] for row in rows]
    errors = [[abs(row["measured"] - row["interval"][side]) for row in rows] for side in (0, 1)]
    axis.errorbar(places, measured, yerr=errors, fmt="o", markersize=4, label="measured, 95 %")
    axis.plot(places, [row["predicted"] for row in rows], "_", markersize=14, label="1 - TV")
    axis.set_ylim(0, 1)
    axis.set_xlabel("place in the draft", fontsize=8)
    axis.set_ylabel("accepted if those before it are", fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts")
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path("docs/results/real"))
    options = parser.parse_args()
    model, tokenizer = opdlm.load(options.folder)
    tasks = load_tasks(options.prompts, tokenizer, model.spec.mask_token_id, limit=options.limit)
    config = DecodeConfig(
        mode="lossless",
        draft_sampling="rejection",
        temperature=1.0,
        max_new_tokens=options.max_new_tokens,
        batch_size=4,
        forward_overhead=MOST_DRAFTS,
    )
    watched = Watched(model.spec.block_size - 1)
    lossless.accept_or_replace = watched
    try:
        opdlm.generate(model, [task.prompt.ids for task in tasks], config, seed=0)
    finally:
        lossless.accept_or_replace = watched.inner
    rows = summarise(watched)
    settings = {"prompts": len(tasks), "file": options.prompts, "max_new_tokens": options.max_new_tokens}
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings | versions(), "places": rows}
    write_atomic(options.out / "acceptance.json", json.dumps(record, indent=1))
    draw(rows, options.out / "acceptance.png")


if __name__ == "__main__":
    main()
