"""Python's standard library as a corpus: text that every installation has, without a download.

Files are sorted by path, and a hash of its path decides whether a file is held out, whatever else is
installed. Files are cut into passages, so that a few thousand bytes drawn by a seed come from many files. The
text depends on the Python version, which results have to name.
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
"""Longer files are left out; a few large tables would otherwise make a tenth of the text."""
PASSAGE_CHARACTERS = 1000
"""A passage ends after the first line that makes it this long, or with the file."""


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
    """Cut a text into passages of whole lines."""
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
    """Write train.jsonl and held_out.jsonl to `folder`: one passage per line as `text`, with its `path`."""
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
