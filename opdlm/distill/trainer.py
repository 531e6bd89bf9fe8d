"""On-policy distillation (OPDLM, arXiv 2606.06712; docs/concepts.md). `train_step` is one training step:

    rollouts = student(prompts)                 on-policy; baselines use the teacher's responses
    p        = teacher(prompt, response)        once per rollout
    states   = masked versions of the rollout   those of its trajectory, or random masks
    loss     = mean of D(p, q)                  at supervised positions; q: the student's distribution

`training.loop` runs, stops and resumes the steps. Random draws belong to a prompt, so gradients do not depend
on the number of ranks. With `rollout.asynchronous`, step n decodes the rollouts of step n + 1 with the
weights from its own start while it trains, so results do not depend on timing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from opdlm.config.schedules import (
    block_size_at,
    first_reused_step,
    num_updates_of,
    selection_at,
)
from opdlm.config.sections import Config, LossSection, scheduled
from opdlm.data.prompts import PromptStream, weighted_sources
from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.rollout import Prompt, Rollout, digest_of
from opdlm.distill.rollouts import RolloutSource
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.slots import CLEAN
from opdlm.objectives.acceptance import Acceptance, PlaceSums, places_of
from opdlm.objectives.losses import (
    Divergence,
    Head,
    HiddenTargets,
    LossOutput,
    Targets,
    TokenTargets,
    chunked_divergence,
    lm_head_of,
)
from opdlm.objectives.masking import ANY_RATE, MaskRates, rates_at
from opdlm.objectives.states import (
    Selection,
    StateBatch,
    first_fit,
    pack_states,
    select_drafts,
    select_states,
)
from opdlm.objectives.targets import needs_teacher, score_rows, targets_at_supervised
from opdlm.seeds import Stream, generator_for
from opdlm.training.devices import sum_over_ranks
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


class StudentLoss(nn.Module):
    """The teacher's pass, the student's pass and the loss as one module, so that wrappers (DDP, ZeRO) see
    every use of the weights.
    """

    def __init__(self, model: DiffusionLM, section: LossSection) -> None:
        super().__init__()
        self.model, self.section = model, section
        self.divergence_name: Divergence = section.divergence
        """Of the present step."""
        self.needs_teacher = needs_teacher(section, model.spec.format)

    def forward(self, states: StateBatch, weights_M: Tensor) -> LossOutput:
        """Weighted sum of the divergences at the supervised slots, plus the AR term with `loss.ar_weight`."""
        scored = score_rows(self.model, states.text) if self.needs_teacher else None
        hidden_BSH = self.model.student_hidden(states.slots, scored.cache if scored else None)
        row_M, column_M = states.is_supervised_BS.nonzero(as_tuple=True)
        targets = targets_at_supervised(self.model, states, scored, self.section)
        hidden_MH = hidden_BSH[row_M, column_M]
        if self.model.draft_head is not None:
            hidden_MH = corrected_drafts(self.model, states, hidden_MH)
        output = self.divergence(hidden_MH, targets, weights_M)
        if self.section.ar_weight == 0:
            return output
        assert scored is not None
        row_M, column_M = (states.text.group_BS == CLEAN).nonzero(as_tuple=True)
        ar_output = self.divergence(
            self.model.student_hidden(states.text)[row_M, column_M],
            HiddenTargets(hidden_MH=scored.hidden_BLH[row_M, column_M], head=self.head(of_teacher=True)),
            self.section.ar_weight * text_weights(states, weights_M)[row_M, column_M],
        )
        return LossOutput(output.loss + ar_output.loss, output.per_position_M)

    def head(self, *, of_teacher: bool = False) -> Head:
        """The LM head, without the banned tokens."""
        model = self.model.teacher if of_teacher and self.model.teacher else self.model.student
        banned = torch.tensor(self.model.spec.banned_token_ids, dtype=torch.long, device=self.model.device)
        return lm_head_of(model, banned)

    def divergence(self, hidden_MH: Tensor, targets: Targets, weights_M: Tensor) -> LossOutput:
        section = self.section
        return chunked_divergence(
            hidden_MH,
            self.head(),
            targets,
            weights_M,
            divergence="cross_entropy" if isinstance(targets, TokenTargets) else self.divergence_name,
            beta=section.jsd_beta,
            reverse_weight=0.0 if isinstance(targets, TokenTargets) else section.reverse_weight,
            variation_weight=0.0 if isinstance(targets, TokenTargets) else section.variation_weight,
            with_acceptance=section.objective == "draft",
        )


def corrected_drafts(model: DiffusionLM, states: StateBatch, hidden_MH: Tensor) -> Tensor:
    """The hidden states of drafts after the draft head, which reads the text in place of the draft tokens."""
    assert model.draft_head is not None
    place_M = places_of(states)
    draft_M = (place_M == 0).cumsum(0) - 1
    row_M, column_M = states.is_supervised_BS.nonzero(as_tuple=True)
    before_M = states.slots.start_BS[row_M, column_M] + states.target_BS[row_M, column_M] - 1
    ids_AD = states.text.ids_BS.new_zeros(int((place_M == 0).sum()), model.spec.block_size - 1)
    ids_AD[draft_M, place_M] = states.text.ids_BS[row_M, before_M]
    state_AW, read = None, []
    for ids_A in ids_AD.unbind(1):
        state_AW = model.draft_head.advance(model.embed(model.student, ids_A), state_AW)
        read.append(state_AW)
    return model.draft_head(hidden_MH, torch.stack(read, 1)[draft_M, place_M])


def text_weights(states: StateBatch, weights_M: Tensor) -> Tensor:
    """The total weight of each document's supervised slots, spread evenly over its clean tokens: `[B, L]`."""
    num_columns = states.text.ids_BS.shape[1]
    row_M, column_M = states.is_supervised_BS.nonzero(as_tuple=True)
    zeros_BL = weights_M.new_zeros(states.text.ids_BS.shape)
    total_BL = zeros_BL.flatten().index_add(
        0, row_M * num_columns + states.slots.start_BS[row_M, column_M], weights_M
    )
    start_BL = states.text.start_BS
    is_text_BL = (states.text.group_BS == CLEAN).to(weights_M)
    length_BL = zeros_BL.scatter_add(1, start_BL, is_text_BL)
    share_BL = total_BL.view_as(zeros_BL) / length_BL.clamp_min(1)
    return share_BL.gather(1, start_BL) * is_text_BL


@dataclass(slots=True, kw_only=True)
class Run(Loop):
    """A conversion."""

    config: Config
    source: RolloutSource
    student_loss: StudentLoss
    """Not wrapped for the devices."""
    acceptance: Acceptance
    """Of draft tokens (objective draft)."""
    pool: dict[int, list[Rollout]] = field(default_factory=dict)
    """Rollouts of the present, earlier (reused) and next (asynchronous) steps, by their step."""

    def progress(self, step: int) -> dict[str, Any]:
        pool = reusable(self, step).items()
        return Loop.progress(self, step) | {
            "acceptance": [self.acceptance.accepted, self.acceptance.offered],
            "pool": {made: [rollout.to_dict() for rollout in rollouts] for made, rollouts in pool},
        }

    def restore(self, progress: dict[str, Any]) -> None:
        Loop.restore(self, progress)
        if "acceptance" in progress:  # not in those of earlier versions
            self.acceptance.accepted, self.acceptance.offered = progress["acceptance"]
        for made, rollouts in progress["pool"].items():
            self.pool[int(made)] = [Rollout.from_dict(rollout) for rollout in rollouts]


def train(
    model: DiffusionLM,
    prompts: Sequence[Prompt],
    config: Config,
    log: MetricsLog,
    recorded: Sequence[Rollout] = (),
    eval_callback: EvalCallback | None = None,
    every: int = 0,
) -> Run:
    """Train to `train.num_steps`, or until retention stalls. Resumes from the newest checkpoint in
    `output_dir` if there is one. `recorded`: rollouts of `rollout.path`, instead of prompts.
    """
    run = start_run(model, prompts, config, recorded)
    run_steps(run, lambda step: train_step(run, step), log, eval_callback, every)
    run.source.close()
    finish(run, log)
    return run


def start_run(
    model: DiffusionLM, prompts: Sequence[Prompt], config: Config, recorded: Sequence[Rollout] = ()
) -> Run:
    """Place the model on the devices and create the optimiser and the source of rollouts."""
    per_step, seed = config.rollout.prompts_per_step, config.train.seed
    student_loss = StudentLoss(model, config.loss)
    started = start(model, student_loss, config)
    sources = weighted_sources(prompts, config.data) if prompts else []
    sizes = ([len(group)] for _, group in sources)
    source = RolloutSource(
        config=config,
        model=model,
        loss=started["loss"],
        accelerator=started["accelerator"],
        prompts=PromptStream(prompts, per_step, seed, sources),
        recorded=PromptStream(recorded, per_step, seed) if recorded else None,
    )
    return Run(
        **started,
        num_planned=num_updates_of(config),
        totals={"rollout_tokens": 0.0, "loss_tokens": 0.0},
        data_digest=digest_of(chain((prompt.ids for prompt in prompts), map(ids_of, recorded), sizes)),
        source=source,
        student_loss=student_loss,
        acceptance=Acceptance(config.format.block_size - 1),
    )


def ids_of(rollout: Rollout) -> tuple[int, ...]:
    """The integers of a rollout that training depends on: its tokens and their reveal steps."""
    return (*rollout.prompt_ids, *rollout.response_ids, *rollout.unmask_step)


def train_step(run: Run, step: int) -> dict[str, float]:
    """Step `step` (0-based): decode rollouts, then update for `epochs_per_rollout` epochs; its metrics."""
    config, started, cpu_started = run.config, time.perf_counter(), time.process_time()
    run.model.spec = replace(run.model.spec, block_size=block_size_at(config.format, step))
    rollouts = run.pool.get(step) or run.source.rollouts_at(step, run.doing)  # in the pool if asynchronous
    waited = time.perf_counter() - started
    schedule = config.loss.divergence_schedule
    run.student_loss.divergence_name = scheduled(schedule, step, config.loss.divergence)
    rng = generator_for(config.train.seed, step + 1, Stream.UPDATE_ORDER)
    run.pool = reusable(run, step) | {step: rollouts}
    pool = [rollout for made in run.pool.values() for rollout in made]
    selection, rates = selection_at(config, step), rates_at(config.masking, step)
    sums = UpdateSums()
    with run.source.decoding_ahead(step + 1) as pending:
        for chosen in update_order(len(pool), config, rng):
            sums += update(run, pool, chosen, selection, rates)
            pending.raise_failure()
        ready = time.perf_counter()
        if pending.future:
            run.pool[step + 1] = run.source.gather(pending.future.result())
        waited += time.perf_counter() - ready
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
    return step_metrics(run, rollouts, sums, waited, seconds)


def reusable(run: Run, step: int) -> dict[int, list[Rollout]]:
    """Rollouts of earlier steps that step `step` trains on again."""
    oldest = first_reused_step(run.config, step)
    return {made: rollouts for made, rollouts in run.pool.items() if made >= oldest}


def update_order(num_rollouts: int, config: Config, rng: torch.Generator) -> Iterator[list[int]]:
    """Indices of the rollouts of each optimiser update: every epoch is a new permutation."""
    rows = config.train.rows_per_update
    for _ in range(config.train.epochs_per_rollout):
        order = torch.randperm(num_rollouts, generator=rng).tolist()
        for first in range(0, num_rollouts, rows):
            yield order[first : first + rows]


def update(
    run: Run,
    rollouts: Sequence[Rollout],
    chosen: Sequence[int],
    selection: Selection,
    rates: MaskRates = ANY_RATE,
) -> UpdateSums:
    """One optimiser update on the chosen rollouts, split over the ranks, in packed micro-batches."""
    mine = chosen[run.accelerator.process_index :: run.accelerator.num_processes]
    states = [states_of(run, rollouts, i, selection, rates) for i in mine]
    weights = normalized_weights(run, states)

    def packed(batch: list[int]) -> tuple[StateBatch, Tensor]:
        if batch:
            one = pack_states([states[i] for i in batch])
            weights_M = torch.cat([weights[i] for i in batch])
        else:  # takes part in collectives, without a gradient
            one = states_of(run, rollouts, chosen[0], selection, rates).without_targets()
            weights_M = torch.zeros(0)
        return one.to(run.accelerator.device), weights_M.to(run.accelerator.device)

    def attempt() -> tuple[UpdateSums, PlaceSums]:
        batches = equally_many(run.accelerator, micro_batches(run, states))
        places = PlaceSums.of_length(len(run.acceptance.accepted))
        observe = places.observe if is_draft else None
        return update_weights(run, map(packed, batches), len(batches), observe), places

    is_draft = run.config.loss.objective == "draft"
    sums, places = with_enough_memory(run, attempt)
    if is_draft:
        run.acceptance.add(sum_over_ranks(run.accelerator, *places.accepted_D, *places.offered_D))
    return sums


def micro_batches(run: Run, states: list[StateBatch]) -> list[list[int]]:
    """Indices of the states that share a packed row of at most `micro_batch_rows` * longest columns."""
    sizes = [one.num_columns for one in states]
    return first_fit(sizes, run.micro_batch_rows * max(sizes, default=0))


def states_of(
    run: Run, rollouts: Sequence[Rollout], index: int, selection: Selection, rates: MaskRates
) -> StateBatch:
    """Denoising states of one rollout, with draws that depend on (update, index) only."""
    rng = generator_for(run.config.train.seed, Stream.STATES + run.num_updates, index)
    if run.config.loss.objective == "draft":
        return select_drafts([rollouts[index]], run.model.spec, run.config.states.anchors_per_row, rng)
    return select_states([rollouts[index]], run.model.spec, selection, rng, rates)


def normalized_weights(run: Run, states: list[StateBatch]) -> list[Tensor]:
    """Weights of the supervised slots that make the update's loss a mean over the global batch.

    `token`: mean over supervised positions. `row`: mean over rows of the mean over each row (OPDLM, arXiv
    2606.06712). `sft` first weights a position by 1 / (masked fraction of its block), and
    `loss.reach_weights` by the probability that it is reached.
    """
    per_batch, total = [], torch.zeros(())
    for batch in states:
        is_supervised_BS = batch.is_supervised_BS
        weights_BS = is_supervised_BS.float()
        if run.config.loss.objective == "sft":
            weights_BS = weights_BS / batch.masked_fraction_BS.clamp_min(1e-6)
        if run.config.loss.reach_weights:
            weights_BS[is_supervised_BS] = run.acceptance.weights()[places_of(batch)]
        if run.config.loss.normalization == "row":
            counts_B1 = is_supervised_BS.sum(1, keepdim=True)
            weights_BS = weights_BS / counts_B1.clamp_min(1)
            total = total + (counts_B1 > 0).sum()
        else:
            total = total + is_supervised_BS.sum()
        per_batch.append(weights_BS[is_supervised_BS])
    total = run.accelerator.reduce(total.to(run.accelerator.device), "sum").clamp_min(1)
    return [weights_M * (run.accelerator.num_processes / total.cpu()) for weights_M in per_batch]


def step_metrics(
    run: Run,
    rollouts: Sequence[Rollout],
    sums: UpdateSums,
    waited: float,
    seconds: dict[str, float],
) -> dict[str, float]:
    """Metrics of a step; adds to `run.totals`. `waited`: seconds spent waiting for rollouts. `seconds`: by
    the clock, and of processor time of this process.
    """
    decoding = DecodeStats.of(rollouts)
    run.totals["rollout_tokens"] += decoding.num_tokens
    run.totals["loss_tokens"] += sums.positions
    return {
        "loss": sums.loss / sums.num_updates,
        "divergence": sums.divergence / max(1, sums.positions),
        "grad_norm": sums.grad_norm / sums.num_updates,
        "learning_rate": sums.learning_rate,
        "block_size": run.model.spec.block_size,
        "tokens_per_forward": decoding.tokens_per_forward,
        "tokens_per_step": decoding.tokens_per_step,
        "response_length": decoding.num_tokens / len(rollouts),
        "stop_rate": sum(r.finish_reason == "stop" for r in rollouts) / len(rollouts),
        "rollout_tokens_per_second": run.source.tokens_per_second,
        "rollout_wait_seconds": waited,
        "rollout_share_of_time": waited / seconds["seconds"],
        **seconds,
        **(run.acceptance.metrics() if run.config.loss.objective == "draft" else {}),
        **run.totals,
    }
