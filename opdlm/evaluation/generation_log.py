"""Responses on disk as soon as they exist: an evaluation that was killed continues where it stopped.

Append-only JSON lines. The key of a line is a hash of everything that decides the response (checkpoint,
decoding, prompt), so a finished prompt is found again whatever else changed, and never taken for another's.
A line that a kill cut in half is dropped on opening.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdlm.decoding.rollout import Rollout


@dataclass(frozen=True, slots=True)
class Generation:
    """One response and its share of the time that its batch took."""

    rollout: Rollout
    seconds: float

    def to_record(self) -> dict[str, Any]:
        return self.rollout.to_dict() | {"seconds": self.seconds}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Generation:
        return cls(Rollout.from_dict(record), record["seconds"])


class GenerationLog:
    """The generations file of one evaluation. `checkpoint` says which weights answer."""

    def __init__(self, path: Path, checkpoint: str) -> None:
        self.path, self.checkpoint = path, checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        self.finished = read_finished(path)

    def key(self, decoding: dict[str, Any], prompt_ids: Sequence[int]) -> str:
        described = json.dumps([self.checkpoint, decoding, list(prompt_ids)], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:32]

    def add(self, generations: dict[str, Generation]) -> None:
        """Append a batch in one write; it is on the disk when this returns."""
        lines = [json.dumps({"key": key} | g.to_record()) + "\n" for key, g in generations.items()]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        self.finished |= generations


def read_finished(path: Path) -> dict[str, Generation]:
    """Every whole line by key; half a line at the end is cut off."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    records = [json.loads(line) for line in whole.splitlines()]
    return {r["key"]: Generation.from_record(r) for r in records if "key" in r}


def fingerprint(folder: str) -> str:
    """Which weights lie in a folder, by size and time of its files; a hub id is its own name."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    return json.dumps([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]) if files else folder
