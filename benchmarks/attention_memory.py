"""Peak memory and time of one layer's attention, forward and backward, against the length of the row.

The layout is a `preserve` training row with one state per block: L noised slots that read L cached clean
keys and their own group. Every measurement runs in its own process after a small warm-up. Peak memory is the
maximum resident size of the process minus its size after query, key and value were made. Time and memory
include the mask, which is made once per forward.

    python benchmarks/attention_memory.py --json docs/results/attention_memory.json

Shapes: L tokens of the row; 16 query heads over 8 key heads of 128 dimensions (Qwen3-0.6B), float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opdlm.modeling.attention import Backend, SlotForward, keys_with_cache, make_mask, slot_attention
from opdlm.modeling.slots import Slots, make_slots

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 8, 128, 4
MIB = 2**20


def noised_row(length: int) -> Slots:
    """One state of every block, with all tokens masked."""
    positions_BS = torch.arange(length)[None]
    anchor_BS = positions_BS // BLOCK_SIZE * BLOCK_SIZE - 1
    group_BS = 1 + positions_BS // BLOCK_SIZE
    return make_slots(positions_BS, positions_BS, anchor_BS, group_BS, torch.ones_like(group_BS) > 0)


def run_layer(backend: Backend, noised: Slots, inputs: list[torch.Tensor]) -> None:
    keys = keys_with_cache(noised, noised.ids_BS.shape[1])
    mask = make_mask(noised, keys, None, torch.float32, backend)
    module: Any = nn.Module().eval()
    module.layer_idx, module.num_key_value_groups = 0, HEADS // KV_HEADS
    forward = SlotForward({None: mask}, (None,), None)
    query, key, value = inputs
    slot_attention(module, query, key, value, None, slot_forward=forward)[0].sum().backward()


def make_inputs(length: int) -> list[torch.Tensor]:
    shapes = [(length, HEADS), (2 * length, KV_HEADS), (2 * length, KV_HEADS)]
    return [torch.randn(1, n, h, HEAD_DIM).transpose(1, 2).requires_grad_() for n, h in shapes]


def peak_mib(reset: bool = False) -> float:
    """Maximum resident size since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / MIB


def measure(backend: Backend, length: int) -> dict[str, float]:
    run_layer(backend, noised_row(256), make_inputs(256))
    noised, inputs = noised_row(length), make_inputs(length)
    before = peak_mib(reset=True)
    started = time.perf_counter()
    run_layer(backend, noised, inputs)
    return {"seconds": round(time.perf_counter() - started, 2), "mib": round(peak_mib() - before, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--backends", nargs="+", default=["sdpa", "flash"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], int(args.child[1]))))
        return
    rows = []
    for length in args.lengths:
        for backend in args.backends:
            command = [sys.executable, __file__, "--child", backend, str(length)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"length": length, "backend": backend, **json.loads(done.stdout)})
            print(rows[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
