"""Outcomes of injected faults or odd inputs, counted per kind: a table, and a JSON file from which a command
that was killed goes on. The number-th input of a kind is a function of (seed, kind, number) alone.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opdlm.evaluation.retention import versions
from opdlm.files import write_atomic

ROOT = Path(__file__).parents[1]


class Tally:
    """Counts of outcomes by kind, of one commit and one seed."""

    def __init__(self, kinds: Sequence[str], seed: int, file: Path | None) -> None:
        self.about: dict[str, Any] = {"commit": commit(), "seed": seed, "versions": versions()}
        self.seed, self.file, self.started = seed, file, time.monotonic()
        self.measured: dict[str, Any] = {}
        """Figures beside the counts."""
        self.counts: dict[str, Counter[str]] = {}
        self.seconds: dict[str, float] = {}
        if file is not None and file.is_file():
            saved = json.loads(file.read_text())
            if all(saved.get(key) == value for key, value in self.about.items()):
                self.counts = {kind: Counter(found) for kind, found in saved["counts"].items()}
                self.seconds, self.measured = saved["seconds"], saved["measured"]
        for kind in kinds:
            self.counts.setdefault(kind, Counter())

    def numbers(self, kind: str, wanted: int) -> Iterator[tuple[int, random.Random]]:
        """The numbers of the inputs that are not counted yet, each with its random numbers."""
        while (number := self.counts[kind].total()) < wanted:
            yield number, random.Random(f"{self.seed} {kind} {number}")

    def add(self, kind: str, outcome: str, times: int = 1) -> None:
        """Count an outcome; the time since the one before is added to that of its kind."""
        self.counts[kind][outcome] += times
        now = time.monotonic()
        self.seconds[kind] = round(self.seconds.get(kind, 0) + now - self.started, 3)
        self.started = now
        if self.file is not None:
            values = {"counts": self.counts, "seconds": self.seconds, "measured": self.measured}
            write_atomic(self.file, json.dumps(self.about | values, indent=1) + "\n")

    def table(self, columns: Mapping[str, str]) -> str:
        """Markdown; `columns`: outcome -> title."""
        lines = [f"| kind | number | {' | '.join(columns.values())} |", "|---|--:|" + "--:|" * len(columns)]
        for kind, found in (self.counts | {"together": sum(self.counts.values(), Counter())}).items():
            cells = [kind, found.total(), *(found[outcome] for outcome in columns)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        return "\n".join(lines)

    def has(self, *outcomes: str) -> bool:
        return any(found[outcome] for found in self.counts.values() for outcome in outcomes)


def commit() -> str:
    """The commit of the checkout, with a + where files differ from it."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"
