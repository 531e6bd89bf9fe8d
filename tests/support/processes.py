"""Programs in processes of their own, with this checkout on the path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(
    program: list[str], *options: str, check: bool = True, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a module with arguments, one thread per process; `options` are those of a launcher before it."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", *options, *program]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert not check or done.returncode == 0, done.stderr
    return done
