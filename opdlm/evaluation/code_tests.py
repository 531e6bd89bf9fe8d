"""Run a model's code against tests, in a process of its own with limits on time, memory and files.

The process is Python in isolated mode, in an empty folder, without the environment of its parent; it may use
`seconds` of CPU and of wall-clock time, `megabytes` of memory, and write small files. This keeps mistakes in,
not malice: the network is not cut off, so run unknown models in a container. Nothing calls this unless
`eval.run_code` is set.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
MAX_FILE_BYTES = 2**20


def code_of(response: str) -> str:
    """The last fenced block of a response, else all of it."""
    found = FENCE.findall(response)
    return found[-1] if found else response


def passes(response: str, tests: str, *, seconds: int = 10, megabytes: int = 512) -> bool:
    """Whether the response's code followed by the tests ends without an error."""

    def limit() -> None:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        program.write_text(f"{code_of(response)}\n\n{tests}\n", encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-I", str(program)],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=limit,
        )
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            end_group(process.pid)
            process.wait()


def end_group(pid: int) -> None:
    """What the program started ends with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
