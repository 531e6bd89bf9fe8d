"""Plots of runs and reports as PNG files: training curves, retention, accuracy against speed.

They are drawn without a display, from plain values as `metrics.jsonl` and `retention.json` hold them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from opdlm.objectives.mask_theory import WIKITEXT_WEIGHTS, optimal_t, signal
from opdlm.reporting.tables import all_modes, percent

CURVES = {
    "loss": "loss",
    "divergence": "divergence, nats",
    "ar_loss": "autoregressive loss, nats per token",
    "md_loss": "masked-diffusion loss, nats per token",
    "heldout_ar_nll": "held-out autoregressive loss",
    "heldout_md_bound": "held-out masked-diffusion bound",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "held_back_tokens_per_forward": "tokens per forward, held-back prompts",
    "tokens_per_forward": "tokens per forward, rollouts",
    "response_length": "response length, tokens",
    "rollout_share_of_time": "rollout share of time",
    "retention": "retention, %",
}
LOGARITHMIC = ("loss", "divergence", "grad_norm")
DPI = 120


def new_figure(columns: int, width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which needs a display and keeps every figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_metrics(runs: Mapping[str, Sequence[dict[str, float]]], path: Path) -> None:
    """The metrics of trainings, by their names, against the number of (rollout) tokens; `retention` where
    measured. The names of several are written below.
    """
    curves = {name for metrics in runs.values() for row in metrics for name in row}
    shown = [name for name in CURVES if name in curves]
    columns = 2
    num_rows = math.ceil(len(shown) / columns) or 1
    figure, axes = new_figure(columns, 8, 2.2 * num_rows, num_rows)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, shown, strict=False):
        rare = name in ("retention", "held_back_tokens_per_forward")
        style = {"marker": "o", "markersize": 3} if rare else {"linewidth": 1}
        scale = 100 if name == "retention" else 1
        for label, metrics in runs.items():
            rows = [row for row in metrics if name in row]
            tokens = [row.get("rollout_tokens", row.get("tokens")) for row in rows]
            axis.plot(tokens, [scale * row[name] for row in rows], label=label, **style)
        if name in LOGARITHMIC and any(row.get(name, 0) > 0 for rows in runs.values() for row in rows):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.tick_params(which="minor", labelsize=7)
        axis.locator_params(axis="x", nbins=5)
        axis.set_title(CURVES[name], fontsize=10)
        axis.set_xlabel("tokens seen", fontsize=8)
        axis.grid(alpha=0.3)
    if len(runs) > 1 and shown:
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize=8)
    figure.savefig(path, dpi=DPI)


def plot_retention(report: Mapping[str, Any], path: Path) -> None:
    """Accuracy of teacher and modes over all, seen and held-out skills; below, the retention of the modes."""
    figure, axes = new_figure(1, 8, 6.4, 2)
    modes = all_modes(dict(report))
    ticks = [tick_of(mode) for mode in modes]
    axis = axes[0][0]
    groups = {"all skills": "accuracy", "seen": "accuracy_seen", "held out": "accuracy_held_out"}
    groups = {label: key for label, key in groups.items() if modes[0][key] is not None}
    for number, (label, key) in enumerate(groups.items()):
        places = [i + 0.27 * (number - (len(groups) - 1) / 2) for i in range(len(modes))]
        limits = [mode[f"{key}_interval"] for mode in modes]
        draw_bars(axis, places, [mode[key] for mode in modes], limits, width=0.25, label=label)
    axis.set_ylabel("accuracy, %")
    axis.legend(loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.2), frameon=False)
    axis.set_xticks(range(len(modes)), ticks)
    axis.set_ylim(0, 112)
    axis, students = axes[1][0], modes[1:]
    compared = [mode["against_teacher"]["all"]["retention_interval"] for mode in students]
    places = list(range(len(students)))
    draw_bars(axis, places, [mode["retention"] for mode in students], compared, width=0.5)
    axis.axhline(100, color="gray", linewidth=0.8, linestyle="--")
    axis.set_ylabel("retained, % of the teacher")
    axis.set_xticks(places, ticks[1:])
    axis.set_xlim(-0.6, max(len(students), 2) - 0.4)
    axis.margins(y=0.12)
    figure.savefig(path, dpi=DPI)


def tick_of(mode: Mapping[str, Any]) -> str:
    """Name, tokens per forward and, where the AR model replaced tokens, their share."""
    lines = [mode["name"], f"{mode['tokens_per_forward']:.2f} tok/fwd"]
    replaced = mode.get("replaced")
    return "\n".join(lines if replaced is None else [*lines, f"{percent(replaced)} replaced"])


def plot_speed(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tokens per second as multiples of the fastest AR decoding, from 0, for the rows of one batch size."""
    names = [f"{row['name']}, {row['tokens_per_forward']:.2f} tok/fwd" for row in rows]
    ratios = [row["over_fastest_ar"] for row in rows]
    plot_bars(names, {"one prompt at a time": ratios}, "× the fastest AR decoding", path)


def draw_bars(
    axis: Any, places: Sequence[float], shares: Sequence[float], limits: Sequence[Any], **options: Any
) -> None:
    """Bars in percent with their numbers above, and with intervals where they are not None."""
    values = [100 * share for share in shares]
    pairs = [limit or (share, share) for share, limit in zip(shares, limits, strict=True)]
    errors = whiskers(values, pairs)
    bars = axis.bar(places, values, yerr=errors, error_kw={"linewidth": 0.8, "capsize": 2}, **options)
    axis.bar_label(bars, fmt="%.0f", fontsize=8)


def whiskers(percents: Sequence[float], limits: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Distances in percent from the values to the lower and upper ends of their intervals (shares)."""
    pairs = list(zip(percents, limits, strict=True))
    return [
        [max(0.0, v - 100 * low) for v, (low, _) in pairs],
        [max(0.0, 100 * high - v) for v, (_, high) in pairs],
    ]


def plot_trade_off(report: Mapping[str, Any], path: Path) -> None:
    """Accuracy against tokens per forward: a line over thresholds, points for teacher and modes."""
    figure, axes = new_figure(1, 7, 4.5)
    axis = axes[0][0]
    points = sorted(report["trade_off"], key=lambda point: point["confidence_threshold"])
    draw_curve(axis, points, "accuracy", "threshold")
    for point in points:
        at = (point["tokens_per_forward"], 100 * point["accuracy"])
        axis.annotate(
            f"{point['confidence_threshold']:g}", at, (4, 5), textcoords="offset points", fontsize=8
        )
    others = [mode for mode in all_modes(dict(report)) if not is_threshold_alone(mode)]
    for mode, marker in zip(others, "s^vDP*", strict=False):
        x, y = mode["tokens_per_forward"], 100 * mode["accuracy"]
        axis.plot([x], [y], marker, label=mode["name"], linestyle="none")
    finish_trade_off(axis, "accuracy, %")
    figure.savefig(path, dpi=DPI)


def is_threshold_alone(mode: Mapping[str, Any]) -> bool:
    """Whether the mode is a point of the line over thresholds."""
    return mode["name"].split(",")[0] == "threshold" and mode.get("replaced") is None


def draw_curve(axis: Any, points: Sequence[Mapping[str, Any]], key: str, label: str) -> None:
    """Points with their intervals, joined by a line in the given order."""
    xs, ys = [p["tokens_per_forward"] for p in points], [100 * p[key] for p in points]
    errors = whiskers(ys, [p[f"{key}_interval"] for p in points])
    axis.errorbar(xs, ys, yerr=errors, marker="o", linewidth=1, elinewidth=0.8, capsize=2, label=label)


def finish_trade_off(axis: Any, ylabel: str) -> None:
    axis.set_xlabel("tokens per forward")
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def plot_comparison(students: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Retention against tokens per forward of every student in every mode, with the Pareto front."""
    figure, axes = new_figure(1, 7, 4.8)
    axis = axes[0][0]
    points = []
    for number, student in enumerate(students):
        color, report = f"C{number % 10}", student["report"]
        for mode in report["student"]:
            at = (mode["tokens_per_forward"], 100 * mode["retention"])
            points.append(at)
            axis.plot(*at, "o", color=color, label=student["name"] if mode is report["student"][0] else None)
            axis.annotate(mode["name"], at, (4, 5), textcoords="offset points", fontsize=7, color=color)
        curve = sorted(report.get("trade_off", []), key=lambda point: point["confidence_threshold"])
        if curve:
            steps = [(point["tokens_per_forward"], 100 * point["retention"]) for point in curve]
            points += steps
            axis.plot(*zip(*steps, strict=True), ".-", color=color, linewidth=0.8, alpha=0.6)
    front = pareto_front(points)
    ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none"}
    axis.plot(*zip(*front, strict=True), "--", color="gray", linewidth=0.8, label="beaten by none", **ring)
    axis.margins(0.12)
    finish_trade_off(axis, "retained, % of the teacher")
    figure.savefig(path, dpi=DPI)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other point exceeds in both coordinates, from left to right."""
    return sorted({p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)})


def plot_divergence(report: Mapping[str, Any], path: Path) -> None:
    """Mean KL(teacher ‖ student) by masked share of the block and offset in the block, a panel per mode."""
    import numpy as np

    size = report["settings"]["block_diffusion"]["block_size"]
    measured = {name: m["profile"] for name, m in report["agreement"].items() if m["profile"]}
    figure, axes = new_figure(max(1, len(measured)), 1.2 + 3.4 * max(1, len(measured)), 3.6)
    grids = {name: divergence_grid(profile, size) for name, profile in measured.items()}
    highest = max((float(np.nanmax(grid)) for grid in grids.values()), default=1.0)
    for axis, (name, grid) in zip(axes[0], grids.items(), strict=False):
        image = axis.imshow(grid, origin="lower", aspect="auto", vmin=0, vmax=highest, cmap="viridis")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("offset in the block")
        ticks = range(0, size, max(1, size // 8))
        axis.set_xticks(ticks)
        axis.set_yticks(ticks, [f"{i + 1}/{size}" for i in ticks])
    axes[0][0].set_ylabel("masked share of the block")
    if grids:
        figure.colorbar(image, ax=list(axes[0]), label="KL(teacher ‖ student), nats")
    figure.savefig(path, dpi=DPI)


def divergence_grid(profile: Sequence[Mapping[str, float]], size: int) -> Any:
    """Mean KL `[size, size]`: masked share in steps of 1 / size by offset; NaN without observations."""
    import numpy as np

    total, num = np.zeros((size, size)), np.zeros((size, size))
    for cell in profile:
        rounding = 5e-4 * size + 1e-6  # shares have three decimals
        row = min(size, max(1, math.ceil(cell["masked"] * size - rounding))) - 1
        total[row, int(cell["offset"])] += cell["kl"] * cell["num"]
        num[row, int(cell["offset"])] += cell["num"]
    return np.where(num > 0, total / np.maximum(num, 1), np.nan)


def plot_signal(weights: Sequence[float], window: tuple[float, float], path: Path) -> None:
    """Signal(t) of the corpus with the window of `masking.windows=auto`, and WikiText's for comparison."""
    figure, axes = new_figure(2, 9, 3.4)
    axis, places = axes[0][0], [i / 200 for i in range(201)]
    for label, shares, style in (("this text", weights, "-"), ("WikiText", WIKITEXT_WEIGHTS, ":")):
        best = optimal_t(shares)
        axis.plot(places, [signal(t, shares) for t in places], style, label=f"{label}: t* = {best:.3f}")
        axis.plot([best], [signal(best, shares)], "o", color=axis.lines[-1].get_color(), markersize=4)
    axis.axvspan(*window, alpha=0.2, color="C2", label=f"window {window[0]:g} to {window[1]:g}")
    axis.set_xlabel("mask rate t")
    axis.set_ylabel("Signal(t)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    draw_orders(axes[0][1], weights)
    figure.savefig(path, dpi=DPI)


def draw_orders(axis: Any, weights: Sequence[float]) -> None:
    orders = range(2, 2 + len(weights))
    bars = axis.bar(orders, [100 * weight for weight in weights])
    axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set_xlabel("tokens in a dependency")
    axis.set_ylabel("share of what n-grams explain, %")


def plot_bars(names: Sequence[str], groups: Mapping[str, Sequence[float]], ylabel: str, path: Path) -> None:
    """One cluster of bars per group, a bar per name: ratios from 0, with a line at 1."""
    figure, axes = new_figure(1, 4 + 0.45 * len(names) * len(groups), 3.6)
    axis = axes[0][0]
    width = 0.8 / len(names)
    for offset, name in enumerate(names):
        places = [i + width * (offset - (len(names) - 1) / 2) for i in range(len(groups))]
        bars = axis.bar(places, [values[offset] for values in groups.values()], width=width, label=name)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    axis.axhline(1, color="gray", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(groups)), list(groups))
    axis.margins(y=0.1)
    axis.set_ylim(bottom=0)
    axis.set_ylabel(ylabel, fontsize=8)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=DPI)


def plot_acceptance(shares: Sequence[float], path: Path) -> None:
    """How often the token at each place of a draft is accepted: after those before it, and from the start."""
    figure, axes = new_figure(1, 4.5, 3)
    axis, places = axes[0][0], range(1, len(shares) + 1)
    axis.plot(places, shares, marker="o", markersize=4, label="if those before it are")
    axis.plot(places, list(accumulate(shares, mul)), marker="o", markersize=4, label="with all before it")
    axis.set_ylim(0, 1)
    axis.set_xticks(places)
    axis.set_xlabel("place in the draft", fontsize=8)
    axis.set_ylabel("share of draft tokens accepted", fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)
