"""Tables of measurements, rendered as Markdown, as HTML or in the terminal.

The input are plain values as `retention.json` and `timing.json` hold them. Not here: measuring, pages, plots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table as TerminalTable
from rich.text import Text

from opdlm.reporting.verdict import Values, has_answers, is_preserve, verdict
from opdlm.training.run_folder import RunState

NOTHING = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as text; the first column names the row."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """Head and rows, with pipes inside of cells escaped."""
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)

    def terminal(self) -> TerminalTable:
        """The table as drawn in a terminal, with the note as its caption."""
        found = TerminalTable(
            title=Text(self.title),
            caption=Text(self.note),
            box=box.SIMPLE_HEAD,
            caption_justify="left",
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for place, name in enumerate(self.head):
            found.add_column(Text(name), justify="right" if place else "left", overflow="fold")
        for row in self.rows:
            found.add_row(*map(Text, row))  # as text: brackets are no markup
        return found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if console.is_terminal:
            yield self.terminal()
        else:
            yield Text("\n\n".join(filter(None, [self.title, self.markdown(), self.note])), end="\n\n")


def print_table(table: Table, console: Console) -> None:
    """A drawn table in a terminal; Markdown, with title and note, in a pipe or a file."""
    console.print(table, soft_wrap=not console.is_terminal, end="")


def percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f} %"


def with_interval(share: float | None, interval: Sequence[float] | None) -> str:
    if share is None or interval is None:
        return percent(share)
    return f"{percent(share)} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def count(number: float | None) -> str:
    """A mean number of tokens; 0 means that none were counted."""
    return f"{number:.2f}" if number else NOTHING


def all_modes(report: Values) -> list[Values]:
    """Teacher first, then lossless decoding, the student alone, and what the AR model corrected."""
    return [report["teacher"] | {"retention": 1.0}, *sorted(report["student"], key=place_of)]


def place_of(mode: Values) -> int:
    if mode["name"] == "lossless":
        return 0
    return 1 if mode.get("replaced") is None else 2


REPLACED_NOTE = (
    "replaced: share of tokens that the AR model put in place of the student's; `alone`: it replaced none. "
    "by AR: share that it wrote in all, as it also predicts the first unknown token; where that is nearly "
    "all, agreement with it says nothing. `lossless` is the AR model's text by construction, so only its "
    "speed says what was learnt. How much it drafts depends on the rows decoded at once and on "
    "eval.decode.forward_overhead."
)


def summary_table(report: Values) -> Table:
    """What fits a terminal of 80 columns."""
    rows = [
        [
            mode["name"],
            *[percent(mode.get(key)) for key in ("accuracy", "identical_to_teacher", "common_prefix")],
            *[percent(mode.get(key)) for key in ("replaced", "from_ar")],
            count(mode["tokens_per_forward"]),
        ]
        for mode in all_modes(report)
    ]
    note = "" if has_answers(report) else "Without answers the teacher's responses are the reference. "
    note += "prefix: share of the teacher's tokens before the first difference."
    if is_preserve(report):
        note = f"{note} {REPLACED_NOTE}"
    return Table(
        title=f"Retention on {report['teacher']['num_prompts']} prompts",
        head=["decoding", "accuracy", "= teacher", "prefix", "replaced", "by AR", "tok/fwd"],
        rows=rows,
        note=note,
    )


def retention_table(report: Values) -> Table:
    rows = []
    for mode in all_modes(report):
        compared = mode["against_teacher"]["all"]["retention_interval"]
        interval = None if mode["name"] == "teacher" else compared
        rows.append(
            [
                mode["name"],
                *[percent(mode[key]) for key in ("accuracy", "accuracy_seen", "accuracy_held_out")],
                with_interval(mode["retention"], interval),
                *[percent(mode.get(key)) for key in ("identical_to_teacher", "common_prefix")],
                *[percent(mode.get(key)) for key in ("replaced", "from_ar")],
                *[count(mode[f"tokens_per_forward{group}"]) for group in ("", "_seen", "_held_out")],
                speed(report, mode["name"]),
            ]
        )
    section = report["settings"]["config"]["eval"]
    temperature = section.get("decode", section)["temperature"]  # earlier reports have no section `decode`
    how = f"sampled at temperature {temperature:g}, seed 0" if temperature else "greedy"
    return Table(
        title="Retention",
        head=[
            *("mode", "accuracy", "seen", "held out", "retention", "= teacher", "prefix", "replaced"),
            *("by AR", "tok/fwd", "seen", "held out", "tok/s"),
        ],
        rows=rows,
        note=f"{report['teacher']['num_prompts']} prompts, {how}; accuracy is the mean over skills of exact "
        "match. Every forward is counted, prefill and commits included. `teacher` is the original model, "
        "decoded token by token. In brackets: 95 % interval (bootstrap over the same prompts). prefix: share "
        "of the teacher's tokens before the first difference. "
        + (REPLACED_NOTE if is_preserve(report) else ""),
    )


def speed(report: Values, name: str) -> str:
    return f"{report['timing'][name]:.0f}" if name in report.get("timing", {}) else NOTHING


def paired_table(report: Values) -> Table:
    rows = []
    for mode in report["student"]:
        for group, compared in mode["against_teacher"].items():
            low, high = compared["difference_interval"]
            rows.append(
                [
                    f"{mode['name']}, {group.replace('_', ' ')}",
                    f"{100 * compared['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
                    str(compared["num_gained"]),
                    str(compared["num_lost"]),
                    f"{compared['p_value']:.3g}",
                ]
            )
    return Table(
        title="Against the teacher, prompt by prompt",
        head=["mode, skills", "points of accuracy", "gained", "lost", "p"],
        rows=rows,
        note="gained: prompts that only the student answers rightly; lost: prompts that only the teacher "
        "answers rightly. p: McNemar's exact test, two-sided.",
    )


def response_table(report: Values) -> Table:
    timing = report.get("timing", {})
    beside_ar = {name: f"{speed / timing['teacher']:.2f}" for name, speed in timing.items()}
    rows = [
        [
            mode["name"],
            f"{mode['mean_response_tokens']:.1f}",
            percent(mode["stop_rate"]),
            percent(mode["repetition"]),
            count(mode["tokens_per_step"]),
            count(mode["tokens_per_forward"]),
            speed(report, mode["name"]),
            beside_ar.get(mode["name"], NOTHING),
        ]
        for mode in all_modes(report)
    ]
    return Table(
        title="Responses and speed",
        head=["mode", "tokens", "stopped", "repeated", "tok/step", "tok/fwd", "tok/s", "× AR"],
        rows=rows,
        note="tokens: mean length. stopped: ended by a stop token, not by the limit. repeated: share of "
        "4-grams that occur earlier in the same response. A step is a forward that reveals tokens. "
        "× AR: tokens per second over the teacher's, of a single run (`opdlm bench` repeats it).",
    )


def speed_table(rows: Sequence[Values]) -> Table:
    """A row per way of decoding and batch size, from the rows of `bench.json` or `timing.json`."""
    return Table(
        title="Decoding speed",
        head=["decoding", "batch", "tok/s", "× generate", "× best AR", "tok/fwd", "= AR"],
        rows=[
            [
                row["name"],
                str(row["batch_size"]),
                f"{row['tokens_per_second']:.0f}",
                f"{row['speedup']:.2f}",
                f"{row['over_fastest_ar']:.2f}",
                count(row["tokens_per_forward"]),
                percent(row["identical"]),
            ]
            for row in rows
        ],
        note="× generate: speed over `transformers.generate`. × best AR: over the fastest AR decoding of "
        "this table. = AR: responses equal to those of `transformers.generate`.",
    )


def runs_table(runs: Sequence[RunState]) -> Table:
    """A row per run."""
    return Table(
        title="Runs",
        head=["run", "by", "state", "step", "left", "loss", "held back"],
        rows=[
            [
                str(run.folder),
                run.verb,
                run.state,
                f"{run.step}/{run.num_steps}",
                NOTHING if run.seconds_left is None else str(timedelta(seconds=round(run.seconds_left))),
                f"{run.last['loss']:.4f}" if "loss" in run.last else NOTHING,
                count(run.last.get("held_back_tokens_per_forward")),
            ]
            for run in runs
        ],
        note="left: time of the steps. held back: tokens per forward after the last step, if it was "
        "measured. `opdlm resume RUN` continues a run that is stopped.",
    )


def distance_table(report: Values) -> Table:
    return Table(
        title="Distance to the teacher",
        head=["mode", "tokens = AR arg-max", "KL(teacher ‖ student), nats"],
        rows=[
            [name, percent(measured["argmax_agreement"]), f"{measured['teacher_kl']:.4f}"]
            for name, measured in report.get("agreement", {}).items()
        ],
        note="KL: mean over the masked tokens of the states that decoding visited.",
    )


def likelihood_note(report: Values) -> str:
    measured = report.get("likelihood")
    if measured is None:
        return ""
    return (
        f"Nats per token of the teacher's {measured['num_tokens']} response tokens: teacher "
        f"{measured['teacher_nll_per_token']:.4f}, student at most {measured['student_bound_per_token']:.4f} "
        f"± {measured['student_bound_standard_error']:.4f} (standard error of the bound)."
    )


def skill_table(report: Values) -> Table:
    """Exact match per skill with its interval; held-out skills last and marked."""
    modes, held_out = all_modes(report), report["held_out_skills"]
    return Table(
        title="Accuracy per skill",
        head=["skill", *[mode["name"] for mode in modes]],
        rows=[
            [
                f"{skill} (held out)" if skill in held_out else skill,
                *[with_interval(m["by_skill"][skill], m["by_skill_interval"][skill]) for m in modes],
            ]
            for skill in sorted(report["teacher"]["by_skill"], key=lambda s: (s in held_out, s))
        ],
        note="In brackets: 95 % interval (Wilson).",
    )


def trade_off_table(report: Values) -> Table:
    return Table(
        title="Accuracy against speed",
        head=["threshold", "accuracy", "retention", "= teacher", "tok/fwd"],
        rows=[
            [
                f"{point['confidence_threshold']:g}",
                with_interval(point["accuracy"], point["accuracy_interval"]),
                with_interval(point["retention"], point["against_teacher"]["all"]["retention_interval"]),
                percent(point["identical_to_teacher"]),
                count(point["tokens_per_forward"]),
            ]
            for point in report.get("trade_off", [])
        ],
        note="Threshold decoding: a token is revealed where its probability exceeds the threshold.",
    )


def seed_table(report: Values) -> Table:
    spread = report.get("over_seeds", {})
    return Table(
        title="Over seeds",
        head=["mode", "accuracy", "seen", "held out", "retention", "tok/fwd"],
        rows=[
            [
                name,
                *[plus_minus(measures[key], 100, " %", 1) for key in SHARES_OVER_SEEDS],
                plus_minus(measures["tokens_per_forward"], 1, "", 2),
            ]
            for name, measures in spread.items()
        ],
        note=f"Mean ± standard deviation over the seeds {', '.join(map(str, report['settings']['seeds']))} "
        "on the same prompts.",
    )


SHARES_OVER_SEEDS = ("accuracy", "accuracy_seen", "accuracy_held_out", "retention")


def plus_minus(measure: Values | None, scale: float, unit: str, digits: int) -> str:
    if measure is None:
        return NOTHING
    mean, deviation = scale * measure["mean"], scale * measure["standard_deviation"]
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}{unit}"


def report_tables(report: Values) -> list[Table]:
    """Every table of one report that has rows."""
    tables = (retention_table, seed_table, paired_table, response_table, distance_table, skill_table)
    made = [timed_table(report), *[make(report) for make in (*tables, trade_off_table)]]
    return [table for table in made if table.rows]


def timed_table(report: Values) -> Table:
    """The speed of lossless decoding beside AR decoding, where it was measured."""
    measured = report.get("speed", {"rows": []})
    table = speed_table(measured["rows"])
    if not table.rows:
        return table
    how = measured["settings"]
    return replace(
        table,
        title="Lossless decoding speed",
        note=f"{how['prompts']} prompts one after the other, median of {how['repeats']} repeats; lossless "
        "plans by the cost of forwards measured here, and copies drafts only where eval.decode asks for it. "
        f"{table.note}",
    )


def comparison_table(students: Sequence[Values]) -> Table:
    """Several students, a row for each of their modes. A student is its report and what made it."""
    rows = [
        [
            f"{student['name']}, {mode['name']}",
            student["format"],
            student["objective"],
            f"{student['rollout_tokens']:,.0f}",
            with_interval(mode["accuracy"], mode["accuracy_interval"]),
            with_interval(mode["retention"], mode["against_teacher"]["all"]["retention_interval"]),
            count(mode["tokens_per_forward"]),
            speed(student["report"], mode["name"]),
        ]
        for student in students
        for mode in student["report"]["student"]
    ]
    return Table(
        title="Students",
        head=[
            *("student, mode", "format", "objective", "tokens seen"),
            *("accuracy", "retention", "tok/fwd", "tok/s"),
        ],
        rows=rows,
        note="tokens seen: response tokens of all rollouts of the training. Retention is against each "
        "student's own teacher, in brackets its 95 % interval (bootstrap over the same prompts).",
    )


def main_tables(report: Values) -> list[Table]:
    """The tables of a report for the model card."""
    makers = (timed_table, retention_table, seed_table, distance_table, trade_off_table)
    return [table for make in makers if (table := make(report)).rows]


def print_report(report: Values, console: Console) -> None:
    """Narrow tables, what the student's likelihoods are, and the verdict."""
    makers = (timed_table, summary_table, seed_table, trade_off_table)
    for table in (table for make in makers if (table := make(report)).rows):
        print_table(table, console)
    for text in filter(None, (likelihood_note(report), verdict(report))):
        console.print(Text(f"{text}\n"), soft_wrap=not console.is_terminal)


def measured_text(report: Values) -> str:
    """The verdict and the main tables in Markdown, with their notes."""
    parts = [part for table in main_tables(report) for part in (table.markdown(), table.note)]
    return "\n\n".join(filter(None, [verdict(report), *parts, likelihood_note(report)]))
