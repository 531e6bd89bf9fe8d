"""The model of a folder with the likelihoods that can be measured on it, and why others cannot.

A folder of `opdlm train` is measured as it was trained (its settings are stored beside the weights), a folder
of `opdlm convert` as its format decodes. Any other checkpoint is measured autoregressively, and as masked
diffusion if the user says what its masked positions predict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opdlm.checkpoints.convert import make_spec, probe, stop_token_ids
from opdlm.checkpoints.folders import is_converted
from opdlm.checkpoints.load import context_length, load, load_causal_lm, load_tokenizer, vocabulary_rows
from opdlm.config.loader import apply_override, build_section
from opdlm.config.rules import load_config
from opdlm.config.sections import CONFIG_COPY
from opdlm.config.text import TEXT_CONFIG_COPY, TextConfig, TextSection, load_text_config
from opdlm.data.documents import RowBatch, TextRow
from opdlm.decoding.rollout import Rollout
from opdlm.errors import ConfigError
from opdlm.evaluation.likelihood import ar_response_nll, nll_bound
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.text.batches import Prediction, pieces
from opdlm.text.likelihood import (
    RowNats,
    Score,
    block_bound,
    causal_nll,
    md_bound,
    prefix_nll,
    pseudo_nll,
)
from opdlm.text.trainer import in_order

FORWARD, MASKED = ("ar_nll", "prefix_nll"), ("md_bound", "pll", "pll_right1", "pll_right2")
METRICS = (*FORWARD, *MASKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodOptions:
    """How likelihoods are measured."""

    num_rates: int = 32
    """Mask rates of the bound; an even number."""
    prediction: Prediction | None = None
    """What masked positions of a plain checkpoint predict."""
    overrides: tuple[str, ...] = ()
    """`data.key=value`: how the text is cut into rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodModel:
    """A model and the likelihoods that can be measured on it."""

    diffusion_lm: DiffusionLM
    tokenizer: PreTrainedTokenizerBase
    data: TextSection
    trained: str
    """How it was trained, as the table shows it."""
    scores: dict[str, Score]
    """Functions by the name of the metric."""
    default: tuple[str, ...]
    """Metrics that it was trained for."""
    unsupported: dict[str, str] = field(default_factory=dict)
    """Metrics that cannot be measured, and why."""

    @property
    def context_length(self) -> float:
        return context_length(self.diffusion_lm.student.config)

    def choose_metrics(self, metrics: Sequence[str], folder: Path) -> tuple[str, ...]:
        """The metrics that the user named, or all that the model was trained for."""
        for name in metrics:
            if name in self.unsupported:
                raise ConfigError(
                    f"--metrics {name} cannot be measured for {folder}: {self.unsupported[name]}."
                )
        return tuple(metrics) or self.default


def load_likelihood_model(folder: Path, options: LikelihoodOptions) -> LikelihoodModel:
    """The model of a folder. Raises ConfigError where `options.prediction` contradicts the folder."""
    is_trained = (folder / TEXT_CONFIG_COPY).is_file()
    if options.prediction and (is_trained or is_converted(folder)):
        raise ConfigError(f"--prediction is for plain checkpoints; {folder} knows its own: leave it out.")
    if is_trained:
        return from_train_folder(folder, options)
    if is_converted(folder):
        return from_convert_folder(folder, options)
    return from_plain_folder(folder, options)


def from_train_folder(folder: Path, options: LikelihoodOptions) -> LikelihoodModel:
    """A folder of `opdlm train`: its objective decides what is measured."""
    config = load_text_config(folder / TEXT_CONFIG_COPY, options.overrides)
    section = config.objective
    if is_converted(folder):
        model, tokenizer = load(folder, config.model.dtype)
    else:
        base, tokenizer = load_causal_lm(str(folder), config.model.dtype), load_tokenizer(str(folder))
        mask_token_id = tokenizer.get_vocab()[config.format.mask_token]
        spec = replace(make_spec(base, tokenizer, config, mask_token_id), adapter=False)
        model = DiffusionLM(base, spec).eval().requires_grad_(False)

    def to_row_batch(rows: Sequence[TextRow]) -> RowBatch:
        if section.token_order == "random" and len(rows[0].ids_R) != config.data.sequence_length + 1:
            raise ConfigError(
                f"{folder} reads whole rows in one random order (objective.token_order): it cannot rank "
                "options, nor read rows of another data.sequence_length."
            )
        return in_order(RowBatch.of(rows), section, config.train.seed)

    scores = row_scores(model, section.prediction, options.num_rates, to_row_batch)
    default: tuple[str, ...] = ("md_bound",)
    unsupported: dict[str, str] = {}
    match section.name:
        case "autoregressive":
            default = ("ar_nll",)
            unsupported = dict.fromkeys(MASKED, "it was trained autoregressively only (objective.name)")
        case "block_diffusion":
            scores["md_bound"] = block_score(model, options.num_rates)
            unsupported = dict.fromkeys(
                METRICS, "blocks see nothing after them (objective.name=block_diffusion)"
            )
            del unsupported["md_bound"]
        case "masked_diffusion" if section.prediction == "same_position":
            unsupported = dict.fromkeys(FORWARD, "its positions predict themselves (objective.prediction)")
        case "dual":
            forward = FORWARD if section.prediction == "next_position" else FORWARD[:1]
            default = (*forward, "md_bound")
    return LikelihoodModel(
        diffusion_lm=model,
        tokenizer=tokenizer,
        data=config.data,
        trained=section.name,
        scores=scores,
        default=default,
        unsupported=unsupported,
    )


def from_convert_folder(folder: Path, options: LikelihoodOptions) -> LikelihoodModel:
    """A folder of `opdlm convert`: the bound of the student, and its AR model if the folder holds one."""
    model, tokenizer = load(folder)
    spec = model.spec
    if spec.format == "preserve":
        num_samples = max(2, options.num_rates // (2 * spec.block_size))  # each is two orders of a block
        scores: dict[str, Score] = {
            "ar_nll": lambda rows, _: over_pieces(model, rows, partial(ar_parts, model)),
            "md_bound": lambda rows, seed: over_pieces(
                model, rows, partial(bound_parts, model, num_samples, seed)
            ),
        }
        if not spec.can_denoise:
            del scores["md_bound"]
    else:
        scores = {"md_bound": block_score(model, options.num_rates)}
        if load_config(folder / CONFIG_COPY).loss.ar_weight:
            scores["ar_nll"] = lambda rows, _: causal_nll(model, RowBatch.of(rows))
    why = "a converted model sees no later block" if spec.can_denoise else "its student computes drafts only"
    unsupported = {name: why for name in METRICS if name not in scores}
    if "ar_nll" not in scores:
        unsupported["ar_nll"] = "its autoregressive model is the checkpoint it was made from: measure that"
    return LikelihoodModel(
        diffusion_lm=model,
        tokenizer=tokenizer,
        data=plain_section(model, options),
        trained=f"converted, {spec.format} {spec.block_size}",
        scores=scores,
        default=tuple(name for name in METRICS if name in scores),
        unsupported=unsupported,
    )


def from_plain_folder(folder: Path, options: LikelihoodOptions) -> LikelihoodModel:
    """Any causal checkpoint; also masked diffusion if the user names its prediction."""
    base, tokenizer = load_causal_lm(str(folder)), load_tokenizer(str(folder))
    mask_token_id = tokenizer.mask_token_id
    is_masked = options.prediction is not None and mask_token_id is not None
    spec = DiffusionSpec(
        format="sdar",
        block_size=1,
        grid="absolute",
        mask_token_id=mask_token_id if is_masked else vocabulary_rows(base),  # or an id that no forward sees
        stop_token_ids=stop_token_ids(base, tokenizer),
    )
    probe(base, spec, tokenizer)
    model = DiffusionLM(base, spec).eval().requires_grad_(False)
    unsupported: dict[str, str] = {}
    default: tuple[str, ...] = ("ar_nll",)
    if not is_masked:
        why = "it has no mask token" if mask_token_id is None else "what its masks predict is unknown"
        unsupported = dict.fromkeys(
            MASKED,
            f"{why} (needed: a mask token in the tokenizer, and --prediction next_position or same_position)",
        )
    elif options.prediction == "same_position":
        default, unsupported = ("md_bound",), dict.fromkeys(FORWARD, "its positions predict themselves")
    else:
        default = ("ar_nll", "md_bound")
    return LikelihoodModel(
        diffusion_lm=model,
        tokenizer=tokenizer,
        data=plain_section(model, options),
        trained="plain checkpoint",
        scores=row_scores(model, options.prediction or "next_position", options.num_rates, RowBatch.of),
        default=default,
        unsupported=unsupported,
    )


def plain_section(model: DiffusionLM, options: LikelihoodOptions) -> TextSection:
    """How text is cut into rows for models that were not trained on rows."""
    length = min(TextSection().sequence_length, context_length(model.student.config))
    values: dict[str, Any] = {"data": {"sequence_length": length}}
    for override in options.overrides:
        apply_override(values, override)
    return build_section(TextConfig, values).data


def row_scores(
    model: DiffusionLM,
    prediction: Prediction,
    num_rates: int,
    to_row_batch: Callable[[Sequence[TextRow]], RowBatch],
) -> dict[str, Score]:
    """All metrics of a model that reads whole rows."""

    def pll(num_right: int) -> Score:
        return lambda rows, seed: pseudo_nll(model, to_row_batch(rows), prediction, num_right)

    return {
        "ar_nll": lambda rows, seed: causal_nll(model, to_row_batch(rows)),
        "prefix_nll": lambda rows, seed: prefix_nll(model, to_row_batch(rows)),
        "md_bound": lambda rows, seed: md_bound(model, to_row_batch(rows), prediction, num_rates, seed),
        "pll": pll(0),
        "pll_right1": pll(1),
        "pll_right2": pll(2),
    }


def block_score(model: DiffusionLM, num_rates: int) -> Score:
    return lambda rows, seed: block_bound(model, rows, num_rates, seed)


def over_pieces(
    model: DiffusionLM, rows: Sequence[TextRow], measure: Callable[[Sequence[Rollout]], tuple[Tensor, Tensor]]
) -> RowNats:
    """Sums over the documents of each row; `measure` returns nats and their standard error per document."""
    nats, tokens, errors = list[Tensor](), list[int](), list[Tensor]()
    for row in rows:
        parts = list(pieces(row, model.spec))
        nats_P, error_P = measure(parts) if parts else (torch.zeros(0), torch.zeros(0))
        nats.append(nats_P.double().sum())
        errors.append(error_P.double().square().sum().sqrt())
        tokens.append(sum(part.num_response for part in parts))
    return RowNats(nats_B=torch.stack(nats), tokens_B=torch.tensor(tokens), error_B=torch.stack(errors))


def ar_parts(model: DiffusionLM, parts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    nats_P = ar_response_nll(model, parts)
    return nats_P, torch.zeros_like(nats_P)


def bound_parts(
    model: DiffusionLM, num_samples: int, seed: int, parts: Sequence[Rollout]
) -> tuple[Tensor, Tensor]:
    bound = nll_bound(model, parts, num_samples, seed)
    return bound.nats_B, bound.standard_error_B
