"""The last barrier: whatever goes wrong, the command line says it in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from opdlm import environment
from opdlm.cli.main import main
from opdlm.training.metrics import MetricsLog, PhaseProgress

ROOT = Path(__file__).parents[2]


def fail(reason: str) -> None:
    raise LookupError(reason)


@pytest.fixture
def broken_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`opdlm env` meets an error that nobody expects; temporary files go to the folder."""
    monkeypatch.setattr(environment, "describe_environment", lambda: fail("no\n\ud800 such [/thing]"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_an_unexpected_error_is_one_sentence_and_a_file(
    broken_env: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["env"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    (file,) = broken_env.glob("opdlm-*/traceback.txt")
    assert line.startswith(
        r"opdlm: env met an error that it does not expect (LookupError: no\n\ud800 such [/thing])"
    )
    assert str(file) in line and "report it with the command and what `opdlm env` prints" in line
    text = file.read_text()
    assert text.startswith("Traceback") and text.endswith("LookupError: no\n\\ud800 such [/thing]\n")


def test_the_traceback_is_shown_on_request(
    broken_env: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPDLM_TRACEBACK", "1")
    assert main(["env"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-1].startswith("opdlm: env met")


def test_a_full_temporary_folder_is_said(
    broken_env: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(broken_env / "missing"))
    assert main(["env"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be written (No such file or directory); OPDLM_TRACEBACK=1 prints it" in line


def test_texts_of_users_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal too, where colours and :bug: signs are drawn."""
    text = "m[/x] a[red]b :bug: [link=x]"
    for is_terminal in (False, True):
        console = Console(force_terminal=is_terminal, width=200)
        MetricsLog(tmp_path, console).note(text)
        with PhaseProgress(text, 1, console) as progress:
            progress.advance(1, text)
        written = capsys.readouterr().out
        assert written.count("[/x]") >= 2 and written.count(":bug:") >= 2 and "\U0001f41b" not in written


def test_a_folder_named_like_markup_is_printed_as_it_is(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m[", "x]").parent.mkdir()
    Path("m[", "x]").symlink_to(teacher_folder)
    settings = (
        *("data.path=bundled:prompts.jsonl", "data.limit=8", "eval.held_back=0", "lora.r=4"),
        *("rollout.prompts_per_step=2", "rollout.decode.max_new_tokens=4", "train.rows_per_update=2"),
        *("train.num_steps=1", "output_dir=a[/b]:bug:x"),
    )
    assert main(["convert", "m[/x]", *settings]) == 0
    written = capsys.readouterr().out
    assert "m[/x]: qwen3," in written and "converted checkpoint: a[/b]:bug:x/model" in written
    assert Path("a[", "b]:bug:x", "model").is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory")
def test_no_fuzzed_input_ends_in_a_traceback_or_never() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "fuzz.py", "--inputs", "60", "--seed", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = done.stdout.splitlines()[2:-1]
    assert len(kinds) == 8 and not [line for line in kinds if not line.endswith("| 0 | 0 |")]
    assert not [line for line in kinds if line.split("|")[2].strip() == "0"]
