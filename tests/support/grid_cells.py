"""Small real jobs for grids: a least-squares fit by gradient descent, and what goes wrong with jobs.

python tests/support/grid_cells.py OUT NUM SECONDS   a grid of NUM fits that take SECONDS each, two at a time
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from opdlm.studies.grid import Cell, run_grid


def fit(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fit y = 2x by gradient descent from 0: after n steps the error is (1 - rate * mean(x^2))^n."""
    import torch

    if "says" in settings:
        print(settings["says"], flush=True)
    time.sleep(settings.get("seconds", 0))
    x = torch.arange(4, dtype=torch.float64)
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(settings["steps"]):
        loss = ((weight * x - 2 * x) ** 2).mean() / 2
        (slope,) = torch.autograd.grad(loss, [weight])
        weight.data -= settings["rate"] * slope
    with (folder.parent.parent / "calls.txt").open("a") as calls:
        calls.write(f"{settings['rate']}\n")
    return {"error": 2 - weight.item(), "threads": torch.get_num_threads(), "pid": os.getpid()}


def fit_or_fail(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    match settings.get("trouble"):
        case "error":
            raise ValueError("the matrix is singular")
        case "killed":
            while time.process_time() < settings.get("busy", 0):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        case "interrupted":
            (folder / "checkpoint").write_text("half of it")
            raise KeyboardInterrupt
    return fit(settings, folder)


def cells(num: int, **settings: Any) -> list[Cell]:
    return [Cell(name=f"rate{i}", settings={"rate": i / 10, "steps": 3, **settings}) for i in range(num)]


if __name__ == "__main__":
    run_grid(cells(int(sys.argv[2]), seconds=float(sys.argv[3])), fit, Path(sys.argv[1]), Console(), 2)
