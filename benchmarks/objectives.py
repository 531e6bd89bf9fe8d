"""Quality against training tokens: four objectives in both formats, same teacher, prompts and updates.

    python benchmarks/objectives.py --out docs/results/objectives --steps 48 --every 12
    python benchmarks/objectives.py --out docs/results/objectives --formats sdar  # results add up

Writes a JSON per run, results.json, table.md and a plot; a run whose JSON exists is not repeated. With one
seed, differences of a few points are noise.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from opdlm.config.rules import load_config
from opdlm.config.sections import Config
from opdlm.distill.pipeline import Inputs, load_inputs
from opdlm.distill.trainer import start_run, train_step
from opdlm.evaluation.evaluate import evaluate
from opdlm.evaluation.retention import versions
from opdlm.files import write_atomic
from opdlm.reporting.plots import new_figure

OBJECTIVES = ("sft", "off_policy", "opd_random", "opd")
FORMATS = ("preserve", "sdar")


def run_config(fmt: str, objective: str, args: argparse.Namespace) -> Config:
    """The tiny recipe with one objective, no warm start, one epoch per rollout: the same budget for all."""
    recipe = (
        Path(__file__).parent.parent / "recipes" / ("tiny.yaml" if fmt == "preserve" else "tiny_sdar.yaml")
    )
    return load_config(
        recipe,
        [
            f"loss.objective={objective}",
            f"train.num_steps={args.steps}",
            "format.block_size=4",
            f"train.seed={args.seed}",
            "rollout.prompts_per_step=64",
            "train.rows_per_update=32",
            "train.epochs_per_rollout=1",
            "rollout.warm_start_steps=0",
            "data.path=bundled:prompts.jsonl",
            "data.self_prompts=0",
            f"eval.limit={args.limit}",
            "eval.modes=static,threshold",
            "eval.decode.ar_accept_threshold=0",  # the student's own tokens
        ],
    )


def measure_run(config: Config, every: int) -> list[dict[str, Any]]:
    """Train, and evaluate after every `every` steps."""
    inputs: Inputs = load_inputs(config)
    run = start_run(inputs.student, inputs.prompts, config)
    points = []
    for step in range(config.train.num_steps):
        train_step(run, step)
        if (step + 1) % every == 0:
            report, _ = evaluate(run.model, inputs.tokenizer, inputs.tasks, config.eval)
            point: dict[str, Any] = {
                "tokens": run.totals["rollout_tokens"],
                "teacher": report.teacher.accuracy,
            }
            for mode in report.student:
                point[mode.name] = mode.accuracy
                point[f"{mode.name}_held_out"] = mode.accuracy_held_out
                point[f"{mode.name}_tokens_per_forward"] = mode.tokens_per_forward
            points.append(point)
            print(config.format.name, config.loss.objective, step + 1, point, flush=True)
    return points


def write_table(results: dict[str, Any], path: Path) -> None:
    lines = [
        "| format | objective | tokens seen | static | threshold 0.9 | change | static, held out | tok/fwd |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, run in sorted(results["runs"].items()):
        fmt, objective = name.split("/")
        for point in run["points"]:
            static, threshold = 100 * point["static"], 100 * point["threshold"]
            lines.append(
                f"| {fmt} | {objective} | {point['tokens'] / 1000:.0f} k | {static:.1f} | {threshold:.1f} | "
                f"{threshold - static:+.1f} | {100 * point['static_held_out']:.1f} | "
                f"{point['threshold_tokens_per_forward']:.2f} |"
            )
    path.write_text("\n".join(lines) + "\n")


def plot(results: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(4, 15, 3.4)
    panels = [(fmt, mode) for fmt in FORMATS for mode in ("static", "threshold")]
    for axis, (fmt, mode) in zip(axes[0], panels, strict=True):
        for objective in OBJECTIVES:
            run = results["runs"].get(f"{fmt}/{objective}")
            if run:
                tokens = [point["tokens"] / 1000 for point in run["points"]]
                values = [100 * point[mode] for point in run["points"]]
                axis.plot(tokens, values, marker="o", markersize=3, label=objective)
                axis.axhline(100 * run["points"][-1]["teacher"], color="black", linewidth=0.6)
        axis.set_title(f"{fmt}, {mode}")
        axis.set_xlabel("rollout tokens seen, thousand")
        axis.set_ylim(0, 102)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("exact match, %")
    axes[0][0].legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def is_finished(part: Path, settings: dict[str, Any]) -> bool:
    """Whether this run was measured, with these settings."""
    return part.is_file() and json.loads(part.read_text()).get("settings") == settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--every", type=int, default=12)
    parser.add_argument("--limit", type=int, default=10, help="evaluation prompts per skill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: vars(args)[name] for name in ("steps", "every", "seed", "limit")}
    for fmt in args.formats:
        for objective in args.objectives:
            part = args.out / f"{fmt}-{objective}.json"
            if not is_finished(part, settings):
                started = time.perf_counter()
                points = measure_run(run_config(fmt, objective, args), args.every)
                run = {"settings": settings, "points": points, "seconds": time.perf_counter() - started}
                write_atomic(part, json.dumps(run))
    parts = {f"{f}/{o}": args.out / f"{f}-{o}.json" for f in FORMATS for o in OBJECTIVES}
    runs = {name: json.loads(path.read_text()) for name, path in parts.items() if is_finished(path, settings)}
    results = {"settings": settings | {"versions": versions()}, "runs": runs}
    write_atomic(args.out / "results.json", json.dumps(results, indent=1))
    write_table(results, args.out / "table.md")
    plot(results, args.out / "objectives.png")


if __name__ == "__main__":
    main()
