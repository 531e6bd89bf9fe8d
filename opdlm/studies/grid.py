"""A grid of small jobs, each in its own process with one thread, resumable cell by cell.

A cell has a name and settings; a function of (settings, work folder) runs it and returns plain values. Its
process writes OUT/cells/NAME.json atomically. However the command ends (Ctrl-C, kill -9, a failing cell),
finished cells are kept, and the same command continues with the others. The work folder OUT/work/NAME is
deleted when its cell is finished; until then a job can continue from its checkpoints there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console

from opdlm.config.loader import plain
from opdlm.errors import ConfigError
from opdlm.files import write_atomic
from opdlm.training.metrics import STEP_LINE_SECONDS, progress_line

Values = dict[str, Any]
RunCell = Callable[[Values, Path], Values]
"""(settings, work folder) -> result, all plain values. A module-level function: it is pickled by name."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
"""Environment of the processes: one thread each; glibc keeps freed memory, because new memory is slow on some
virtual machines (docs/lab/cpu.md)."""
LOG_FILE = "log.txt"
CPU_SECONDS_FILE = "cpu_seconds.txt"
NOTE_SECONDS = 2.0
"""Time between notes of the CPU seconds of a running cell."""
TAIL_BYTES = 4096
"""Of a log, where its last line is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One job of a grid. `name` is a file name; `settings` are plain values that determine the result."""

    name: str
    settings: Values


@dataclass(frozen=True, slots=True, kw_only=True)
class GridResult:
    """Records (settings, result, CPU seconds) of finished cells in the order of the cells, and errors."""

    records: dict[str, Values]
    errors: dict[str, str]


def run_grid(
    cells: Sequence[Cell],
    run_cell: RunCell,
    out: Path,
    console: Console,
    processes: int | None = None,
) -> GridResult:
    """Run the cells that are not finished, `processes` at a time (default: one per core).

    Raises ConfigError if a finished cell was made with other settings. The other cells run if one fails.
    """
    waiting = [cell for cell in cells if read_finished(cell, out) is None]
    if len(waiting) < len(cells):
        console.out(f"{len(cells) - len(waiting)} of {len(cells)} cells are finished already")
    errors = run_processes(waiting, run_cell, out, console, processes or num_cores())
    records = {cell.name: read_finished(cell, out) for cell in cells}
    return GridResult(records={n: r for n, r in records.items() if r is not None}, errors=errors)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cell_file(cell: Cell, out: Path) -> Path:
    return out / "cells" / f"{cell.name}.json"


def work_folder(cell: Cell, out: Path) -> Path:
    return out / "work" / cell.name


def read_finished(cell: Cell, out: Path) -> Values | None:
    """The record of a cell; None if it is not finished."""
    path = cell_file(cell, out)
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(plain(cell.settings)))
    if record["settings"] != wanted:
        raise ConfigError(
            f"{path} was made with other settings ({first_difference(record['settings'], wanted)}): choose "
            "another --out, or delete it to run this cell again."
        )
    return record


def first_difference(there: Values, here: Values) -> str:
    for key in {**there, **here}:
        old, new = there.get(key), here.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            return f"{key}.{first_difference(old, new)}"
        return f"{key}: {old!r} there, {new!r} now"
    raise AssertionError("the settings are equal")


def run_processes(
    waiting: Sequence[Cell], run_cell: RunCell, out: Path, console: Console, processes: int
) -> dict[str, str]:
    """Run every cell in a new process; returns errors by cell. The processes end with this function."""
    queue, errors = list(waiting), dict[str, str]()
    running: dict[Any, tuple[Cell, BaseProcess]] = {}
    started = time.monotonic()
    with progress_line("study", console) as progress:
        task = progress.add_task("", total=len(waiting), status="")
        try:
            while queue or running:
                while queue and len(running) < processes:
                    cell = queue.pop(0)
                    process = start_process(cell, run_cell, out)
                    running[process.sentinel] = cell, process
                at = [f"{cell.name}: {last_line(cell, out) or 'starting'}" for cell, _ in running.values()]
                progress.update(task, status="; ".join(at))
                ended = connection.wait(list(running), 1.0 if console.is_terminal else STEP_LINE_SECONDS)
                if not ended and not console.is_terminal:
                    console.out("\n".join(at))
                for sentinel in ended:
                    cell, process = running.pop(sentinel)
                    process.join()
                    if error := error_of(cell, process, out):
                        errors[cell.name] = error
                    done = len(waiting) - len(queue) - len(running)
                    progress.update(task, completed=done)
                    report_cell(console, cell, error, done, len(waiting), time.monotonic() - started)
        finally:
            for _, process in running.values():
                process.kill()
                process.join()
    return errors


def report_cell(console: Console, cell: Cell, error: str, done: int, total: int, seconds: float) -> None:
    """Print a failure, and without a progress bar also a success."""
    if error:
        console.out(f"{cell.name} failed: {error}")
    elif not console.is_terminal:
        left = seconds / done * (total - done)
        console.out(f"cell {done}/{total}  {cell.name}  {seconds:.0f} s, {left:.0f} s left")


def start_process(cell: Cell, run_cell: RunCell, out: Path) -> BaseProcess:
    """Start a process that does not inherit the threads of our torch.

    On Linux it is a fork of a server that has imported everything and computed nothing.
    """
    on_linux = sys.platform == "linux"
    context = multiprocessing.get_context("forkserver") if on_linux else multiprocessing.get_context("spawn")
    context.set_forkserver_preload(["torch", run_cell.__module__])
    process = context.Process(target=work, args=(run_cell, cell, out), name=cell.name)
    with environment():
        process.start()
    return process


@contextmanager
def environment() -> Iterator[None]:
    """Processes started inside get ENVIRONMENT, which libraries read when they are loaded."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def work(run_cell: RunCell, cell: Cell, out: Path) -> None:
    """Main function of a process: run a cell, and write its output to its log and its record to OUT/cells."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends its processes
    folder = work_folder(cell, out)
    folder.mkdir(parents=True, exist_ok=True)
    before, noting = cpu_seconds_before(folder), threading.Lock()
    threading.Thread(target=end_with_parent, args=(folder, before, noting), daemon=True).start()
    with (folder / LOG_FILE).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    result = run_cell(cell.settings, folder)
    seconds = before + time.process_time()  # CPU time, independent of other load
    record = {"settings": cell.settings, "result": result, "seconds": round(seconds, 1)}
    path = cell_file(cell, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(plain(record), indent=1))
    with noting:
        shutil.rmtree(folder)


def cpu_seconds_before(folder: Path) -> float:
    """What earlier processes of an unfinished cell have spent, to within `NOTE_SECONDS` each."""
    path = folder / CPU_SECONDS_FILE
    return float(path.read_text()) if path.is_file() else 0.0


def end_with_parent(folder: Path, before: float, noting: threading.Lock) -> None:
    """End with the parent: an orphan would compute a cell that the restarted command computes again. Until
    then, note the CPU seconds of the cell, since this process may be killed; not while `noting` is held.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    while not connection.wait([parent.sentinel], NOTE_SECONDS):
        with noting:
            if folder.is_dir():
                write_atomic(folder / CPU_SECONDS_FILE, str(before + time.process_time()))
    os._exit(1)


def error_of(cell: Cell, process: BaseProcess, out: Path) -> str:
    """The last line that a failed process printed, and the path of its log; empty after a success."""
    if process.exitcode == 0:
        return ""
    log = work_folder(cell, out) / LOG_FILE
    if process.exitcode is not None and process.exitcode < 0:
        return f"ended by signal {-process.exitcode} (9: perhaps out of memory), see {log}"
    return f"{last_line(cell, out) or f'exit code {process.exitcode}'} (see {log})"


def last_line(cell: Cell, out: Path) -> str:
    """What the cell printed last, as a terminal would show it; empty if nothing."""
    try:
        tail = (work_folder(cell, out) / LOG_FILE).read_bytes()[-TAIL_BYTES:]
    except FileNotFoundError:
        return ""
    lines = tail.decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def of_window(records: Sequence[Values], window: Sequence[float]) -> dict[int, Values]:
    """Records of this mask window by seed."""
    return chosen(records, window=list(window))


def chosen(records: Sequence[Values], **coordinates: Any) -> dict[int, Values]:
    """Records with these coordinates by seed."""
    return {
        record["settings"]["seed"]: record
        for record in records
        if all(record["settings"][key] == value for key, value in coordinates.items())
    }
