"""Speed of decoding on random weights in the shape of a 0.6 B model, where a forward is expensive.

    python benchmarks/decoding_shape.py --out docs/results/decoding_shape

`transformers.generate` and three samplers at each batch size, greedy and without stop tokens, so that all
generate the same number of tokens: `ar`, `static` (one token per denoising step, block size 4) and
`reprefill` (static, with everything prefilled again in every step: `benchmarks/decoding.py`). Drafts of a
random model are never accepted, so lossless decoding is not measured. Then the seconds of one denoising step
after 64 and 2048 known tokens: with a cache only attention depends on their number. The lower bound of a step
at batch size 1 is the time to read the weights once, measured as a sum over as many bytes.

Shapes: B batch.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from decoding import Ids, reprefill
from transformers import Qwen3Config, Qwen3ForCausalLM

from opdlm.checkpoints.load import assemble
from opdlm.config.sections import LoraSection
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.evaluation.retention import versions
from opdlm.evaluation.speed import hf_responses
from opdlm.modeling.cpu_linear import use_faster_linear
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.seeds import generator_for

BLOCK_SIZE = 4


def make_model(layers: int) -> tuple[DiffusionLM, Qwen3ForCausalLM]:
    """Gated LoRA on random weights in Qwen3-0.6B's published shape, and the AR model inside it."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=40_960,
    )
    base = Qwen3ForCausalLM(config).eval()
    spec = DiffusionSpec(
        format="preserve",
        block_size=BLOCK_SIZE,
        grid="absolute",
        mask_token_id=config.vocab_size - 1,
        stop_token_ids=(config.vocab_size - 2,),
        banned_token_ids=(config.vocab_size - 2, config.vocab_size - 1),
        adapter=True,
    )
    plain = copy.deepcopy(base)  # `transformers.generate` runs stock layers without an adapter
    use_faster_linear(base)
    model = assemble(base, spec, lora=LoraSection(), mask_embedding=torch.zeros(config.hidden_size))
    return model.eval(), plain


def seconds_of(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(model: DiffusionLM, base: Any, batch_size: int, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of each sampler on the same prompts."""
    ids_BL = torch.randint(1, 100_000, (batch_size, args.prompt), generator=generator_for(0))
    prompts: list[Ids] = [tuple(ids) for ids in ids_BL.tolist()]
    config = DecodeConfig(
        mode="static", max_new_tokens=args.new, batch_size=batch_size, ar_accept_threshold=0.0
    )
    ar = replace(config, mode="ar")
    samplers = {
        "transformers.generate": lambda: hf_responses(base, model, prompts, config),
        "ar": lambda: generate(model, prompts, ar),
        "static": lambda: generate(model, prompts, config),
        "reprefill": lambda: reprefill(model, prompts, config),
    }
    return {name: batch_size * args.new / seconds_of(work) for name, work in samplers.items()}


def step_seconds(model: DiffusionLM, num_known: int, num_steps: int = 300) -> float:
    """Median seconds of the last 20 denoising steps after `num_known` tokens; the first ones warm up."""
    times: list[float] = []
    prompt = torch.randint(1, 100_000, (num_known,), generator=generator_for(1)).tolist()
    config = DecodeConfig(mode="static", max_new_tokens=num_steps, batch_size=1, ar_accept_threshold=0.0)
    generate(model, [prompt], config, on_step=lambda *_: times.append(time.perf_counter()))
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times[-21:]))


def read_seconds(base: Any) -> float:
    """Seconds to read as many bytes as the weights of a forward have, including the LM head."""
    weights = [p for p in base.parameters() if p.ndim > 1]
    return min(seconds_of(lambda: [weight.sum() for weight in weights]) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--known", type=int, nargs="+", default=[64, 2048])
    args = parser.parse_args()
    model, base = make_model(args.layers)
    generate(model, [[1, 2, 3]], DecodeConfig(max_new_tokens=4))
    record: dict[str, Any] = {"versions": versions(), "threads": torch.get_num_threads(), "speed": {}}
    lines = ["| batch | transformers.generate | ar | static | reprefill | static / reprefill |"]
    lines.append("|---:|" + "---:|" * 5)
    for batch_size in args.batch_sizes:
        speed = compare(model, base, batch_size, args)
        record["speed"][batch_size] = speed
        ratio = speed["static"] / speed["reprefill"]
        cells = " | ".join(f"{value:.2f}" for value in speed.values())
        lines.append(f"| {batch_size} | {cells} | {ratio:.1f} |")
        print(lines[-1], flush=True)
    record["read_seconds"] = read_seconds(base)
    record["step_seconds"] = {known: step_seconds(model, known) for known in args.known}
    lines += ["", "| known tokens | seconds of a step | times the lower bound |", "|---:|---:|---:|"]
    for known, seconds in record["step_seconds"].items():
        lines.append(f"| {known} | {seconds:.3f} | {seconds / record['read_seconds']:.2f} |")
    head = f"Tokens per second; {args.prompt} + {args.new} tokens, {args.layers} layers, float32."
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text("\n".join([head, "", *lines]) + "\n")
    (args.out / "results.json").write_text(json.dumps(record, indent=2))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
