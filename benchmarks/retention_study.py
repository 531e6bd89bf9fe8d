"""Retention by objective, format and block size over several seeds, with intervals, also on held-out skills.

    python benchmarks/retention_study.py objectives --formats preserve --steps 120 --threads 1 --out OUT
    python benchmarks/retention_study.py blocks --formats preserve --steps 120 --threads 1 --out OUT

Committed: docs/results/retention/{preserve,sdar,blocks_preserve}; docs/results/README.md has their commands.

`objectives`: sft, off_policy, opd_random, opd × preserve, sdar × seeds at block size 4. `blocks`: opd × both
formats × block sizes 4, 8, 16, 32 × seeds. Every run is one conversion and one retention report under
OUT/runs. An interrupted command continues: finished runs are kept, training resumes. Static and threshold
decoding accept every token of the student (eval.decode.ar_accept_threshold=0). results.json, table.md and a
plot are written after every run. The weights of finished runs are deleted unless --keep-weights is given.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console

from opdlm.config.rules import load_config
from opdlm.distill.pipeline import convert_checkpoint
from opdlm.environment import quiet_libraries
from opdlm.evaluation.retention import versions
from opdlm.files import write_atomic
from opdlm.reporting.plots import new_figure

RECIPES = Path(__file__).parent.parent / "recipes"
OBJECTIVES = ("sft", "off_policy", "opd_random", "opd")
FORMATS = {"preserve": "tiny", "sdar": "tiny_sdar"}
BLOCK_SIZES = (4, 8, 16, 32)
ACCURACIES = ("accuracy", "accuracy_seen", "accuracy_held_out")
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t for a two-sided 95 % interval of a mean over seeds, by degrees of freedom."""


@dataclass(frozen=True)
class Cell:
    """One run. `variant` is the objective or the block size."""

    study: str
    fmt: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.fmt}-{self.variant}-seed{self.seed}"

    def settings(self) -> list[str]:
        objective, block_size = ("opd", self.variant) if self.study == "blocks" else (self.variant, "4")
        modes = "static,threshold,lossless" if self.fmt == "preserve" else "static,threshold"
        return [
            f"loss.objective={objective}",
            f"format.block_size={block_size}",
            f"train.seed={self.seed}",
            "rollout.prompts_per_step=64",
            "train.rows_per_update=32",
            "train.epochs_per_rollout=1",
            "rollout.warm_start_steps=0",
            "data.path=bundled:prompts.jsonl",
            f"eval.modes={modes}",
            "eval.decode.ar_accept_threshold=0",
        ]


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    variants = map(str, args.block_sizes) if args.study == "blocks" else args.objectives
    for seed, fmt, variant in itertools.product(args.seeds, args.formats, list(variants)):
        yield Cell(args.study, fmt, variant, seed)


def run_cell(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """The report of one run, read from its file if the run is finished."""
    folder: Path = args.out / "runs" / cell.name
    report_file = args.out / "reports" / f"{cell.name}.json"
    config = load_config(
        RECIPES / f"{FORMATS[cell.fmt]}.yaml",
        [*cell.settings(), f"train.num_steps={args.steps}", f"output_dir={folder}", *args.set],
    )
    settings = {key: value for key, value in config.to_dict().items() if key != "output_dir"}
    if report_file.is_file():
        saved = json.loads(report_file.read_text())
        if saved["settings_of_run"] == settings:
            return saved
        raise SystemExit(f"{report_file} was made with other settings: choose another --out or delete it.")
    model_folder = convert_checkpoint(config, Console(quiet=True))
    report = json.loads((model_folder / "retention.json").read_text())
    results = json.loads((model_folder / "all_results.json").read_text())
    report |= {"settings_of_run": settings, "results": results, "cell": vars(cell)}
    report_file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(report_file, json.dumps(report, indent=1))
    if not args.keep_weights:
        shutil.rmtree(folder)
    return report


def over_seeds(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and half of the 95 % interval over seeds (nan with one seed)."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if len(known) == 1:
        return known[0], math.nan
    return mean(known), T_95.get(len(known) - 1, 1.96) * stdev(known) / math.sqrt(len(known))


def mode_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in [report["teacher"], *report["student"]] if row["name"] == name)


def change_to_threshold(report: dict[str, Any], key: str) -> float | None:
    """Points of accuracy from static to threshold decoding of one student."""
    before, after = (mode_of(report, mode)[key] for mode in ("static", "threshold"))
    return None if before is None or after is None else after - before


def grouped(reports: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for report in reports:
        groups.setdefault((report["cell"]["fmt"], report["cell"]["variant"]), []).append(report)
    return groups


def shown(value: tuple[float, float] | None, scale: float = 100, digits: int = 1) -> str:
    if value is None:
        return "–"
    error = "" if math.isnan(value[1]) else f" ± {scale * value[1]:.{digits}f}"
    return f"{scale * value[0]:.{digits}f}{error}"


def table(reports: Sequence[dict[str, Any]], study: str) -> str:
    label = "block size" if study == "blocks" else "objective"
    lines = [
        f"| format | {label} | mode | accuracy | seen | held out | retention | tok/fwd | KL to teacher |",
        "|---|---|---|" + "---:|" * 6,
    ]
    for (fmt, variant), runs in grouped(reports).items():
        for mode in [row["name"] for row in runs[0]["student"]]:
            rows = [mode_of(run, mode) for run in runs]
            shares = [shown(over_seeds([row[key] for row in rows])) for key in (*ACCURACIES, "retention")]
            speed = shown(over_seeds([row["tokens_per_forward"] for row in rows]), 1, 2)
            distance = shown(over_seeds([run["agreement"][mode]["teacher_kl"] for run in runs]), 1, 3)
            lines.append(f"| {fmt} | {variant} | {mode} | {' | '.join(shares)} | {speed} | {distance} |")
    return "\n".join([*lines, "", *change_table(reports, label)])


def change_table(reports: Sequence[dict[str, Any]], label: str) -> list[str]:
    """The change in accuracy from static to threshold decoding (arXiv 2606.06712)."""
    lines = [
        f"| format | {label} | static → threshold, points | seen | held out |",
        "|---|---|---:|---:|---:|",
    ]
    groups = grouped(reports)
    for (fmt, variant), runs in groups.items():
        changes = [shown(over_seeds([change_to_threshold(run, key) for run in runs])) for key in ACCURACIES]
        lines.append(f"| {fmt} | {variant} | {' | '.join(changes)} |")
    for fmt in FORMATS:
        if {(fmt, "opd"), (fmt, "sft")} <= set(groups):
            differences = [shown(over_seeds(opd_minus_sft(groups, fmt, key))) for key in ACCURACIES]
            lines.append(f"| {fmt} | opd − sft, same seeds | {' | '.join(differences)} |")
    return lines


def opd_minus_sft(
    groups: dict[tuple[str, str], list[dict[str, Any]]], fmt: str, key: str
) -> list[float | None]:
    """For each seed with both: change of `opd` minus change of `sft` from static to threshold decoding."""
    changes: dict[str, dict[int, float | None]] = {
        objective: {run["cell"]["seed"]: change_to_threshold(run, key) for run in groups[fmt, objective]}
        for objective in ("opd", "sft")
    }
    seeds = sorted(set(changes["opd"]) & set(changes["sft"]))
    pairs = [(changes["opd"][seed], changes["sft"][seed]) for seed in seeds]
    return [None if opd is None or sft is None else opd - sft for opd, sft in pairs]


def plot(reports: Sequence[dict[str, Any]], study: str, path: Path) -> None:
    """Accuracy against tokens per forward, one mark per run and mode."""
    formats = list(dict.fromkeys(report["cell"]["fmt"] for report in reports))
    figure, axes = new_figure(len(formats), 6 * len(formats), 4)
    marks = {"static": "o", "threshold": "^", "lossless": "s"}
    for axis, fmt in zip(axes[0], formats, strict=True):
        groups = [(variant, runs) for (f, variant), runs in grouped(reports).items() if f == fmt]
        for number, (variant, runs) in enumerate(groups):
            for mode, mark in marks.items():
                rows = [row for run in runs for row in run["student"] if row["name"] == mode]
                axis.plot(
                    [row["tokens_per_forward"] for row in rows],
                    [100 * row["accuracy"] for row in rows],
                    mark,
                    color=f"C{number}",
                    label=variant if mode == "static" else None,
                )
        axis.axhline(100 * reports[0]["teacher"]["accuracy"], color="black", linewidth=0.6)
        axis.set_title(f"{fmt}: circle static, triangle threshold, square lossless")
        axis.set_xlabel("tokens per forward")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("exact match, %")
    axes[0][0].legend(title="block size" if study == "blocks" else "objective", fontsize=8)
    figure.savefig(path, dpi=120)


def without_profiles(report: dict[str, Any]) -> dict[str, Any]:
    """The report without its divergence profile, which has a thousand cells at block size 32."""
    agreement = {
        mode: {key: value for key, value in found.items() if key != "profile"}
        for mode, found in report["agreement"].items()
    }
    return report | {"agreement": agreement}


def write_study(reports: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    intro = (
        f"Study `{args.study}`, {args.steps} steps, seeds {', '.join(map(str, args.seeds))}: mean ± half of "
        "the 95 % interval over seeds (Student's t). Teacher: "
        f"{100 * reports[0]['teacher']['accuracy']:.1f} % on {reports[0]['teacher']['num_prompts']} prompts. "
        "Intervals over prompts of each run: reports/."
    )
    write_atomic(args.out / "table.md", f"{intro}\n\n{table(reports, args.study)}\n")
    shared = {"study": args.study, "steps": args.steps, "seeds": args.seeds, "set": args.set}
    runs = {Cell(**report["cell"]).name: without_profiles(report) for report in reports}
    write_atomic(
        args.out / "results.json", json.dumps(shared | {"versions": versions(), "runs": runs}, indent=1)
    )
    plot(reports, args.study, args.out / "study.png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=("objectives", "blocks"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=BLOCK_SIZES)
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="for every run")
    parser.add_argument("--keep-weights", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    quiet_libraries()
    reports = []
    for cell in cells(args):
        reports.append(run_cell(cell, args))
        print(
            cell.name, *(f"{row['name']} {row['accuracy']:.3f}" for row in reports[-1]["student"]), flush=True
        )
        write_study(reports, args)


if __name__ == "__main__":
    main()
