"""Study `window_sft`: whether the mask window that is best for likelihood is also best for generation.

The bundled teacher, or another checkpoint, is fine-tuned into a block-diffusion model on its own responses,
which are generated once for all cells. Likelihood is measured as the bound on the teacher's responses, over
all mask rates; generation as the share of right answers. arXiv 2601.22450.
"""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass
from rich.console import Console

from opdlm.config.sections import STRICT, Config
from opdlm.distill.pipeline import convert_checkpoint
from opdlm.errors import ConfigError, DataError
from opdlm.reporting.plots import DPI, new_figure
from opdlm.reporting.tables import Table
from opdlm.studies.claims import (
    WORTH,
    WORTH_ACCURACY,
    Claim,
    Findings,
    common_seeds,
    difference_claim,
    differences,
    is_below,
    kendall,
    means,
    over_seeds,
)
from opdlm.studies.conversion import Measure, conversion_config, measure_of
from opdlm.studies.grid import Cell, Values, of_window

Window = tuple[float, float]
LIKELIHOOD, GENERATION = (0.45, 0.55), (0.5, 1.0)
"""The published best windows for likelihood and for generative fine-tuning."""
SAME_ORDER = 0.5
ROLLOUTS = "teacher.parquet"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class SftGrid:
    windows: tuple[Window, ...] = ((0, 1), (0.45, 0.55), (0.5, 1), (0, 0.5))
    """Ranges of the mask rate t of a block."""
    num_prompts: int = 2000
    """Prompts that the teacher answers."""


def make_cells(grid: SftGrid, base: Values, seeds: Sequence[int]) -> list[Cell]:
    cells = []
    for window, seed in itertools.product(grid.windows, seeds):
        values = copy.deepcopy(base)
        values.setdefault("masking", {})["windows"] = [list(window)]
        values.setdefault("train", {})["seed"] = seed
        config = sft_config(values, Path("data"), Path("run")).to_dict()
        config["rollout"]["path"] = ""
        del config["output_dir"]
        coordinates = {"window": list(window), "seed": seed, "num_prompts": grid.num_prompts}
        cells.append(
            Cell(name=f"t{window[0]:g}_{window[1]:g}-seed{seed}", settings={**coordinates, "config": config})
        )
    return cells


def sft_config(values: Values, data: Path, output_dir: Path) -> Config:
    """The settings of one conversion, with its paths."""
    values = copy.deepcopy(values)
    values.setdefault("rollout", {})["path"] = str(data / ROLLOUTS)
    return conversion_config(values, output_dir)


def prepare(grid: SftGrid, base: Values, out: Path) -> None:
    """Generate the teacher's responses to `num_prompts` prompts; an interrupted call continues."""
    (out / "data").mkdir(parents=True, exist_ok=True)
    config = sft_config(base, Path("data"), Path("run"))
    path = config.data.path
    if not isinstance(path, str):
        raise ConfigError(f"run.data.path ({path}) must be one path: the study has one file of responses.")
    options = {
        "mode": "ar",
        "limit": grid.num_prompts,
        "max-new-tokens": config.rollout.decode.max_new_tokens,
        "temperature": config.rollout.decode.temperature,
        "out": out / "data" / ROLLOUTS,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    columns = [f"data.{key}={value}" for key, value in base.get("data", {}).items() if key != "path"]
    command = [sys.executable, "-m", "opdlm", "rollout", config.model.path, path, *columns, *flags]
    if subprocess.run(command, check=False).returncode:
        raise DataError(f"the teacher's responses could not be written: {' '.join(command)} says why.")


def run_cell(settings: Values, folder: Path) -> Values:
    """Convert. Returns the bound, and the accuracy of every mode, from the report of the folder."""
    config = sft_config(settings["config"], folder.parent.parent / "data", folder / "run")
    report = json.loads((convert_checkpoint(config, Console(highlight=False)) / "retention.json").read_text())
    modes = {row["name"]: {"accuracy": row["accuracy"]} for row in report["student"]}
    return {"bound": report["likelihood"]["student_bound_per_token"], "modes": modes}


def bound_of(record: Values) -> float:
    return record["result"]["bound"]


def errors_of(mode: str) -> Measure:
    return lambda record: 1 - measure_of(mode, "accuracy")(record)


def conclude(records: Sequence[Values], grid: SftGrid, _: Path) -> Findings:
    modes = list(records[0]["result"]["modes"])
    comparisons: list[tuple[Window, Measure, str, float]] = [
        (LIKELIHOOD, bound_of, "likelihood (the bound)", WORTH),
        *[(GENERATION, errors_of(mode), f"{mode} accuracy", WORTH_ACCURACY) for mode in modes],
    ]
    return Findings(
        tables=[window_table(records, grid, modes)],
        claims=[
            *[
                better_window(records, window, other, measure, what, worth)
                for window, measure, what, worth in comparisons
                for other in grid.windows
                if window in grid.windows and other != window
            ],
            *([other_order(records, grid, modes[0])] if len(grid.windows) > 2 else []),
        ],
    )


def window_table(records: Sequence[Values], grid: SftGrid, modes: Sequence[str]) -> Table:
    rows = []
    for window in grid.windows:
        runs = of_window(records, window).values()
        measures = [bound_of, *[measure_of(mode, "accuracy") for mode in modes]]
        rows.append([f"[{window[0]:g}, {window[1]:g}]", *means(runs, measures)])
    return Table(
        title="Likelihood and generation by training window",
        head=["window", "bound, nats per token", *[f"{mode} accuracy" for mode in modes]],
        rows=rows,
        note="Mean ± half of the 95 % interval over seeds. Bound: on the teacher's responses, at all mask "
        "rates.",
    )


def better_window(
    records: Sequence[Values], window: Window, other: Window, measure: Measure, what: str, worth: float
) -> Claim:
    """Compares two windows by `measure`, of which lower is better."""
    gaps = differences(of_window(records, window), of_window(records, other), measure)
    return difference_claim(
        f"[{window[0]:g}, {window[1]:g}] is better than [{other[0]:g}, {other[1]:g}] for {what}",
        "paired differences (negative is better)",
        gaps,
        worth,
    )


def other_order(records: Sequence[Values], grid: SftGrid, mode: str) -> Claim:
    runs = [of_window(records, window) for window in grid.windows]
    accuracy = measure_of(mode, "accuracy")
    taus = [
        kendall([-bound_of(f[seed]) for f in runs], [accuracy(f[seed]) for f in runs])
        for seed in common_seeds(*runs)
    ]
    return Claim(
        claim=f"Likelihood does not rank windows as {mode} accuracy does",
        rule=f"Kendall's τ of the two rankings, one per seed: 95 % interval below {SAME_ORDER}",
        verdict=is_below(taus, SAME_ORDER),
        evidence=f"τ {over_seeds(taus)}",
    )


def draw(records: Sequence[Values], grid: SftGrid, _: Path, path: Path) -> None:
    """Accuracy against the bound, a colour per window and a mark per mode."""
    figure, axes = new_figure(1, 6.5, 4.5)
    axis: Any = axes[0][0]
    modes = list(records[0]["result"]["modes"])
    for number, window in enumerate(grid.windows):
        runs = of_window(records, window).values()
        for mode, mark in zip(modes, "o^sD", strict=False):
            xs, accuracy = [bound_of(run) for run in runs], measure_of(mode, "accuracy")
            label = f"[{window[0]:g}, {window[1]:g}], {mode}"
            axis.plot(xs, [100 * accuracy(run) for run in runs], mark, color=f"C{number}", label=label)
    axis.set_xlabel("bound, nats per token")
    axis.set_ylabel("exact match, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=DPI)
