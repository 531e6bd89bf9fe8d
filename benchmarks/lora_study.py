"""Which adapters match full training at the same budget: rank, targets, scaling and initialisation.

    python benchmarks/lora_study.py --out docs/results/lora
    python benchmarks/lora_study.py --out docs/results/lora --variants rank-8 dora --steps 24

Every variant converts the bundled teacher (preserve, the tiny recipe) with the same prompts, seed and number
of updates; only the `lora` section differs, and the learning rate of the full copy. An interrupted command
continues: a variant whose JSON has the same settings is not run again. If a variant fails, the others still
run, and the failure is reported at the end. results.json, table.md and lora_study.png are written after every
variant. With one seed, differences of a few points are noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from opdlm.config.rules import load_config
from opdlm.config.sections import Config
from opdlm.distill.pipeline import load_inputs
from opdlm.distill.trainer import start_run, train_step
from opdlm.evaluation.evaluate import evaluate
from opdlm.evaluation.retention import versions
from opdlm.files import write_atomic
from opdlm.reporting.plots import new_figure

ATTENTION = "lora.target_modules=[q_proj,k_proj,v_proj,o_proj]"
VARIANTS: dict[str, tuple[str, ...]] = {
    "rank-4": ("lora.r=4", "lora.alpha=8"),
    "rank-8": ("lora.r=8", "lora.alpha=16"),
    "rank-32": ("lora.r=32", "lora.alpha=64"),
    "rank-32-attention": ("lora.r=32", "lora.alpha=64", ATTENTION),
    "rank-32-rslora": ("lora.r=32", "lora.alpha=11", "lora.use_rslora=true"),
    "rank-4-dora": ("lora.r=4", "lora.alpha=8", "lora.use_dora=true"),
    "rank-32-gaussian": ("lora.r=32", "lora.alpha=64", "lora.init=gaussian"),
    "rank-32-orthogonal": ("lora.r=32", "lora.alpha=64", "lora.init=orthogonal"),
    "full-copy": ("lora.enabled=false", "optimizer.learning_rate=1e-3"),
}
"""A full copy takes two forwards per step: one for its drafts, one for the AR model. Its learning rate is a
third of that of LoRA. rank-32-rslora scales by 11 / sqrt(32) = 1.94 and rank-32 by 64 / 32, so that their
results should be close."""
TINY = Path(__file__).parent.parent / "recipes" / "tiny.yaml"


def run_config(variant: str, args: argparse.Namespace) -> Config:
    return load_config(
        TINY,
        [
            f"train.num_steps={args.steps}",
            f"train.seed={args.seed}",
            f"eval.limit={args.limit}",
            "eval.modes=static,threshold,lossless",
            f"output_dir={args.out}",
            *args.set,
            *VARIANTS[variant],
        ],
    )


def measure(config: Config) -> dict[str, Any]:
    """Train one variant and evaluate it in memory."""
    inputs = load_inputs(config)
    run = start_run(inputs.student, inputs.prompts, config)
    trained = [p for p in inputs.student.parameters() if p.requires_grad]
    total = sum(p.numel() for n, p in inputs.student.student.named_parameters() if "lora_" not in n)
    started = time.perf_counter()
    for step in range(config.train.num_steps):
        metrics = train_step(run, step)
        print(f"step {step + 1}/{config.train.num_steps} loss {metrics['loss']:.4f}", flush=True)
    seconds = time.perf_counter() - started
    report, _ = evaluate(run.model.eval(), inputs.tokenizer, inputs.tasks, config.eval)
    modes = {row["name"]: row for row in report.to_dict()["student"]}
    return {
        "trained": sum(p.numel() for p in trained),
        "bytes": sum(p.numel() * p.element_size() for p in trained),
        "parameters": total,
        "rollout_tokens": run.totals["rollout_tokens"],
        "divergence": metrics["divergence"],
        "seconds": seconds,
        "teacher": report.teacher.accuracy,
        "static": modes["static"]["accuracy"],
        "threshold": modes["threshold"]["accuracy"],
        "threshold_tokens_per_forward": modes["threshold"]["tokens_per_forward"],
        "lossless_tokens_per_forward": modes["lossless"]["tokens_per_forward"],
        "lossless_tokens_per_step": modes["lossless"]["tokens_per_step"],
        "lossless_identical": modes["lossless"]["identical_to_teacher"],
    }


def write_table(runs: dict[str, Any], path: Path) -> None:
    lines = [
        "| student | trained | of the model | size | static | threshold | tok/fwd | lossless tok/fwd | "
        "tok/step | = teacher | s per run |",
        "|---|" + "---:|" * 10,
    ]
    for name, run in runs.items():
        lines.append(
            f"| {name} | {run['trained'] / 1e3:.0f} k | {100 * run['trained'] / run['parameters']:.1f} % | "
            f"{run['bytes'] / 2**20:.2f} MiB | {100 * run['static']:.1f} % | "
            f"{100 * run['threshold']:.1f} % | {run['threshold_tokens_per_forward']:.2f} | "
            f"{run['lossless_tokens_per_forward']:.2f} | {run['lossless_tokens_per_step']:.2f} | "
            f"{100 * run['lossless_identical']:.1f} % | {run['seconds']:.0f} |"
        )
    path.write_text("\n".join(lines) + "\n")


def plot(runs: dict[str, Any], path: Path) -> None:
    figure, (axes,) = new_figure(2, 11, 4)
    for axis, unit in zip(axes, ("step", "forward"), strict=True):
        for name, run in runs.items():
            point = (run["bytes"] / 2**20, run[f"lossless_tokens_per_{unit}"])
            axis.scatter(*point)
            axis.annotate(name, point, fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set_ylabel(f"lossless, tokens per {unit}")
        axis.set_xscale("log", base=2)
        axis.margins(x=0.2)
        axis.set_xlabel("trained weights, MiB")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def finished(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The variants that were measured with these settings, in the order of VARIANTS."""
    parts = [(name, out / f"{name}.json") for name in VARIANTS]
    found = {name: json.loads(part.read_text()) for name, part in parts if part.is_file()}
    return {name: part["run"] for name, part in found.items() if part["settings"] == settings}


def write_results(runs: dict[str, Any], settings: dict[str, Any], out: Path) -> None:
    results = {"settings": settings | {"versions": versions()}, "runs": runs}
    write_atomic(out / "results.json", json.dumps(results, indent=1))
    write_table(runs, out / "table.md")
    plot(runs, out / "lora_study.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--limit", type=int, default=10, help="evaluation prompts per skill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="for every variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {"steps": args.steps, "seed": args.seed, "limit": args.limit, "set": args.set}
    failed = []
    for variant in args.variants:
        if variant not in finished(args.out, settings):
            print(variant, flush=True)
            try:
                run = measure(run_config(variant, args))
            except Exception:  # the other variants still run
                traceback.print_exc()
                failed.append(variant)
                continue
            write_atomic(
                args.out / f"{variant}.json", json.dumps({"settings": settings, "run": run}, indent=1)
            )
        write_results(finished(args.out, settings), settings, args.out)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command tries them again")


if __name__ == "__main__":
    main()
