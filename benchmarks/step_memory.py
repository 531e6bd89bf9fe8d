"""Time and peak memory of one training step at several lengths: a naive implementation against ours.

naive     student and teacher copies, both on the doubled row [prompt | clean | noised], full logits of both,
          dense log-softmaxes, KL averaged over the supervised positions, backward, AdamW on all weights
sdar      ours: same format, trained weights and loss, only the computation differs
sdar_lora ours: same format, LoRA of rank 32 on one set of weights
preserve  ours: gated LoRA, one set of weights, noised slots only

`_bf16` runs in bfloat16, the others in float32. naive_bf16: float32 weights under autocast; sdar_bf16:
float32 master weights (`model.dtype=bfloat16`); preserve_bf16: frozen weights in bfloat16, float32 adapter.

Every measurement is its own process: one step to warm up, one step timed. Peak memory is the largest resident
size after the models are built (building them takes more than a step), minus the size before. Time is CPU
time; run with one thread. The lower bound is 2 N T FLOPs for the teacher and 6 N M for the student (T clean
tokens, M slots of the student, N parameters without embedding; the head at supervised positions only),
converted to seconds at the rate of a float32 matrix product measured in the same process.

    OMP_NUM_THREADS=1 python benchmarks/step_memory.py --out docs/results/step_memory

Shapes: B batch (1), L row, M supervised positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opdlm.checkpoints.load import assemble, copy_of
from opdlm.config.sections import LoraSection, LossSection, OptimizerSection
from opdlm.decoding.rollout import Rollout
from opdlm.distill.trainer import StudentLoss
from opdlm.modeling.diffusion_lm import DiffusionSpec
from opdlm.modeling.slots import CLEAN, Slots, join_slots, visible
from opdlm.objectives.states import StateBatch, select_states
from opdlm.seeds import generator_for
from opdlm.training.optimizer import make_optimizer

MIB = 2**20
SIDES = ("naive", "sdar", "sdar_lora", "preserve", "naive_bf16", "sdar_bf16", "preserve_bf16")
BLOCK_SIZE = 4
LENGTHS = (512, 1024, 2048, 4096)


def make_spec(args: argparse.Namespace, fmt: str) -> DiffusionSpec:
    mask_token_id = args.vocabulary - 1
    return DiffusionSpec(
        format="preserve" if fmt.startswith("preserve") else "sdar",
        block_size=BLOCK_SIZE,
        grid="absolute",
        mask_token_id=mask_token_id,
        stop_token_ids=(0,),
        banned_token_ids=(),
        adapter=fmt.startswith("preserve"),
    )


def make_rollout(args: argparse.Namespace) -> Rollout:
    ids = torch.randint(1, args.vocabulary - 1, (args.prompt + args.response,), generator=generator_for(0))
    return Rollout(
        prompt_ids=tuple(ids[: args.prompt].tolist()),
        response_ids=tuple(ids[args.prompt :].tolist()),
        unmask_step=tuple(range(args.response)),
        num_response=args.response,
        finish_reason="length",
    )


def make_model(args: argparse.Namespace) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def naive_loss(student: PreTrainedModel, teacher: PreTrainedModel, states: StateBatch) -> Tensor:
    """Both models on the whole doubled row, everything dense."""
    noised = states.slots.group_BS[0] > CLEAN
    num_text = states.text.ids_BS.shape[1]
    block_BS = states.text.positions_BS // BLOCK_SIZE
    clean = replace(states.text, visible_until_BS=(block_BS + 1) * BLOCK_SIZE - 1)
    row = join_slots(clean, Slots(*(x_BS[:, noised] for x_BS in states.slots.tensors)))
    inputs = {
        "input_ids": row.ids_BS,
        "position_ids": row.positions_BS,
        "attention_mask": visible(row, row)[:, None],
        "use_cache": False,
    }
    causal = {"input_ids": row.ids_BS, "position_ids": row.positions_BS, "use_cache": False}
    slot = torch.arange(row.ids_BS.shape[1])
    causal["attention_mask"] = (slot[:, None] >= slot)[None, None]
    with torch.no_grad():
        logp_BLV = teacher(**causal).logits.float().log_softmax(-1)
    logq_BLV = student(**inputs).logits.float().log_softmax(-1)
    target_M = states.target_BS[states.is_supervised_BS]
    logp_MV = logp_BLV[0, target_M - 1]
    logq_MV = logq_BLV[0, num_text + states.is_supervised_BS[0, noised].nonzero()[:, 0]]
    return (logp_MV.exp() * (logp_MV - logq_MV)).sum(-1).mean()


def make_loss(args: argparse.Namespace, states: StateBatch) -> tuple[Callable[[], Tensor], list[Parameter]]:
    """The loss of one step as a function without arguments, and the weights it trains."""
    spec, base = make_spec(args, args.side), make_model(args)
    kind, _, precision = args.side.partition("_")
    is_bf16 = precision == "bf16"
    if kind == "naive":
        teacher = copy_of(base)

        def naive() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                return naive_loss(base, teacher, states)

        return naive, list(base.parameters())
    if is_bf16:
        base.bfloat16()
    if args.side in ("sdar", "sdar_bf16"):
        model = assemble(base, spec, lora=None, teacher=copy_of(base))
    else:
        base.requires_grad_(False)
        lora = LoraSection(r=32, alpha=64)
        model = assemble(base, spec, lora=lora, mask_embedding=torch.zeros(args.hidden))
    student_loss = StudentLoss(model, LossSection())
    weights_M = states.is_supervised_BS.float()[states.is_supervised_BS] / states.is_supervised_BS.sum()

    def loss() -> Tensor:
        return student_loss(states, weights_M).loss

    return loss, [p for p in model.parameters() if p.requires_grad]


def least_flops(args: argparse.Namespace, states: StateBatch) -> int:
    """The lower bound 2 N T + 6 N M."""
    num_head = args.vocabulary * args.hidden
    with torch.device("meta"):
        num_layers = make_model(args).num_parameters() - num_head
    num_supervised = int(states.is_supervised_BS.sum())
    teacher = num_layers * states.text.ids_BS.numel() + num_head * num_supervised
    student = num_layers * states.slots.ids_BS.numel() + num_head * num_supervised
    return 2 * teacher + 6 * student


def matmul_flops_per_second() -> float:
    left, right = torch.randn(1024, 1024), torch.randn(1024, 3072)
    left @ right
    begin = time.process_time()
    for _ in range(10):
        left @ right
    return 10 * 2 * left.numel() * right.shape[1] / (time.process_time() - begin)


def peak_mib() -> float:
    """Largest resident size since `reset_peak`; Linux."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / MIB


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one side in this process."""
    spec = make_spec(args, args.side)
    states = select_states([make_rollout(args)], spec, "random_mask", generator_for(1))
    least, rate = least_flops(args, states), matmul_flops_per_second()
    reset_peak()
    start_mib = peak_mib()
    loss_of, parameters = make_loss(args, states)
    reset_peak()
    optimizer = make_optimizer(parameters, OptimizerSection())

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    first_loss = step()
    begin, wall = time.process_time(), time.perf_counter()
    step()
    return {
        "side": args.side,
        "response": args.response,
        "cpu_seconds": time.process_time() - begin,
        "wall_seconds": time.perf_counter() - wall,
        "least_seconds": least / rate,
        "least_gflop": least / 1e9,
        "added_mib": peak_mib() - start_mib,
        "loss": first_loss,
        "num_clean": states.text.ids_BS.numel(),
        "num_slots": states.slots.ids_BS.numel(),
        "num_supervised": int(states.is_supervised_BS.sum()),
    }


def measure_in_subprocess(args: argparse.Namespace, side: str, response: int) -> dict[str, Any] | None:
    """None where the process needs more memory than `--limit-gib`."""
    command = [sys.executable, __file__, "--side", side, "--response", str(response)]
    for name in ("layers", "hidden", "vocabulary", "prompt"):
        command += [f"--{name}", str(getattr(args, name))]
    limit = int(args.limit_gib * 2**30)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    if done.returncode == 0:
        return json.loads(done.stdout)
    assert "allocate memory" in done.stderr, done.stderr
    return None


def table(args: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    """Markdown, ratios against naive at the same length."""
    lines = [
        f"One step, {args.layers} layers, hidden {args.hidden}, vocabulary {args.vocabulary}, prompt "
        f"{args.prompt}, {os.environ.get('OMP_NUM_THREADS', 'all')} thread(s). Ratios: naive / it.",
        "",
        "| response | side | CPU s | faster | times the lower bound | peak MiB | memory | loss |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    naive = {r["response"]: r for r in results if r["side"] == "naive"}
    for r in results:
        base, over_least = naive.get(r["response"]), r["cpu_seconds"] / r["least_seconds"]
        ratios = [f"{base[key] / r[key]:.1f}x" if base else "-" for key in ("cpu_seconds", "added_mib")]
        lines.append(
            f"| {r['response']} | {r['side']} | {r['cpu_seconds']:.2f} | {ratios[0]} | "
            f"{over_least:.2f} | {r['added_mib']:.0f} | {ratios[1]} | {r['loss']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, help="measure one side here and print JSON")
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=SIDES, help="only these")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, help="one length instead of all")
    parser.add_argument("--limit-gib", type=float, default=24.0, help="memory of one process")
    parser.add_argument("--out", type=Path, help="also write OUT.json and OUT.md")
    args = parser.parse_args()
    if args.side is not None:
        print(json.dumps(measure(args)))
        return
    results = []
    for response in [args.response] if args.response else LENGTHS:
        for side in args.sides:
            result = measure_in_subprocess(args, side, response)
            if result is None:
                print(f"{side} at {response}: did not fit in {args.limit_gib} GiB", file=sys.stderr)
            else:
                results.append(result)
    print(table(args, results))
    if args.out is not None:
        args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(args, results))


if __name__ == "__main__":
    main()
