"""Training on given text: autoregressive, masked diffusion, block diffusion, both at once, or distilled.

`train_step` reads rows, masks them and makes one update. The loss is in nats per learnt token:
    autoregressive     mean of -log p(next token)
    masked diffusion   sum over masked tokens of -log p / P(masked | t), over all tokens (a bound)
    dual               (ar_weight * sum of the first + sum of the second) / (ar_weight * tokens + tokens)
With `distill_weight` w it is (1 - w) * (that) + w * (the same sums over KL(teacher || student)).
arXiv 2512.14549 (dual), 2601.22450 (mask rates), 2503.09573 (block diffusion).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from opdlm.config.text import ObjectiveSection, TextConfig
from opdlm.data.documents import PackedDataset, RowBatch, TextRow
from opdlm.decoding.rollout import digest_of
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.objectives.losses import HiddenTargets, LossOutput, TokenTargets, chunked_divergence, lm_head_of
from opdlm.objectives.masking import MaskRates, Masks, draw_masks, rates_at
from opdlm.seeds import Stream, generator_for
from opdlm.text.batches import TextBatch, block_batch, can_mask, mixed_rows
from opdlm.training.devices import sum_over_ranks
from opdlm.training.dropout import without_output_dropout
from opdlm.training.loop import (
    EvalCallback,
    Loop,
    UpdateSums,
    equally_many,
    finish,
    run_steps,
    start,
    update_weights,
    with_enough_memory,
)
from opdlm.training.metrics import MetricsLog


class TextLoss(nn.Module):
    """The forward passes and the loss as one module, so that wrappers see every use of the weights."""

    def __init__(self, model: DiffusionLM, section: ObjectiveSection) -> None:
        super().__init__()
        self.model, self.section = model, section

    def forward(self, batch: TextBatch, weight_M: Tensor) -> LossOutput:
        """`per_position_M` is the cross-entropy, or the divergence where nothing else is trained."""
        distill_weight = self.section.distill_weight
        hidden_MH = self.model.student_hidden(batch.slots)[batch.row_M, batch.column_M]
        banned = torch.tensor(self.model.spec.banned_token_ids, dtype=torch.long, device=hidden_MH.device)
        head = lm_head_of(self.model.student, banned)
        if distill_weight == 0:
            return chunked_divergence(
                hidden_MH, head, TokenTargets(ids_M=batch.target_M), weight_M, divergence="cross_entropy"
            )
        has_teacher_M = batch.teacher_column_M >= 0
        row_T, column_T = batch.row_M[has_teacher_M], batch.teacher_column_M[has_teacher_M]
        with without_output_dropout(self.model):
            teacher_BLH = self.model.teacher_hidden(batch.text)
        targets = HiddenTargets(
            hidden_MH=teacher_BLH[row_T, column_T],
            head=lm_head_of(self.model.teacher or self.model.student, banned),
        )
        distilled = chunked_divergence(hidden_MH[has_teacher_M], head, targets, weight_M[has_teacher_M])
        if distill_weight == 1:
            per_position_M = torch.zeros_like(weight_M).masked_scatter_(
                has_teacher_M, distilled.per_position_M.to(weight_M)
            )
            return LossOutput(distilled.loss, per_position_M)
        supervised = chunked_divergence(
            hidden_MH, head, TokenTargets(ids_M=batch.target_M), weight_M, divergence="cross_entropy"
        )
        return LossOutput(
            torch.lerp(supervised.loss, distilled.loss, distill_weight), supervised.per_position_M
        )


@dataclass(slots=True, kw_only=True)
class TextRun(Loop):
    """The state of a training on text; `config.masking` and `config.objective.ar_share` are resolved."""

    config: TextConfig
    rows: PackedDataset


def train(
    model: DiffusionLM,
    rows: PackedDataset,
    config: TextConfig,
    log: MetricsLog,
    eval_callback: EvalCallback | None = None,
) -> TextRun:
    """Train until `train.num_steps`, or until the held-out loss stalls; continue from the newest
    checkpoint.
    """
    run = start_run(model, rows, config)
    run_steps(run, lambda step: train_step(run, step), log, eval_callback, config.eval.every)
    finish(run, log)
    return run


def start_run(model: DiffusionLM, rows: PackedDataset, config: TextConfig) -> TextRun:
    return TextRun(
        **start(model, TextLoss(model, config.objective), config),
        num_planned=config.train.num_steps,
        totals={"tokens": 0.0},
        data_digest=digest_of((document.num_prompt, *document.ids) for document in rows.documents),
        rows=rows,
    )


@dataclass(slots=True)
class KindSums:
    """Weighted cross-entropy and tokens of autoregressive and of masked rows on one rank."""

    ar_nats: float = 0.0
    ar_tokens: float = 0.0
    md_nats: float = 0.0
    md_tokens: float = 0.0

    def observe(self, batch: TextBatch, output: LossOutput) -> None:
        nats_M = output.per_position_M * batch.weight_M.to(output.per_position_M)
        self.ar_nats += float(output.per_position_M[batch.is_ar_M].sum())
        self.ar_tokens += int(batch.is_ar_M.sum())
        self.md_nats += float(nats_M[~batch.is_ar_M].sum())
        self.md_tokens += batch.num_masked


def train_step(run: TextRun, step: int) -> dict[str, float]:
    """One update (0-based) on the next rows."""
    started, config, accelerator = time.perf_counter(), run.config, run.accelerator

    def attempt() -> tuple[UpdateSums, KindSums]:
        batches = make_batches(run, step)
        total = sum(config.objective.ar_weight * batch.num_ar + batch.num_masked for batch in batches)
        total = sum_over_ranks(accelerator, total)[0] / accelerator.num_processes
        moved = (batch.to(accelerator.device) for batch in batches)
        weighted = ((batch, batch.weight_M / total) for batch in moved)
        sums = KindSums()
        return update_weights(run, weighted, len(batches), sums.observe), sums

    update, sums = with_enough_memory(run, attempt)
    length = run.rows.length * config.train.rows_per_update
    run.totals["tokens"] += length
    seconds = time.perf_counter() - started
    parts = (sums.ar_nats, sums.ar_tokens, sums.md_nats, sums.md_tokens)
    ar_nats, ar_tokens, md_nats, md_tokens = sum_over_ranks(accelerator, *parts)
    return {
        "loss": update.loss,
        **({"ar_loss": ar_nats / ar_tokens} if ar_tokens else {}),
        **({"md_loss": md_nats / md_tokens} if md_tokens else {}),
        "grad_norm": update.grad_norm,
        "learning_rate": update.learning_rate,
        "epoch": run.totals["tokens"] / run.rows.length / run.rows.per_epoch,
        "tokens_per_second": length / seconds,
        "seconds": seconds,
        **run.totals,
    }


def make_batches(run: TextRun, step: int) -> list[TextBatch]:
    """This rank's micro-batches of one update. Every rank draws the masks of all rows."""
    config, accelerator = run.config, run.accelerator
    num_rows = config.train.rows_per_update
    rows = [run.rows.at(index) for index in range(step * num_rows, (step + 1) * num_rows)]
    mine = list(range(accelerator.process_index, num_rows, accelerator.num_processes))
    size = run.micro_batch_rows
    chosen = equally_many(accelerator, [mine[first : first + size] for first in range(0, len(mine), size)])
    rates = rates_at(config.masking, step)
    if config.objective.name == "block_diffusion":
        rngs = [generator_for(config.train.seed, Stream.MASKS, step, place) for place in range(num_rows)]

        def make(part: Sequence[int]) -> TextBatch:
            parts = [rows[i] for i in part], run.model.spec, rates, [rngs[i] for i in part]
            return block_batch(*parts, complementary=config.objective.complementary)
    else:
        row_batch, masks = rows_and_masks(rows, rates, config, step)

        def make(part: Sequence[int]) -> TextBatch:
            return row_micro_batch(row_batch, masks, run.model.spec, config, step, part)

    return [make(part) if part else make([0]).without_targets() for part in chosen]


def rows_and_masks(
    rows: Sequence[TextRow], rates: MaskRates, config: TextConfig, step: int
) -> tuple[RowBatch, Masks]:
    """The rows of an update with masks; autoregressive rows use theirs under `objective.input_masking`."""
    section, rng = config.objective, generator_for(config.train.seed, Stream.MASKS, step)
    row_batch = in_order(RowBatch.of(rows), section, config.train.seed)
    if section.input_masking is not None:
        rates = MaskRates(windows=(section.input_masking,))
        return row_batch, draw_masks(row_batch.is_text_BL, rates, rng)
    return row_batch, draw_masks(can_mask(row_batch, section.prediction), rates, rng)


def row_micro_batch(
    row_batch: RowBatch,
    masks: Masks,
    spec: DiffusionSpec,
    config: TextConfig,
    step: int,
    chosen: Sequence[int],
) -> TextBatch:
    """One micro-batch; the first rows of the update are autoregressive."""
    section, picked = config.objective, torch.tensor(chosen)
    num_causal = int((picked < num_causal_rows(config, step)).sum())
    masks = Masks(*(values_BL[picked] for values_BL in (masks.is_masked, masks.weight, masks.is_counted)))
    row_batch = row_batch.pick(picked)
    if section.complementary:
        masked_BL, can_BL = masks.is_masked, can_mask(row_batch, section.prediction)
        both = torch.cat([masked_BL, can_BL & ~masked_BL])
        row_batch = row_batch.pick(torch.arange(len(picked)).repeat(2))
        masks = Masks(both, both.float(), can_BL.repeat(2, 1))
    batch = mixed_rows(
        row_batch,
        num_causal,
        masks,
        section.prediction,
        spec.mask_token_id,
        ar_weight=section.ar_weight,
        masks_causal=section.input_masking is not None,
    )
    return replace(batch, num_masked=batch.num_masked / 2) if section.complementary else batch


def num_causal_rows(config: TextConfig, step: int) -> int:
    """Autoregressive rows of an update: all, none, or such that their share over the steps is `ar_share`."""
    num_rows, share = config.train.rows_per_update, config.objective.ar_share
    if config.objective.name != "dual":
        return num_rows if config.objective.name == "autoregressive" else 0
    assert share != "auto", "resolved before training: it depends on the data"
    return math.floor((step + 1) * num_rows * share + 1e-9) - math.floor(step * num_rows * share + 1e-9)


def in_order(row_batch: RowBatch, section: ObjectiveSection, seed: int) -> RowBatch:
    """The tokens of every row in the order of the run (`objective.token_order`)."""
    if section.token_order == "left_to_right":
        return row_batch
    order_R = torch.randperm(row_batch.ids_BR.shape[1], generator=generator_for(seed, Stream.TOKEN_ORDER))
    return RowBatch(row_batch.ids_BR[:, order_R], row_batch.start_BR, row_batch.is_given_BR[:, order_R])
