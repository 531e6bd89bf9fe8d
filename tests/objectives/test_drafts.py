"""The states of the objective draft: what lossless decoding asks the student, checked token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import make_lm, qwen3

from opdlm.decoding.rollout import Rollout
from opdlm.modeling.attention import keys_with_cache
from opdlm.modeling.diffusion_lm import DiffusionSpec
from opdlm.modeling.kv_cache import DecodeCache, Packed
from opdlm.modeling.slots import visible
from opdlm.objectives.acceptance import Acceptance, PlaceSums, places_of
from opdlm.objectives.losses import LossOutput
from opdlm.objectives.states import pack_states, select_drafts
from opdlm.objectives.targets import score_rows

SIZE, MASK = 4, 99
SPEC = DiffusionSpec(
    format="preserve", block_size=SIZE, grid="absolute", mask_token_id=MASK, stop_token_ids=(1,)
)


def rollout(num_prompt: int, num_response: int) -> Rollout:
    return Rollout(
        prompt_ids=tuple(range(10, 10 + num_prompt)),
        response_ids=tuple(range(40, 40 + num_response)),
        unmask_step=tuple(range(1, num_response + 1)),
        num_response=num_response,
        finish_reason="stop",
    )


def drafts_of(one: Rollout, anchors: int | None, seed: int = 0) -> list[list[tuple[int, int, int, int, int]]]:
    """(id, position, visible until, predicted position, group) of every slot, by group."""
    states = select_drafts([one], SPEC, anchors, torch.Generator().manual_seed(seed))
    slots, groups = states.slots, {}
    columns = (slots.ids_BS, slots.positions_BS, slots.visible_until_BS, states.target_BS, slots.group_BS)
    for slot in zip(*(column[0].tolist() for column in columns), strict=True):
        if slot[4] > 0:
            groups.setdefault(slot[4], []).append(slot)
    return list(groups.values())


@pytest.mark.parametrize(("num_prompt", "num_response"), [(3, 9), (1, 4), (5, 2), (8, 17)])
def test_every_draft_is_the_one_that_decoding_makes_after_its_anchor(
    num_prompt: int, num_response: int
) -> None:
    end = num_prompt + num_response
    drafts = drafts_of(rollout(num_prompt, num_response), anchors=1000)
    starts = []
    for draft in drafts:
        _, start, anchor, _, group = draft[0]
        starts.append(start)
        last = min(start + SIZE - 1, end)
        expected = [(MASK, place, start - 1, place + 1, group) for place in range(start, last)]
        supervised = [slot for slot in expected if slot[3] < end]
        assert anchor == start - 1
        assert [slot for slot in draft if slot[3] >= 0] == supervised
        assert [slot[:3] for slot in draft] == [
            (MASK, place, anchor) for place in range(start, start + SIZE - 1)
        ]
    assert starts == list(range(num_prompt, end - 1))  # the last token of the response has nothing after it


def test_anchors_are_distinct_as_many_as_asked_for_and_drawn_anew() -> None:
    one = rollout(3, 20)
    draws = [[draft[0][1] for draft in drafts_of(one, 6, seed)] for seed in range(20)]
    assert all(len(set(draw)) == 6 for draw in draws)
    assert {start for draw in draws for start in draw} == set(range(3, 22))
    assert len(drafts_of(one, None)) == 5  # one for every four of 20 tokens


@pytest.mark.parametrize("num_response", [1, 0])
def test_a_response_without_a_second_token_gets_no_draft(num_response: int) -> None:
    generator = torch.Generator().manual_seed(0)
    states = select_drafts([rollout(3, num_response)], SPEC, 5, generator)
    assert not states.is_supervised_BS.any()


def test_places_count_from_the_first_token_that_is_drafted() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [select_drafts([rollout(2, n)], SPEC, 1000, generator) for n in (7, 5)]
    for states in (*batches, pack_states(batches)):
        expected = (states.target_BS - states.slots.positions_BS)[states.is_supervised_BS]
        assert (expected == 1).all()
        counts = torch.bincount(places_of(states), minlength=SIZE - 1).tolist()
        assert counts[0] > counts[1] > counts[2] > 0


def test_acceptance_is_a_running_mean_by_place() -> None:
    generator = torch.Generator().manual_seed(0)
    states = select_drafts([rollout(2, 9)], SPEC, 1000, generator)
    place_M = places_of(states)
    values_M = torch.tensor([0.5, 0.25, 0.125])[place_M]
    sums = PlaceSums.of_length(SIZE - 1)
    for _ in range(2):
        sums.observe(states, LossOutput(torch.zeros(()), values_M, values_M))
    acceptance = Acceptance(SIZE - 1)
    assert acceptance.shares() == acceptance.reach() == [1.0, 1.0, 1.0]
    acceptance.add([*sums.accepted_D.tolist(), *sums.offered_D.tolist()])
    acceptance.add([*sums.accepted_D.tolist(), *sums.offered_D.tolist()])
    assert acceptance.shares() == pytest.approx([0.5, 0.25, 0.125])
    assert acceptance.reach() == pytest.approx([1.0, 0.5, 0.125])
    assert float(acceptance.weights().mean()) == pytest.approx(1)
    assert acceptance.metrics()["expected_tokens_per_forward"] == pytest.approx(1 + 0.5 + 0.125 + 0.125**2)


def test_uniform_noise_takes_the_place_of_every_mask_and_repeats() -> None:
    spec = replace(SPEC, noise_vocab_size=7)
    first, again, other = (
        select_drafts([rollout(3, 200)], spec, 100, torch.Generator().manual_seed(seed)).slots
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.ids_BS, again.ids_BS) and not torch.equal(first.ids_BS, other.ids_BS)
    counts = torch.bincount(first.ids_BS[first.is_noised_BS], minlength=7)
    assert len(counts) == 7 and counts.min() > 20
    masked = select_drafts([rollout(3, 200)], SPEC, 100, torch.Generator().manual_seed(0))
    assert (masked.slots.ids_BS[masked.slots.is_noised_BS] == MASK).all()
    assert all(map(torch.equal, first.tensors[1:], masked.slots.tensors[1:]))  # nothing else differs


@pytest.mark.parametrize("size", [2, 5])
def test_a_causal_draft_sees_the_text_before_it_and_itself_backwards(size: int) -> None:
    """Every pair of slots of a packed row, against the rule written out."""
    spec = replace(SPEC, block_size=size, draft_attention="causal")
    rng = torch.Generator().manual_seed(0)
    documents = [select_drafts([rollout(3, n)], spec, 4, rng) for n in (9, 6)]
    packed = pack_states(documents)
    keys = keys_with_cache(packed.slots, packed.text.ids_BS.shape[1])
    seen_QK = visible(packed.slots, keys)[0].tolist()
    text_length = len(documents[0].text.ids_BS[0])
    columns = [
        (document, anchor, position, group)
        for document, one in enumerate(documents)
        for anchor, position, group in zip(
            *(x_BS[0].tolist() for x_BS in (one.slots.visible_until_BS, one.slots.positions_BS)),
            one.slots.group_BS[0].tolist(),
            strict=True,
        )
    ]
    for seen_K, (document, anchor, position, group) in zip(seen_QK, columns, strict=True):
        text = [
            document == (column >= text_length) and column - document * text_length <= anchor
            for column in range(packed.text.ids_BS.shape[1])
        ]
        noised = [
            key_document == document and key_group == group and (key_position <= position or group < 0)
            for key_document, _, key_position, key_group in columns
        ]
        assert seen_K == [*text, *noised]


@pytest.mark.parametrize("drafts", [{}, {"draft_attention": "causal"}, {"noise_vocab_size": 30}])
@torch.no_grad()
def test_a_training_row_computes_what_lossless_decoding_computes(drafts: dict[str, Any]) -> None:
    """The states of every draft, against a forward of the decoder over the text up to its anchor."""
    model = make_lm("lora", base=qwen3(vocabulary=30), block_size=SIZE, **drafts)
    first_group = model.spec.first_group
    one = replace(rollout(5, 9), prompt_ids=(3, 4, 5, 6, 7), response_ids=(8, 9, 3, 5, 7, 9, 4, 6, 8))
    text = one.prompt_ids + one.response_ids
    states = select_drafts([one], model.spec, 1000, torch.Generator().manual_seed(0))
    hidden_SH = model.student_hidden(states.slots, score_rows(model, states.text).cache)[0]
    for group in range(first_group, int(states.slots.group_BS.max()) + 1):
        columns = (states.slots.group_BS[0] == group).nonzero()[:, 0]
        anchor = int(states.slots.visible_until_BS[0, columns[0]])
        places = torch.arange(anchor + len(columns) + 1)
        is_noised = places > anchor
        packed = Packed(
            anchor + 1,
            torch.zeros_like(places),
            torch.tensor([*text[: anchor + 1], *states.slots.ids_BS[0, columns].tolist()]),
            places,
            torch.where(is_noised, anchor, places),
            is_noised * first_group,
        )
        decoded_NH, _ = model.packed_hidden(packed, 1, DecodeCache(1, 64, model.device))
        torch.testing.assert_close(hidden_SH[columns], decoded_NH[anchor + 1 :], atol=1e-5, rtol=1e-5)
