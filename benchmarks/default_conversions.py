"""What `opdlm convert MODEL data.path=…` does with no other setting: docs/results/real/defaults.json.

    python benchmarks/default_conversions.py MODELS/smollm2 MODELS/qwen_coder --prompts prompts.jsonl \\
        --dtypes bfloat16 float32 --out runs/defaults

For each model and precision: held-back tokens per forward while it trained (defaults.png), the numbers
at the end, and whether every weight and tokenizer file of the result has the SHA-256 of the original's. Not
here: speed, which `opdlm bench` measures on an idle machine.
Finished runs are read, not repeated, and results of other models and precisions stay in the file, so that
each can be measured on its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from real_models import curve

import opdlm
from opdlm.files import write_atomic
from opdlm.reporting.plots import DPI, new_figure
from opdlm.training.metrics import read_metrics

WEIGHTS_AND_TOKENIZER = (".safetensors", ".model", ".jinja", ".txt")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight and tokenizer file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix in WEIGHTS_AND_TOKENIZER or "token" in path.name
    }


def convert(model: Path, dtype: str, prompts: str, out: Path) -> dict[str, Any]:
    """Convert, unless it is done, and collect what the run wrote."""
    run = out / f"{model.name}_{dtype}"
    if not (run / "model" / "all_results.json").exists():
        opdlm.convert(model, data=prompts, output_dir=run, overrides=[f"model.dtype={dtype}"])
    original, result = digests(model), digests(run / "model")
    report = json.loads((run / "model" / "retention.json").read_text())
    rows = read_metrics(run / "metrics.jsonl")
    keys = ("common_prefix", "identical_to_teacher", "replaced", "tokens_per_forward")
    return {
        "model": model.name,
        "dtype": dtype,
        "steps": rows[-1]["step"],
        "rollout_tokens": rows[-1]["rollout_tokens"],
        "curve": curve(rows),
        "modes": {mode["name"]: {key: mode[key] for key in keys} for mode in report["student"]},
        "versions": report["settings"]["versions"],
        "files": sorted(original),
        "files_that_differ": [name for name, digest in original.items() if result.get(name) != digest],
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Held-back tokens per forward over training, a line per run."""
    figure, axes = new_figure(1, 6.5, 4.5)
    axis: Any = axes[0][0]
    for run in runs:
        tokens = [point["rollout_tokens"] for point in run["curve"]]
        values = [point["held_back_tokens_per_forward"] for point in run["curve"]]
        axis.plot(tokens, values, "o-", label=f"{run['model']}, {run['dtype']}")
    axis.set_xlabel("tokens of its own text seen")
    axis.set_ylabel("lossless tokens per forward, held-back prompts")
    axis.set_ylim(bottom=1)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=DPI)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--results", type=Path, default=Path("docs/results/real"))
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / "defaults.json"
    known = json.loads(file.read_text())["runs"] if file.is_file() else []
    runs = {(run["model"], run["dtype"]): run for run in known}
    for model in options.models:
        for dtype in options.dtypes:
            runs[model.name, dtype] = convert(model, dtype, options.prompts, options.out)
            write_atomic(file, json.dumps({"runs": list(runs.values())}, indent=1))
    draw(list(runs.values()), options.results / "defaults.png")


if __name__ == "__main__":
    main()
