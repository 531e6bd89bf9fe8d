"""A few faults of each kind, injected into real commands; `make test-faults` injects many."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_no_fault_loses_a_run_changes_it_in_silence_or_prints_a_traceback() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "faults.py", "--faults", "12", "--seed", "3"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = done.stdout.splitlines()[2:-1]
    assert len(kinds) == 8 and not [line for line in kinds if not line.endswith("| 0 | 0 | 0 |")]
    assert not [line for line in kinds if line.split("|")[2].strip() == "0"]
