"""Pictures of a run: training curves and retention bars. PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opdlm.evaluate import RetentionReport

CURVES = ("divergence", "tokens_per_forward", "response_length", "grad_norm")


def new_figure(columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which needs a display and keeps every figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)


def plot_metrics(metrics: Sequence[dict[str, float]], path: Path) -> None:
    """Loss and what came with it, against rollout tokens seen."""
    figure, axes = new_figure(len(CURVES), 14, 3)
    tokens = [row["rollout_tokens"] for row in metrics]
    for axis, name in zip(axes[0], CURVES, strict=True):
        axis.plot(tokens, [row[name] for row in metrics], linewidth=1)
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("rollout tokens seen")
        axis.grid(alpha=0.3)
    axes[0][0].set_yscale("log")
    figure.savefig(path, dpi=120)


def plot_retention(report: RetentionReport, path: Path) -> None:
    """Accuracy of teacher and student modes: all skills, seen skills, held-out skills."""
    figure, axes = new_figure(1, 8, 3.6)
    axis = axes[0][0]
    modes = [report.teacher, *report.student]
    groups = {"all skills": "accuracy", "seen": "accuracy_seen", "held out": "accuracy_held_out"}
    for offset, (label, attribute) in enumerate(groups.items()):
        values = [100 * (getattr(mode, attribute) or 0.0) for mode in modes]
        places = [i + 0.27 * (offset - 1) for i in range(len(modes))]
        limits = [getattr(mode, f"{attribute}_interval") or (0.0, 0.0) for mode in modes]
        errors = [[v - 100 * low, 100 * high - v] for v, (low, high) in zip(values, limits, strict=True)]
        whiskers = [list(side) for side in zip(*errors, strict=True)]
        bars = axis.bar(places, values, width=0.25, label=label, yerr=whiskers, error_kw={"linewidth": 0.8})
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set_xticks(range(len(modes)), [f"{m.name}\n{m.tokens_per_forward:.2f} tok/fwd" for m in modes])
    axis.set_ylabel("exact match, %")
    axis.set_ylim(0, 112)
    axis.legend(loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.13), frameon=False)
    figure.savefig(path, dpi=120)


def plot_bars(names: Sequence[str], groups: Mapping[str, Sequence[float]], ylabel: str, path: Path) -> None:
    """One cluster of bars per group, a bar per name, on a logarithmic axis."""
    figure, axes = new_figure(1, 2 + 2.2 * len(groups), 3.6)
    axis = axes[0][0]
    width = 0.8 / len(names)
    for offset, name in enumerate(names):
        places = [i + width * (offset - (len(names) - 1) / 2) for i in range(len(groups))]
        bars = axis.bar(places, [values[offset] for values in groups.values()], width=width, label=name)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_yscale("log")
    axis.set_ylabel(ylabel)
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
