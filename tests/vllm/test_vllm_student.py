"""Students in vLLM against our own decoder, on a CPU through Triton's interpreter: token for token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreted_vllm import interpreter as interpreter
from tiny_models import BLOCK, GRIDS, gemma3, make_lm, make_prompts, qwen3
from torch import nn

from opdlm.checkpoints.load import assemble
from opdlm.config.sections import LoraSection
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Prompt
from opdlm.errors import ConfigError
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.slots import GridKind
from opdlm.vllm.engine import VllmStudent, check_student, start_student
from opdlm.vllm.gate import SlotGate
from opdlm.vllm.queries import block_queries, slot_queries

LENGTHS = [1, 3, 4, 5, 6, 7, 8, 13, 22, 30]  # all remainders of the block size; more prompts than engine rows
NEW_TOKENS = 14


def student(grid: GridKind) -> DiffusionLM:
    return make_lm("sdar", grid, base=qwen3(head_dim=32))


def assert_same(vllm: VllmStudent, model: DiffusionLM, config: DecodeConfig) -> None:
    preserve = model.spec.format == "preserve"  # a block there needs a slot before it
    lengths = [n for n in LENGTHS if n >= BLOCK or not preserve]
    prompts, seeds = make_prompts(lengths), range(100, 100 + len(lengths))
    theirs = vllm.rollouts(prompts, config.max_new_tokens, seeds)
    ours = generate(model, prompts, config, list(seeds))
    assert [replace(r, num_forwards=0) for r in theirs] == [replace(r, num_forwards=0) for r in ours]


@pytest.mark.parametrize(
    ("model", "lengths", "message"),
    [
        (make_lm("lora", "absolute"), [9, BLOCK - 1], "at least a block"),
        (make_lm("sdar", base=gemma3(8)), [9], "gemma3_text students do not run in vLLM"),
    ],
)
def test_students_and_prompts_that_vllm_cannot_run_are_named_beforehand(
    model: DiffusionLM, lengths: list[int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    prompts = [Prompt(ids=tuple(ids), index=i) for i, ids in enumerate(make_prompts(lengths))]
    with pytest.raises(ConfigError, match=message):
        check_student(model, DecodeConfig(ar_accept_threshold=0.0), prompts)


def test_every_block_of_every_request_is_a_query() -> None:
    rows, ends, seen = block_queries([4, 12, 6, 3], 4, "absolute")
    assert (rows, ends) == ([0, 1, 1, 1, 2, 2, 3], [4, 8, 12, 16, 20, 22, 25]) and seen == ends
    rows, ends, seen = block_queries([4, 7, 3], 4, "response")
    assert (rows, ends) == ([0, 1, 1, 2], [4, 7, 11, 14]) and seen == ends


@pytest.mark.parametrize("counts", [[(2, 0), (4, 3), (4, 0)], [(4, 4), (5, 2), (1, 0), (1, 1)]])
def test_clean_slots_see_the_past_and_noised_slots_their_whole_group(counts: list[tuple[int, int]]) -> None:
    """What causal queries let every slot see, against the rule itself."""
    rows, ends, seen = slot_queries(*zip(*counts, strict=True))
    found, first = list[tuple[int, int]](), 0
    for row, end, limit in zip(rows, ends, seen, strict=True):
        found += [(row, limit - (end - 1 - slot)) for slot in range(first, end)]  # causal: aligned at the end
        first = end
    expected, start = list[tuple[int, int]](), 0
    for row, (count, noised) in enumerate(counts):
        clean, start = start + count - noised, start + count
        expected += [(row, slot + 1 if slot < clean else start) for slot in range(start - count, start)]
    assert found == expected


def test_adapters_of_joined_layers_change_noised_slots_only() -> None:
    torch.manual_seed(0)
    joined, single = nn.Linear(6, 9), nn.Linear(6, 6)
    joined.output_sizes, single.output_size = [4, 2, 3], 6
    gate = SlotGate({"a.qkv_proj": joined, "a.o_proj": single})
    inputs_NI = torch.randn(5, 6)
    plain = {name: layer(inputs_NI).detach() for name, layer in gate.layers.items()}
    adapter = {
        name: (torch.randn(2, 6), torch.randn(size, 2)) for name, size in (("a.q_proj", 4), ("a.v_proj", 3))
    }
    gate.load(adapter)
    gate.noised_N = torch.tensor([1, 4])
    changes = [inputs_NI @ down.T @ up.T for down, up in adapter.values()]
    change_NO = torch.cat([changes[0], torch.zeros(5, 2), changes[1]], 1)
    change_NO[[0, 2, 3]] = 0
    with torch.no_grad():
        torch.testing.assert_close(joined(inputs_NI), plain["a.qkv_proj"] + change_NO)
        assert torch.equal(single(inputs_NI), plain["a.o_proj"])


STATIC = DecodeConfig(mode="static", denoising_steps=2, max_new_tokens=NEW_TOKENS, ar_accept_threshold=0.0)
SAMPLED = DecodeConfig(
    confidence_threshold=0.3, temperature=1.0, top_p=0.9, max_new_tokens=NEW_TOKENS, ar_accept_threshold=0.0
)


@pytest.mark.vllm
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("config", [STATIC, SAMPLED], ids=["static", "threshold"])
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
    assert_parity(model, replace(SAMPLED, temperature=0.0))
    for name, weight in model.student.state_dict().items():
        assert ("lora" in name) or torch.equal(weight, before[name])


@pytest.mark.vllm
@pytest.mark.parametrize(("grid", "config"), [(GRIDS[0], SAMPLED), (GRIDS[1], STATIC)], ids=GRIDS)
def test_a_preserve_student_is_gated_in_vllm_too(
    grid: GridKind, config: DecodeConfig, interpreter: None
) -> None:
    assert_parity(make_lm("lora", grid, base=qwen3(head_dim=32), noise=0.5), config)


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
    """The rollouts are ours at the start, and after an update once the engine has the new weights."""
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
