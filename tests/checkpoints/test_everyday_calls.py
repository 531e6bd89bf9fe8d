"""A result folder's remote code is used as any model of transformers is."""

from __future__ import annotations

from pathlib import Path

import pytest
from everyday_calls import CALLS, run
from tiny_checkpoints import NUM_TOKENS, tiny_overrides, write_checkpoint, write_data

from opdlm.cli.main import main

KINDS = {
    "preserve": ("format.name=preserve",),
    "preserve-copy": ("format.name=preserve", "lora.enabled=false"),
    "sdar": ("format.name=sdar",),
    "sdar-apart": ("format.name=sdar", "lora.merge=false"),
}
outcomes: dict[str, dict[str, str]] = {}
"""By kind of folder: the outcome of each call. All calls of a kind share a process."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("everyday")
    write_data(root)
    write_checkpoint(root / "teacher", vocab_size=NUM_TOKENS)
    return root


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_everyday_call(kind: str, name: str, root: Path) -> None:
    if kind not in outcomes:
        teacher = root / "teacher"
        settings = tiny_overrides(teacher, root, root / kind)[1:]
        assert main(["convert", str(teacher), *settings, *KINDS[kind]]) == 0
        outcomes[kind] = run(root / kind / "model", teacher, root / f"modules-{kind}")
    assert not outcomes[kind][name], outcomes[kind][name]
