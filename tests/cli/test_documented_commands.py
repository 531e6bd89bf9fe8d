"""The examples and the commands of docs/quickstart.md and docs/python_api.md run as they are written."""

from __future__ import annotations

import importlib.util
import io
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_checkpoints import convert_both

import opdlm
from opdlm.cli.main import main, parse

ROOT = Path(__file__).parents[2]
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text()
PYTHON_API = (ROOT / "docs" / "python_api.md").read_text()


def commands_of(page: str) -> list[list[str]]:
    """Arguments of every `opdlm` command in the page's blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("opdlm ")]


def python_blocks(page: str) -> list[str]:
    """The page's Python but for what is marked as not run."""
    return re.findall(r"(?<!not run -->\n)^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_commands_of_the_quickstart_parse_and_name_every_step() -> None:
    commands = commands_of(QUICKSTART)
    for command in commands:
        parse(command)
    assert {"convert", "generate", "chat", "eval", "serve", "report", "env"} == {c[0] for c in commands}


def test_every_public_name_is_in_the_page_of_the_api() -> None:
    names = set(re.findall(r"\w+", PYTHON_API))
    assert set(opdlm.__all__) - {"__version__"} <= names
    assert len(python_blocks(PYTHON_API)) >= 8
    for block in re.findall(r"^```python\n(.*?)^```", PYTHON_API, re.DOTALL | re.MULTILINE):
        compile(block, "python_api.md", "exec")


def test_the_example_of_decoding_modes_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = convert_both(tmp_path)
    for name, modes in (("preserve", "ar static threshold lossless"), ("sdar", "ar static threshold")):
        capsys.readouterr()
        example("decode_modes").main(str(folders[name]), "add 1 2")
        lines = [line for line in capsys.readouterr().out.splitlines() if " forwards  " in line]
        assert [line.split()[0] for line in lines] == modes.split()


@pytest.mark.slow
def test_the_example_of_training_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("train_in_python").main(str(tmp_path / "run"), num_steps=1)
    shown = capsys.readouterr().out
    assert "add 47 38: " in shown and "lossless: retention 1.00" in shown


@pytest.mark.slow
def test_the_quickstart_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written; the server has tests of its own."""
    monkeypatch.chdir(tmp_path)
    for command in commands_of(QUICKSTART):
        if command[0] != "serve":
            monkeypatch.setattr(sys, "stdin", io.StringIO("add 47 38\n"))
            assert main(command) == 0, command
    assert (tmp_path / "runs" / "first" / "report" / "report.html").is_file()
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    assert "-> 85" in capsys.readouterr().out


@pytest.mark.slow
def test_the_python_of_the_api_page_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in python_blocks(PYTHON_API):
        exec(compile(block, "python_api.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "-> 85" in shown and "Did you mean train.num_steps?" in shown
    shutil.rmtree(tmp_path / "runs")
