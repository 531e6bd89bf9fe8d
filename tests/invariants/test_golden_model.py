"""The published OPDLM implementation from its weights: masks, logits, targets, losses, gradients, decoding.

Its rows are [left-padded prompt | clean response | noised response], ours are right-padded clean slots
followed by the noised ones; `real_columns` maps one to the other. Its conventions come in as switches of
these tests only: the response grid, a last block cut at the response's end, the recorded loss mask (stop
excluded, row 2 supervises padding), no banned ids.

Shapes: B rows, L clean row, R response slots, S noised slots, M supervised, V vocabulary, H hidden.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from opdlm.config.schedules import length_cap
from opdlm.config.sections import LossSection, OptimizerSection, RolloutDecode, RolloutSection
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Rollout
from opdlm.distill.trainer import StudentLoss
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.modeling.slots import clean_slots, join_slots, visible
from opdlm.objectives.losses import HiddenTargets
from opdlm.objectives.states import StateBatch, block_table, noised_slots
from opdlm.objectives.targets import score_rows, targets_at_supervised
from opdlm.training.optimizer import make_scheduler

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
if not (GOLDEN / "golden.json").exists():
    pytest.skip(f"no golden numbers in {GOLDEN}", allow_module_level=True)

NUMBERS: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text())
NUM_PROMPT, NUM_RESPONSE, MASK = 7, 10, NUMBERS["special"]["mask"]
VARIANTS: dict[str, LossSection] = {
    "fkl_full": LossSection(),
    "fkl_top16": LossSection(top_k=16, tail=False),
    "fkl_top4": LossSection(top_k=4, tail=False),
    "fkl_full_with_imend": LossSection(),
    "rkl50_full": LossSection(reverse_weight=0.5),
    "jsd_full": LossSection(divergence="jsd"),
    "jsd_top16": LossSection(divergence="jsd", top_k=16, tail=False),
    "rkl50_top16": LossSection(reverse_weight=0.5, top_k=16, tail=False),
    "nll": LossSection(objective="sft"),
}


def load_tensors(name: str, prefix: str) -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}


def load_lm(grid: str, head_scale: float = 1.0) -> DiffusionLM:
    def load(prefix: str) -> Qwen3ForCausalLM:
        model = Qwen3ForCausalLM(Qwen3Config(**NUMBERS["config"])).eval()
        model.load_state_dict(load_tensors("weights", prefix))
        return model

    special = NUMBERS["special"]
    spec = DiffusionSpec(
        format="sdar",
        block_size=4,
        grid=grid,
        mask_token_id=MASK,
        stop_token_ids=(special["im_end"],),
    )
    object.__setattr__(spec, "banned_token_ids", ())  # the published code does not even ban [MASK]
    student = load("student.")
    student.lm_head.weight.data *= head_scale
    return DiffusionLM(student, spec, teacher=load("teacher.").requires_grad_(False))


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_tensors("train", "train.")


@pytest.fixture(scope="module")
def model() -> DiffusionLM:
    return load_lm("response")


def num_padding(golden: dict[str, Tensor]) -> list[int]:
    return [NUM_PROMPT - n for n in golden["prompt_lens"].tolist()]


def make_states(golden: dict[str, Tensor], model: DiffusionLM, loss_mask: str = "loss_mask") -> StateBatch:
    """The recorded rows through our own construction; padding after the stop counts as response, as there."""
    rollouts = [
        Rollout(
            prompt_ids=tuple(row[pad:NUM_PROMPT]),
            response_ids=tuple(row[NUM_PROMPT:]),
            unmask_step=tuple(steps),
            num_response=NUM_RESPONSE,
            finish_reason="length",
        )
        for row, steps, pad in zip(
            golden["input_ids"].tolist(), golden["step_map_ext"].tolist(), num_padding(golden), strict=True
        )
    ]
    table = block_table(rollouts, model.spec)
    table = replace(table, is_inside_BNT=table.is_response_BNT)
    noised_BR = golden["extended_input_ids"][:, NUM_PROMPT + NUM_RESPONSE :]
    masked_BW = torch.zeros(3, 12, dtype=torch.bool)
    masked_BW[:, :NUM_RESPONSE] = noised_BR == MASK
    noised, target_BS, fraction_BS = noised_slots(table, masked_BW.view(3, 1, 3, 4), model.spec)
    assert noised.ids_BS.tolist() == noised_BR.tolist()
    supervised_BR = golden[loss_mask][:, NUM_PROMPT:]
    rows = [torch.tensor(r.prompt_ids + r.response_ids) for r in rollouts]
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths_B = torch.tensor([len(row) for row in rows])
    num_prompt_B = torch.tensor([len(r.prompt_ids) for r in rollouts])
    target_BS = torch.where(supervised_BR, target_BS, -1)
    return StateBatch(
        text=clean_slots(ids_BL, lengths_B, num_prompt_B, model.spec.block_grid, "preserve"),
        slots=join_slots(
            clean_slots(ids_BL, lengths_B, num_prompt_B, model.spec.block_grid, model.spec.format), noised
        ),
        target_BS=F.pad(target_BS, (ids_BL.shape[1], 0), value=-1),
        masked_fraction_BS=F.pad(fraction_BS, (ids_BL.shape[1], 0)),
    )


def real_columns(padding: int) -> tuple[list[int], list[int]]:
    """(their columns, our columns) of one row that hold the same slot."""
    num_clean = NUM_PROMPT + NUM_RESPONSE
    theirs = [*range(padding, num_clean), *range(num_clean, num_clean + NUM_RESPONSE)]
    ours = [*range(num_clean - padding), *range(num_clean, num_clean + NUM_RESPONSE)]
    return theirs, ours


def test_masks_and_logits_of_training_rows_equal_the_published_ones(
    golden: dict[str, Tensor], model: DiffusionLM
) -> None:
    states = make_states(golden, model)
    slots = states.slots
    seen_BSS = visible(slots, slots)
    with torch.no_grad():
        logits_BSV = model.logits(model.student_hidden(slots))
    for row, padding in enumerate(num_padding(golden)):
        theirs, ours = real_columns(padding)
        assert slots.ids_BS[row, ours].tolist() == golden["extended_input_ids"][row, theirs].tolist()
        assert slots.positions_BS[row, ours].tolist() == golden["position_ids"][row, theirs].tolist()
        expected_SS = golden["student_attn_mask"][row][theirs][:, theirs].bool()
        assert seen_BSS[row][ours][:, ours].tolist() == expected_SS.tolist()
        torch.testing.assert_close(
            logits_BSV[row, ours], golden["student_full_logits"][row, theirs], atol=1e-4, rtol=1e-4
        )


def test_teacher_targets_equal_the_published_log_probabilities(
    golden: dict[str, Tensor], model: DiffusionLM
) -> None:
    states = make_states(golden, model)
    scored = score_rows(model, states.text)
    targets = targets_at_supervised(model, states, scored, LossSection())
    assert isinstance(targets, HiddenTargets)
    logprobs_MV = targets.head.logits(targets.hidden_MH).log_softmax(-1)
    expected_MV = golden["teacher_logprobs_resp"][golden["loss_mask"][:, NUM_PROMPT:]]
    torch.testing.assert_close(logprobs_MV, expected_MV, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_through_rows_targets_and_chunks_equal_the_published_ones(
    name: str, golden: dict[str, Tensor], model: DiffusionLM
) -> None:
    states = make_states(golden, model, "loss_mask_with_imend" if name.endswith("imend") else "loss_mask")
    with torch.no_grad():
        out = StudentLoss(model, VARIANTS[name])(states, row_mean_weights(states))
    counts = states.is_supervised_BS.sum(1).tolist()
    expected = NUMBERS["training"]["losses"][name]
    row_means = [row.mean().item() for row in out.per_position_M.split(counts)]
    assert row_means == pytest.approx(expected["per_row"], rel=1e-5)
    assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-5)


def row_mean_weights(states: StateBatch) -> Tensor:
    mask_BS = states.is_supervised_BS
    return (mask_BS / mask_BS.sum(1, keepdim=True) / len(mask_BS)).float()[mask_BS]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_mathematically_correct_ones(
    checkpointing: bool, golden: dict[str, Tensor]
) -> None:
    """The published code is 45 % off with checkpointing, because it changes its mask in place."""
    model = load_lm("response")
    calls = count_layer_calls(model)
    if checkpointing:
        model.student.gradient_checkpointing_enable({"use_reentrant": False})
        model.student.train()
    states = make_states(golden, model)
    StudentLoss(model, LossSection())(states, row_mean_weights(states)).loss.backward()
    assert len(calls) == (2 if checkpointing else 1)  # else checkpointing was not on
    expected = load_tensors("grads_fkl_full", "grad.")
    actual = {name: parameter.grad for name, parameter in model.student.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert (actual[name] - grad).norm() <= 1e-4 * grad.norm(), name


def count_layer_calls(model: DiffusionLM) -> list[None]:
    """Grows by one whenever the student's first layer runs."""
    calls: list[None] = []
    model.student.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


RUNS: list[dict[str, Any]] = NUMBERS["generation_absolute_grid"]["runs"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['strategy']}-prompt{len(run['prompt'])}")
def test_greedy_decoding_reveals_what_the_published_sampler_reveals(run: dict[str, Any]) -> None:
    """Tokens, reveal steps and the block after every step are theirs, until the response is complete.

    We stop once the known prefix holds the stop token or reaches the cap; the published sampler first fills
    the rest of the last block, which nobody reads. Our commits ride on the next block's first forward, so
    every forward is a denoising step, and what it needs beyond `num_denoise_forwards` does not exist.
    """
    model = load_lm("absolute", NUMBERS["generation_absolute_grid"]["lm_head_scale"])
    blocks: list[list[int]] = []
    starts = [step["context_len"] for step in run["trace"]]

    def on_step(_rows_B: Tensor, tokens_BL: Tensor, _revealed_BL: Tensor) -> None:
        start = starts[len(blocks)]
        blocks.append(tokens_BL[0, start : start + run["block"]].tolist())

    config = DecodeConfig(
        mode="static" if run["strategy"].endswith("static") else "threshold",
        max_new_tokens=run["max_tokens"],
        denoising_steps=run["steps"],
        confidence_threshold=run["threshold"],
    )
    (rollout,) = generate(model, [run["prompt"]], config, on_step=on_step)
    assert list(rollout.text_ids) == run["completion"]
    assert list(rollout.unmask_step[: rollout.num_response]) == run["first_unmask_steps"]
    assert blocks == [step["after"] for step in run["trace"]][: len(blocks)]
    assert rollout.num_steps == rollout.num_forwards == max(run["first_unmask_steps"])
    assert rollout.num_steps <= run["num_denoise_forwards"] < run["num_forwards_incl_commit"]


def test_the_length_curriculum_is_the_published_one() -> None:
    section = RolloutSection(start_new_tokens=100, decode=RolloutDecode(max_new_tokens=4000), ramp_steps=100)
    expected = NUMBERS["schedules"]["max_token_cos(start100,end4000,ramp100)"]
    assert {step: length_cap(section, int(step), 4) for step in expected} == expected


def test_the_learning_rate_schedule_is_the_published_one() -> None:
    """Recorded as a formula: step / warmup, then 0.1 + 0.9 * 0.5 * (1 + cos(pi * progress)). Steps from 0."""
    published = NUMBERS["schedules"]["lr_cosine"]
    warmup, total = published["warmup_opt_steps"], published["total_opt_steps"]
    section = OptimizerSection(warmup_steps=warmup, min_learning_rate_ratio=published["min_scale"])
    quarter = (total - warmup) / 4
    expected = {0: 0.0, warmup // 2: 0.5, warmup: 1.0, total: 0.1}
    expected |= {warmup + quarter: 0.1 + 0.45 * (1 + 0.5**0.5), warmup + 2 * quarter: 0.55}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=section.learning_rate)
    (scale_at,) = make_scheduler(optimizer, section, total).lr_lambdas
    scales = {step: scale_at(step) for step in expected}
    assert scales == pytest.approx(expected)
