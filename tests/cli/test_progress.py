"""No phase of a conversion is silent: a terminal sees something move, a log has a line for every phase."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = (
    *("data.self_prompts=24", "train.num_steps=3", "rollout.decode.max_new_tokens=24", "eval.held_back=4"),
    *("rollout.prompts_per_step=8", "train.rows_per_update=8", "eval.timed_prompts=2"),
)
LONGEST_SILENCE = 6.0
"""Seconds: the aim is two on an idle machine, and the suite runs beside other work."""


def command(output: Path) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "cli.py"), "convert", "bundled:teacher", *SETTINGS),
        f"output_dir={output}",
    ]


def test_a_terminal_is_never_silent_for_long(tmp_path: Path) -> None:
    """From the first character on; the interpreter's own start comes before it."""
    parent, child = pty.openpty()
    process = subprocess.Popen(command(tmp_path / "run"), stdout=child, stderr=child, close_fds=True)
    os.close(child)
    silences, last, heard = [], 0.0, b""
    while True:
        ready, _, _ = select.select([parent], [], [], 0.1)
        try:
            part = os.read(parent, 65536) if ready else b""
        except OSError:  # the other end is closed
            break
        now = time.monotonic()
        if part:
            heard += part
            if last:
                silences.append(now - last)
            last = now
        elif process.poll() is not None:
            break
    assert process.wait() == 0, heard.decode()[-2000:]
    print(f"longest silence {max(silences):.2f} s")
    assert max(silences) < LONGEST_SILENCE


def test_a_log_has_a_line_for_every_phase(tmp_path: Path) -> None:
    run = subprocess.run(command(tmp_path / "run"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for phase in (
        *("chosen for this model and machine", "prompts that the model writes 0/24", "step 1/3", "step 3/3"),
        *("evaluate teacher 0/3", "evaluate lossless 3/3", "time decoding, batch 1 9/9"),
        *("Lossless decoding writes", "converted checkpoint:", "next: opdlm chat"),
    ):
        assert phase in run.stdout, (phase, run.stdout)
