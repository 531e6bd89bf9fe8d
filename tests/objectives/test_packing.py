"""Packed rows: visibility across documents, and the same losses and gradients as one rollout per row.

float64 throughout. Shapes: S slots, M supervised.
"""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import GRIDS, KINDS, SIZES, SLIDING, V, make_lm, make_rollout, ready
from torch import Tensor
from transformers import PreTrainedModel, Starcoder2Config, Starcoder2ForCausalLM

from opdlm.config.sections import LossSection
from opdlm.distill.trainer import StudentLoss
from opdlm.modeling import attention as attention
from opdlm.modeling.attention import AttentionChoice
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.slots import CLEAN, GridKind, Slots, join_slots, visible
from opdlm.objectives.states import Selection, StateBatch, first_fit, pack_states, select_states

LENGTHS = [(3, 6), (8, 9), (1, 2), (5, 12), (7, 1), (9, 5), (2, 17)]
SELECTIONS: tuple[Selection, ...] = ("one_per_block", "all", "complementary", "random_mask")


def starcoder2() -> PreTrainedModel:
    """A family that computes in the dtype of its weights throughout."""
    config = Starcoder2Config(vocab_size=V, residual_dropout=0.0, embedding_dropout=0.0, **SIZES)
    return ready(Starcoder2ForCausalLM, config).double()


def one_by_one(model: DiffusionLM, selection: Selection) -> list[StateBatch]:
    """The states of ragged rollouts; (7, 1) carries no loss in `preserve`."""
    rng = torch.Generator().manual_seed(0)
    grid = model.spec.grid
    rollouts = [make_rollout(p, r, grid, stop=r % 2 == 0) for p, r in LENGTHS]
    return [select_states([rollout], model.spec, selection, rng) for rollout in rollouts]


def slot_list(states: StateBatch, slots: Slots, document: int) -> list[tuple[int, ...]]:
    """(document, position, visible_until, group) of every slot."""
    fields = (slots.positions_BS, slots.visible_until_BS, slots.group_BS)
    return [(document, *values) for values in zip(*(x_BS[0].tolist() for x_BS in fields), strict=True)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["lora", "sdar"])
@pytest.mark.parametrize("window", [None, 5])
def test_a_slot_sees_its_own_document_only_and_there_what_it_saw_alone(
    kind: str, grid: GridKind, window: int | None
) -> None:
    parts = one_by_one(make_lm(kind, grid), "all")
    packed = pack_states(parts)
    columns: list[tuple[int, ...]] = []
    for which in ("text", "slots"):
        for document, part in enumerate(parts):
            columns += slot_list(part, getattr(part, which), document)
    both = join_slots(packed.text, packed.slots)
    assert both.positions_BS[0].tolist() == [position for _, position, _, _ in columns]
    expected = [
        [sees(q, k, window) and (i == j or k[3] == CLEAN or q[3] > CLEAN) for j, k in enumerate(columns)]
        for i, q in enumerate(columns)
    ]
    assert visible(both, both, window)[0].tolist() == expected


def sees(q: tuple[int, ...], k: tuple[int, ...], window: int | None) -> bool:
    """The rule of `slots.visible` for (document, position, visible_until, group), within one document."""
    if q[3] < CLEAN or k[3] < CLEAN:
        return q == k
    is_near = window is None or q[1] - k[1] < window
    return q[0] == k[0] and is_near and ((k[3] == CLEAN and k[1] <= q[2]) or (k[3] == q[3] != CLEAN))


def loss_and_gradients(
    model: DiffusionLM, batches: list[StateBatch], objective: str = "opd"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of every supervised slot, and the gradient of their sum with uneven weights."""
    student_loss = StudentLoss(model, LossSection(objective=objective))
    per_position, first = [], 0
    model.zero_grad()
    for states in batches:
        num = int(states.is_supervised_BS.sum())
        weights_M = 1.0 + torch.arange(first, first + num).double() % 7
        output = student_loss(states, weights_M)
        output.loss.backward()
        per_position.append(output.per_position_M)
        first += num
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat(per_position), gradients


def assert_packing_changes_nothing(
    model: DiffusionLM, selection: Selection, objective: str = "opd", tolerance: float = 1e-10
) -> None:
    model.student.gradient_checkpointing_enable({"use_reentrant": False})
    model.student.train()
    parts = one_by_one(model, selection)
    expected_M, expected = loss_and_gradients(model, parts, objective)
    packed = [pack_states(parts[:5]), pack_states(parts[5:])]
    assert packed[0].num_columns == sum(part.num_columns for part in parts[:5])
    actual_M, actual = loss_and_gradients(model, packed, objective)
    torch.testing.assert_close(actual_M, expected_M, atol=tolerance, rtol=tolerance)
    assert actual.keys() == expected.keys()
    assert sum(gradient.norm() for gradient in expected.values()) > 1e-3
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_of_packed_rows_are_those_of_one_rollout_per_row(
    kind: str, selection: Selection
) -> None:
    assert_packing_changes_nothing(make_lm(kind, base=starcoder2()).double(), selection)


@pytest.mark.parametrize("backend", ["sdpa", "flash"])
@pytest.mark.parametrize("family", SLIDING)
@pytest.mark.parametrize("kind", ["lora", "sdar"])
def test_packed_rows_keep_sliding_windows(
    kind: str, family: str, backend: AttentionChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These families normalise in float32 whatever their weights are."""
    model = make_lm(kind, base=SLIDING[family](5).double()).double()
    model.attention = backend
    monkeypatch.setattr(attention, "CHUNK", 8)
    assert_packing_changes_nothing(model, "all", tolerance=1e-5)


@pytest.mark.parametrize("kind", ["lora", "sdar"])
def test_packed_rows_find_the_tokens_of_their_own_document(kind: str) -> None:
    model = make_lm(kind, "response", base=starcoder2()).double()
    assert_packing_changes_nothing(model, "random_mask", "sft")


def test_sdar_computes_no_clean_text_from_the_last_block_with_loss_on() -> None:
    for part, (num_prompt, num_response) in zip(one_by_one(make_lm("sdar"), "all"), LENGTHS, strict=True):
        num_clean = int((part.slots.group_BS == CLEAN).sum())
        assert num_clean == (num_prompt + num_response - 1) // 4 * 4


def test_first_fit_fills_bins_and_loses_nothing() -> None:
    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.randint(1, 100) for _ in range(40)]
        bins = first_fit(sizes, 130)
        assert sorted(i for members in bins for i in members) == list(range(40))
        loads = sorted(sum(sizes[i] for i in members) for members in bins)
        assert loads[-1] <= 130 and loads[0] + loads[1] > 130
