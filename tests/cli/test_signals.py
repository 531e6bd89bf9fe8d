"""A signal at any moment of a command ends it in one sentence or without a word, never in a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

AT_EVERY_LINE = """
import os, signal, sys, traceback
from pathlib import Path

import opdlm.cli.main as cli

NUMBER = signal.Signals[sys.argv[1]]
TRACED = {str(Path(cli.__file__).with_name("main.py")), str(Path(cli.__file__).parents[1] / "interrupts.py")}


def run(line):
    # the line at which the signal comes; the number of lines
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                sys.settrace(None)
                os.kill(os.getpid(), NUMBER)
        return trace

    sys.settrace(trace)
    code = cli.main(["recipes"])
    sys.settrace(None)
    return seen, code


def outcome(line):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            _, code = run(line)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    said = open(reader).read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


num_lines, code = run(0)
assert code == 0 and num_lines > 50, num_lines
found = {}
for line in range(1, num_lines + 1):
    found.setdefault(outcome(line), []).append(line)
expected = {(128 + NUMBER, "opdlm: interrupted.\\n"), (-NUMBER, "")}
assert set(found) <= expected, {key: lines for key, lines in found.items() if key not in expected}
assert len(found) == 2, found
"""

DURING_IMPORTS = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts the tests may ignore it

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "opdlm.cli.convert":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from opdlm.__main__ import run
run()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_at_every_line_of_the_command_line_ends_it_in_one_sentence(name: str) -> None:
    ended = subprocess.run([sys.executable, "-c", AT_EVERY_LINE, name], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no default action of SIGINT")
def test_ctrl_c_during_the_imports_ends_without_a_traceback() -> None:
    ended = subprocess.run([sys.executable, "-c", DURING_IMPORTS], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-2, "", "")
