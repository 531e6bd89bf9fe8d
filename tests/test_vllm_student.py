"""Students in vLLM against our own decoder, on a CPU through Triton's interpreter: token for token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreted_vllm import interpreter as interpreter
from tiny_models import BLOCK, GRIDS, make_lm, make_prompts, qwen3

from opdlm.blocks import GridKind
from opdlm.config import LoraSection
from opdlm.diffusion import DiffusionLM
from opdlm.generate import DecodeConfig, generate
from opdlm.models import assemble
from opdlm.vllm_engine import VllmStudent, start_student
from opdlm.vllm_plugin import block_queries

LENGTHS = [1, 3, 4, 5, 6, 7, 8, 13, 22, 30]  # every remainder of the block size; more rows than places
NEW_TOKENS = 14


def student(grid: GridKind) -> DiffusionLM:
    return make_lm("sdar", grid, base=qwen3(head_dim=32))


def assert_same(vllm: VllmStudent, model: DiffusionLM, config: DecodeConfig) -> None:
    prompts, seeds = make_prompts(LENGTHS), range(100, 100 + len(LENGTHS))
    theirs, stats = vllm.rollouts(prompts, config.max_new_tokens, seeds)
    ours, own_stats = generate(model, prompts, config, list(seeds))
    assert [replace(r, num_forwards=0) for r in theirs] == [replace(r, num_forwards=0) for r in ours]
    assert stats.num_tokens == own_stats.num_tokens and stats.num_steps == own_stats.num_steps


def test_every_block_of_every_request_is_a_query() -> None:
    assert block_queries([4, 12, 6, 3], 4, "absolute") == ([0, 1, 1, 1, 2, 2, 3], [4, 8, 12, 16, 20, 22, 25])
    assert block_queries([4, 7, 3], 4, "response") == ([0, 1, 1, 2], [4, 7, 11, 14])


@pytest.mark.vllm
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(mode="static", denoising_steps=2, max_new_tokens=NEW_TOKENS),
        DecodeConfig(
            mode="threshold", confidence_threshold=0.3, temperature=1.0, top_p=0.9, max_new_tokens=NEW_TOKENS
        ),
    ],
    ids=["static", "threshold"],
)
def test_rollouts_equal_ours_and_follow_the_weights(
    config: DecodeConfig, grid: GridKind, interpreter: None
) -> None:
    assert_parity(student(grid), config)


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_merged_at_every_update(kind: str, interpreter: None) -> None:
    """The student's own weights stay: its teacher is the same weights without the adapter."""
    model = student_with_adapter(LoraSection(r=4, alpha=8, use_dora=kind == "dora"))
    before = {name: weight.clone() for name, weight in model.student.state_dict().items()}
    assert_parity(model, DecodeConfig(confidence_threshold=0.3, max_new_tokens=NEW_TOKENS))
    for name, weight in model.student.state_dict().items():
        assert ("lora" in name) or torch.equal(weight, before[name])


def student_with_adapter(section: LoraSection) -> DiffusionLM:
    base = student("response").student
    spec = replace(student("response").spec, adapter=True)
    model = assemble(base, spec, lora=section, mask_embedding=torch.linspace(-0.5, 0.5, 32))
    move(model, 0.1)
    return model


def move(model: DiffusionLM, noise: float) -> None:
    """Another student, as after an update."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += noise * torch.randn(parameter.shape, generator=rng)


def assert_parity(model: DiffusionLM, config: DecodeConfig) -> None:
    """Our rollouts at the start and after an update, which the engine must be told of."""
    assert model.spec.block_size == BLOCK
    vllm = start_student(
        model,
        config,
        dtype="float32",
        max_rows=4,
        max_tokens=max(LENGTHS) + NEW_TOKENS,
        max_step_tokens=20,  # so that prompts are prefilled in several forwards
    )
    try:
        assert_same(vllm, model, config)
        move(model, 0.05)
        with pytest.raises(AssertionError):
            assert_same(vllm, model, config)  # its weights are the old ones
        vllm.update(model)
        assert_same(vllm, model, config)
    finally:
        vllm.close()
