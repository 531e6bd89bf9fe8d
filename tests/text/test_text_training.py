"""Training on text: what each objective reduces to, gradients, batches, dropout.

Several processes: `test_distributed`. Whole runs: `test_text_runs`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MASK, STOP, make_lm, qwen3
from torch import Tensor

from opdlm.checkpoints.load import copy_of
from opdlm.config.sections import OptimizerSection
from opdlm.config.text import ObjectiveSection, TextConfig, TextSection, TextTrainSection
from opdlm.data.documents import Document, PackedDataset, RowBatch
from opdlm.errors import ConfigError, DataError
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.objectives.masking import ANY_RATE, Masks, draw_masks
from opdlm.seeds import generator_for
from opdlm.text import trainer as text_trainer
from opdlm.text.batches import TextBatch, block_batch, can_mask, mixed_rows
from opdlm.text.trainer import TextLoss, TextRun, num_causal_rows, start_run, train_step
from opdlm.training.activation_checkpointing import checkpoint_layers
from opdlm.training.dropout import add_output_dropout, training_dropout

LENGTH = 12
COMPARED = ("loss", "ar_loss", "md_loss", "grad_norm", "learning_rate", "tokens", "epoch")
Metrics = dict[str, float]


def documents(num: int = 12, num_prompt: int = 0) -> list[Document]:
    rng = generator_for(7)
    lengths = torch.randint(4, 15, (num,), generator=rng).tolist()
    ids = [torch.randint(STOP, (n,), generator=rng).tolist() for n in lengths]
    return [Document((*i, STOP), num_prompt) for i in ids]


def config_of(output: Path, train: dict[str, Any] | None = None, **objective: Any) -> TextConfig:
    return TextConfig(
        output_dir=str(output),
        data=TextSection(sequence_length=LENGTH),
        objective=ObjectiveSection(**objective),
        optimizer=OptimizerSection(learning_rate=1e-2),
        train=TextTrainSection(
            **{"rows_per_update": 5, "micro_batch_rows": 5, "num_steps": 4} | (train or {})
        ),
    )


def started(config: TextConfig, model: DiffusionLM | None = None) -> TextRun:
    rows = PackedDataset(documents(), config.data, config.train.seed)
    return start_run(make_lm("sdar") if model is None else model, rows, config)


def run_steps(config: TextConfig, num: int = 3) -> tuple[list[Metrics], dict[str, Tensor]]:
    """Metrics and weights after a few updates."""
    run = started(config)
    found = [{k: v for k, v in train_step(run, step).items() if k in COMPARED} for step in range(num)]
    return found, {name: p.detach().clone() for name, p in run.model.student.named_parameters()}


def assert_same_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]


DUAL = {"name": "dual", "prediction": "next_position"}


def test_dual_with_a_share_of_1_is_autoregressive_training_bit_for_bit(tmp_path: Path) -> None:
    dual = run_steps(config_of(tmp_path, **DUAL, ar_share=1.0))
    plain = run_steps(config_of(tmp_path, name="autoregressive"))
    assert dual[0] == plain[0] and "md_loss" not in dual[0][0]
    assert_same_weights(dual[1], plain[1])


@pytest.mark.parametrize("prediction", ["same_position", "next_position"])
def test_dual_with_a_share_of_0_is_masked_diffusion_bit_for_bit(tmp_path: Path, prediction: str) -> None:
    dual = run_steps(config_of(tmp_path, name="dual", prediction=prediction, ar_share=0.0))
    plain = run_steps(config_of(tmp_path, name="masked_diffusion", prediction=prediction))
    assert dual[0] == plain[0] and "ar_loss" not in dual[0][0]
    assert_same_weights(dual[1], plain[1])


@pytest.mark.parametrize("share", [1 / 256, 0.1, 0.5, 2 / 3, 255 / 256])
def test_the_share_of_autoregressive_rows_is_exact_over_the_steps(tmp_path: Path, share: float) -> None:
    config = config_of(tmp_path, {"rows_per_update": 16}, **DUAL, ar_share=share)
    counts = [num_causal_rows(config, step) for step in range(480)]
    assert sum(counts) == pytest.approx(480 * 16 * share, abs=1e-6)
    assert max(counts) - min(counts) <= 1
    assert set(counts) <= set(range(17))


def test_ar_weight_2_is_the_share_of_the_published_code(tmp_path: Path) -> None:
    """With as many tokens in every row, weight 2 at share a is 2a / (1 + a) AR and the rest diffusion."""
    config = config_of(tmp_path, {"rows_per_update": 4}, **DUAL, ar_share=0.25, ar_weight=2.0)
    config = replace(config, data=replace(config.data, document_mask=False))
    run = started(config)
    weighted = train_step(run, 0)
    alpha = 2 * 0.25 / 1.25
    expected = alpha * weighted["ar_loss"] + (1 - alpha) * weighted["md_loss"]
    assert weighted["loss"] == pytest.approx(expected, rel=1e-5)


def make_batch(share: float, seed: int = 0) -> TextBatch:
    section = TextSection(sequence_length=LENGTH)
    rows = PackedDataset(documents(num_prompt=2), section, seed=0)
    row_batch = RowBatch.of([rows.at(i) for i in range(4)])
    masks = draw_masks(can_mask(row_batch, "next_position"), ANY_RATE, generator_for(seed))
    return mixed_rows(row_batch, round(4 * share), masks, "next_position", MASK, ar_weight=2.0)


def block_rows() -> TextBatch:
    rows = PackedDataset(documents(num_prompt=2), TextSection(sequence_length=LENGTH), seed=0)
    spec = make_lm("sdar").spec
    return block_batch(
        [rows.at(0), rows.at(1)], spec, ANY_RATE, [generator_for(i) for i in (0, 1)], complementary=False
    )


def full_logits_loss(model: DiffusionLM, batch: TextBatch, weight_M: Tensor, share: float) -> Tensor:
    """The loss from logits over the whole vocabulary, by autograd."""
    banned = list(model.spec.banned_token_ids)

    def logprobs(hidden_MH: Tensor, head: Any) -> Tensor:
        logits_MV = head(hidden_MH).clone()
        logits_MV[:, banned] = -1e30
        return logits_MV.log_softmax(-1)

    student_MV = logprobs(
        model.student_hidden(batch.slots)[batch.row_M, batch.column_M], model.student.lm_head
    )
    told = -student_MV.gather(-1, batch.target_M[:, None])[:, 0]
    loss = (1 - share) * (weight_M * told).sum()
    if share:
        with torch.no_grad(), model.teacher_weights() as teacher:
            hidden_BLH = model.teacher_hidden(batch.text)
            teacher_MV = logprobs(hidden_BLH[batch.row_M, batch.teacher_column_M], teacher.lm_head)
        kl_MV = teacher_MV.exp() * (teacher_MV - student_MV)
        has_teacher_M = batch.teacher_column_M >= 0
        loss = loss + share * (weight_M * kl_MV.sum(-1))[has_teacher_M].sum()
    return loss


def gradients(model: DiffusionLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["copy", "adapter", "blocks"])
def test_gradients_equal_autograd_through_all_logits(kind: str, share: float, checkpointing: bool) -> None:
    """Teacher: a full copy, or the base under the adapter."""
    model = make_lm("lora" if kind == "adapter" else "sdar", base=qwen3().double())
    if kind == "adapter":
        model.spec = replace(model.spec, format="sdar")
        model.double()
    batch = block_rows() if kind == "blocks" else make_batch(0.5)
    weight_M = batch.weight_M.double() / (batch.num_ar + batch.num_masked)
    expected = gradients(model, full_logits_loss(model, batch, weight_M, share))
    if checkpointing:
        checkpoint_layers(model.student, 1)
    output = TextLoss(model, ObjectiveSection(distill_weight=share))(batch, weight_M)
    found = gradients(model, output.loss)
    reference = full_logits_loss(model, batch, weight_M, share)
    assert output.loss.item() == pytest.approx(reference.item(), rel=1e-9)
    assert found.keys() == expected.keys() and len(found) > 5
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-7, rtol=1e-5, msg=name)
    is_base = [
        name for name in found if kind == "adapter" and "lora_" not in name and name != "mask_embedding"
    ]
    assert not is_base


def test_a_deeper_teacher_and_another_family_can_be_distilled(tmp_path: Path) -> None:
    """The student's windows are not the teacher's."""
    deep = qwen3(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=3, layer_types=["sliding_attention"] * 3
    )
    model = DiffusionLM(qwen3(), make_lm("sdar").spec, teacher=copy_of(deep))
    batch = make_batch(0.5)
    output = TextLoss(model, ObjectiveSection(distill_weight=1.0))(batch, batch.weight_M)
    alone = DiffusionLM(deep, model.spec)
    torch.testing.assert_close(model.teacher_hidden(batch.text), alone.student_hidden(batch.text))
    output.loss.backward()
    assert torch.isfinite(output.loss)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    model = make_lm("sdar", noise=0.0)
    rows = PackedDataset(documents(), TextSection(sequence_length=LENGTH), seed=0)
    row_batch = RowBatch.of([rows.at(0)])
    none_BL = torch.zeros_like(row_batch.is_text_BL)
    nothing = Masks(none_BL, none_BL.float(), none_BL)
    batch = mixed_rows(row_batch, 1, nothing, "next_position", MASK)
    output = TextLoss(model, ObjectiveSection(distill_weight=1.0))(batch, batch.weight_M)
    assert abs(output.loss.item()) < 1e-5


CASES = {
    "dual": DUAL | {"ar_share": 0.3},
    "masked": {"name": "masked_diffusion", "complementary": True},
    "blocks": {"name": "block_diffusion"},
    "autoregressive": {"name": "autoregressive", "input_masking": (0.1, 0.5)},
}


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_no_gradient(tmp_path: Path, name: str) -> None:
    found = []
    for size in (1, 2, 5):
        config = config_of(tmp_path, {"micro_batch_rows": size}, **CASES[name])
        run = started(config)
        metrics = [train_step(run, step) for step in range(2)]
        found.append([{k: m[k] for k in COMPARED if k in m} for m in metrics])
    for other in found[1:]:
        for left, right in zip(found[0], other, strict=True):
            assert left == pytest.approx(right, rel=1e-4)
    assert found[0][0]["loss"] > 0.1


@pytest.mark.parametrize("name", CASES)
def test_an_update_without_enough_memory_is_repeated_with_smaller_micro_batches(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator refuses what the forward after the first micro-batch asks for."""
    config = config_of(tmp_path, {"micro_batch_rows": 4}, **CASES[name])
    expected = [train_step(run, step) for run in [started(config)] for step in range(2)]
    forward, calls = TextLoss.forward, list[int]()

    def starved(self: TextLoss, batch: TextBatch, weight_M: Tensor) -> Any:
        calls.append(batch.slots.ids_BS.numel())
        if len(calls) == 2:
            torch.empty(2**50, dtype=torch.uint8)
        return forward(self, batch, weight_M)

    monkeypatch.setattr(TextLoss, "forward", starved)
    run = started(config)
    for metrics in expected:
        found = train_step(run, int(run.num_updates))
        assert {k: found[k] for k in COMPARED if k in found} == pytest.approx(
            {k: metrics[k] for k in COMPARED if k in metrics}, rel=1e-4
        )
    assert run.micro_batch_rows == 2 and max(calls[2:]) < calls[0]


def test_complementary_rows_learn_every_token_once(tmp_path: Path) -> None:
    run = started(config_of(tmp_path, name="masked_diffusion", complementary=True))
    (batch,) = text_trainer.make_batches(run, 0)
    rows = [run.rows.at(i) for i in range(5)]
    assert sorted(batch.target_M.tolist()) == sorted(i for row in rows for i in row.ids_R[:-1].tolist())
    assert batch.num_masked == 5 * LENGTH == float(batch.weight_M.sum())


def test_input_masking_hides_inputs_and_predicts_every_next_token(tmp_path: Path) -> None:
    run = started(config_of(tmp_path, name="autoregressive", input_masking=(0.4, 0.6)))
    (batch,) = text_trainer.make_batches(run, 0)
    plain = started(config_of(tmp_path, name="autoregressive"))
    (clean,) = text_trainer.make_batches(plain, 0)
    share = float((batch.slots.ids_BS == MASK).float().mean())
    assert 0.2 < share < 0.8 and not (clean.slots.ids_BS == MASK).any()
    for name in ("row_M", "column_M", "target_M", "weight_M"):
        assert torch.equal(getattr(batch, name), getattr(clean, name))


def test_a_random_order_is_one_permutation_that_prompts_follow() -> None:
    section = ObjectiveSection(name="autoregressive", token_order="random")
    rows = PackedDataset(
        documents(num_prompt=2), TextSection(sequence_length=LENGTH, document_mask=False), seed=0
    )
    row_batch = RowBatch.of([rows.at(0), rows.at(1)])
    row_batch = replace(row_batch, ids_BR=torch.arange(LENGTH + 1) + 100 * row_batch.is_given_BR)
    mixed = text_trainer.in_order(row_batch, section, seed=3)
    order = mixed.ids_BR % 100
    assert torch.equal(order[0], order[1]) and sorted(order[0].tolist()) == list(range(LENGTH + 1))
    assert order[0].tolist() != list(range(LENGTH + 1))
    assert torch.equal(mixed.is_given_BR, mixed.ids_BR >= 100)


def test_dropout_acts_in_updates_alone_and_depends_on_the_seed(tmp_path: Path) -> None:
    def losses(p: float, seed: int = 0) -> tuple[float, Tensor]:
        model = make_lm("sdar")
        if p:
            add_output_dropout(model.student, p)
        config = config_of(tmp_path, {"seed": seed}, name="autoregressive", dropout=p)
        run = start_run(model, PackedDataset(documents(), config.data, 0), config)
        hidden = run.model.student_hidden(make_batch(1.0).slots).detach()
        return train_step(run, 0)["loss"], hidden

    plain, dropped, again, other = losses(0), losses(0.3), losses(0.3), losses(0.3, seed=1)
    assert torch.equal(plain[1], dropped[1])
    assert dropped[0] == again[0] and len({plain[0], dropped[0], other[0]}) == 3


def test_the_teacher_under_an_adapter_has_no_dropout() -> None:
    model = make_lm("lora")
    model.spec = replace(model.spec, format="sdar")
    batch = make_batch(1.0)
    expected = model.teacher_hidden(batch.text)
    add_output_dropout(model.student, 0.5)
    seen = []
    teacher_hidden = model.teacher_hidden

    def observed(slots: Any) -> Tensor:
        seen.append(teacher_hidden(slots))
        return seen[-1]

    object.__setattr__(model, "teacher_hidden", observed)
    loss = TextLoss(model, ObjectiveSection(distill_weight=0.5))
    with training_dropout(model, seed=0):
        first = loss(batch, batch.weight_M).loss.item()
    without = loss(batch, batch.weight_M).loss.item()
    assert torch.equal(seen[0], expected) and torch.equal(seen[1], expected)
    assert first != without  # the student has


def test_dropout_that_finds_no_layer_is_an_error() -> None:
    model = qwen3()
    for layer in model.model.layers:
        layer.hidden = layer._modules.pop("self_attn"), layer._modules.pop("mlp")
    with pytest.raises(ConfigError, match=r"objective\.dropout \(0\.1\) finds no attention"):
        add_output_dropout(model, 0.1)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = make_lm("sdar")
    with torch.no_grad():
        model.student.lm_head.weight[3] = torch.inf
    run = started(config_of(tmp_path, name="autoregressive"), model)
    with pytest.raises(DataError, match=r"the loss became nan at update 1\. Lower optimizer\.learning_rate"):
        train_step(run, 0)
