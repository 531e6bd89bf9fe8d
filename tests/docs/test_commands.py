"""The commands and the Python of README.md and docs/*.md run from an empty folder, in the order of the page.

A block of bash or python runs unless a comment above it, `<!-- needs ... -->`, says what is missing here:
another model, a GPU, a second terminal. A diff is applied to a copy of the package, which the page's Python
then imports.
"""

from __future__ import annotations

import contextlib
import importlib.util
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
from types import ModuleType
from urllib.request import urlopen

import pytest
from processes import launch
from tiny_checkpoints import convert_both, write_rows

import opdlm
from opdlm.cli.main import main, parse

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:^<!-- needs ([^\n]+) -->\n)?^```(bash|python|diff)\n(.*?)^```", re.DOTALL | re.MULTILINE
)
SMALL = {
    "convert": ["train.num_steps=1", "rollout.prompts_per_step=8", "train.rows_per_update=8"],
    "eval": ["--limit", "1"],
    "bench": ["--limit", "2", "--repeats", "1", "--batch-sizes", "1", "--max-new-tokens", "8"],
}
"""What the small run adds to a command, by verb."""
SMALL_SETTINGS = {"data.self_prompts=4000": "data.self_prompts=8", "train.num_steps=400": "train.num_steps=2"}
"""What it puts in the place of others."""
SHOWN = {
    "README.md": "85",
    "quickstart.md": "-> 85",
    "python_api.md": "Did you mean train.num_steps?",
    "evaluation.md": "report",
    "runs.md": "runs/tiny",
}
"""A text that the blocks of a page print."""


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Language and text of every block that runs here."""
    return [(language, text) for needs, language, text in BLOCK.findall(page.read_text()) if not needs]


PAGES = {
    page.name: page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if any(language != "diff" for language, _ in blocks_of(page))
}


def commands_of(block: str) -> list[list[str]]:
    """The commands of a bash block of a page, without those of pip."""
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    known = (["opdlm"], ["accelerate", "launch"], ["pip", "install"])
    assert all(any(line[: len(start)] == start for start in known) for line in lines if line), block
    return [line for line in lines if line and line[0] != "pip"]


def commands_in(name: str) -> list[list[str]]:
    return [c for language, text in blocks_of(PAGES[name]) if language == "bash" for c in commands_of(text)]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `opdlm convert tiny` writes, after one step."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    small = [*SMALL["convert"], "eval.limit=1", "eval.modes=[lossless]", "eval.timed_prompts=0"]
    opdlm.convert("tiny", output_dir=folder, overrides=small)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_module_cache: None) -> Path:
    """An empty folder with the files that the commands name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "opdlm" / "bundled" / "teacher", tmp_path / "my-model")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"add {i} {2 * i}"} for i in range(10, 80)])
    write_rows(
        tmp_path / "questions.jsonl", [{"prompt": f"add {i} 7", "answer": f"{i + 7}"} for i in range(8)]
    )
    write_rows(tmp_path / "held_out.jsonl", [{"text": f"add {i} 7 -> {i + 7}"} for i in range(80)])
    return tmp_path


def run(command: list[str], as_written: bool) -> None:
    start = command.index("opdlm")
    launcher, command = command[:start], command[start + 1 :]
    if not as_written:
        command = [SMALL_SETTINGS.get(word, word) for word in command] + SMALL.get(command[0], [])
        if command[:2] == ["convert", "tiny"]:
            command.append("eval.limit=1")
    if launcher:
        launch(["opdlm", *command], "accelerate.commands.launch", *launcher[2:], cwd=Path.cwd())
        return
    if command[0] == "serve":
        if as_written:  # it takes port 8000; tests/serving start servers every day
            assert_serves(command)
        return
    assert main(command) == 0, command


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


def run_patched(blocks: list[tuple[str, str]], folder: Path) -> None:
    """The page's Python in a process of its own, on a copy of the package to which its diffs are applied."""
    shutil.copytree(ROOT / "opdlm", folder / "opdlm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    changes, code = (
        "".join(text for kind, text in blocks if kind == wanted) for wanted in ("diff", "python")
    )
    subprocess.run(["patch", "-p1", "--fuzz=0"], input=changes, text=True, cwd=folder, check=True)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    (folder / "page.py").write_text(code)
    subprocess.run([sys.executable, "page.py"], env=environment, cwd=folder, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "as_written"),
    [
        *(pytest.param(name, False, id=name) for name in PAGES),
        *(pytest.param(name, True, id=f"{name}-as_written") for name in ("README.md", "quickstart.md")),
    ],
)
def test_the_blocks_of_a_page_run(
    name: str,
    as_written: bool,
    folder: Path,
    request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The small run cuts the budget of the trainings; the other changes nothing."""
    blocks = blocks_of(PAGES[name])
    if any(language == "diff" for language, _ in blocks):
        run_patched(blocks, folder)
        return
    if name not in ("README.md", "quickstart.md", "python_api.md"):  # these make their own
        shutil.copytree(request.getfixturevalue("tiny_run"), folder / "runs" / "tiny")
    names: dict[str, object] = {}
    for language, text in blocks:
        if language == "python":
            exec(compile(text, name, "exec"), names)
            continue
        for command in commands_of(text):
            monkeypatch.setattr(sys, "stdin", io.StringIO("add 47 38\n"))
            run(command, as_written)
    assert SHOWN.get(name, "") in "".join(capfd.readouterr())


def test_the_small_run_changes_commands_that_the_pages_have() -> None:
    """A page that no longer has such a command would run in full without a word."""
    words = {word for name in PAGES for command in commands_in(name) for word in command}
    assert set(SMALL_SETTINGS) <= words and set(SMALL) <= words and set(SHOWN) <= set(PAGES)


def test_every_command_of_a_page_parses() -> None:
    """Those that are not run too, where they are of `opdlm`."""
    for page in PAGES.values():
        blocks = BLOCK.findall(page.read_text())
        assert len(blocks) == len(re.findall(r"^```(?:bash|python|diff)$", page.read_text(), re.MULTILINE))
        for _, language, text in blocks:
            for line in text.replace("\\\n", " ").splitlines() if language == "bash" else ():
                if line.startswith("opdlm "):
                    parse(shlex.split(line, comments=True)[1:])
            if language == "bash":
                subprocess.run(["bash", "-n"], input=text, text=True, check=True)
            if language == "python":
                compile(text, page.name, "exec")


def test_the_quickstart_names_every_step() -> None:
    commands = commands_in("quickstart.md")
    assert {"convert", "generate", "chat", "eval", "serve", "report", "env"} == {c[1] for c in commands}


def test_every_public_name_is_in_the_page_of_the_api() -> None:
    text = PAGES["python_api.md"].read_text()
    assert set(opdlm.__all__) - {"__version__"} <= set(re.findall(r"\w+", text))


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
