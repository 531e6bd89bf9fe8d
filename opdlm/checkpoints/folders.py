"""What a path names, judged from its files alone: a mistyped folder is reported before torch is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from opdlm.config.sections import resolve_path
from opdlm.errors import ConfigError, DataError, require_package
from opdlm.files import MANIFEST, find_damage

VERIFY = "OPDLM_VERIFY"
"""Environment variable; 0: folders are loaded without comparing their files with their manifest."""
RECORD_SUFFIXES = (".md", ".html", ".png", ".jsonl")
RECORD_FILES = ("all_results.json", "retention.json", "timing.json")
"""Files of a result folder that say what was measured: they may change, and no model is loaded from them."""
is_code_trusted: ContextVar[bool] = ContextVar("is_code_trusted", default=False)


@contextmanager
def trust_remote_code(trusted: bool = True) -> Iterator[None]:
    """Inside the block, Python code that a checkpoint brings is run. Use it only if you trust its author."""
    token = is_code_trusted.set(trusted or is_code_trusted.get())
    try:
        yield
    finally:
        is_code_trusted.reset(token)


def looks_like_path(name: str) -> bool:
    """Whether a name that does not exist was meant as a path: nobody asks the hub for it then.

    It starts with `.`, `/` or `~`, has more than one `/` (a hub id is `owner/name`), or its first folder
    exists.
    """
    first, slash, _ = name.partition("/")
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or bool(slash and Path(first).is_dir())


def check_is_checkpoint(path: str, *, setting: str = "model.path", needs_weights: bool = True) -> None:
    """A path that looks local must exist and hold a config; anything else is left to the hub. `setting` names
    it in messages; empty: the path alone.
    """
    folder, name = Path(path), f"{setting} ({path})" if setting else path
    if not folder.exists() and looks_like_path(path):
        raise DataError(f"{name} does not exist. Give a checkpoint folder or a hub id.")
    if gguf_file(path):
        require_package("gguf", "demo", f"{name}, a GGUF file,")
        return
    if folder.is_file():
        raise DataError(f"{name} is a file. Give the folder that holds config.json, or a .gguf file.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(f"{name} has no config.json, so it is not a Hugging Face checkpoint folder.")
    if needs_weights and folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise DataError(
            f"{name} holds no .safetensors weights, and pickle files are not read. Load it once "
            "where you trust it and write it with save_pretrained; `opdlm train` needs none with "
            "model.from_scratch=true."
        )
    if folder.is_dir():
        try:
            json.loads((folder / "config.json").read_text())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{folder / 'config.json'} is not valid JSON. Download it again.") from error


def check_intact(folder: str | Path) -> None:
    """DataError if a file of the folder, other than a record, is not as its manifest says. This reads every
    byte once: about 0.7 s per GB. A folder without a manifest passes.
    """
    switch = os.environ.get(VERIFY, "1")
    if switch not in ("0", "1"):
        raise ConfigError(f"{VERIFY} ({switch}) must be 1 (compare files with {MANIFEST}) or 0.")
    damage = find_damage(Path(folder)) if switch == "1" else []
    for name, problem in damage:
        if not name.endswith((*RECORD_SUFFIXES, *RECORD_FILES)):
            raise DataError(
                f"{folder} is not as it was written: {name} {problem} (`opdlm verify` lists all). Copy the "
                f"folder again; if the change is yours, delete {MANIFEST} or set {VERIFY}=0."
            )


def gguf_file(path: str) -> Path | None:
    """The GGUF file that holds the checkpoint: `path`, or the only one of a folder without safetensors.

    DataError if the folder has several.
    """
    if path.endswith(".gguf") and Path(path).is_file():
        return Path(path)
    found = [] if any(Path(path).glob("*.safetensors")) else sorted(Path(path).glob("*.gguf"))
    if len(found) > 1:
        raise DataError(
            f"{path} holds {len(found)} .gguf files ({', '.join(file.name for file in found)}). Give one of "
            "them; one that was split must be joined first (llama-gguf-split --merge)."
        )
    return found[0] if found else None


def is_converted(folder: str | Path) -> bool:
    """Whether the folder's config.json says how to decode by diffusion."""
    file = Path(folder) / "config.json"
    try:
        return file.is_file() and "block_diffusion" in json.loads(file.read_text())
    except ValueError:
        return False


def check_is_converted(folder: str | Path) -> None:
    """Raises DataError where the folder is not there, or `opdlm convert` did not write it."""
    if not Path(folder).exists():
        raise DataError(f"{folder} does not exist. Give the folder `model` of a run's output_dir.")
    if not is_converted(folder):
        raise DataError(
            f"{folder} is not a folder written by opdlm convert (no block_diffusion in config.json). Give "
            "the folder `model` of a run's output_dir."
        )


def check_can_decode(path: str, mode: str) -> None:
    """Raises DataError for a path that is no checkpoint, ConfigError for a mode that a plain one lacks."""
    folder = resolve_path(path)
    check_is_checkpoint(folder, setting="")
    if mode != "ar" and not is_converted(folder):
        raise ConfigError(
            f"`mode={mode}` needs a diffusion model, and {path} is not a folder written by opdlm convert: "
            "give one, or use `mode=ar`."
        )
