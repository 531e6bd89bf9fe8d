"""Rows of data files: JSON lines or one JSON array (also compressed), Parquet, or a `datasets` name.

A row comes with its place, FILE:LINE or FILE row N, which error messages name. Lines end at a line feed only:
other line separators are valid inside JSON texts. What cannot be read is a DataError.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import from_json

from opdlm.config.loader import NO_TEXT
from opdlm.config.sections import resolve_path
from opdlm.errors import DataError

Row = dict[str, Any]
Item = TypeVar("Item")
COMPRESSED = (".gz", ".zst")


def evenly_spaced(items: Sequence[Item], num: int) -> list[Item]:
    """`num` of the items, or all if there are fewer, the first among them."""
    num = min(num, len(items))
    return [items[i * len(items) // num] for i in range(num)]


def read_rows(path: str, split: str = "train", config: str = "") -> list[tuple[str, Row]]:
    """(place, row) pairs; DataError if they cannot be read."""
    file = Path(resolve_path(path))
    suffix = Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix
    if suffix in (".jsonl", ".json"):
        return list(read_json(file))
    if file.suffix == ".parquet":
        return read_parquet(file)
    if file.is_file() or (file.suffix and not file.is_dir()):
        raise DataError(
            f"data.path ({path}) must be a .jsonl, .json (either also .gz or .zst) or .parquet file, or the "
            "name of a dataset: convert it to one of these."
        )
    return read_dataset(path, split, config)


def read_json(file: Path) -> Iterator[tuple[str, Row]]:
    """The objects of a file with one object per line, or with one array; empty lines are skipped."""
    import pyarrow

    try:
        data = pyarrow.input_stream(str(file), compression="detect").read()
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist. Give a JSONL file with one prompt per line.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}. Give an undamaged file.") from error
    data = data.removeprefix(codecs.BOM_UTF8)
    if data.lstrip()[:1] == b"[":
        rows = [(f"{file} row {i}", row) for i, row in enumerate(parse_json(str(file), data))]
    else:
        lines = [(f"{file}:{i}", line) for i, line in enumerate(data.split(b"\n"), 1)]
        rows = [(place, parse_json(place, line)) for place, line in lines if line.strip()]
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{place} must be a JSON object, not {type(row).__name__}.")
        yield place, row


def parse_json(place: str, data: bytes | str) -> Any:
    """The value of a JSON text. DataError for what is none, for lone surrogates, deep nesting and integers of
    thousands of digits.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return from_json(check_text(place, text))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place} cannot be read as UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8."
        ) from error
    except ValueError as error:
        reason = str(error).replace("line 1 column", "column").replace("hex escape", "surrogate pair")
        raise DataError(f"{place} is not valid JSON ({reason}). Fix or remove the line.") from error


def check_text(place: str, text: str) -> str:
    """The text itself; DataError if it holds what no tokenizer takes as text."""
    found = NO_TEXT.search(text)
    if found:
        raise DataError(
            f"{place} has U+{ord(found[0]):04X} at character {found.start()}, which is not text (NUL, a lone "
            "surrogate or an undecodable byte): remove it."
        )
    return text


def check_texts(place: str, value: Any) -> None:
    """`check_text` of every text in nested lists and dictionaries."""
    if isinstance(value, str):
        check_text(place, value)
    elif isinstance(value, dict):
        check_texts(place, [*value, *value.values()])
    elif isinstance(value, list):
        for item in value:
            check_texts(place, item)


def read_parquet(file: Path) -> list[tuple[str, Row]]:
    """The rows of a Parquet file."""
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:  # ValueError: not Parquet, or no UTF-8
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error
    return [(f"{file} row {i}", row) for i, row in enumerate(rows)]


def read_dataset(name: str, split: str, config: str) -> list[tuple[str, Row]]:
    """The rows of a data set that `datasets` loads."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        first = str(error).splitlines()[0]
        raise DataError(
            f"data.path ({name}), split {split}, cannot be loaded by `datasets`: {first}"
        ) from error
    return [(f"{name} row {i}", row) for i, row in enumerate(loaded)]
