"""Atomic writes: after a crash a file or folder is complete or absent. It is written under another name,
synced to disk and renamed. A folder ends with a manifest of its files, by which damage is found later.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from opdlm.errors import DataError

MANIFEST = "manifest.json"
"""Size in bytes and SHA-256 of every other file of a folder, by its relative path."""


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that gets a manifest and is renamed to `final` when the block ends without an error.
    An existing folder is replaced. DataError if it cannot be written.
    """
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        write_manifest(partial)
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        try:
            partial.rename(final)
        except BaseException:
            if old.exists():
                old.rename(final)
            raise
        sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise DataError(
            f"{final} cannot be written: {error}. Free some disk space; the same command then continues."
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_atomic(path: Path, text: str) -> None:
    """Write a text file atomically: readers find the old or the new text."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def write_manifest(folder: Path) -> None:
    """Describe the files of a folder in its manifest. Where it has one already, weights keep their entries:
    nothing writes them again, and reading them takes long.
    """
    file, entries = folder / MANIFEST, {}
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            is_known = path.suffix == ".safetensors" and name in known
            entries[name] = known[name] if is_known else describe(path)
    write_atomic(file, json.dumps(entries, indent=1))


def describe(path: Path) -> dict[str, int | str]:
    """The entry of a file in a manifest."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def find_damage(folder: Path) -> list[tuple[str, str]]:
    """The files that are not as the manifest says, each with the difference; (MANIFEST, ...) if that itself
    cannot be read, and nothing without one.
    """
    if not (folder / MANIFEST).exists():
        return []
    try:
        expected = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        return [(MANIFEST, f"cannot be read ({error})")]
    damage = []
    for name, entry in expected.items():
        try:
            if describe(folder / name) != entry:
                damage.append((name, "has other content"))
        except OSError as error:
            damage.append((name, f"cannot be read: {error.strerror}"))
    return damage


def sync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
