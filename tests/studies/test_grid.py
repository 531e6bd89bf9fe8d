"""Grids of jobs: processes of one thread, resumed cell by cell whatever ended them."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from grid_cells import cells, fit, fit_or_fail
from rich.console import Console

from opdlm.errors import ConfigError
from opdlm.studies import grid as grid_module
from opdlm.studies.grid import Cell, GridResult, environment, num_cores, run_grid

CELLS = Path(__file__).parents[1] / "support" / "grid_cells.py"


def run(grid: list[Cell], out: Path, run_cell=fit_or_fail) -> tuple[GridResult, str]:
    text = io.StringIO()
    result = run_grid(grid, run_cell, out, Console(file=text, width=200), processes=2)
    return result, text.getvalue()


def calls(out: Path) -> list[str]:
    path = out / "calls.txt"
    return sorted(path.read_text().split()) if path.is_file() else []


def test_every_cell_runs_in_a_process_of_one_thread_and_leaves_its_settings_and_result(
    tmp_path: Path,
) -> None:
    result, text = run(cells(3), tmp_path)
    assert list(result.records) == ["rate0", "rate1", "rate2"] and not result.errors
    for record in result.records.values():
        expected = 2 * (1 - record["settings"]["rate"] * 3.5) ** 3
        assert record["result"]["error"] == pytest.approx(expected, rel=1e-12)
        assert record["result"]["threads"] == 1
    pids = {record["result"]["pid"] for record in result.records.values()}
    assert len(pids) == 3 and os.getpid() not in pids
    assert not list((tmp_path / "work").iterdir())
    assert "cell 3/3" in text and "s left" in text


def test_the_parents_threads_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with environment():
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ


def test_finished_cells_are_not_run_again_and_other_settings_are_refused(tmp_path: Path) -> None:
    first, _ = run(cells(1, nested={"a": 1, "b": (2, 3)}), tmp_path)
    second, text = run(cells(2, nested={"a": 1, "b": (2, 3)}), tmp_path)
    assert "1 of 2 cells are finished already" in text
    assert second.records["rate0"] == first.records["rate0"] and calls(tmp_path) == ["0.0", "0.1"]
    with pytest.raises(ConfigError, match=r"nested\.b: \[2, 3\] there, \[2, 4\] now") as error:
        run([Cell(name="new", settings={}), *cells(1, nested={"a": 1, "b": (2, 4)})], tmp_path)
    assert "\n" not in str(error.value) and calls(tmp_path) == ["0.0", "0.1"]


def test_a_failing_cell_says_why_and_loses_no_other(tmp_path: Path) -> None:
    grid = [
        Cell(name="singular", settings={"trouble": "error"}),
        Cell(name="killed", settings={"trouble": "killed"}),
        *cells(2),
    ]
    result, text = run(grid, tmp_path)
    assert list(result.records) == ["rate0", "rate1"]
    assert result.errors["singular"].startswith("ValueError: the matrix is singular")
    assert "signal 9" in result.errors["killed"]
    assert "singular failed: ValueError: the matrix is singular" in text
    assert "Traceback" in (tmp_path / "work" / "singular" / "log.txt").read_text()


def test_a_long_cell_shows_what_it_printed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "STEP_LINE_SECONDS", 0.2)
    _, text = run(cells(1, says="step 1/9\rstep 2/9", seconds=1.0), tmp_path)
    assert "rate0: step 2/9" in text.splitlines()


def test_what_an_unfinished_cell_has_written_is_there_when_it_runs_again(tmp_path: Path) -> None:
    result, _ = run([Cell(name="a", settings={"trouble": "interrupted"})], tmp_path)
    assert "a" in result.errors
    assert (tmp_path / "work" / "a" / "checkpoint").read_text() == "half of it"
    result, _ = run([Cell(name="a", settings={"rate": 0.1, "steps": 1})], tmp_path)
    assert "a" in result.records and not (tmp_path / "work" / "a").exists()


def test_the_time_of_a_killed_process_is_counted(tmp_path: Path) -> None:
    killed = Cell(name="a", settings={"trouble": "killed", "busy": 2 * grid_module.NOTE_SECONDS})
    assert "signal 9" in run([killed], tmp_path)[0].errors["a"]
    result, _ = run([Cell(name="a", settings={"rate": 0.1, "steps": 1})], tmp_path)
    assert result.records["a"]["seconds"] >= grid_module.NOTE_SECONDS / 2


@pytest.mark.parametrize("ending", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_killed_grid_continues_without_repeating_a_finished_cell(tmp_path: Path, ending: int) -> None:
    command = [sys.executable, str(CELLS), str(tmp_path), "4", "0.5"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(list((tmp_path / "cells").glob("*.json"))) >= 1)
    process.send_signal(ending)
    assert process.wait(120) != 0
    # orphans end with their parent, so what is finished now stays what is finished
    wait_for(lambda: not processes_of(tmp_path))
    finished = {path.name: path.read_text() for path in (tmp_path / "cells").glob("*.json")}
    assert 1 <= len(finished) < 4
    assert all("result" in json.loads(text) for text in finished.values())
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    now = {path.name: path.read_text() for path in (tmp_path / "cells").glob("*.json")}
    assert len(now) == 4 and {name: now[name] for name in finished} == finished


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited for two minutes"
        time.sleep(0.02)


def processes_of(out: Path) -> list[int]:
    """Living processes whose open files lie under `out`: the workers, whose log is there."""
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith(str(out)):
            found.append(int(descriptor.parts[2]))
    return found


def test_one_process_per_core_that_may_be_used() -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)
    assert fit.__module__ == "grid_cells"  # pickled by name
