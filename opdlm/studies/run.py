"""`opdlm study`: a grid of small trainings with several seeds that tests published claims.

A recipe names the study, its seeds, its grid, and the settings that all runs share. `grid` executes the runs,
one process per core, resumable run by run. Tables, plot and verdicts are computed from their results. Every
study is a module with the same functions: `make_cells`, `conclude`, `draw`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from opdlm.config.loader import apply_override, build_section, plain, read_recipe, rename_old_keys
from opdlm.errors import ConfigError
from opdlm.evaluation.retention import versions
from opdlm.files import write_atomic
from opdlm.studies import conversion as study_conversion
from opdlm.studies import crossover as study_crossover
from opdlm.studies import dual_repetition as study_dual
from opdlm.studies import mask_window as study_window
from opdlm.studies import parity as study_parity
from opdlm.studies import window_sft as study_sft
from opdlm.studies.claims import Findings, conclusion
from opdlm.studies.grid import Cell, GridResult, RunCell, Values, run_grid
from opdlm.studies.text_runs import prepare_text, run_text

TABLE_FILE, RESULTS_FILE, PICTURE_FILE = "table.md", "results.json", "study.png"


@dataclass(frozen=True, slots=True)
class Study:
    """The parts of one study."""

    module: Any
    """Has `make_cells(grid, run, seeds)`, which checks all settings, `conclude(records, grid, out)` and
    `draw(records, grid, out, path)`."""
    grid: type
    """Dataclass of the `grid` section."""
    run_cell: RunCell
    prepare: Callable[[Any, Values, Path], None] | None = None
    """(grid, run, out): writes files that all cells read."""


def prepare_corpus(_grid: Any, _run: Values, out: Path) -> None:
    prepare_text(out)


STUDIES = {
    "dual_repetition": Study(study_dual, study_dual.DualGrid, run_text, study_dual.prepare),
    "mask_window": Study(study_window, study_window.WindowGrid, run_text, prepare_corpus),
    "parity": Study(study_parity, study_parity.ParityGrid, study_parity.run_cell),
    "crossover": Study(study_crossover, study_crossover.CrossoverGrid, run_text, prepare_corpus),
    "conversion": Study(study_conversion, study_conversion.ConversionGrid, study_conversion.run_cell),
    "window_sft": Study(study_sft, study_sft.SftGrid, study_sft.run_cell, study_sft.prepare),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPlan:
    """A study with its settings; the settings of all cells are checked."""

    name: str
    title: str
    """The first line of the recipe."""
    study: Study
    grid: Any
    run: Values
    seeds: tuple[int, ...]
    cells: list[Cell]


def read_plan(recipe: Path, overrides: Sequence[str], num_seeds: int | None = None) -> StudyPlan:
    """Read a recipe and overrides `section.key=value`. Raises ConfigError for any setting of any cell."""
    values = read_recipe(recipe)
    rename_old_keys(values.get("run", {}))
    for override in overrides:
        apply_override(values, override)
    name = values.pop("study", None)
    if name not in STUDIES:
        raise ConfigError(f"study ({name}) of {recipe} must be one of {', '.join(STUDIES)}.")
    if set(values) - {"seeds", "grid", "run"}:
        unknown = ", ".join(sorted(set(values) - {"seeds", "grid", "run"}))
        raise ConfigError(f"unknown key {unknown} in a study: it has the sections grid and run, and seeds.")
    study = STUDIES[name]
    grid: Any = build_section(study.grid, values.get("grid", {}), "grid.")
    seeds = tuple(range(num_seeds)) if num_seeds is not None else read_seeds(values.get("seeds", [0, 1, 2]))
    run = values.get("run", {})
    cells: list[Cell] = study.module.make_cells(grid, run, seeds)
    (most_frequent, number), *_ = Counter(cell.name for cell in cells).most_common(1)
    if number > 1:
        raise ConfigError(f"{number} runs are called {most_frequent}: give each value once.")
    title = recipe.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
    return StudyPlan(name=name, title=title, study=study, grid=grid, run=run, seeds=seeds, cells=cells)


def read_seeds(value: Any) -> tuple[int, ...]:
    """A list of numbers, or an override such as `0,1,2`."""
    items = value if isinstance(value, list) else str(value).split(",")
    if not items or not all(str(item).strip().isdigit() for item in items):
        raise ConfigError(f"seeds ({value}) must be whole numbers: seeds=0,1,2.")
    return tuple(int(item) for item in items)


def run_study(plan: StudyPlan, out: Path, console: Console, processes: int | None = None) -> GridResult:
    """Run all cells that are not finished, and write table.md, results.json and study.png to `out`."""
    if plan.study.prepare is not None:
        plan.study.prepare(plan.grid, plan.run, out)
    result = run_grid(plan.cells, plan.study.run_cell, out, console, processes)
    if result.records:
        write_study(plan, result, out)
    return result


def write_study(plan: StudyPlan, result: GridResult, out: Path) -> None:
    records = list(result.records.values())
    findings = plan.study.module.conclude(records, plan.grid, out)
    write_atomic(out / TABLE_FILE, study_text(plan, result, findings))
    results = {
        "study": plan.name,
        "seeds": plan.seeds,
        "grid": asdict(plan.grid),
        "run": plan.run,
        "versions": versions() | {"threads": "1 per run"},
        "predictions": [asdict(claim) for claim in findings.claims],
        "errors": result.errors,
        "cells": result.records,
    }
    write_atomic(out / RESULTS_FILE, json.dumps(plain(results), indent=1))
    plan.study.module.draw(records, plan.grid, out, out / PICTURE_FILE)


def study_text(plan: StudyPlan, result: GridResult, findings: Findings) -> str:
    """The text of table.md: runs, verdicts, tables and plot."""
    minutes = sum(record["seconds"] for record in result.records.values()) / 60
    seeds = ", ".join(map(str, plan.seeds))
    shown = " ".join(f"{key} {value}," for key, value in versions().items() if key != "threads")
    parts = [
        f"# Study `{plan.name}`",
        f"{plan.title} {len(result.records)} of {len(plan.cells)} runs, seeds {seeds}, {minutes:.0f} minutes "
        f"of one core in all; {shown.rstrip(',')}.",
    ]
    parts += [f"`{name}` failed: {error}" for name, error in result.errors.items()]
    parts += ["## Conclusion", conclusion(findings.claims)]
    for table in findings.tables:
        parts += [f"## {table.title}", table.markdown(), table.note]
    parts += [f"![{plan.name}]({PICTURE_FILE})"]
    return "\n\n".join(filter(None, parts)) + "\n"


def describe_plan(plan: StudyPlan) -> str:
    """The runs of a study, for `--dry-run`."""
    names = "\n".join(f"  {cell.name}" for cell in plan.cells)
    return f"{plan.name}: {plan.title}\n{len(plan.cells)} runs:\n{names}"
