"""Settings of `opdlm train`: objectives on given text. What it shares with conversion comes from `config`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from opdlm.config.loader import build_section, read_settings
from opdlm.config.rules import check_adapter, check_masking
from opdlm.config.sections import (
    STRICT,
    Count,
    FormatSection,
    LoopSection,
    LoraSection,
    MaskSection,
    MeasureSection,
    ModelSection,
    OptionalCount,
    Positive,
    RunConfig,
    Share,
)
from opdlm.errors import ConfigError

TEXT_CONFIG_COPY = "opdlm_train.yaml"
"""The settings of a training, beside the weights it wrote."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TextModelSection(ModelSection):
    from_scratch: bool = False
    """Start from random weights: of `path` only config.json and the tokenizer are read. `bundled:byte` is a
    small byte-level one.
    """
    shape: dict[str, int] = Field(default_factory=dict)
    """With from_scratch: entries of config.json to change, as model.shape.hidden_size=256."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TextFormatSection(FormatSection):
    name: Literal["preserve", "sdar"] = "sdar"
    """sdar: one set of weights, which is trained. preserve is for `opdlm convert`."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TextLoraSection(LoraSection):
    enabled: bool = False
    """Train a LoRA adapter instead of all weights."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TextSection:
    path: str | tuple[str, ...] = ""
    """.jsonl or .json (also .gz, .zst), .parquet or a `datasets` name, one or a list without weights. Rows
    need `text`, or a prompt and its response: `prompt` and `response` (or `completion`), `messages` or
    `conversations` that end with the assistant's, or `instruction` and `output`.
    """
    text_column: str = "text"
    """Column that holds the text."""
    config: str = ""
    """Configuration of a `datasets` name that has several."""
    split: str = "train"
    """Split of a `datasets` name."""
    date: str = ""
    """The day that chat templates with a date print, as 2026-11-29; empty: the day on which the run starts,
    also where it resumes later.
    """
    sequence_length: Annotated[int, Field(ge=2, le=10**9)] = 512
    """Tokens of a row."""
    packing: Literal["chunks", "whole"] = "chunks"
    """chunks: documents are joined and cut into full rows. whole: no document is cut; a row holds as many as
    fit, and a longer one is an error.
    """
    document_mask: bool = True
    """Tokens see their own document only. false: a row is one text."""
    unique_tokens: OptionalCount = None
    """Use the first so many tokens of the shuffled documents; None = all."""
    epochs: Positive | None = None
    """Passes over the data; sets train.num_steps. Documents are shuffled and cut anew in each."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ObjectiveSection:
    name: Literal["autoregressive", "masked_diffusion", "block_diffusion", "dual"] = "masked_diffusion"
    """masked_diffusion sees the whole row; block_diffusion its block and all before it; dual trains
    autoregressive and masked_diffusion rows in one forward.
    """
    prediction: Literal["same_position", "next_position"] = "same_position"
    """What a masked position predicts: its own token, or (as autoregressive models do) position i the token
    i + 1.
    """
    ar_share: Literal["auto"] | Share = 0.5
    """dual: share of autoregressive rows (alpha); auto: 63/64 up to 16 passes over the data, 16 / passes
    beyond.
    """
    ar_weight: Positive = 1.0
    """dual: weight of an autoregressive token against one of diffusion."""
    complementary: bool = False
    """Each row trains twice: with its masks, and with exactly the other tokens masked."""
    distill_weight: Share = 0.0
    """Share of the loss that is the KL divergence from a frozen autoregressive teacher; the rest is the
    text's.
    """
    teacher: str = ""
    """Checkpoint of the teacher; empty: the model as it is before training."""
    input_masking: tuple[float, float] | None = None
    """autoregressive: mask inputs at a rate t ~ U(low, high) per row; every next token is still predicted."""
    dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.0
    """On the output of every attention and MLP layer."""
    token_order: Literal["left_to_right", "random"] = "left_to_right"
    """random: every row's tokens in one fixed random order, a control for autoregressive models."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TextTrainSection(LoopSection):
    num_steps: Count = 1000
    """Optimiser updates."""
    rows_per_update: Count = 16
    """Rows per update, over all devices."""
    micro_batch_rows: Count = 16
    """Rows per forward and backward on one device. Changes no result."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TextEvalSection(MeasureSection):
    path: str = ""
    """Held-out text in the form of data.path; its loss is measured at the end, and during training with
    `every`. Empty: none.
    """
    num_rates: Count = 32
    """Stratified mask rates per row of the diffusion bound, which is always on t ~ U(0, 1)."""
    limit: Count = 64
    """Rows that are measured, evenly spaced."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TextConfig(RunConfig):
    """A training on text."""

    model: TextModelSection = Field(default_factory=TextModelSection)
    format: TextFormatSection = Field(default_factory=TextFormatSection)
    lora: TextLoraSection = Field(default_factory=TextLoraSection)
    data: TextSection = Field(default_factory=TextSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    train: TextTrainSection = Field(default_factory=TextTrainSection)
    eval: TextEvalSection = Field(default_factory=TextEvalSection)
    output_dir: str = "runs/text"


def load_text_config(recipe: Path | None, overrides: Sequence[str] = ()) -> TextConfig:
    """Defaults, then the recipe, then `section.key=value` strings; checked as a whole."""
    return build_text_config(read_settings(recipe, overrides))


def build_text_config(values: dict[str, Any]) -> TextConfig:
    """Defaults, changed by a tree of plain values; checked as a whole."""
    config = build_section(TextConfig, values, verb="train")
    check_text_config(config)
    return config


def refuse(is_wrong: bool, sentence: str) -> None:
    if is_wrong:
        raise ConfigError(sentence)


def check_text_config(config: TextConfig) -> None:
    """Rules across keys. Raises ConfigError for the first that does not hold."""
    check_masking(config)
    check_adapter(config)
    check_objective(config.objective)
    check_steps(config)
    model, data = config.model, config.data
    refuse(
        config.format.name != "sdar",
        f"format.name ({config.format.name}) must be sdar here: preserve trains drafts beside frozen "
        "weights, which is `opdlm convert` (loss.objective=sft for given responses).",
    )
    refuse(
        not config.format.can_denoise,
        f"format.noise ({config.format.noise}) and format.draft_attention ({config.format.draft_attention}) "
        "are for the drafts of `opdlm convert`: leave them out.",
    )
    refuse(
        config.objective.name == "autoregressive" and config.masking != MaskSection(),
        "masking has no effect with objective.name=autoregressive: leave it out, or set "
        "objective.input_masking.",
    )
    refuse(
        bool(model.shape) and not model.from_scratch,
        f"model.shape ({model.shape}) changes a model that has weights: set model.from_scratch=true, or "
        "leave it out.",
    )
    refuse(
        model.from_scratch and (config.lora.enabled or model.load_in_4bit),
        "model.from_scratch (true) leaves nothing for an adapter to adapt: set lora.enabled=false and "
        "model.load_in_4bit=false.",
    )
    refuse(
        config.objective.token_order == "random" and (data.document_mask or data.packing == "whole"),
        "objective.token_order (random) mixes the tokens of a whole row: set data.document_mask=false and "
        "data.packing=chunks.",
    )
    refuse(
        config.objective.token_order == "random" and config.objective.distill_weight > 0,
        f"objective.distill_weight ({config.objective.distill_weight:g}) asks a teacher about text that "
        "objective.token_order (random) scrambles: set one of the two back.",
    )
    refuse(
        config.objective.distill_weight > 0 and model.from_scratch and not config.objective.teacher,
        f"objective.distill_weight ({config.objective.distill_weight:g}) needs a teacher, and "
        "model.from_scratch (true) has random weights: set objective.teacher.",
    )
    refuse(
        config.objective.name == "block_diffusion" and data.sequence_length < config.format.block_size,
        f"data.sequence_length ({data.sequence_length}) is shorter than format.block_size "
        f"({config.format.block_size}): use longer rows.",
    )
    refuse(
        (config.eval.every > 0 or config.eval.patience is not None) and not config.eval.path,
        f"eval.every ({config.eval.every}) measures during training, but eval.path is empty: give held-out "
        "text, or set eval.every=0 and no patience.",
    )
    refuse(
        config.eval.patience is not None and not config.eval.every,
        f"eval.patience ({config.eval.patience}) counts measurements during training, but eval.every is 0: "
        "set it to a number of steps.",
    )
    refuse(
        config.eval.load_best_model_at_end and not config.eval.every,
        "eval.load_best_model_at_end (true) chooses by measurements during training, but eval.every is 0: "
        "set it to a number of steps.",
    )


def check_steps(config: TextConfig) -> None:
    """What counts steps knows how many there are."""
    data, train = config.data, config.train
    refuse(
        data.epochs is not None and train.num_steps != TextTrainSection().num_steps,
        f"data.epochs ({data.epochs}) and train.num_steps ({train.num_steps}) both set the length: leave one "
        "out.",
    )
    refuse(
        data.epochs is not None and config.masking.schedule != (),
        f"masking.schedule counts steps, and data.epochs ({data.epochs}) decides their number: set "
        "train.num_steps instead.",
    )
    refuse(
        config.format.block_growth != (),
        f"format.block_growth ({config.format.block_growth}) has no effect here: blocks of given text keep "
        "format.block_size. Leave it out.",
    )


def check_objective(objective: ObjectiveSection) -> None:
    """Settings that the chosen objective would not read are refused."""
    name, default = objective.name, ObjectiveSection()
    only_for = {
        "ar_share": {"dual"},
        "ar_weight": {"dual"},
        "complementary": {"masked_diffusion", "block_diffusion"},
        "input_masking": {"autoregressive"},
        "token_order": {"autoregressive"},
    }
    for key, names in only_for.items():
        value = getattr(objective, key)
        refuse(
            name not in names and value != getattr(default, key),
            f"objective.{key} ({value}) has no effect with objective.name={name}: leave it out, or use "
            f"{' or '.join(sorted(names))}.",
        )
    refuse(
        name == "block_diffusion" and objective.prediction == "next_position",
        "objective.prediction (next_position) does not fit objective.name=block_diffusion, whose blocks "
        "predict their own positions: use same_position.",
    )
    refuse(
        name == "autoregressive" and objective.prediction != default.prediction,
        "objective.prediction (next_position) is what objective.name=autoregressive always does: leave it "
        "out.",
    )
    refuse(
        objective.complementary and objective.prediction == "next_position",
        "objective.complementary (true) would supervise the last token of a row twice with "
        "objective.prediction=next_position: use same_position.",
    )
    refuse(
        objective.input_masking is not None
        and not 0 <= objective.input_masking[0] < objective.input_masking[1] <= 1,
        f"objective.input_masking ({objective.input_masking}) must be a range: 0 <= lower end < upper end "
        "<= 1.",
    )
    refuse(
        objective.teacher != "" and not objective.distill_weight,
        f"objective.teacher ({objective.teacher}) is not asked with objective.distill_weight=0: set "
        "a weight.",
    )
