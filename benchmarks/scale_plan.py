"""The plan of converting Qwen3-4B and Qwen3-8B: what `opdlm convert preserve_lora --dry-run` computes from
their config.json, and hours that follow from assumed speeds. Nothing is measured.

Training takes FLOPs / (a share of the peak), where devices share the rows of an update. Rollouts of the AR
mode are limited by memory: a forward reads every weight once, whatever the number of rows, so their time is
the number of forwards times bytes / bandwidth.

Command: python benchmarks/scale_plan.py    (prints the tables of docs/scale.md)
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from opdlm.api import convert_settings
from opdlm.distill.costs import response_cap, step_flops
from opdlm.distill.plan import GIB, ConversionPlan, make_plan

SHAPES: dict[str, dict[str, int | bool]] = {
    "Qwen/Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "Qwen/Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}
SHARED = {
    **{"vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"head_dim": 128, "max_position_embeddings": 40960},
}
"""The published config.json."""
RECIPE = "preserve_lora"
GPUS = (1, 8, 64)
PEAK, BANDWIDTH = 989e12, 3.35e12
"""bfloat16 FLOP/s and bytes/s of an H100 SXM, by its data sheet."""
SHARE_OF_PEAK, SHARE_OF_BANDWIDTH = 0.35, 0.6
"""Assumed."""
PUBLISHED_TOKENS = 4.5e9
"""Training tokens of I-DLM-8B (arXiv 2604.11035)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Plan and hours of one model."""

    name: str
    plan: ConversionPlan

    def training_flops(self) -> float:
        config, sizes = self.plan.config, self.plan.sizes
        steps = (step_flops(config, sizes, step) for step in range(config.train.num_steps))
        return sum(value for flops in steps for name, value in flops.items() if name != "rollout")

    def published(self) -> float:
        """How many such runs have as many tokens as a published conversion."""
        return PUBLISHED_TOKENS / self.plan.response_tokens

    def training_hours(self, num_gpus: int) -> float:
        """An update has `rows_per_update` rows; a device without one waits."""
        rows = self.plan.config.train.rows_per_update
        share = math.ceil(rows / num_gpus) / rows
        return share * self.training_flops() / (SHARE_OF_PEAK * PEAK) / 3600

    def rollout_hours(self, num_gpus: int) -> float:
        """One forward per token of the longest response, for every batch that follows another."""
        config = self.plan.config
        prompts, batch = config.rollout.prompts_per_step, config.rollout.decode.batch_size
        forwards = sum(response_cap(config, step) for step in range(config.train.num_steps))
        forwards *= math.ceil(math.ceil(prompts / num_gpus) / batch)
        return forwards * self.plan.sizes.weight_bytes / (SHARE_OF_BANDWIDTH * BANDWIDTH) / 3600


def make_scale(name: str) -> Scale:
    """Planned from a folder that holds config.json alone."""
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model("qwen3", **SHARED, **SHAPES[name], dtype="bfloat16").save_pretrained(
            Path(folder)
        )
        config = convert_settings(RECIPE, [f"model.path={folder}"])
        return Scale(name=name, plan=make_plan(config))


def cost_table(scales: list[Scale]) -> str:
    rows: dict[str, Callable[[Scale], str]] = {
        "parameters": lambda s: f"{s.plan.sizes.total / 1e9:.2f} B",
        "trained parameters (LoRA, draft head, mask embedding)": lambda s: (
            f"{s.plan.sizes.trained / 1e6:.0f} M"
        ),
        "memory per GPU, at most": lambda s: f"{s.plan.peak / GIB:.1f} GiB",
        "of it weights": lambda s: f"{s.plan.sizes.weight_bytes / GIB:.1f} GiB",
        "response tokens, at most": lambda s: f"{s.plan.response_tokens / 1e6:.1f} M",
        "FLOPs of the rollouts": lambda s: f"{s.plan.total_flops - s.training_flops():.1e}",
        "FLOPs of the training": lambda s: f"{s.training_flops():.1e}",
        "the same at 4.5 B response tokens": lambda s: f"{s.training_flops() * s.published():.1e}",
        "GPU hours of it": lambda s: f"{s.training_hours(1) * s.published():,.0f}",
    }
    lines = [f"| {name} | {' | '.join(of(s) for s in scales)} |" for name, of in rows.items()]
    return "\n".join([f"| | {' | '.join(s.name for s in scales)} |", "|---|" + "---:|" * len(scales), *lines])


def hours_table(scales: list[Scale]) -> str:
    lines = [
        f"| {n} | "
        + " | ".join(f"{s.rollout_hours(n):.2f} + {s.training_hours(n):.2f}" for s in scales)
        + " |"
        for n in GPUS
    ]
    return "\n".join(
        [f"| GPUs | {' | '.join(s.name for s in scales)} |", "|---:|" + "---:|" * len(scales), *lines]
    )


def tables() -> str:
    """Both tables of docs/scale.md."""
    scales = [make_scale(name) for name in SHAPES]
    return f"{cost_table(scales)}\n\n{hours_table(scales)}"


if __name__ == "__main__":
    print(tables())
