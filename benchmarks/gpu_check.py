"""One check of everything that only a GPU runs, in at most ten minutes on one H200.

    PYTHONPATH=. python benchmarks/gpu_check.py --out gpu_check.json

It needs torch and transformers only. Each section is a process of its own with a limit of seconds: a failure
or a hang is recorded, and the others run. Weights are random, of the shape of Qwen3-0.6B.

attention   outputs and gradients of sdpa, flex and flash against each other, in float32 and bfloat16
flex, flash two training steps of `sdar` in full (student and teacher apart, bf16 autocast): seconds, TFLOP/s,
            MFU, and peak memory against the estimate of `opdlm convert --dry-run`. FLOPs count visible pairs.
decoding    ar and lossless in bfloat16 at batch 1, 8 and 64; the `_compiled` section with CUDA graphs
tests       pytest -m gpu, where pytest and the package's dependencies are installed

`identical` is the share of lossless responses that equal those of ar; bfloat16 rounds two equal computations
differently, and random weights are full of near ties. `--toy` runs every section on a CPU at a tiny size.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.generate import generate
from opdlm.modeling.attention import Backend, flex_failure
from opdlm.modeling.compiled import compiled_decoding
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.modeling.slots import Grid, Slots, clean_slots, join_slots, make_slots, visible
from opdlm.objectives.losses import HiddenTargets, chunked_divergence, lm_head_of

PEAK_TFLOPS = 989.0
"""Dense bfloat16 of an H200 or H100."""
BLOCK = 4
Row = dict[str, Any]
Report = Callable[[Row], None]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the sections compute."""

    hidden: int = 1024
    layers: int = 28
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 151936
    rows: int = 4
    prompt: int = 512
    response: int = 1536
    batches: tuple[int, ...] = (1, 8, 64)
    decode_prompt: int = 128
    new_tokens: int = 64
    device: str = "cuda"
    compiler: str = "inductor"
    estimated_gib: float | None = None
    """Peak of a training step by the dry run, which needs more packages: computed in a test."""

    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=True,
        )


FULL = Size(estimated_gib=37.0)
TOY = Size(
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocabulary=128,
    rows=2,
    prompt=64,
    response=128,
    batches=(1, 3),
    decode_prompt=9,
    new_tokens=8,
    device="cpu",
    compiler="eager",
)


def make_model(size: Size, dtype: torch.dtype, fmt: str) -> DiffusionLM:
    """`sdar`: a student and its teacher. `preserve`: one set of weights, as with an adapter."""
    torch.manual_seed(0)
    with torch.device(size.device):
        student: Any = Qwen3ForCausalLM(size.config())
        teacher: Any = Qwen3ForCausalLM(size.config()).requires_grad_(False) if fmt == "sdar" else None
    spec = DiffusionSpec(
        format="sdar" if fmt == "sdar" else "preserve",
        block_size=BLOCK,
        grid="absolute",
        mask_token_id=size.vocabulary - 1,
        stop_token_ids=(),
        adapter=fmt != "sdar",
    )
    mask_embedding = None if fmt == "sdar" else torch.randn(size.hidden)
    model = DiffusionLM(student, spec, teacher=teacher, mask_embedding=mask_embedding)
    return model.to(size.device, dtype).eval()


def training_rows(size: Size) -> tuple[Slots, Slots, Tensor]:
    """The doubled rows of `sdar`, their clean text, and the columns of the masked tokens, 2 or 3 a block."""
    device, mask_id = size.device, size.vocabulary - 1
    length, rows, grid = size.prompt + size.response, size.rows, Grid(block_size=BLOCK)
    ids_BL = torch.randint(mask_id, (rows, length), device=device)
    lengths_B, prompts_B = (torch.full((rows,), n, device=device) for n in (length, size.prompt))
    text = clean_slots(ids_BL, lengths_B, prompts_B, grid, "preserve")
    clean = clean_slots(ids_BL, lengths_B, prompts_B, grid, "sdar")
    places_R = torch.arange(size.prompt, length, device=device)
    masked_R = places_R % BLOCK >= 1 + places_R // BLOCK % 2
    positions_BR = places_R.expand(rows, -1)
    start_BR = positions_BR // BLOCK * BLOCK
    noised_ids_BR = ids_BL[:, size.prompt :].masked_fill(masked_R, mask_id)
    valid_BR = torch.ones_like(positions_BR, dtype=torch.bool)
    noised = make_slots(noised_ids_BR, positions_BR, start_BR - 1, start_BR // BLOCK + 1, valid_BR)
    return join_slots(clean, noised), text, places_R[masked_R]


def loss_of(model: DiffusionLM, row: Slots, text: Slots, target_T: Tensor, size: Size) -> Tensor:
    """Mean KL of the student to the teacher over the masked tokens."""
    banned = torch.tensor([size.vocabulary - 1], device=size.device)
    column_T = target_T + size.response  # noised slots follow the clean ones of prompt and response
    student_MH = model.student_hidden(row)[:, column_T].flatten(0, 1)
    teacher_MH = model.teacher_hidden(text)[:, target_T - 1].flatten(0, 1)
    targets = HiddenTargets(hidden_MH=teacher_MH, head=lm_head_of(model.teacher or model.student, banned))
    weights_M = torch.full((len(student_MH),), 1 / len(student_MH), device=size.device)
    return chunked_divergence(student_MH, lm_head_of(model.student, banned), targets, weights_M).loss


def step_tflop(model: DiffusionLM, row: Slots, text: Slots, num_targets: int, size: Size) -> float:
    """FLOPs of a step in 10^12: products with weights, and the visible pairs of attention."""
    tables = size.vocabulary * size.hidden
    body = sum(p.numel() for p in model.student.parameters()) - tables
    pair = 4 * size.heads * size.head_dim * size.layers
    student = 2 * body * row.ids_BS.numel() + pair * int(visible(row, row).sum())
    teacher = 2 * body * text.ids_BS.numel() + pair * int(visible(text, text).sum())
    return (3 * student + teacher + 2 * tables * num_targets * 4) / 1e12


def synchronize(size: Size) -> None:
    if size.device == "cuda":
        torch.cuda.synchronize()


def peak_gib(size: Size) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if size.device == "cuda" else None


def check_training(backend: Backend, size: Size, report: Report) -> None:
    """Two steps; the first compiles and allocates."""
    if backend == "flex":
        reason = flex_failure(
            torch.device(size.device), size.heads, size.kv_heads, size.head_dim, torch.bfloat16
        )
        if reason:
            raise RuntimeError(reason)
    model = make_model(size, torch.float32, "sdar")
    model.attention = backend
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5, fused=True)
    row, text, target_T = training_rows(size)
    tflop = step_tflop(model, row, text, size.rows * len(target_T), size)
    for step in range(2):
        synchronize(size)
        started = time.perf_counter()
        with torch.autocast(size.device, torch.bfloat16):
            loss = loss_of(model, row, text, target_T, size)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(size)
        seconds = time.perf_counter() - started
        report(
            {
                "step": step,
                "seconds": seconds,
                "loss": float(loss.detach()),
                "slots": row.ids_BS.numel(),
                "tflops": tflop / seconds,
                "mfu": tflop / seconds / PEAK_TFLOPS if size.device == "cuda" else None,
                "peak_gib": peak_gib(size),
                "estimated_gib": size.estimated_gib,
            }
        )


def check_attention(size: Size, report: Report) -> None:
    """Loss and gradient of a small model by each backend against sdpa in float32."""
    small = replace(size, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, vocabulary=512)
    small = replace(small, rows=1, prompt=128, response=192)
    row, text, target_T = training_rows(small)
    expected: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for backend in ("sdpa", "flash", "flex"):
            model = make_model(small, torch.float32, "sdar").to(dtype)
            model.attention = backend
            found: Row = {"backend": backend, "dtype": str(dtype).removeprefix("torch.")}
            try:
                loss = loss_of(model, row, text, target_T, small)
                loss.backward()
                grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
                expected = expected or grads
                errors = [float((grads[n] - g).norm() / g.norm()) for n, g in expected.items()]
                found |= {"loss": float(loss.detach()), "gradient_error": max(errors)}
            except Exception as error:  # the other backends are checked all the same
                found["error"] = first_line(error)
            report(found)


def check_decoding(size: Size, report: Report, *, compiles: bool) -> None:
    """Speed of ar and lossless; a compiled forward is warmed up twice: compiled, then recorded."""
    model = make_model(size, torch.float32 if size.device == "cpu" else torch.bfloat16, "preserve")
    rng = torch.Generator().manual_seed(0)
    for batch in size.batches:
        shape = (batch, size.decode_prompt)
        prompts = torch.randint(size.vocabulary - 1, shape, generator=rng).tolist()
        responses: dict[str, list[tuple[int, ...]]] = {}
        for mode in ("ar", "lossless"):
            responses[mode] = time_decoding(model, mode, prompts, size, report, responses, compiles)


def time_decoding(
    model: DiffusionLM,
    mode: Mode,
    prompts: Sequence[Sequence[int]],
    size: Size,
    report: Report,
    responses: dict[str, list[tuple[int, ...]]],
    compiles: bool,
) -> list[tuple[int, ...]]:
    """The responses of one mode; reports its speed, and how many equal those of `ar`."""
    config = DecodeConfig(mode=mode, max_new_tokens=size.new_tokens, batch_size=len(prompts))
    with compiled_decoding(model, compiles, backend=size.compiler):
        started = time.perf_counter()
        for _ in range(2 if compiles else 1):
            generate(model, prompts, config)
        warm_up = time.perf_counter() - started
        started = time.perf_counter()
        rollouts = generate(model, prompts, config)
        seconds = time.perf_counter() - started
    found = [rollout.text_ids for rollout in rollouts]
    same = [a == b for a, b in zip(found, responses.get("ar", found), strict=True)]
    num_steps = max(rollout.num_steps for rollout in rollouts)
    report(
        {
            "mode": mode,
            "batch": len(prompts),
            "tokens_per_second": sum(map(len, found)) / seconds,
            "ms_per_step": 1e3 * seconds / num_steps,
            "warm_up_seconds": warm_up,
            "identical": sum(same) / len(same),
            "peak_gib": peak_gib(size),
        }
    )
    return found


def check_tests(size: Size, report: Report) -> None:
    """The tests marked gpu."""
    if find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/modeling"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    lines = (done.stdout + done.stderr).splitlines()
    report({"exit": done.returncode, "summary": " | ".join(lines[-5:])})


SECTIONS: dict[str, tuple[float, Callable[[Size, Report], None]]] = {
    "attention": (60, check_attention),
    "flex": (90, lambda size, report: check_training("flex", size, report)),
    "flash": (60, lambda size, report: check_training("flash", size, report)),
    "decoding": (80, lambda size, report: check_decoding(size, report, compiles=False)),
    "decoding_compiled": (150, lambda size, report: check_decoding(size, report, compiles=True)),
    "tests": (130, check_tests),
}
"""By name: limit in seconds, 570 in all, and the function."""


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def run_here(name: str, size: Size, out: Path) -> None:
    """Run one section; `out` holds its rows so far at any time."""
    result: Row = {"rows": []}

    def report(row: Row) -> None:
        result["rows"].append(row)
        out.write_text(json.dumps(result))

    started = time.perf_counter()
    try:
        SECTIONS[name][1](size, report)
    except Exception as error:  # recorded, so that the other sections run
        result["error"] = first_line(error)
    result["seconds"] = time.perf_counter() - started
    out.write_text(json.dumps(result))


def run_apart(name: str, out: Path) -> None:
    """Run one section in a process of its own, which ends at its limit."""
    limit = SECTIONS[name][0]
    command = [sys.executable, __file__, "--section", name, "--out", str(out)]
    reason = ""
    try:
        done = subprocess.run(command, timeout=limit, stderr=subprocess.PIPE, text=True)
        reason = f"exit {done.returncode}: {done.stderr[-300:]}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"stopped after {limit:.0f} s"
    if reason:
        result = json.loads(out.read_text()) if out.is_file() else {"rows": []}
        out.write_text(json.dumps(result | {"error": reason}))


def table_lines(name: str, result: Row) -> Iterator[str]:
    """The rows of a section as columns of text."""
    yield f"\n{name}  {result.get('seconds', float('nan')):.0f} s"
    keys = list(dict.fromkeys(key for row in result["rows"] for key in row))
    cells = [keys, *([shown(row.get(key)) for key in keys] for row in result["rows"])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells if keys else ():
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    if "error" in result:
        yield f"  failed: {result['error']}"


def shown(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> Row:
    """What the numbers were measured on."""
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="gpu_check.json")
    parser.add_argument("--toy", action="store_true", help="a tiny size on the CPU, without the tests")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.section:
        run_here(options.section, FULL, Path(options.out))
        return
    results: Row = {"machine": machine(), "sections": {}}
    names = [name for name in options.only if not (options.toy and name == "tests")]
    with TemporaryDirectory() as folder:
        for name in names:
            part = Path(folder) / f"{name}.json"
            if options.toy:
                run_here(name, TOY, part)
            else:
                run_apart(name, part)
            results["sections"][name] = json.loads(part.read_text())
            print("\n".join(table_lines(name, results["sections"][name])), flush=True)
            Path(options.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
