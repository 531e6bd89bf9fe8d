"""A log of responses, written after every piece, from which an interrupted evaluation resumes.

Append-only JSON lines. The key of a line is a hash of everything that determines the response (checkpoint,
decode settings, prompt), so a response is reused exactly if these are unchanged. A truncated last line is
dropped when the log is opened.
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

BATCHES_PER_PIECE = 4
"""So many batches are decoded, and then logged, together: the next prompt takes the row of a finished one.
What is interrupted is decoded again beside the same prompts, since others may change its rounding.
"""


@dataclass(frozen=True, slots=True)
class Generation:
    """One response, and the time of its piece divided by the number of its prompts, in seconds."""

    rollout: Rollout
    seconds: float

    def to_record(self) -> dict[str, Any]:
        return self.rollout.to_dict() | {"seconds": self.seconds}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Generation:
        return cls(Rollout.from_dict(record), record["seconds"])


class GenerationLog:
    """The log of one evaluation. `checkpoint` identifies the weights."""

    def __init__(self, path: Path, checkpoint: str) -> None:
        self.path, self.checkpoint = path, checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        self.finished = read_finished(path)

    def key(self, decoding: dict[str, Any], prompt_ids: Sequence[int]) -> str:
        """Key of a response: a hash of checkpoint, decode settings and prompt."""
        described = json.dumps([self.checkpoint, decoding, list(prompt_ids)], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:32]

    def add(self, generations: dict[str, Generation]) -> None:
        """Append a piece in one write and flush it to the disk."""
        lines = [json.dumps({"key": key} | g.to_record()) + "\n" for key, g in generations.items()]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        self.finished |= generations


def read_finished(path: Path) -> dict[str, Generation]:
    """Complete lines by key. A truncated last line is removed from the file; lines of earlier versions, which
    did not count replaced tokens, are not read.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    records = [json.loads(line) for line in whole.splitlines()]
    return {r["key"]: Generation.from_record(r) for r in records if {"key", "num_replaced"} <= r.keys()}


def fingerprint(folder: str) -> str:
    """Identifies weights: sizes and modification times of the files in a folder, or the hub id."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    return json.dumps([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]) if files else folder
