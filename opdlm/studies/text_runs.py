"""Runs of studies on text objectives: one `opdlm train` per cell, with its final losses and curves.

The settings of a cell are the coordinates of the grid, including `seed`, and `config`, all settings of its
training. Without `data.path` the text is the standard library, stored in the folder of the study.
"""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from opdlm.config.text import TextConfig, build_text_config
from opdlm.errors import ConfigError
from opdlm.evaluation.retention import MODEL_FOLDER, RESULTS_FILE
from opdlm.studies.corpus import stdlib_corpus
from opdlm.studies.grid import Cell, Values
from opdlm.text.pipeline import train_text
from opdlm.training.metrics import read_metrics

AR, MD = "heldout_ar_nll", "heldout_md_bound"
LOSS_NAMES = {AR: "AR loss, nats per byte", MD: "MD bound, nats per byte"}


def text_cell(coordinates: Values, base: Values, changes: Mapping[str, Any]) -> Cell:
    """One training: the shared settings with changes `section.key`. Raises ConfigError for invalid ones."""
    values = copy.deepcopy(base)
    for key, value in {"train.seed": coordinates["seed"], **changes}.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    config = text_config(values, Path("data"), Path("run")).to_dict()
    del config["output_dir"]
    corpus = {}
    if not values.get("data", {}).get("path"):
        config["data"]["path"] = config["eval"]["path"] = ""
        corpus = {"corpus": f"standard library of Python {platform.python_version()}"}
    name = "-".join(f"{key}_{short(value)}" for key, value in coordinates.items())
    return Cell(name=name, settings={**coordinates, **corpus, "config": config})


def short(value: Any) -> str:
    """A coordinate for a file name."""
    if isinstance(value, list | tuple):
        return "_".join(map(short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def text_config(values: Values, data: Path, output_dir: Path) -> TextConfig:
    """The settings of one training, with its paths."""
    values = copy.deepcopy(values) | {"output_dir": str(output_dir)}
    if not values.setdefault("data", {}).get("path"):
        values["data"]["path"] = str(data / "train.jsonl")
        values.setdefault("eval", {})["path"] = str(data / "held_out.jsonl")
    return build_text_config(values)


def check_curves(base: Values) -> None:
    """Raise ConfigError unless losses are measured during training."""
    every = base.get("eval", {}).get("every", 0)
    if not isinstance(every, int) or every < 1:
        raise ConfigError(f"run.eval.every ({every}) must be at least 1: this study reads the curves.")


def prepare_text(out: Path) -> None:
    """Write the corpus, which the cells read."""
    stdlib_corpus(out / "data")


def run_text(settings: Values, folder: Path) -> Values:
    """Train one cell. Returns the held-out losses at the end and during training."""
    config = text_config(settings["config"], folder.parent.parent / "data", folder / "run")
    model_folder = train_text(config, Console(highlight=False))
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    keys = ("step", "epoch", AR, MD)
    curve = [{key: row[key] for key in keys if key in row} for row in rows if AR in row or MD in row]
    assert model_folder.name == MODEL_FOLDER
    final = json.loads((model_folder / RESULTS_FILE).read_text())
    return {"final": {key: final[key] for key in (AR, MD) if key in final}, "curve": curve}


def final_loss(loss: str) -> Callable[[Values], float]:
    return lambda record: record["result"]["final"][loss]


def best_loss(loss: str) -> Callable[[Values], float]:
    """The lowest loss during training, as with early stopping."""
    return lambda record: min(point[loss] for point in record["result"]["curve"])
