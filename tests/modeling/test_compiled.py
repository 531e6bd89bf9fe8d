"""A compiled forward decodes what the plain one does: every kind, mode and window, while rows come and go.

The backend "eager" runs what was traced as it stands, so that a test takes seconds;
"inductor" is what users get.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_checkpoints import tiny_model
from tiny_models import DRAFTS, KINDS, SLIDING, make_lm, make_prompts, qwen3
from torch._dynamo.utils import counters

from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Rollout
from opdlm.distill.async_student import AsyncStudent
from opdlm.errors import ConfigError
from opdlm.modeling.compiled import CompiledForward, compiled_decoding, rounded
from opdlm.modeling.diffusion_lm import DiffusionLM, PackedForward

LENGTHS = [1, 2, 3, 4, 5, 6, 7, 8, 11, 3, 20]
CONFIG = DecodeConfig(
    max_new_tokens=9,
    batch_size=4,
    temperature=1.0,
    confidence_threshold=0.2,
    logprobs=True,
    forward_overhead=32.0,
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


def decode(model: DiffusionLM, config: DecodeConfig = CONFIG) -> list[Rollout]:
    prompts = make_prompts(LENGTHS, model.spec.mask_token_id + 1)
    return generate(model, prompts, config, torch.Generator().manual_seed(7))


def assert_same(found: list[Rollout], expected: list[Rollout]) -> None:
    """Everything but the last digits of the log-probabilities: padding changes how sums are split."""
    for one, other in zip(found, expected, strict=True):
        assert replace(one, logprobs=()) == replace(other, logprobs=())
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_engine_is_the_plain_one_in_every_mode(kind: str, pads: bool) -> None:
    model = make_lm(kind, "response")
    modes: list[Mode] = (
        ["threshold", "static"] if kind == "sdar" else ["threshold", "static", "lossless", "ar"]
    )
    for mode in modes:
        config = replace(CONFIG, mode=mode)
        expected = decode(model, config)
        with compiled_decoding(model, backend="eager", pads=pads):
            assert_same(decode(model, config), expected)
    assert num_graphs() == (2 if kind == "copy" else 1)  # two models; no size has a form of its own


@pytest.mark.parametrize("drafts", DRAFTS)
def test_every_kind_of_draft_is_compiled(drafts: str) -> None:
    model = make_lm("lora", base=qwen3(vocabulary=6), **DRAFTS[drafts])
    config = replace(CONFIG, mode="lossless", forward_overhead=1e6)
    expected = decode(model, config)
    with compiled_decoding(model, backend="eager"):
        assert_same(decode(model, config), expected)
    assert num_graphs() == 1


@pytest.mark.parametrize("family", SLIDING)
def test_sliding_windows_are_compiled_as_they_are(family: str) -> None:
    model = make_lm("lora", base=SLIDING[family](5))
    expected = decode(model)
    with compiled_decoding(model, backend="eager", pads=True):
        assert_same(decode(model), expected)
    assert num_graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2", "smollm3", "qwen3_moe"])
def test_other_families_are_compiled_as_well(family: str) -> None:
    model = make_lm("sdar", base=tiny_model(family))
    expected = decode(model)
    with compiled_decoding(model, backend="eager", pads=True):
        assert_same(decode(model), expected)
    assert num_graphs() == 1


def test_a_bfloat16_base_under_a_float32_adapter_is_compiled_as_well() -> None:
    model = make_lm("lora", base=qwen3().bfloat16())
    assert {weight.dtype for weight in model.student.parameters()} == {torch.bfloat16, torch.float32}
    expected = decode(model)
    with compiled_decoding(model, backend="eager"):
        assert [r.text_ids for r in decode(model)] == [r.text_ids for r in expected]


def test_one_row_at_a_time_is_compiled_once() -> None:
    model, config = make_lm("lora"), replace(CONFIG, batch_size=1)
    expected = decode(model, config)
    with compiled_decoding(model, backend="eager"):
        assert_same(decode(model, config), expected)
    assert num_graphs() == 1


def test_new_weights_count_without_compiling_again() -> None:
    model = make_lm("lora")
    with compiled_decoding(model, backend="eager"):
        before = decode(model)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.mul_(-3)
        after = decode(model)
    assert_same(after, decode(model))
    assert after != before
    assert num_graphs() == 1


def test_the_gate_is_closed_for_clean_slots_and_open_again_afterwards() -> None:
    model = make_lm("lora", base=qwen3().double())
    reference = make_lm("lora", base=qwen3().double())
    with torch.no_grad():  # an adapter that would be seen anywhere
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(10)
    with compiled_decoding(model, backend="eager"):
        assert [r.text_ids for r in decode(model, replace(CONFIG, mode="ar"))] == [
            r.text_ids for r in decode(reference, replace(CONFIG, mode="ar"))
        ]
    assert model.gate.is_open_N1 is None and model.run_packed is PackedForward.run


def test_a_copy_of_the_student_compiles_for_itself() -> None:
    model = make_lm("lora")
    model.requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora" in name)
    expected = decode(model)
    twin = AsyncStudent(model).model
    with compiled_decoding(twin, backend="eager"):
        assert_same(decode(twin), expected)


def test_a_model_that_cannot_be_traced_is_refused_in_one_sentence() -> None:
    model = make_lm("sdar")
    layer = model.student.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x) * (2 if float(x.detach().flatten()[0].item()) > 0 else 1)
    with compiled_decoding(model, backend="eager"), pytest.raises(ConfigError) as error:
        decode(model)
    assert "torch.compile fails on Qwen3ForCausalLM" in str(error.value)
    assert "rollout.compile=false" in str(error.value) and "\n" not in str(error.value)


def test_padded_rows_follow_the_occupied_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the rows of the cache: a nearly empty one would pay for all."""
    model, rows, padded = make_lm("lora"), list[tuple[int, int]](), CompiledForward.padded

    def recorded(self: CompiledForward, call: PackedForward, pads: bool) -> tuple[Any, ...]:
        inputs = padded(self, call, pads)
        rows.append((call.cache.num_active, inputs[-1][None].shape[0]))
        return inputs

    monkeypatch.setattr(CompiledForward, "padded", recorded)
    prompts = make_prompts([3] * 20, model.spec.mask_token_id + 1)
    with compiled_decoding(model, backend="eager", pads=True):
        generate(model, prompts, replace(CONFIG, batch_size=20), torch.Generator().manual_seed(7))
    assert {shown for _, shown in rows} == {8, 16, 20}
    assert all(occupied <= shown <= occupied + 7 for occupied, shown in rows)


def test_padded_sizes_are_few_and_at_most_a_quarter_more() -> None:
    sizes = [rounded(size) for size in range(1, 4097)]
    assert all(size <= padded < size + max(8, size / 4 + 1) for size, padded in enumerate(sizes, 1))
    assert sizes == sorted(sizes) and all(size % 8 == 0 for size in sizes)
    assert len(set(sizes)) < 45


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_gives_the_same_tokens_in_float64(kind: str) -> None:
    model = make_lm(kind, base=qwen3().double())
    expected = decode(model)
    with compiled_decoding(model):
        assert_same(decode(model), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_graphs_give_the_same_tokens_on_a_gpu(kind: str) -> None:
    model = make_lm(kind).to("cuda")
    expected = [r.text_ids for r in decode(model)]
    with compiled_decoding(model):
        for _ in range(3):  # warm-up, recording, replay
            assert [r.text_ids for r in decode(model)] == expected
