"""Peak memory and time of one training step: the straightforward way against ours.

naive     student and teacher copies, both on the doubled row [prompt | clean | noised], full logits of both,
dense
          log-softmaxes, KL averaged over the supervised positions, backward, AdamW on all weights
sdar      ours, same format, same weights trained, same loss: only the computation differs
preserve  ours, the default recipe: gated LoRA, one set of weights, noised slots only

Every side runs in a process of its own: one step to warm up, one step timed. Peak memory is the process's
maximum resident size, less what it was before the models were built.

    python benchmarks/step_memory.py --json docs/results/step_memory.json

Shapes: B batch (1), L row, M supervised positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from opdlm.blocks import Slots, join_slots, visible
from opdlm.config import LoraSection, LossSection
from opdlm.diffusion import DiffusionLM, DiffusionSpec
from opdlm.models import assemble, copy_of
from opdlm.records import Rollout
from opdlm.rollout import generator_for
from opdlm.states import StateBatch, select_states
from opdlm.targets import score_rows
from opdlm.trainer import StudentLoss

MIB = 2**20
SIDES = ("naive", "sdar", "preserve")


def make_spec(args: argparse.Namespace, fmt: str) -> DiffusionSpec:
    mask_token_id = args.vocabulary - 1
    return DiffusionSpec(
        format="preserve" if fmt == "preserve" else "sdar",
        block_size=4,
        grid="absolute",
        mask_token_id=mask_token_id,
        stop_token_ids=(0,),
        banned_token_ids=(),
        adapter=fmt == "preserve",
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


def naive_loss(
    student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, row: Slots, states: StateBatch
) -> Tensor:
    """Both models over the whole doubled row, everything dense."""
    inputs = {
        "input_ids": row.ids_BS,
        "position_ids": row.positions_BS,
        "attention_mask": visible(row, row)[:, None],
        "use_cache": False,
    }
    causal = {"input_ids": row.ids_BS, "position_ids": row.positions_BS, "use_cache": False}
    num_clean = states.ids_BL.shape[1]
    slot = torch.arange(row.ids_BS.shape[1])
    causal["attention_mask"] = (slot[:, None] >= slot)[None, None]
    with torch.no_grad():
        logp_BLV = teacher(**causal).logits.log_softmax(-1)
    logq_BLV = student(**inputs).logits.log_softmax(-1)
    target_M = states.target_BS[states.is_supervised_BS]
    logp_MV = logp_BLV[0, target_M - 1]
    logq_MV = logq_BLV[0, num_clean + states.is_supervised_BS[0].nonzero()[:, 0]]
    return (logp_MV.exp() * (logp_MV - logq_MV)).sum(-1).mean()


def make_loss(args: argparse.Namespace) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The loss of one step as a function of nothing, and the weights it trains."""
    spec = make_spec(args, args.side)
    states = select_states([make_rollout(args)], spec, "random_mask", generator_for(1), torch.device("cpu"))
    base = make_model(args)
    if args.side == "naive":
        teacher = copy_of(base)
        shapes = DiffusionLM(base, spec)  # for its slots only
        clean = shapes.clean_slots(states.ids_BL, states.lengths_B, states.num_prompt_B)
        row = join_slots(clean, states.noised)
        return lambda: naive_loss(base, teacher, row, states), list(base.parameters())
    if args.side == "sdar":
        model = assemble(base, spec, lora=None, teacher=copy_of(base))
    else:
        base.requires_grad_(False)
        model = assemble(
            base, spec, lora=LoraSection(r=32, alpha=64), mask_embedding=torch.zeros(args.hidden)
        )
    student_loss = StudentLoss(model, LossSection())
    weights_M = states.is_supervised_BS.float()[states.is_supervised_BS] / states.is_supervised_BS.sum()

    def loss() -> Tensor:
        scored = score_rows(model, states.ids_BL, states.lengths_B, states.num_prompt_B)
        return student_loss(states, scored, weights_M).loss

    return loss, [p for p in model.parameters() if p.requires_grad]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    start_mib = peak_mib()
    loss_of, parameters = make_loss(args)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    first_loss = step()
    begin = time.perf_counter()
    step()
    seconds = time.perf_counter() - begin
    return {"side": args.side, "seconds": seconds, "added_mib": peak_mib() - start_mib, "loss": first_loss}


def measure_in_subprocess(args: argparse.Namespace, side: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side]
    for name in ("layers", "hidden", "vocabulary", "prompt", "response"):
        command += [f"--{name}", str(getattr(args, name))]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, help="measure one side here and print JSON")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=512)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    if args.side is not None:
        print(json.dumps(measure(args)))
        return
    results = [measure_in_subprocess(args, side) for side in SIDES]
    print("| side | seconds | peak MiB | time | memory | loss |\n|---|---:|---:|---:|---:|---:|")
    for r in results:
        time_ratio, memory_ratio = (r[key] / results[0][key] for key in ("seconds", "added_mib"))
        print(
            f"| {r['side']} | {r['seconds']:.2f} | {r['added_mib']:.0f} | {time_ratio:.2f} | "
            f"{memory_ratio:.2f} | {r['loss']:.4f} |"
        )
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
