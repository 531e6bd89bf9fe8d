"""Lossless decoding is AR decoding in fewer forwards: token for token, and sampled in distribution."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact_sampling import chi_square_p_value, exact_probabilities
from tiny_models import CPU, DRAFTS, SLIDING, make_lm, make_prompts, qwen3
from transformers import DynamicCache

from opdlm.decoding import denoise
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.decode_state import DecodeState, DecodeStats, Request
from opdlm.decoding.draft_policy import DraftPolicy, ForwardCost
from opdlm.decoding.generate import check_settings, generate
from opdlm.decoding.lossless import lossless_step
from opdlm.decoding.rollout import Rollout, num_first_unknown
from opdlm.decoding.unmasking import uniform_ids
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.kv_cache import DecodeCache


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("overhead", [0.0, 32.0, 1e6])
@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_lossless_decoding_equals_ar_decoding_token_for_token(
    kind: str, overhead: float, block_size: int
) -> None:
    """The vocabulary is tiny, so that drafts are often accepted."""
    base = qwen3(vocabulary=6)
    model = make_lm(kind, base=base, block_size=block_size)
    prompts = make_prompts([1 + i % 9 for i in range(48)], vocabulary=6)
    config = DecodeConfig(mode="lossless", max_new_tokens=14, batch_size=20, forward_overhead=overhead)
    rollouts = generate(model, prompts, config)
    expected = generate(model, prompts, replace(config, mode="ar"))
    for ours, theirs in zip(rollouts, expected, strict=True):
        assert (ours.text_ids, ours.finish_reason) == (theirs.text_ids, theirs.finish_reason)
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    stats = DecodeStats.of(rollouts)
    num_saved = stats.num_tokens - stats.num_steps
    if block_size == 1:
        assert num_saved == 0
    elif overhead == 1e6:
        assert num_saved > 20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_every_kind_of_draft_is_lossless(kind: str, drafts: str, temperature: float) -> None:
    """Greedily, and with the same seeds also when sampled."""
    model = make_lm(kind, base=qwen3(vocabulary=6), block_size=4, **DRAFTS[drafts])
    prompts = make_prompts([1 + i % 9 for i in range(32)], vocabulary=6)
    config = DecodeConfig(mode="lossless", max_new_tokens=14, batch_size=20, forward_overhead=1e6)
    config = replace(config, temperature=temperature)
    rollouts = generate(model, prompts, config, range(len(prompts)))
    expected = generate(model, prompts, replace(config, mode="ar"), range(len(prompts)))
    assert [r.text_ids for r in rollouts] == [r.text_ids for r in expected]
    stats = DecodeStats.of(rollouts)
    assert stats.num_steps < stats.num_tokens  # some drafts were accepted
    if temperature == 0:
        with pytest.raises(ValueError, match="`mode=threshold` denoises blocks in part"):
            check_settings(DecodeConfig(), model.spec)


@pytest.mark.parametrize("drafts", DRAFTS)
def test_a_draft_is_what_plain_transformers_computes_on_its_row(drafts: str) -> None:
    """The input and the attention of a draft, against a forward of the base class with a written-out mask."""
    model = make_lm("lora", base=qwen3(vocabulary=6), block_size=4, **DRAFTS[drafts])
    (prompt,) = make_prompts([7], vocabulary=6)
    spec, mask = model.spec, model.spec.mask_token_id
    config = DecodeConfig(mode="lossless", max_new_tokens=20, prompt_lookup_num_tokens=0)
    state = DecodeState.start([Request(0, prompt, 5, config)], 40, mask, 3)
    policy = DraftPolicy(3, ForwardCost.linear(1e6))
    with torch.inference_mode():
        lossless_step(model, state, DecodeCache(1, 80, CPU), config, policy)
    places = torch.arange(7, 10)
    noise = uniform_ids(torch.full_like(places, 5), places, 6) if spec.noise_vocab_size else [mask] * 3
    embedded_LH = model.student.get_input_embeddings()(torch.tensor([*prompt, *noise]))
    if model.mask_embedding is not None:
        embedded_LH = torch.cat([embedded_LH[:7], model.mask_embedding.expand(3, -1)])
    hidden = reference_hidden(model, embedded_LH[None], 7, is_causal=spec.draft_attention == "causal")
    logits_DV = model.student.lm_head(hidden[0, 7:]).detach()
    logits_DV[:, mask] = -torch.inf
    assert state.draft_BD[0].tolist() == logits_DV.argmax(-1).tolist()
    confidence_D = logits_DV.softmax(-1).max(-1).values
    torch.testing.assert_close(state.draft_confidence_BD[0], confidence_D, atol=1e-5, rtol=1e-5)


def reference_hidden(
    model: DiffusionLM, embedded_1LH: torch.Tensor, num_clean: int, *, is_causal: bool
) -> torch.Tensor:
    """Hidden states of a row with the adapter on after the first `num_clean` tokens: two forwards of the
    model's own code, whose layers give keys and values to each other through a cache.
    """
    length = embedded_1LH.shape[1]
    seen = torch.ones(length - num_clean, length).tril(num_clean if is_causal else length).bool()
    cache = DynamicCache()
    with torch.no_grad():
        with model.adapter_off():
            model.student.get_decoder()(inputs_embeds=embedded_1LH[:, :num_clean], past_key_values=cache)
        noised = model.student.get_decoder()(
            inputs_embeds=embedded_1LH[:, num_clean:],
            attention_mask=torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[None, None],
            past_key_values=cache,
        ).last_hidden_state
    return torch.cat([torch.zeros_like(embedded_1LH[:, :num_clean]), noised], 1)


def test_uniform_ids_are_uniform_and_repeat() -> None:
    seed_M, position_M = torch.arange(70).repeat(100), torch.arange(100).repeat_interleave(70)
    ids_M = uniform_ids(seed_M, position_M, 7)
    assert torch.equal(ids_M, uniform_ids(seed_M, position_M, 7))
    counts = torch.bincount(ids_M, minlength=7)
    assert len(counts) == 7 and ((counts - 1000) ** 2 / 1000).sum() < 22.5  # chi-square, 1 in 1000
    both = torch.bincount(ids_M[:-70] * 7 + ids_M[70:], minlength=49)  # of neighbouring positions
    assert ((both - 6930 / 49) ** 2 / (6930 / 49)).sum() < 85


def test_lossless_decoding_beyond_a_sliding_window_equals_ar_decoding() -> None:
    model, prompts = make_lm("lora", base=SLIDING["qwen3_mixed"](8)), make_prompts([3, 11, 15])
    lossless, ar = (
        generate(model, prompts, DecodeConfig(mode=mode, max_new_tokens=20)) for mode in ("lossless", "ar")
    )
    assert [rollout.text_ids for rollout in lossless] == [rollout.text_ids for rollout in ar]


@pytest.mark.parametrize("kind", ["lora", "copy"])
@pytest.mark.parametrize("mode", ["static", "threshold"])
def test_rejecting_everything_that_is_not_the_ar_arg_max_makes_decoding_ar_decoding(
    kind: str, mode: Mode
) -> None:
    model = make_lm(kind, base=qwen3(vocabulary=6), block_size=4)
    prompts = make_prompts([1 + i % 9 for i in range(48)], vocabulary=6)
    config = DecodeConfig(mode=mode, max_new_tokens=14, confidence_threshold=0.2, ar_accept_threshold=1.0)
    expected = generate(model, prompts, replace(config, mode="ar"))
    checked = generate(model, prompts, config)
    free = generate(model, prompts, replace(config, ar_accept_threshold=0.0))
    assert [rollout.text_ids for rollout in checked] == [rollout.text_ids for rollout in expected]
    assert [rollout.text_ids for rollout in free] != [rollout.text_ids for rollout in expected]
    if mode == "threshold":  # correct drafts were accepted
        stats = DecodeStats.of(checked)
        assert stats.num_forwards < (1 if kind == "lora" else 2) * stats.num_tokens


@pytest.mark.parametrize("threshold", [0.05, 0.3])
@pytest.mark.parametrize("mode", ["static", "threshold"])
def test_every_token_is_the_ar_arg_max_or_above_the_acceptance_threshold(
    threshold: float, mode: Mode
) -> None:
    base = qwen3(vocabulary=6)
    model = make_lm("lora", base=base, block_size=4)
    prompts = make_prompts([1 + i % 9 for i in range(24)], vocabulary=6)
    config = DecodeConfig(
        mode=mode, max_new_tokens=14, confidence_threshold=0.2, ar_accept_threshold=threshold
    )
    for rollout in generate(model, prompts, config):
        ids = rollout.prompt_ids + rollout.text_ids
        with model.adapter_off(), torch.no_grad():
            logits_LV = base(torch.tensor([ids])).logits[0]
        logits_LV[:, -1] = -torch.inf
        for place in range(len(rollout.prompt_ids), len(ids)):
            predicted_V = logits_LV[place - 1]
            is_likely = predicted_V.softmax(-1)[ids[place]] >= threshold - 1e-5
            assert is_likely or predicted_V.argmax() == ids[place]


@pytest.mark.parametrize("mode", ["static", "threshold"])
def test_the_tokens_that_the_ar_model_replaced_are_counted(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_lm("lora", base=qwen3(vocabulary=6), block_size=4)
    prompts = make_prompts([1 + i % 9 for i in range(24)], vocabulary=6)
    config = DecodeConfig(mode=mode, max_new_tokens=14, confidence_threshold=0.2, ar_accept_threshold=0.3)
    places: list[tuple[int, int]] = []
    reject = denoise.reject_unlikely

    def recording(model: DiffusionLM, state: DecodeState, *rest: Any) -> torch.Tensor:
        rejected_B = reject(model, state, *rest)
        replaced = zip(state.index_B[rejected_B].tolist(), state.final_B[rejected_B].tolist(), strict=True)
        places.extend((index, end - 1) for index, end in replaced)
        return rejected_B

    monkeypatch.setattr(denoise, "reject_unlikely", recording)
    rollouts = generate(model, prompts, config)
    for index, rollout in enumerate(rollouts):
        end = len(rollout.prompt_ids) + rollout.num_response
        assert rollout.num_replaced == sum(row == index and place < end for row, place in places)
    assert sum(rollout.num_replaced for rollout in rollouts) > 20
    for other in (replace(config, ar_accept_threshold=0.0), replace(config, mode="lossless")):
        assert not any(rollout.num_replaced for rollout in generate(model, prompts, other))


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["static", "threshold", "left_to_right"])
def test_the_ar_model_writes_the_first_unknown_tokens_and_no_other(
    mode: Mode, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token is the AR model's if its logits came from a clean slot, or if it replaced the student's."""
    model = make_lm("lora", base=qwen3(vocabulary=6), block_size=4)
    prompts = make_prompts([1 + i % 9 for i in range(24)], vocabulary=6)
    config = DecodeConfig(mode=mode, max_new_tokens=14, confidence_threshold=0.2)
    config = replace(config, ar_accept_threshold=threshold)
    reveal, reject, logits_of = denoise.reveal, denoise.reject_unlikely, denoise.slot_logits
    is_clean: list[torch.Tensor] = []
    is_from_ar: dict[tuple[int, int], bool] = {}  # the last writer of each (prompt, position)

    def recorded_logits(model: DiffusionLM, *rest: Any) -> torch.Tensor:
        is_clean.append(rest[-1])
        return logits_of(model, *rest)

    def recorded_reveal(state: DecodeState, places: Any, ids_M: Any, confidence_BT: Any, chosen: Any) -> None:
        reveal(state, places, ids_M, confidence_BT, chosen)
        row_M, offset_M, position_M = places
        chosen_M = chosen[row_M, offset_M]
        keys = zip(state.index_B[row_M[chosen_M]].tolist(), position_M[chosen_M].tolist(), strict=True)
        is_from_ar.update(zip(keys, is_clean[-1][chosen_M].tolist(), strict=True))

    def recorded_reject(model: DiffusionLM, state: DecodeState, *rest: Any) -> torch.Tensor:
        rejected_B = reject(model, state, *rest)
        for index, end in zip(
            state.index_B[rejected_B].tolist(), state.final_B[rejected_B].tolist(), strict=True
        ):
            is_from_ar[index, end - 1] = True
        return rejected_B

    monkeypatch.setattr(denoise, "slot_logits", recorded_logits)
    monkeypatch.setattr(denoise, "reveal", recorded_reveal)
    monkeypatch.setattr(denoise, "reject_unlikely", recorded_reject)
    rollouts = generate(model, prompts, config)
    shares = []
    for index, rollout in enumerate(rollouts):
        first, length = len(rollout.prompt_ids), rollout.num_response
        num_from_ar = sum(is_from_ar[index, first + i] for i in range(length))
        assert num_first_unknown(rollout.unmask_step[:length]) == num_from_ar >= rollout.num_replaced
        shares.append(num_from_ar / length)
    if mode == "left_to_right":  # one token a step: nothing is the student's
        assert set(shares) == {1.0}
    else:
        assert 0 < min(shares) < max(shares)


def test_a_rollout_of_an_earlier_version_is_read() -> None:
    (rollout,) = generate(make_lm("lora"), make_prompts([3]), DecodeConfig(max_new_tokens=4))
    assert Rollout.from_dict(json.loads(json.dumps(rollout.to_dict()))) == rollout
    earlier = {name: value for name, value in rollout.to_dict().items() if name != "num_replaced"}
    assert Rollout.from_dict(earlier) == replace(rollout, num_replaced=0)


@pytest.mark.parametrize(
    ("kind", "mode", "drafts", "is_exact"),
    [
        ("lora", "lossless", {}, True),
        ("copy", "lossless", {}, True),
        ("lora", "lossless", DRAFTS["uniform_causal"], True),
        ("lora", "ar", {}, True),
        ("lora", "static", {}, False),  # the test can tell: denoising alone is not the AR distribution
    ],
)
def test_lossless_sampling_follows_the_distribution_of_the_base_model(
    kind: str, mode: Mode, drafts: dict[str, Any], is_exact: bool
) -> None:
    base = qwen3(vocabulary=6, initializer_range=0.15)
    model = make_lm(kind, base=base, noise=0.3, **drafts)
    (prompt,) = make_prompts([3], vocabulary=6)
    config = DecodeConfig(mode=mode, max_new_tokens=3, temperature=1.0, forward_overhead=1e6)
    rollouts = generate(model, [prompt] * 4000, config, torch.Generator().manual_seed(5))
    if mode == "lossless":
        stats = DecodeStats.of(rollouts)
        assert stats.num_steps < stats.num_tokens  # some drafts were accepted
    p_value = chi_square_p_value([r.text_ids for r in rollouts], exact_probabilities(base, prompt, config))
    assert (p_value > 1e-3) == is_exact, p_value
