"""The draft head: the same drafts in training and in decoding, and the AR model's text with any head."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import tiny_overrides, write_checkpoint, write_data
from tiny_models import add_draft_head, make_lm, make_prompts, qwen3
from transformers import AutoModelForCausalLM

import opdlm
from opdlm.cli.main import main
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.draft_policy import MOST_DRAFTS
from opdlm.decoding.generate import generate
from opdlm.distill.trainer import corrected_drafts
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.draft_head import DraftHead
from opdlm.objectives.acceptance import places_of
from opdlm.objectives.states import StateBatch, pack_states, select_drafts
from opdlm.objectives.targets import score_rows

VOCABULARY, SIZE = 6, 5


def with_head(kind: str = "lora", *, scale: float = 4.0) -> DiffusionLM:
    """A model with a random head that changes most drafts."""
    return add_draft_head(make_lm(kind, base=qwen3(vocabulary=VOCABULARY), block_size=SIZE), scale)


def hidden_of(model: DiffusionLM, states: StateBatch) -> torch.Tensor:
    hidden_BSH = model.student_hidden(states.slots, score_rows(model, states.text).cache)
    return hidden_BSH[states.is_supervised_BS]


@torch.no_grad()
def test_a_new_head_changes_nothing_and_a_trained_one_reads_the_tokens_before_each_place() -> None:
    model = with_head()
    head = model.draft_head
    assert head is not None
    texts = make_prompts([9, 14, 6], VOCABULARY)
    rollouts = generate(model, texts, DecodeConfig(mode="ar", max_new_tokens=12))
    rng = torch.Generator().manual_seed(0)
    batches = [select_drafts([one], model.spec, 3, rng) for one in rollouts if one.num_response > 4]
    assert len(batches) > 1
    for states in (*batches, pack_states(batches)):
        hidden_MH = hidden_of(model, states)
        corrected_MH = corrected_drafts(model, states, hidden_MH)
        row_M, column_M = states.is_supervised_BS.nonzero(as_tuple=True)
        for m, (row, column) in enumerate(zip(row_M.tolist(), column_M.tolist(), strict=True)):
            start = int(states.slots.start_BS[row, column])
            first = start + int(states.slots.visible_until_BS[row, column]) + 1
            last = start + int(states.target_BS[row, column]) - 1
            state = None
            for token in states.text.ids_BS[row, first : last + 1]:
                state = head.advance(model.embed(model.student, token[None]), state)
            assert state is not None
            torch.testing.assert_close(corrected_MH[m : m + 1], head(hidden_MH[m : m + 1], state))
        assert not torch.allclose(corrected_MH, hidden_MH)
        model.draft_head = DraftHead(hidden_MH.shape[-1], 8)
        assert torch.equal(corrected_drafts(model, states, hidden_MH), hidden_MH)
        model.draft_head = head


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_decoding_accepts_exactly_what_the_training_rows_predict(kind: str) -> None:
    """The text of the AR model is cut into forwards by the drafts that training computes."""
    model = with_head(kind)
    config = DecodeConfig(mode="lossless", max_new_tokens=24, forward_overhead=MOST_DRAFTS)
    rollouts = generate(model, make_prompts([3 + i % 6 for i in range(24)], VOCABULARY, seed=2), config)
    num_accepted = 0
    for rollout in rollouts:
        if rollout.num_response < 3:
            continue
        states = select_drafts([rollout], model.spec, 1000, torch.Generator().manual_seed(0))
        corrected_MH = corrected_drafts(model, states, hidden_of(model, states))
        chosen_M = model.logits(corrected_MH).argmax(-1)
        target_M = states.target_BS[states.is_supervised_BS]
        anchor_M = target_M - places_of(states) - 2
        drafted = {
            (int(anchor), int(target)): int(token)
            for anchor, target, token in zip(anchor_M, target_M, chosen_M, strict=True)
        }
        text = dict(enumerate(rollout.prompt_ids + rollout.text_ids))
        known = len(rollout.prompt_ids) + 1  # the first forward gives one token and a draft
        expected = [1]
        while known < len(text):
            # made in the forward that gave the last known token, which the draft does not see
            draft = [drafted.get((known - 2, place)) for place in range(known, known + SIZE - 1)]
            hits = [token is not None and token == text.get(known + k) for k, token in enumerate(draft)]
            length = [*hits, False].index(False)
            num_accepted += length
            expected.append(length + 1)
            known += length + 1
        steps = rollout.unmask_step[: rollout.num_response]
        found = [count for _, count in sorted(Counter(steps).items())]
        assert found[:-1] == expected[: len(found) - 1]  # the last may be cut
    assert num_accepted > 10


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("overhead", [0.0, 64.0, MOST_DRAFTS])
def test_the_text_is_that_of_the_ar_model_with_any_head(overhead: float, temperature: float) -> None:
    model = with_head()
    prompts = make_prompts([1 + i % 9 for i in range(24)], VOCABULARY)
    config = DecodeConfig(
        mode="lossless",
        max_new_tokens=20,
        batch_size=10,
        temperature=temperature,
        forward_overhead=overhead,
    )
    seeds = list(range(len(prompts)))
    found = generate(model, prompts, config, seeds)
    if temperature == 0:
        expected = generate(model, prompts, replace(config, mode="ar"))
        assert [one.text_ids for one in found] == [one.text_ids for one in expected]
    model.draft_head = None
    without = generate(model, prompts, config, seeds)
    assert [one.text_ids for one in found] == [one.text_ids for one in without]
    if overhead:
        assert [one.unmask_step for one in found] != [one.unmask_step for one in without]


@pytest.mark.usefixtures("own_module_cache")
def test_a_head_is_trained_saved_and_read_by_both_loaders(tmp_path: Path) -> None:
    teacher = write_checkpoint(tmp_path / "teacher")
    write_data(tmp_path)
    settings = tiny_overrides(teacher, tmp_path, tmp_path / "run")[1:]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["convert", str(teacher), *settings, "loss.objective=draft", "format.draft_head=8"]) == 0
    folder = tmp_path / "run" / "model"
    weights = load_file(folder / "draft_head.safetensors")
    assert weights["correction.weight"].abs().max() > 0
    model, _ = opdlm.load(folder)
    assert model.draft_head is not None
    loaded = model.draft_head.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    remote: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    remote.save_pretrained(tmp_path / "saved")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    opdlm.merge(folder, tmp_path / "merged", full_copy=True)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    for one in (remote, again, merged):
        read = one.diffusion.draft_head.state_dict()
        assert all(torch.equal(read[name], value) for name, value in weights.items())
