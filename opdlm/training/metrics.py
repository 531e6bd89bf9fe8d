"""Progress on the console and the file `metrics.jsonl` of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

LINE_SECONDS = 10.0
"""Time between lines of progress where no terminal shows a bar."""
STEP_LINE_SECONDS = 30.0
"""The same inside a training step."""
Doing = Callable[[str], None]
"""Is told what a long step is at."""
SHOWN = {
    "loss": "loss {:.4f}",
    "tokens_per_forward": "{:.2f} tok/fwd",
    "held_back_tokens_per_forward": "{:.2f} held back",
    "rollout_tokens_per_second": "{:.0f} tok/s",
    "tokens_per_second": "{:.0f} tok/s",
}
"""Metrics that the progress line shows, and their formats."""


def progress_line(verb: str, console: Console) -> Progress:
    """A progress bar with counts, remaining time and the field `status`; shown on terminals only."""
    return Progress(
        SpinnerColumn(),
        TextColumn(verb, style="bold", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )


class PhaseProgress:
    """Progress of a phase outside training. On a terminal a moving bar; elsewhere a line at the start, at
    the end, and every `LINE_SECONDS`. Inside a step of training `doing` is told instead.
    """

    def __init__(self, verb: str, total: int, console: Console | None, doing: Doing | None = None) -> None:
        self.verb, self.total, self.doing = verb, total, doing
        self.console = console or Console(quiet=True)
        self.progress = progress_line(verb, self.console)

    def __enter__(self) -> PhaseProgress:
        self.started = self.told = time.monotonic()
        self.first = self.done = self.num_tokens = 0
        self.seen: set[int] = set()
        self.task = self.progress.add_task("", total=self.total, status="")
        self.progress.start()
        self.tell()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def skip(self, num: int) -> None:
        """Count what an earlier, interrupted run has done."""
        self.first += num
        self.advance(num)

    def advance(self, num: int, status: str = "") -> None:
        """Count `num` more as done."""
        self.done = min(self.total, self.done + num)
        self.seen.clear()
        self.show(self.done, status or self.counted, is_last=num > 0 and self.done >= self.total)

    def on_step(self, index_B: Tensor, _tokens_BL: Tensor, revealed_BL: Tensor) -> None:
        """Callback of `generate` after every decoding step: counts the responses of a batch as they end."""
        self.num_tokens += int(revealed_BL.sum())
        self.seen.update(index_B.tolist())
        ended = self.done + len(self.seen) - len(index_B)
        self.show(min(self.total, ended), self.counted)

    @property
    def counted(self) -> str:
        """Decoded tokens, and their speed."""
        speed = self.num_tokens / max(1e-9, time.monotonic() - self.started)
        return f"{self.num_tokens} tokens, {speed:.0f} tok/s" if self.num_tokens else ""

    def show(self, done: int, status: str, *, is_last: bool = False) -> None:
        self.progress.update(self.task, completed=done, status=status)
        if self.doing is not None:
            self.doing(f"{self.verb} {done}/{self.total}  {status}".rstrip())
        if is_last or time.monotonic() - self.told > LINE_SECONDS:
            self.tell(done, status)

    def tell(self, done: int = 0, status: str = "") -> None:
        self.told = time.monotonic()
        if self.console.is_terminal:
            return
        seconds = self.told - self.started
        left = seconds / max(1, done - self.first) * max(0, self.total - done)
        times = f"  {seconds:.0f} s, {left:.0f} s left" if done > self.first else ""
        self.console.out(f"{self.verb} {done}/{self.total}" + f"  {status}".rstrip() + times)


class MetricsLog:
    """Progress on the console and one JSON line per step in `metrics.jsonl`."""

    def __init__(
        self, output_dir: Path, console: Console, verb: str = "convert", opened: float | None = None
    ) -> None:
        self.path = output_dir / "metrics.jsonl"
        self.opened = time.monotonic() if opened is None else opened
        """The time from which `train.time_limit` counts."""
        self.console = console
        self.progress = progress_line(verb, console)
        self.task: TaskID | None = None
        self.latest: dict[str, float] = {}
        """Last known values of the metrics, since some are not measured in every step."""

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, num_steps: int, first_step: int) -> None:
        """Begin at `first_step`. Lines are only appended: those of steps that run again stay in the file, and
        `read_metrics` leaves them out.
        """
        with self.path.open("ab+") as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):  # cut off by a kill
                file.write(b"\n")
        self.num_steps, self.first_step = num_steps, first_step
        self.started = self.told = time.monotonic()
        self.done, self.status = first_step, ""
        self.task = self.progress.add_task("", total=num_steps, completed=first_step, status="")
        self.progress.start()
        if first_step:
            self.console.out(f"resumed at step {first_step} of {num_steps}")

    def note(self, text: str) -> None:
        """Print a message above the progress line."""
        self.console.out(text)

    def doing(self, what: str) -> None:
        """Show what the present step is at: on a terminal at once, elsewhere every `STEP_LINE_SECONDS`. Only
        the log that was started shows anything: that of the first rank.
        """
        if self.task is None:
            return
        self.progress.update(self.task, status=f"{what}  {self.status}")
        now = time.monotonic()
        if not self.console.is_terminal and now - self.told > STEP_LINE_SECONDS:
            self.told = now
            self.console.out(f"step {self.done + 1}/{self.num_steps}  {what}")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of step `step` (counted from 1) and show the progress."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.latest |= metrics
        shown = [text.format(self.latest[key]) for key, text in SHOWN.items() if key in self.latest]
        self.done, self.status, self.told = step, "  ".join(shown), time.monotonic()
        assert self.task is not None, "start comes first"
        self.progress.update(self.task, completed=step, status=self.status)
        if not self.console.is_terminal and (
            step % max(1, self.num_steps // 20) == 0 or step == self.num_steps
        ):
            seconds = time.monotonic() - self.started
            left = seconds / (step - self.first_step) * (self.num_steps - step)
            self.console.out(
                f"step {step}/{self.num_steps}  {self.status}  {seconds:.0f} s, {left:.0f} s left"
            )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One row per step of a `metrics.jsonl`, in order. Where a line repeats a step the run went back: what
    follows replaces the earlier lines from that step on.
    """
    rows: list[dict[str, Any]] = []
    for row in complete_rows(path):
        if not {"step", "seconds"} <= row.keys():  # a damaged line
            continue
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return rows


def complete_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that is only appended to, without lines that a kill cut off; none without a file."""
    rows = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
