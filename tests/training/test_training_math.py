"""One update's loss and gradient: independent of the batching, zero at the teacher, normalised as documented.

float64 throughout, so that equal means equal. Shapes: K top-k, M supervised, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import KINDS, MASK, STOP, make_lm, make_prompts, make_rollout, qwen3
from torch import Tensor

from opdlm.config.sections import Config, LossSection, TrainSection
from opdlm.config.sections import OptimizerSection as Optimizer
from opdlm.decoding.rollout import Prompt, Rollout
from opdlm.distill.trainer import Run, StudentLoss, normalized_weights, start_run, update
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.objectives.losses import HiddenTargets, LossOutput, TokenTargets, TopKTargets
from opdlm.objectives.states import StateBatch, pack_states, select_states
from opdlm.objectives.targets import score_rows, targets_at_supervised

ROLLOUTS = [
    make_rollout(p, r, "absolute", stop=r % 2 == 0)
    for p, r in [(3, 6), (8, 9), (1, 2), (5, 12), (6, 7), (2, 4), (9, 5), (4, 8)]
]
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def make_model(kind: str, **options: Any) -> DiffusionLM:
    return make_lm(kind, base=qwen3().double(), **options).double()


def make_states(model: DiffusionLM, rollouts: Sequence[Rollout], selection: Any = "all") -> StateBatch:
    return select_states(rollouts, model.spec, selection, torch.Generator().manual_seed(0))


def loss_of(
    model: DiffusionLM, states: StateBatch, weights_M: Tensor | None = None, **loss: Any
) -> LossOutput:
    if weights_M is None:
        weights_M = torch.ones(int(states.is_supervised_BS.sum()), dtype=torch.float64)
    return StudentLoss(model, LossSection(**loss))(states, weights_M)


class GradientRecorder:
    """In the optimiser's place: keeps the gradient that an update would have applied."""

    def __init__(self, model: DiffusionLM) -> None:
        self.model, self.param_groups = model, [{"lr": 0.0}]
        self.gradients: dict[str, Tensor] = {}

    def step(self) -> None:
        named = self.model.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def zero_grad(self) -> None:
        self.model.zero_grad()


def run_update(kind: str, **changes: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one update on all the rollouts."""
    model = make_model(kind)
    loss = {"normalization": changes.pop("normalization", "token")}
    run = make_run(model, TrainSection(rows_per_update=8, **changes), **loss)
    run.optimizer = recorder = GradientRecorder(model)
    order = list(range(len(ROLLOUTS)))
    sums = update(run, ROLLOUTS, order, "all")
    assert recorder.gradients and all(grad.abs().max() > 0 for grad in recorder.gradients.values())
    return sums.loss, recorder.gradients


def make_run(model: DiffusionLM, train: TrainSection | None = None, **loss: Any) -> Run:
    config = Config(
        train=train or TrainSection(),
        loss=LossSection(**loss),
        optimizer=Optimizer(max_grad_norm=1e9),
    )
    return start_run(model, [Prompt(ids=(1,), index=0)], config)


def assert_same_update(left: tuple[float, dict[str, Tensor]], right: tuple[float, dict[str, Tensor]]) -> None:
    assert left[0] == pytest.approx(right[0], rel=1e-6)
    assert left[1].keys() == right[1].keys()
    for name, gradient in left[1].items():
        assert (right[1][name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("normalization", ["token", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_eight_micro_batches_of_one_row_give_the_gradient_of_one_of_eight(
    kind: str, normalization: str
) -> None:
    whole = run_update(kind, micro_batch_rows=8, normalization=normalization)
    for rows in (1, 3):
        assert_same_update(whole, run_update(kind, micro_batch_rows=rows, normalization=normalization))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run_update(kind, micro_batch_rows=4)
    num_recomputed = []
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(*args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():  # LoRA's teacher pass runs through the same layers without
            num_recomputed.append(1)
        return checkpoint(*args, **options)

    monkeypatch.setattr("opdlm.training.activation_checkpointing.checkpoint", counted)
    assert_same_update(plain, run_update(kind, micro_batch_rows=4, gradient_checkpointing=True))
    assert len(num_recomputed) == 2 * 2  # layers times micro-batches: it was on


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_turns_no_dropout_on(kind: str) -> None:
    """Rollouts, targets and states must come from one deterministic model, whatever its dropout settings."""
    model = make_lm(kind, base=qwen3(attention_dropout=0.5).double()).double()
    states = make_states(model, ROLLOUTS[:3])
    expected_M = loss_of(model, states).per_position_M
    make_run(model, TrainSection(gradient_checkpointing=True))
    torch.testing.assert_close(loss_of(model, states).per_position_M, expected_M)


def make_twin(kind: str) -> tuple[DiffusionLM, list[Rollout]]:
    """A student that computes what its teacher does: blocks of 2, [MASK] embedded as the token it hides."""
    model = make_model(kind, block_size=2, noise=0.0, grid="response")
    hidden_token = 5
    with torch.no_grad():
        embedding = model.student.get_input_embeddings().weight[hidden_token]
        model.mask_embedding.copy_(embedding)
    rollouts = []
    for prompt in make_prompts([3, 6, 4]):
        response = [hidden_token if i % 2 == 0 else 7 + i for i in range(8)]
        rollouts.append(
            Rollout(
                prompt_ids=prompt,
                response_ids=tuple(response),
                unmask_step=tuple(range(1, 9)),
                num_response=8,
                finish_reason="length",
            )
        )
    return model, rollouts


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_loss_and_gradient_are_zero_when_the_student_computes_what_the_teacher_does(
    kind: str, divergence: str
) -> None:
    model, rollouts = make_twin(kind)
    out = loss_of(model, make_states(model, rollouts), divergence=divergence)
    assert len(out.per_position_M) == 3 * 4
    assert out.per_position_M.abs().max() < 1e-6
    out.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and max(gradient.abs().max() for gradient in gradients) < 1e-6
    with torch.no_grad():
        model.mask_embedding += 1.0
    assert loss_of(model, make_states(model, rollouts), divergence=divergence).per_position_M.min() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_s_losses_do_not_depend_on_the_rows_beside_it(kind: str) -> None:
    model = make_model(kind)
    together = make_states(model, ROLLOUTS)
    counts = together.is_supervised_BS.sum(1).tolist()
    with torch.no_grad():
        rows = loss_of(model, together).per_position_M.split(counts)
        for rollout, row_M in zip(ROLLOUTS, rows, strict=True):
            torch.testing.assert_close(loss_of(model, make_states(model, [rollout])).per_position_M, row_M)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_the_log_probabilities_of_the_plain_ar_model(kind: str) -> None:
    base, model = qwen3().double(), make_model(kind)
    states = make_states(model, ROLLOUTS)
    scored = score_rows(model, states.text)
    full = targets_at_supervised(model, states, scored, LossSection())
    top = targets_at_supervised(model, states, scored, LossSection(top_k=5))
    hard = targets_at_supervised(model, states, scored, LossSection(objective="sft"))
    assert isinstance(full, HiddenTargets) and isinstance(top, TopKTargets) and isinstance(hard, TokenTargets)
    expected, tokens = [], []
    for row, column in states.is_supervised_BS.nonzero().tolist():
        target = int(states.target_BS[row, column])
        ids = (ROLLOUTS[row].prompt_ids + ROLLOUTS[row].response_ids)[: target + 1]
        expected.append(ids[:-1])
        tokens.append(ids[-1])
    cache = {ids: ar_logprobs(base, ids) for ids in set(expected)}
    expected_MV = torch.stack([cache[ids] for ids in expected])
    torch.testing.assert_close(full.head.logits(full.hidden_MH).log_softmax(-1), expected_MV)
    torch.testing.assert_close(top.logprobs_MK, expected_MV.topk(5).values)
    assert top.ids_MK.tolist() == expected_MV.topk(5).indices.tolist()
    assert hard.ids_M.tolist() == tokens
    assert STOP in tokens


@torch.no_grad()
def ar_logprobs(base: Any, ids: tuple[int, ...]) -> Tensor:
    logits_V = base(torch.tensor([ids])).logits[0, -1]
    logits_V[MASK] = -torch.inf
    return logits_V.log_softmax(-1)


def test_clean_text_of_preserve_gets_no_gradient() -> None:
    """Its keys and values are the teacher's: only tokens that stand in noised slots move their embedding."""
    model = make_model("copy")
    states = make_states(model, ROLLOUTS[:3])
    loss_of(model, states).loss.backward()
    noised = set(states.slots.ids_BS[states.slots.is_noised_BS].tolist()) - {MASK}
    clean = {token for rollout in ROLLOUTS[:3] for token in rollout.prompt_ids + rollout.text_ids}
    assert clean - noised and noised
    gradient_VH = model.student.get_input_embeddings().weight.grad
    moved = set(gradient_VH.abs().sum(1).nonzero()[:, 0].tolist())
    assert moved == noised
    assert model.mask_embedding.grad.abs().max() > 0
    assert all(p.grad is None for p in model.teacher.parameters())


def test_the_clean_half_of_sdar_gets_gradient() -> None:
    model = make_model("sdar")
    states = make_states(model, ROLLOUTS[:3])
    loss_of(model, states).loss.backward()
    moved = model.student.get_input_embeddings().weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    noised = set(states.slots.ids_BS[states.slots.is_noised_BS].tolist())
    assert set(moved) > noised and set(moved) & set(ROLLOUTS[1].prompt_ids[:4])


def test_lora_trains_the_adapter_and_the_mask_embedding_only() -> None:
    model = make_model("lora")
    loss_of(model, make_states(model, ROLLOUTS[:3])).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {
        name for name, _ in model.named_parameters() if "lora_" in name or name == "mask_embedding"
    }


def micro_batches(model: DiffusionLM, selection: str = "all") -> list[StateBatch]:
    return [make_states(model, ROLLOUTS[first : first + 3], selection) for first in (0, 3, 6)]


def weights_by_row(states: list[StateBatch], weights: list[Tensor]) -> list[Tensor]:
    return [
        row
        for batch, weights_M in zip(states, weights, strict=True)
        for row in weights_M.split(batch.is_supervised_BS.sum(1).tolist())
    ]


def test_token_normalization_weighs_every_supervised_position_of_the_update_alike() -> None:
    model = make_model("sdar")
    states = micro_batches(model)
    weights = torch.cat(normalized_weights(make_run(model, normalization="token"), states))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / len(weights)))


def test_row_normalization_weighs_every_row_of_the_update_alike() -> None:
    model = make_model("sdar")
    states = micro_batches(model)
    rows = weights_by_row(states, normalized_weights(make_run(model, normalization="row"), states))
    assert len({len(row) for row in rows}) > 1
    for row in rows:
        torch.testing.assert_close(row, torch.full_like(row, 1 / (len(ROLLOUTS) * len(row))))


def test_rows_without_a_supervised_position_count_for_nothing() -> None:
    """In `preserve` the teacher predicts a block's first masked token: a one-token block has no loss."""
    model = make_model("lora")
    single = replace(make_rollout(7, 1, "absolute"), response_ids=(3,), unmask_step=(1,))
    states = [make_states(model, [single, ROLLOUTS[1]])]
    rows = weights_by_row(states, normalized_weights(make_run(model, normalization="row"), states))
    assert len(rows[0]) == 0
    assert rows[1].sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("normalization", ["token", "row"])
def test_sft_weighs_a_position_by_one_over_the_masked_share_of_its_block(normalization: str) -> None:
    model = make_model("sdar")
    states = micro_batches(model, "random_mask")
    run = make_run(model, objective="sft", normalization=normalization)
    plain = make_run(model, normalization=normalization)
    shares = torch.cat([batch.masked_fraction_BS[batch.is_supervised_BS] for batch in states])
    assert len(shares.unique()) > 2
    weights, expected = (torch.cat(normalized_weights(one, states)) for one in (run, plain))
    torch.testing.assert_close(weights, expected / shares)


def test_sft_loss_is_the_weighted_cross_entropy_of_the_response_tokens() -> None:
    model = make_model("sdar")
    states = make_states(model, ROLLOUTS, "random_mask")
    (weights_M,) = normalized_weights(make_run(model, objective="sft"), [states])
    out = loss_of(model, states, weights_M, objective="sft")
    scored = score_rows(model, states.text)
    hidden_MH = model.student_hidden(states.slots, scored.cache)[states.is_supervised_BS]
    logits_MV = hidden_MH @ model.student.lm_head.weight.T
    logits_MV = logits_MV.index_fill(-1, torch.tensor([MASK]), -torch.inf)
    targets_M = states.text.ids_BS.gather(1, states.target_BS.clamp_min(0))[states.is_supervised_BS]
    losses_M = F.cross_entropy(logits_MV, targets_M, reduction="none")
    torch.testing.assert_close(out.per_position_M, losses_M.detach())
    torch.testing.assert_close(out.loss, (weights_M.double() * losses_M).sum())


@pytest.mark.parametrize(
    ("kind", "section", "passes"), [("sdar", {}, 0), ("sdar", {"ar_weight": 0.5}, 1), ("preserve", {}, 1)]
)
def test_sft_runs_the_teacher_only_where_it_is_needed(
    kind: str, section: dict[str, Any], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In `preserve` its pass makes the keys and values that the student reads."""
    model, calls = make_model(kind), list[int]()
    teacher_hidden = model.teacher_hidden
    monkeypatch.setattr(model, "teacher_hidden", lambda *args: calls.append(1) or teacher_hidden(*args))
    loss_of(model, make_states(model, ROLLOUTS, "random_mask"), objective="sft", **section)
    assert len(calls) == passes


def test_the_autoregressive_term_is_the_mean_divergence_over_each_rollouts_text() -> None:
    """Against autograd through full logits, every rollout alone."""
    model, section = make_model("sdar"), {"ar_weight": 0.7}
    states = pack_states([make_states(model, [rollout], "one_per_block") for rollout in ROLLOUTS])
    weights_M = torch.rand(int(states.is_supervised_BS.sum()), dtype=torch.float64)
    plain = loss_of(model, states, weights_M).loss
    output = loss_of(model, states, weights_M, **section).loss
    gradient = gradients_of(model, output - plain)

    expected, first = torch.zeros((), dtype=torch.float64), 0
    for rollout in ROLLOUTS:
        one = make_states(model, [rollout], "one_per_block")
        count = int(one.is_supervised_BS.sum())
        assert model.teacher is not None
        allowed = [i for i in range(model.student.config.vocab_size) if i not in model.spec.banned_token_ids]
        logp_LV = model.teacher.lm_head(model.teacher_hidden(one.text)[0])[:, allowed].log_softmax(-1)
        logq_LV = model.student.lm_head(model.student_hidden(one.text)[0])[:, allowed].log_softmax(-1)
        terms_LV = logp_LV.exp() * (logp_LV - logq_LV)
        share = weights_M[first : first + count].sum()
        expected = expected + 0.7 * share * terms_LV.sum(-1).mean()
        first += count
    assert float((output - plain).detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    for name, reference in gradients_of(model, expected).items():
        torch.testing.assert_close(gradient[name], reference, rtol=1e-6, atol=1e-12)


def gradients_of(model: DiffusionLM, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}
