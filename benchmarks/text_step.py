"""Time of one update of `opdlm train` by objective, and of a mixed batch in one forward against two.

transformers      a stock training step: labels, causal attention without a mask, AdamW
autoregressive, masked_diffusion (next_position), dual (half of the rows each): updates of `opdlm train`
two forwards      dual, with autoregressive rows and masked rows in separate forwards

    OMP_NUM_THREADS=1 python benchmarks/text_step.py --out docs/results/text_step.json

The sides alternate; medians over rounds are reported. Random weights (bundled:byte, or --shape), random text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

from opdlm.config.text import load_text_config
from opdlm.data.documents import RowBatch
from opdlm.environment import quiet_libraries
from opdlm.evaluation.retention import versions
from opdlm.objectives.masking import rates_at
from opdlm.text.pipeline import load_text_inputs
from opdlm.text.trainer import TextRun, row_micro_batch, rows_and_masks, start_run, train_step
from opdlm.training.loop import update_weights

OBJECTIVES = {
    "autoregressive": ["objective.name=autoregressive"],
    "masked_diffusion": ["objective.prediction=next_position"],
    "dual": ["objective.name=dual", "objective.prediction=next_position", "objective.ar_share=0.5"],
}


def make_run(args: argparse.Namespace, folder: str, name: str) -> TextRun:
    text = Path(folder) / "text.jsonl"
    if not text.exists():
        letters = torch.randint(
            97, 123, (args.rows * args.length * 4,), generator=torch.Generator().manual_seed(0)
        )
        text.write_text(json.dumps({"text": bytes(letters.tolist()).decode()}) + "\n")
    overrides = [
        "model.path=bundled:byte",
        "model.from_scratch=true",
        f"data.path={text}",
        f"data.sequence_length={args.length}",
        f"train.rows_per_update={args.rows}",
        f"train.micro_batch_rows={args.rows}",
        f"output_dir={folder}/{name}",
        *(f"model.shape.{text}" for text in args.shape),
        *OBJECTIVES[name],
    ]
    inputs = load_text_inputs(load_text_config(None, overrides))
    return start_run(inputs.model, inputs.rows, inputs.config)


def stock_step(run: TextRun) -> Callable[[int], None]:
    """The step of a plain transformers loop on the same rows."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(run.model.student.config, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(number: int) -> None:
        first = number * run.config.train.rows_per_update
        rows = [run.rows.at(i) for i in range(first, first + run.config.train.rows_per_update)]
        ids_BL = RowBatch.of(rows).ids_BR[:, :-1]
        model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_two_forwards(run: TextRun, step: int) -> None:
    """The update of `train_step`, with its two kinds of rows in separate forwards."""
    config, num_rows = run.config, run.config.train.rows_per_update
    rows = [run.rows.at(i) for i in range(step * num_rows, (step + 1) * num_rows)]
    row_batch, masks = rows_and_masks(rows, rates_at(config.masking, step), config, step)
    halves = [range(num_rows // 2), range(num_rows // 2, num_rows)]
    batches = [row_micro_batch(row_batch, masks, run.model.spec, config, step, list(half)) for half in halves]
    total = sum(batch.num_ar + batch.num_masked for batch in batches)
    update_weights(run, ((batch, batch.weight_M / total) for batch in batches), len(batches))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--shape", nargs="*", default=[], metavar="key=value", help="entries of config.json")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: make_run(args, folder, name) for name in OBJECTIVES}
        sides: dict[str, Callable[[int], object]] = {"transformers": stock_step(runs["autoregressive"])}
        sides |= {name: partial(train_step, run) for name, run in runs.items()}
        sides["two forwards"] = partial(in_two_forwards, runs["dual"])
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for round_number in range(args.rounds + 1):
            for name, step in sides.items():
                begin = time.perf_counter()
                step(round_number)
                if round_number:  # the first one warms up
                    seconds[name].append(time.perf_counter() - begin)
    typical = {name: median(values) for name, values in seconds.items()}
    mean = (typical["autoregressive"] + typical["masked_diffusion"]) / 2
    for name, value in typical.items():
        print(f"{name:17} {1000 * value:8.1f} ms   {value / typical['transformers']:.2f} x transformers")
    ratios = {
        "dual / mean of the pure objectives": typical["dual"] / mean,
        "dual / two forwards": typical["dual"] / typical["two forwards"],
    }
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    if args.out is not None:
        settings = {"rows": args.rows, "length": args.length, "rounds": args.rounds, "shape": args.shape}
        record = {"settings": settings, "versions": versions(), "median_seconds": typical, "ratios": ratios}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
