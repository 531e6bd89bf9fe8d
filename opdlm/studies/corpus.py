"""Text that every installation has: Python's own standard library as a corpus, without a download.

Files sorted by path; a hash of the path decides which are held out, so a file keeps its side whatever else is
installed. They come in passages: a few thousand bytes, drawn by a seed, are then a sample of the library and
not one file of it. The text depends on the Python version: results must name it.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from opdlm.files import write_atomic

HELD_OUT_SHARE = 0.1
LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3")
MAX_BYTES = 30_000
"""Longer files are left out: otherwise a few hundred pages of tables would make a tenth of the text."""
PASSAGE_CHARACTERS = 1000
"""A passage ends with the line that reaches this length, or with the file."""


def stdlib_files() -> list[Path]:
    """Sources of the standard library without tests and installed packages, sorted by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path.relative_to(root) for path in root.rglob("*.py") if 0 < path.stat().st_size <= MAX_BYTES]
    files = [path for path in files if not set(path.parts) & set(LEFT_OUT)]
    return sorted(files, key=lambda path: path.as_posix())


def is_held_out(path: Path) -> bool:
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return int.from_bytes(digest[:8]) < HELD_OUT_SHARE * 2**64


def passages(text: str) -> Iterator[str]:
    """Whole lines; together they are the text."""
    lines, length = list[str](), 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= PASSAGE_CHARACTERS:
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)


def stdlib_corpus(folder: Path) -> dict[str, Path]:
    """Writes train.jsonl and held_out.jsonl to `folder`, a passage per line as `text`, with its `path`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    splits = {name: folder / f"{name}.jsonl" for name in ("train", "held_out")}
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[str]] = {name: [] for name in splits}
    for path in stdlib_files():
        text = (root / path).read_text(encoding="utf-8", errors="replace")
        rows["held_out" if is_held_out(path) else "train"] += [
            json.dumps({"path": path.as_posix(), "text": passage}) + "\n" for passage in passages(text)
        ]
    for name, path in splits.items():
        write_atomic(path, "".join(rows[name]))
    return splits
