"""The corpus of every installation: same files, same sides, each once."""

import json
import sysconfig
from pathlib import Path

import pytest

from opdlm.studies.corpus import (
    HELD_OUT_SHARE,
    PASSAGE_CHARACTERS,
    is_held_out,
    passages,
    stdlib_corpus,
    stdlib_files,
)


def test_the_corpus_is_split_by_file_and_sorted_by_path(tmp_path: Path) -> None:
    splits = stdlib_corpus(tmp_path)
    paths = {
        name: [json.loads(line)["path"] for line in path.read_text().splitlines()]
        for name, path in splits.items()
    }
    assert all(found == sorted(found) for found in paths.values())
    assert not set(paths["train"]) & set(paths["held_out"])
    assert "bisect.py" in paths["train"] + paths["held_out"]
    assert splits["train"].stat().st_size > 3e6
    before = {name: path.read_bytes() for name, path in splits.items()}
    assert {name: path.read_bytes() for name, path in stdlib_corpus(tmp_path).items()} == before


def test_a_hash_of_the_path_decides_the_side() -> None:
    files = stdlib_files()
    share = sum(map(is_held_out, files)) / len(files)
    assert 0.5 * HELD_OUT_SHARE < share < 1.5 * HELD_OUT_SHARE
    assert is_held_out(Path("json/decoder.py")) == is_held_out(Path("json") / "decoder.py")
    assert not any(set(path.parts) & {"test", "site-packages"} for path in files)


def test_passages_of_a_file_are_the_file(tmp_path: Path) -> None:
    rows = [json.loads(line) for path in stdlib_corpus(tmp_path).values() for line in path.open()]
    there = "".join(row["text"] for row in rows if row["path"] == "bisect.py")
    assert there == (Path(sysconfig.get_paths()["stdlib"]) / "bisect.py").read_text()


@pytest.mark.parametrize("text", ["", "a\n", "no end of line", "x" * 3000, "line\n" * 999])
def test_passages_are_whole_lines_of_limited_length(text: str) -> None:
    found = list(passages(text))
    assert "".join(found) == text
    assert all(passage.endswith("\n") and len(passage) >= PASSAGE_CHARACTERS for passage in found[:-1])
    longest = max(map(len, text.splitlines()), default=0) + 1
    assert all(0 < len(passage) < PASSAGE_CHARACTERS + longest for passage in found)
