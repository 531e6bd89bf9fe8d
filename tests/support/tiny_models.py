"""Random models small enough to be checked exhaustively, and the states that a sampler went through.

Kinds: `lora` (preserve, gated adapter), `copy` (preserve, student and teacher apart), `sdar` (full
fine-tune). None is at step 0: adapters, mask embeddings and students differ from the teacher, as after
training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opdlm.checkpoints.load import assemble, copy_of
from opdlm.config.sections import LoraSection
from opdlm.decoding import denoise as denoise
from opdlm.decoding import generate as generate
from opdlm.decoding.rollout import Rollout
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.modeling.draft_head import DraftHead
from opdlm.modeling.slots import GridKind

V = 24
STOP, MASK = V - 2, V - 1
BLOCK = 4
KINDS = ("lora", "copy", "sdar")
GRIDS: tuple[GridKind, ...] = ("absolute", "response")
CPU = torch.device("cpu")
DRAFTS = {
    "causal": {"draft_attention": "causal"},
    "uniform": {"noise_vocab_size": 6},
    "uniform_causal": {"noise_vocab_size": 6, "draft_attention": "causal"},
}
"""What students that compute drafts only have in their spec, over a vocabulary of 6."""

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.25,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
}


def qwen3(vocabulary: int = V, **changes: object) -> PreTrainedModel:
    config = Qwen3Config(vocab_size=vocabulary, **{**SIZES, **changes})
    return ready(Qwen3ForCausalLM, config)


def mistral(window: int) -> PreTrainedModel:
    return ready(MistralForCausalLM, MistralConfig(vocab_size=V, sliding_window=window, **SIZES))


def gemma3(window: int) -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(vocab_size=V, sliding_window=window, layer_types=kinds, **SIZES)
    return ready(Gemma3ForCausalLM, config)


def gpt_oss(window: int) -> PreTrainedModel:
    config = GptOssConfig(
        vocab_size=V,
        sliding_window=window,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        **SIZES,
    )
    model = ready(GptOssForCausalLM, config)
    model.set_experts_implementation("batched_mm")  # the default one takes no float64
    return model


def qwen3_mixed(window: int) -> PreTrainedModel:
    return qwen3(
        use_sliding_window=True, sliding_window=window, layer_types=["full_attention", "sliding_attention"]
    )


SLIDING: dict[str, Callable[[int], PreTrainedModel]] = {
    "mistral": mistral,
    "gemma3": gemma3,
    "gpt_oss": gpt_oss,
    "qwen3_mixed": qwen3_mixed,
}


def ready(cls: type[PreTrainedModel], config: object) -> PreTrainedModel:
    """A random model without the special ids that its family's config would bring."""
    torch.manual_seed(0)
    model = cls(config).eval()
    for settings in (model.config, model.generation_config):
        settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = None, STOP, 0
    return model


def make_lm(
    kind: str,
    grid: GridKind = "absolute",
    *,
    base: PreTrainedModel | None = None,
    block_size: int = BLOCK,
    noise: float = 0.1,
    **changes: Any,
) -> DiffusionLM:
    """A student `noise` away from its teacher, over a copy of `base`; `changes` are fields of its spec."""
    base = copy.deepcopy(base) if base is not None else qwen3()
    vocabulary, hidden_size = base.get_input_embeddings().weight.shape
    spec = DiffusionSpec(
        format="sdar" if kind == "sdar" else "preserve",
        block_size=block_size,
        grid=grid,
        mask_token_id=vocabulary - 1,
        stop_token_ids=(vocabulary - 2,),
        banned_token_ids=(vocabulary - 1,),
        adapter=kind == "lora",
        **changes,
    )
    rng = torch.Generator().manual_seed(1)
    mask_embedding = None
    if kind != "sdar" and spec.noise_vocab_size is None:
        dtype = torch.promote_types(base.dtype, torch.float32)
        mask_embedding = torch.randn(hidden_size, generator=rng).to(dtype) * 0.25
    if kind == "lora":
        model = assemble(base, spec, lora=LoraSection(r=4, alpha=8), mask_embedding=mask_embedding)
        moved = [p for name, p in model.student.named_parameters() if "lora_B" in name]
    else:
        model = assemble(base, spec, lora=None, teacher=copy_of(base), mask_embedding=mask_embedding)
        moved = list(model.student.parameters())
    with torch.no_grad():
        for parameter in moved:
            parameter += noise * torch.randn(parameter.shape, generator=rng).to(parameter.dtype)
    return model.eval()


def add_draft_head(model: DiffusionLM, scale: float = 4.0) -> DiffusionLM:
    """The model with a random head that changes most drafts."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.draft_head = DraftHead(model.student.config.hidden_size, 8)
        torch.nn.init.normal_(model.draft_head.correction.weight, std=scale)
    return model.eval()


def make_prompts(lengths: Sequence[int], vocabulary: int = V, seed: int = 0) -> list[tuple[int, ...]]:
    rng = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(vocabulary - 2, (n,), generator=rng).tolist()) for n in lengths]


def make_rollout(
    num_prompt: int, num_response: int, grid: GridKind, seed: int = 0, *, stop: bool = False
) -> Rollout:
    """A response with a random trajectory that ends inside its last block, as the sampler leaves it."""
    rng = torch.Generator().manual_seed(seed * 1009 + num_prompt * 31 + num_response)
    origin = num_prompt % BLOCK if grid == "response" else 0
    end = origin - (-(num_prompt + num_response - origin) // BLOCK) * BLOCK
    tokens = torch.randint(V - 2, (end,), generator=rng).tolist()
    if stop:
        tokens[num_prompt + num_response - 1] = STOP
    steps = (torch.arange(end - num_prompt) // BLOCK * BLOCK).tolist()
    steps = [step + int(torch.randint(1, 4, (1,), generator=rng)) for step in steps]
    return Rollout(
        prompt_ids=tuple(tokens[:num_prompt]),
        response_ids=tuple(tokens[num_prompt:]),
        unmask_step=tuple(steps),
        num_response=num_response,
        finish_reason="stop" if stop else "length",
    )


@dataclass(frozen=True)
class Seen:
    """What the sampler was shown when it proposed the token at `target` of a prompt."""

    row: int
    tokens: tuple[int, ...]
    """The row up to the end of the block, with its masks."""
    target: int
    logits_V: Tensor


@contextmanager
def record_sampler() -> Iterator[list[Seen]]:
    """Every logit that reaches `propose_tokens` inside the decode loop."""
    seen: list[Seen] = []
    places: list[tuple[int, tuple[int, ...], int]] = []
    step, propose = denoise.denoise_step, denoise.propose_tokens

    def denoise_step(model, rows, cache, config, grid, *rest):
        places.clear()
        for index, tokens, num_prompt in zip(
            rows.index_B.tolist(), rows.tokens_BL.tolist(), rows.num_prompt_B.tolist(), strict=True
        ):
            start = grid.block_start(tokens.index(model.spec.mask_token_id), num_prompt)
            row = tuple(tokens[: start + grid.block_size])
            masked = [i for i in range(start, len(row)) if row[i] == model.spec.mask_token_id]
            places.extend((index, row, target) for target in masked)
        return step(model, rows, cache, config, grid, *rest)

    def propose_tokens(logits_MV, *rest):
        assert len(places) == len(logits_MV)
        seen.extend(Seen(*place, logits) for place, logits in zip(places, logits_MV, strict=True))
        return propose(logits_MV, *rest)

    with (
        patch.object(generate, "denoise_step", denoise_step),
        patch.object(denoise, "propose_tokens", propose_tokens),
    ):
        yield seen
