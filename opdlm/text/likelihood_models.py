"""What a folder can be asked about text: the model, its scores by name, and why others are refused.

A folder of `opdlm train` is asked in the way it was trained (its settings lie beside the weights), a folder
of `opdlm convert` as its format decodes, any other checkpoint autoregressively, or as masked diffusion where
the user says what its masked positions predict.
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
from opdlm.checkpoints.load import load, load_causal_lm, load_tokenizer, vocabulary_rows
from opdlm.config.loader import apply_override, build_section
from opdlm.config.rules import load_config
from opdlm.config.sections import CONFIG_COPY
from opdlm.config.text import TEXT_CONFIG_COPY, TextConfig, TextSection, load_text_config
from opdlm.data.documents import RowBatch, TextRow
from opdlm.decoding.rollout import Rollout
from opdlm.errors import ConfigError
from opdlm.evaluation.likelihood import ar_nll as exact_nll
from opdlm.evaluation.likelihood import nll_bound
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.text.batches import Prediction, pieces
from opdlm.text.likelihood import (
    RowNats,
    Score,
    ar_nll,
    block_bound,
    md_bound,
    prefix_nll,
    pseudo_nll,
)
from opdlm.text.trainer import in_order

FORWARD, MASKED = ("ar_nll", "prefix_nll"), ("md_bound", "pll", "pll_right1", "pll_right2")
METRICS = (*FORWARD, *MASKED)


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodOptions:
    """What the user says about how models are asked."""

    num_rates: int = 32
    """Mask rates of the bound, even."""
    prediction: Prediction | None = None
    """Of a plain checkpoint with a mask token."""
    overrides: tuple[str, ...] = ()
    """data.key=value: how the text is cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodModel:
    """A model and the questions it can be asked."""

    model: DiffusionLM
    tokenizer: PreTrainedTokenizerBase
    data: TextSection
    trained: str
    """As the table names it."""
    scores: dict[str, Score]
    default: tuple[str, ...]
    refused: dict[str, str] = field(default_factory=dict)
    """Metrics that it cannot have, and why."""

    @property
    def context(self) -> int | None:
        return getattr(self.model.student.config.get_text_config(), "max_position_embeddings", None)

    def chosen(self, metrics: Sequence[str], folder: Path) -> tuple[str, ...]:
        """The metrics named, or all that the model was trained for."""
        for name in metrics:
            if name in self.refused:
                raise ConfigError(f"--metrics {name} cannot be measured for {folder}: {self.refused[name]}.")
        return tuple(metrics) or self.default


def load_subject(folder: Path, asked: LikelihoodOptions) -> LikelihoodModel:
    """The model of a folder, with what it can be asked."""
    is_trained = (folder / TEXT_CONFIG_COPY).is_file()
    if asked.prediction and (is_trained or is_converted(folder)):
        raise ConfigError(f"--prediction is for plain checkpoints; {folder} knows its own: leave it out.")
    if is_trained:
        return trained_subject(folder, asked)
    return converted_subject(folder, asked) if is_converted(folder) else plain_subject(folder, asked)


def trained_subject(folder: Path, asked: LikelihoodOptions) -> LikelihoodModel:
    """A folder of `opdlm train`."""
    config = load_text_config(folder / TEXT_CONFIG_COPY, asked.overrides)
    section = config.objective
    if is_converted(folder):
        model, tokenizer = load(folder, config.model.dtype)
    else:
        base, tokenizer = load_causal_lm(str(folder), config.model.dtype), load_tokenizer(str(folder))
        mask_token_id = tokenizer.get_vocab()[config.format.mask_token]
        spec = replace(make_spec(base, tokenizer, config, mask_token_id), adapter=False)
        model = DiffusionLM(base, spec).eval().requires_grad_(False)

    def columns(rows: Sequence[TextRow]) -> RowBatch:
        if section.token_order == "random" and len(rows[0].ids_R) != config.data.sequence_length + 1:
            raise ConfigError(
                f"{folder} reads whole rows in one random order (objective.token_order): it cannot rank "
                "options, nor read rows of another data.sequence_length."
            )
        return in_order(RowBatch.of(rows), section, config.train.seed)

    scores = row_scores(model, section.prediction, asked.num_rates, columns)
    default: tuple[str, ...] = ("md_bound",)
    refused: dict[str, str] = {}
    match section.name:
        case "autoregressive":
            default = ("ar_nll",)
            refused = dict.fromkeys(MASKED, "it was trained autoregressively only (objective.name)")
        case "block_diffusion":
            scores["md_bound"] = block_score(model, asked.num_rates)
            refused = dict.fromkeys(METRICS, "blocks see nothing after them (objective.name=block_diffusion)")
            del refused["md_bound"]
        case "masked_diffusion" if section.prediction == "same_position":
            refused = dict.fromkeys(FORWARD, "its positions predict themselves (objective.prediction)")
        case "dual":
            forward = FORWARD if section.prediction == "next_position" else FORWARD[:1]
            default = (*forward, "md_bound")
    return LikelihoodModel(
        model=model,
        tokenizer=tokenizer,
        data=config.data,
        trained=section.name,
        scores=scores,
        default=default,
        refused=refused,
    )


def converted_subject(folder: Path, asked: LikelihoodOptions) -> LikelihoodModel:
    """A folder of `opdlm convert`: its bound, and its AR model where it holds one."""
    model, tokenizer = load(folder)
    spec = model.spec
    if spec.format == "preserve":
        num_samples = max(2, asked.num_rates // (2 * spec.block_size))  # each is two orders of a block
        scores: dict[str, Score] = {
            "ar_nll": lambda rows, _: over_pieces(model, rows, partial(exact_parts, model)),
            "md_bound": lambda rows, seed: over_pieces(
                model, rows, partial(bound_parts, model, num_samples, seed)
            ),
        }
    else:
        scores = {"md_bound": block_score(model, asked.num_rates)}
        if load_config(folder / CONFIG_COPY).loss.ar_weight:
            scores["ar_nll"] = lambda rows, _: ar_nll(model, RowBatch.of(rows))
    refused = {name: "a converted model sees no later block" for name in METRICS if name not in scores}
    if "ar_nll" not in scores:
        refused["ar_nll"] = "its autoregressive model is the checkpoint it was made from: measure that"
    return LikelihoodModel(
        model=model,
        tokenizer=tokenizer,
        data=plain_section(model, asked),
        trained=f"converted, {spec.format} {spec.block_size}",
        scores=scores,
        default=tuple(name for name in METRICS if name in scores),
        refused=refused,
    )


def plain_subject(folder: Path, asked: LikelihoodOptions) -> LikelihoodModel:
    """Any causal checkpoint; a masked one where its prediction is told."""
    base, tokenizer = load_causal_lm(str(folder), "float32"), load_tokenizer(str(folder))
    mask_token_id = tokenizer.mask_token_id
    unknown = vocabulary_rows(base)  # an id that no forward ever sees
    spec = DiffusionSpec(
        format="sdar",
        block_size=1,
        grid="absolute",
        mask_token_id=unknown if mask_token_id is None else mask_token_id,
        stop_token_ids=stop_token_ids(base, tokenizer),
        banned_token_ids=() if asked.prediction is None or mask_token_id is None else (mask_token_id,),
    )
    probe(base, spec)
    model = DiffusionLM(base, spec).eval().requires_grad_(False)
    refused: dict[str, str] = {}
    default: tuple[str, ...] = ("ar_nll",)
    if asked.prediction is None or mask_token_id is None:
        why = "it has no mask token" if mask_token_id is None else "say what its masked positions predict"
        refused = dict.fromkeys(
            MASKED,
            f"{why} (needed: a mask token in the tokenizer, and --prediction next_position or same_position)",
        )
    elif asked.prediction == "same_position":
        default, refused = ("md_bound",), dict.fromkeys(FORWARD, "its positions predict themselves")
    else:
        default = ("ar_nll", "md_bound")
    return LikelihoodModel(
        model=model,
        tokenizer=tokenizer,
        data=plain_section(model, asked),
        trained="plain checkpoint",
        scores=row_scores(model, asked.prediction or "next_position", asked.num_rates, RowBatch.of),
        default=default,
        refused=refused,
    )


def plain_section(model: DiffusionLM, asked: LikelihoodOptions) -> TextSection:
    """How text is cut for models that were not trained on rows."""
    context = getattr(model.student.config.get_text_config(), "max_position_embeddings", None)
    values: dict[str, Any] = {"data": {"sequence_length": min(TextSection().sequence_length, context or 512)}}
    for override in asked.overrides:
        apply_override(values, override)
    return build_section(TextConfig, values).data


def row_scores(
    model: DiffusionLM,
    prediction: Prediction,
    num_rates: int,
    columns: Callable[[Sequence[TextRow]], RowBatch],
) -> dict[str, Score]:
    """Every metric of a model that sees whole rows."""

    def pll(num_right: int) -> Score:
        return lambda rows, seed: pseudo_nll(model, columns(rows), prediction, num_right)

    return {
        "ar_nll": lambda rows, seed: ar_nll(model, columns(rows)),
        "prefix_nll": lambda rows, seed: prefix_nll(model, columns(rows)),
        "md_bound": lambda rows, seed: md_bound(model, columns(rows), prediction, num_rates, seed),
        "pll": pll(0),
        "pll_right1": pll(1),
        "pll_right2": pll(2),
    }


def block_score(model: DiffusionLM, num_rates: int) -> Score:
    return lambda rows, seed: block_bound(model, rows, num_rates, seed)


def over_pieces(
    model: DiffusionLM, rows: Sequence[TextRow], measure: Callable[[Sequence[Rollout]], tuple[Tensor, Tensor]]
) -> RowNats:
    """Sums over the documents of each row; `measure` gives nats and their error per document."""
    nats, tokens, errors = list[Tensor](), list[int](), list[Tensor]()
    for row in rows:
        parts = list(pieces(row, model.spec))
        nats_P, error_P = measure(parts)
        nats.append(nats_P.double().sum())
        errors.append(error_P.double().square().sum().sqrt())
        tokens.append(sum(part.num_response for part in parts))
    return RowNats(nats_B=torch.stack(nats), tokens_B=torch.tensor(tokens), error_B=torch.stack(errors))


def exact_parts(model: DiffusionLM, parts: Sequence[Rollout]) -> tuple[Tensor, Tensor]:
    nats_P = exact_nll(model, parts)
    return nats_P, torch.zeros_like(nats_P)


def bound_parts(
    model: DiffusionLM, num_samples: int, seed: int, parts: Sequence[Rollout]
) -> tuple[Tensor, Tensor]:
    bound = nll_bound(model, parts, num_samples, seed)
    return bound.nats_B, bound.standard_error_B
