"""Report pages: a self-contained HTML file and a Markdown file beside the numbers.

A page holds tables, plots, examples and settings. The HTML file embeds its plots, loads no
other file and escapes the text of models and data. Not here: measuring.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from opdlm.errors import DataError
from opdlm.files import write_atomic
from opdlm.reporting.plots import (
    plot_comparison,
    plot_divergence,
    plot_metrics,
    plot_retention,
    plot_speed,
    plot_trade_off,
)
from opdlm.reporting.tables import (
    NOTHING,
    Table,
    comparison_table,
    count,
    likelihood_note,
    report_tables,
    with_interval,
)
from opdlm.reporting.verdict import Values, own_decodings, verdict
from opdlm.training.metrics import read_metrics

RETENTION_FILE, TIMING_FILE = "retention.json", "timing.json"
HTML_FILE, MARKDOWN_FILE = "report.html", "report.md"
DRAFTED = "held_back_tokens_per_forward"


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG file beside the page."""

    path: Path
    caption: str

    def encoded(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    title: str
    summary: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    examples: Sequence[Mapping[str, Any]] = ()
    settings: dict[str, str] = field(default_factory=dict)
    """Heading -> text."""
    reload_seconds: int | None = None
    """After which a browser loads the page again."""

    def html(self) -> str:
        loader = PackageLoader("opdlm")
        environment = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        return environment.get_template(HTML_FILE).render(page=self)

    def markdown(self) -> str:
        parts = [f"# {self.title}", *self.summary]
        parts += [f"![{picture.caption}]({picture.path.name})" for picture in self.pictures]
        for table in self.tables:
            parts += [f"## {table.title}", table.markdown(), table.note]
        for name, text in self.settings.items():
            parts += [f"## {name}", f"```\n{text.strip()}\n```"]
        return "\n\n".join(filter(None, parts)) + "\n"

    def write(self, folder: Path) -> None:
        write_atomic(folder / HTML_FILE, self.html())
        write_atomic(folder / MARKDOWN_FILE, self.markdown())


def write_retention(folder: Path, report: Values, name: str) -> None:
    """Write the report of one student: numbers, times, plots and pages."""
    numbers = {key: value for key, value in report.items() if key not in ("timing", "speed")}
    times = report["timing"] | {key: report[key] for key in ("speed",) if key in report}
    write_atomic(folder / RETENTION_FILE, json.dumps(numbers, indent=2, ensure_ascii=False))
    write_atomic(folder / TIMING_FILE, json.dumps(times, indent=2))
    pictures = main_pictures(report, folder)
    if "trade_off" in report:
        pictures.append(Picture(folder / "trade_off.png", "Accuracy against tokens per forward by threshold"))
        plot_trade_off(report, pictures[-1].path)
    if any(measured["profile"] for measured in report.get("agreement", {}).values()):
        pictures.append(Picture(folder / "divergence.png", "Mean KL(teacher ‖ student) over visited states"))
        plot_divergence(report, pictures[-1].path)
    page = Page(
        title=f"Retention of {name}",
        summary=[*headline(report), *filter(None, [likelihood_note(report)])],
        pictures=pictures,
        tables=report_tables(report),
        examples=report["examples"],
        settings=settings_text(report["settings"]),
    )
    page.write(folder)


def main_pictures(report: Values, folder: Path) -> list[Picture]:
    """Draw the speed of lossless decoding, where it was measured, and what every mode retains."""
    pictures = []
    if "speed" in report:
        pictures.append(Picture(folder / "speed.png", "Speed of lossless decoding beside AR decoding"))
        plot_speed(report["speed"]["rows"], pictures[-1].path)
    pictures.append(Picture(folder / "retention.png", "Accuracy and retention with 95 % intervals"))
    plot_retention(report, pictures[-1].path)
    return pictures


def headline(report: Values) -> list[str]:
    """The verdict, and a sentence on each mode in which the student writes alone."""
    return [
        verdict(report),
        *student_lines(report),
    ]


def student_lines(report: Values) -> list[str]:
    return [
        f"{mode['name']}: "
        f"{with_interval(mode['retention'], mode['against_teacher']['all']['retention_interval'])} of the "
        f"teacher's accuracy at {count(mode['tokens_per_forward'])} tokens per forward."
        for mode in own_decodings(report)
    ]


def settings_text(settings: Values) -> dict[str, str]:
    config = yaml.safe_dump(settings["config"], sort_keys=False, allow_unicode=True)
    rest = {key: value for key, value in settings.items() if key != "config"}
    return {
        "Checkpoint, seeds and versions": yaml.safe_dump(rest, sort_keys=False, allow_unicode=True),
        "Resolved configuration": config,
    }


def read_retention(folder: Path) -> Values | None:
    """The report that `write_retention` wrote; None if the folder has none."""
    if not (folder / RETENTION_FILE).is_file():
        return None
    report: Values = json.loads((folder / RETENTION_FILE).read_text(encoding="utf-8"))
    if "config" not in report["settings"]:
        raise DataError(
            f"{folder / RETENTION_FILE} was written by an earlier version: `opdlm eval {folder} --out "
            f"{folder}` writes it again."
        )
    if not (folder / TIMING_FILE).is_file():
        return report
    times = json.loads((folder / TIMING_FILE).read_text())
    speed = {"speed": times.pop("speed")} if "speed" in times else {}
    return report | {"timing": times} | speed


def write_comparison(folder: Path, students: Sequence[Values]) -> None:
    """Write several students as one table and one plot; `students` have reports in folders of their own."""
    numbers = [{key: value for key, value in s.items() if key != "report"} for s in students]
    write_atomic(folder / "comparison.json", json.dumps(numbers, indent=2, ensure_ascii=False))
    picture = Picture(folder / "comparison.png", "Retention against tokens per forward")
    plot_comparison(students, picture.path)
    page = Page(
        title=f"{len(students)} students compared",
        pictures=[picture],
        tables=[comparison_table(students)],
        settings={
            s["name"]: settings_text(s["report"]["settings"])["Resolved configuration"] for s in students
        },
    )
    page.write(folder)


def write_run_page(run: Path, reload_seconds: int | None = None) -> Path:
    """Write the page of a finished or running run from its `metrics.jsonl`; returns the HTML file."""
    metrics = {str(run): metrics_of(run)}
    report, tables = read_retention(run / "model"), [last_steps_table(metrics)]
    pictures = [Picture(run / "training.png", "Training, against the rollout tokens seen")]
    plot_metrics(metrics, pictures[0].path)
    if report is not None:
        pictures += main_pictures(report, run)
        tables += report_tables(report)
    config = run / "config.yaml"
    page = Page(
        title=f"Run {run}",
        summary=headline(report) if report else ["Not measured (yet): no model/retention.json."],
        pictures=pictures,
        tables=tables,
        settings={"Resolved configuration": config.read_text(encoding="utf-8")} if config.is_file() else {},
        reload_seconds=reload_seconds,
    )
    page.write(run)
    return run / HTML_FILE


def write_overlay(runs: Sequence[Path], out: Path, reload_seconds: int | None = None) -> Path:
    """Write one page with the curves of several runs in the same axes; returns the HTML file."""
    metrics = {str(run): metrics_of(run) for run in runs}
    out.mkdir(parents=True, exist_ok=True)
    picture = Picture(out / "training.png", "Training, against the rollout tokens seen")
    plot_metrics(metrics, picture.path)
    page = Page(
        title=f"{len(metrics)} runs",
        pictures=[picture],
        tables=[last_steps_table(metrics)],
        reload_seconds=reload_seconds,
    )
    page.write(out)
    return out / HTML_FILE


def metrics_of(run: Path) -> list[dict[str, float]]:
    """The steps that a run has logged; DataError if there are none."""
    metrics = read_metrics(run / "metrics.jsonl")
    if not metrics:
        raise DataError(
            f"{run} holds no finished step in metrics.jsonl: give the output_dir of a run, as runs/tiny."
        )
    return metrics


def last_steps_table(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Table:
    """The metrics of each run's last step, a column per run; below, where its drafts were best."""
    names = dict.fromkeys(name for metrics in runs.values() for name in metrics[-1])
    notes = []
    for run, metrics in runs.items():
        seconds = sum(row["seconds"] for row in metrics)
        notes.append(f"{run}: {len(metrics)} steps, {seconds / 60:.1f} minutes of training.")
        if drafted := [row for row in metrics if DRAFTED in row]:
            best = max(drafted, key=lambda row: row[DRAFTED])
            notes.append(
                f"Most tokens per forward on held-back prompts: {best[DRAFTED]:.2f}, step {best['step']:g}."
            )
    return Table(
        title="Last step",
        head=["measure", *(runs if len(runs) > 1 else ["value"])],
        rows=[
            [
                name.replace("_", " "),
                *(f"{m[-1][name]:.6g}" if name in m[-1] else NOTHING for m in runs.values()),
            ]
            for name in names
        ],
        note=" ".join(notes),
    )
