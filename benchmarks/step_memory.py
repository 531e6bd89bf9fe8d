"""Peak memory and time of one distillation step: the straightforward way against ours.

naive: copies of student and teacher, both on the doubled row [prompt | clean | noised] with full logits and
dense log-softmaxes; KL, mean over the supervised positions, backward. ours: causal teacher pass that keeps
hidden states only, student hidden states of the supervised positions, chunked_divergence, backward.
`loss` starts from the hidden states of the last layer (no transformer layers), `step` is the whole step.
Each measurement runs in a process of its own, once to warm up and once timed; the optimiser is not included.
    python benchmarks/step_memory.py --layers 2 --parts loss step --json out.json

Shapes: B batch (1), H hidden, L row, M supervised positions, V vocabulary.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from opdlm.losses import Head, HiddenTargets, chunked_divergence

BLOCK_SIZE = 4
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One doubled row in which, of each block, a random non-empty part is masked."""

    input_ids_BL: Tensor
    position_ids_BL: Tensor
    visible_LL: Tensor
    supervised_M: Tensor
    """Indices into the row of the masked noised slots (same position predicts: sdar format)."""
    teacher_M: Tensor
    """Indices into [prompt | clean] of the states that predict the same tokens: one earlier."""
    num_clean: int


def make_row(num_prompt: int, num_response: int, mask_token_id: int) -> Row:
    rng = torch.Generator().manual_seed(0)
    num_clean = num_prompt + num_response
    clean = torch.randint(mask_token_id, (num_clean,), generator=rng)
    mask_rate = torch.rand(num_response // BLOCK_SIZE, 1, generator=rng)
    draws = torch.rand(num_response // BLOCK_SIZE, BLOCK_SIZE, generator=rng)
    masked = ((draws < mask_rate) | (draws == draws.amin(-1, keepdim=True))).flatten()
    noised = clean[num_prompt:].masked_fill(masked, mask_token_id)
    position = torch.cat([torch.arange(num_clean), torch.arange(num_prompt, num_clean)])
    block = position // BLOCK_SIZE
    is_noised = torch.arange(len(position)) >= num_clean
    to_clean = ~is_noised & (block < block[:, None] + (~is_noised)[:, None])
    to_noised = is_noised[:, None] & is_noised & (block == block[:, None])
    return Row(
        input_ids_BL=torch.cat([clean, noised])[None],
        position_ids_BL=position[None],
        visible_LL=to_clean | to_noised,
        supervised_M=num_clean + masked.nonzero().flatten(),
        teacher_M=num_prompt - 1 + masked.nonzero().flatten(),
        num_clean=num_clean,
    )


def make_model(args: argparse.Namespace, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).train()


def hidden_states(model: Qwen3ForCausalLM, row: Row) -> Tensor:
    """Last hidden states of the doubled row, [B, L, H]."""
    return model.model(
        input_ids=row.input_ids_BL,
        position_ids=row.position_ids_BL,
        attention_mask=row.visible_LL[None, None],
        use_cache=False,
    ).last_hidden_state


def causal_hidden_states(model: Qwen3ForCausalLM, row: Row) -> Tensor:
    """Last hidden states of [prompt | clean] under a plain causal mask, [B, L, H]."""
    return model.model(input_ids=row.input_ids_BL[:, : row.num_clean], use_cache=False).last_hidden_state


def naive_loss(
    student_BLH: Tensor, student_VH: Tensor, teacher_BLH: Tensor, teacher_VH: Tensor, row: Row
) -> Tensor:
    """Dense: full logits and log-probabilities of both models at every slot of the row."""
    with torch.no_grad():
        logp_BLV = (teacher_BLH @ teacher_VH.T).log_softmax(-1)
    logq_BLV = (student_BLH @ student_VH.T).log_softmax(-1)
    logp_MV, logq_MV = logp_BLV[0, row.teacher_M], logq_BLV[0, row.supervised_M]
    return (logp_MV.exp() * (logp_MV - logq_MV)).sum(-1).mean()


def ours_loss(
    student_BLH: Tensor, student_VH: Tensor, teacher_BLH: Tensor, teacher_VH: Tensor, row: Row
) -> Tensor:
    num_supervised = len(row.supervised_M)
    targets = HiddenTargets(hidden_MH=teacher_BLH[0, row.teacher_M], head=Head(weight=teacher_VH))
    weights_M = torch.full((num_supervised,), 1 / num_supervised)
    student_MH = student_BLH[0, row.supervised_M]
    return chunked_divergence(student_MH, Head(weight=student_VH), targets, weights_M).loss


def naive_step(student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, row: Row) -> Tensor:
    with torch.no_grad():
        teacher_BLH = hidden_states(teacher, row)
    student_BLH = hidden_states(student, row)
    return naive_loss(student_BLH, student.lm_head.weight, teacher_BLH, teacher.lm_head.weight, row)


def ours_step(student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, row: Row) -> Tensor:
    with torch.no_grad():
        teacher_BLH = causal_hidden_states(teacher, row)
    student_BLH = hidden_states(student, row)
    return ours_loss(student_BLH, student.lm_head.weight, teacher_BLH, teacher.lm_head.weight, row)


def make_step(args: argparse.Namespace) -> Callable[[], Tensor]:
    """Forward and backward of one step from zero gradients; returns the loss."""
    row = make_row(args.prompt, args.response, mask_token_id=args.vocabulary - 1)
    shared = args.teacher == "shared" and args.side == "ours"
    if args.part == "step":
        student = make_model(args, seed=0)
        teacher = student if shared else make_model(args, seed=1)
        forward: Callable[..., Tensor] = {"naive": naive_step, "ours": ours_step}[args.side]
        leaves: list[Tensor] = list(student.parameters())
        inputs: tuple[Any, ...] = (student, teacher, row)
    else:
        torch.manual_seed(0)
        student_BLH, teacher_BLH = torch.randn(2, 1, len(row.visible_LL), args.hidden)
        student_VH = (torch.randn(args.vocabulary, args.hidden) * 0.02).requires_grad_()
        teacher_VH = student_VH if shared else torch.randn(args.vocabulary, args.hidden) * 0.02
        forward = {"naive": naive_loss, "ours": ours_loss}[args.side]
        leaves = [student_BLH.requires_grad_(), student_VH]
        inputs = (student_BLH, student_VH, teacher_BLH, teacher_VH, row)

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss = forward(*inputs)
        loss.backward()
        return loss.detach()

    return step


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One side of one part, in this process."""
    start_mib = peak_mib()
    step = make_step(args)
    step()
    begin = time.perf_counter()
    loss = step()
    seconds = time.perf_counter() - begin
    return {
        "part": args.part,
        "side": args.side,
        "seconds": seconds,
        "peak_mib": peak_mib(),
        "added_mib": peak_mib() - start_mib,
        "loss": loss.item(),
    }


def measure_in_subprocess(args: argparse.Namespace, side: str, part: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--parts", part, "--teacher", args.teacher]
    for name in ("layers", "hidden", "vocabulary", "prompt", "response"):
        command += [f"--{name}", str(getattr(args, name))]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def print_table(results: list[dict[str, Any]]) -> None:
    print(f"{'part':<6}{'side':<7}{'seconds':>9}{'peak MiB':>10}{'added MiB':>11}{'loss':>9}")
    for r in results:
        print(
            f"{r['part']:<6}{r['side']:<7}{r['seconds']:>9.2f}{r['peak_mib']:>10.0f}"
            f"{r['added_mib']:>11.0f}{r['loss']:>9.4f}"
        )
    for naive, ours in zip(results[::2], results[1::2], strict=True):
        ratios = (naive[key] / ours[key] for key in ("seconds", "peak_mib", "added_mib"))
        print("{:<6}{:<7}{:>8.2f}x{:>9.2f}x{:>10.2f}x".format(naive["part"], "ratio", *ratios))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", choices=["naive", "ours"], help="measure one side here, print JSON")
    parser.add_argument("--parts", nargs="+", choices=["loss", "step"], default=["loss", "step"])
    parser.add_argument(
        "--teacher",
        choices=["shared", "copy"],
        default="copy",
        help="ours only: the teacher is the student's own weights, or a copy as in naive",
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--response", type=int, default=512, help="a multiple of 4, like --prompt")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.side is not None:
        (args.part,) = args.parts
        print(json.dumps(measure(args)))
        return
    results = [measure_in_subprocess(args, side, part) for part in args.parts for side in ("naive", "ours")]
    print_table(results)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
