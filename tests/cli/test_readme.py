"""README: its commands and its Python run, its table is that of the committed report, its links exist."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from tiny_checkpoints import write_rows

from opdlm.cli.main import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SMALL = {
    "convert": ["train.num_steps=1", "rollout.prompts_per_step=8", "train.rows_per_update=8"],
    "eval": ["--limit", "1"],
    "bench": ["--limit", "2", "--repeats", "1", "--batch-sizes", "1", "--max-new-tokens", "8"],
}
"""What the everyday run adds to a command, by verb."""
SMALL_DATA = {"data.self_prompts=4000": "data.self_prompts=8"}


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("opdlm ")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the files that README's commands name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "opdlm" / "bundled" / "teacher", tmp_path / "my-model")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"add {i} {2 * i}"} for i in range(10, 80)])
    write_rows(
        tmp_path / "questions.jsonl", [{"prompt": f"add {i} 7", "answer": f"{i + 7}"} for i in range(8)]
    )
    return tmp_path


def assert_serves(command: list[str]) -> None:
    """The server of a command answers, and ends when it is told to."""
    address = "http://127.0.0.1:8000/v1/models"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen([sys.executable, "-m", "opdlm", *command], env=environment)
    try:
        for _ in range(120):
            time.sleep(1)
            with (
                contextlib.suppress(OSError),
                urlopen(address, timeout=5) as answer,
            ):
                assert json.load(answer)["data"]
                return
        raise AssertionError("the server did not answer within two minutes")
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.parametrize("as_written", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_commands_and_the_python_of_readme_run(
    as_written: bool, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The everyday run cuts the budget of the trainings; the slow one changes nothing."""
    for command in commands():
        if not as_written:
            command = [SMALL_DATA.get(word, word) for word in command] + SMALL.get(command[0], [])
        if command[:2] == ["convert", "tiny"] and not as_written:
            command.append("eval.limit=1")
        if command[0] == "serve":
            if as_written:  # it takes port 8000; tests/serving start servers every day
                assert_serves(command)
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO("add 47 38\n"))
        assert main(command) == 0, command
    for block in re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE):
        exec(compile(block, "README.md", "exec"), {})
    assert "85" in capsys.readouterr().out
    assert (folder / "report" / "report.html").is_file()


def test_the_tables_are_those_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result of a real model that README links is shown as its benchmark prints it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    real_models = importlib.import_module("real_models")
    results = re.findall(r"\]\((docs/results/real/\w+\.json)\)", README)
    assert results
    for path in results:
        assert real_models.table(json.loads((ROOT / path).read_text())) in README, path


def test_the_toy_drafts_as_its_committed_report_says() -> None:
    report = json.loads((ROOT / "docs" / "results" / "tiny" / "retention.json").read_text())
    (lossless,) = (mode for mode in report["student"] if mode["name"] == "lossless")
    assert f"drafts {lossless['tokens_per_forward']:.2f} tokens per forward pass" in README


def test_the_page_is_short_and_its_links_exist() -> None:
    assert 100 <= len(README.splitlines()) <= 140
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
