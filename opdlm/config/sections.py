"""The settings of a conversion: names, meanings, defaults and bounds.

Every section is one pydantic dataclass: it is validated wherever it is made, also by `dataclasses.replace`.
The docstring under a field is its help text. A recipe is a complete YAML file: no includes, no interpolation.
The resolved tree is saved beside the checkpoint and is itself a recipe. Nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from opdlm.config.loader import flat, plain
from opdlm.decoding.decode_config import DecodeConfig

Selection = Literal["one_per_block", "all", "complementary", "random_mask"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "total_variation"]
Windows = Literal["auto"] | tuple[tuple[float, float], ...]
Value = TypeVar("Value")

Count = Annotated[int, Field(ge=1, le=10**12)]
OptionalCount = Count | None
Steps = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
DURATION = r"^(\d+d)?(\d+h)?(\d+m)?(\d+(\.\d+)?s?)?$"

STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, use_attribute_docstrings=True)
"""Unknown keys are errors; a number may stand for a text."""

CONFIG_COPY = "opdlm_config.yaml"
"""The settings of a conversion, beside the weights it wrote."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class ModelSection:
    path: str = ""
    """Folder or hub id of the autoregressive checkpoint; `bundled:teacher` is part of the package."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights in memory; auto: that of the checkpoint's files, or float32 on a CPU that has
    no instructions for it. Softmax, losses and the weights of the optimiser (adapter and mask embedding, or a
    master copy of the student) are always float32.
    """
    load_in_4bit: bool = False
    """QLoRA: hold the frozen linear layers in 4 bits (NF4). Needs LoRA and bitsandbytes: 'opdlm[quant]'."""
    trust_remote_code: bool = False
    """Run Python code from the checkpoint. Leave it off unless you trust its author."""
    attention: Literal["auto", "sdpa", "flex", "flash"] = "auto"
    """sdpa: a dense mask; flex: FlexAttention (CUDA); flash: chunks of queries, no dense mask; auto: flex or
    flash.
    """


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class FormatSection:
    name: Literal["preserve", "sdar"] = "preserve"
    """preserve: the AR model computes clean tokens and can verify drafts. sdar: for SDAR engines."""
    block_size: Count = 4
    """Tokens per diffusion block."""
    block_growth: tuple[tuple[int, int], ...] = ()
    """Pairs (first step, block size) that end with block_size: [[0, 4], [100, 8]]. Empty: a constant size."""
    grid: Literal["absolute", "response"] = "absolute"
    """Origin of the blocks: token 0, or the first response token."""
    mask_token: Annotated[str, Field(min_length=1)] = "<|mask|>"
    """Text of the mask token; an existing token of this text is used, else an unused row, else a new one."""
    noise: Literal["mask", "uniform"] = "mask"
    """Input of unknown tokens: mask, a trained embedding, or uniform, ids drawn from the whole vocabulary, as
    SGLang and vLLM draft. uniform is for preserve with loss.objective=draft, and decodes losslessly only.
    """
    draft_attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether the tokens of a draft see each other or, as in SGLang and vLLM, only those before them. causal
    is for preserve with loss.objective=draft, and decodes losslessly only.
    """
    mask_init: Literal["zero", "mean", "noise", "stop"] = "zero"
    """Initial mask embedding: zero, the mean embedding, the mean plus noise, or that of the stop token."""
    draft_head: Steps = 0
    """Width of a small head that tells each token of a draft which tokens come before it (objective draft);
    0: none.
    """

    @property
    def can_denoise(self) -> bool:
        """Whether the student can decode without the AR model (`DiffusionSpec.can_denoise`)."""
        return self.noise == "mask" and self.draft_attention == "bidirectional"


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class LoraSection:
    enabled: bool = True
    """Train a LoRA adapter (gated in preserve) instead of a full copy of the weights."""
    r: Annotated[int, Field(ge=1, le=10**5)] = 32
    """Rank."""
    alpha: Count = 64
    """Scale: the adapter's output is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.0
    """On the adapter's input, in updates only: rollouts and targets are computed without it."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Which linear layers get an adapter, as PEFT reads it: all-linear, a list of names, or a regular
    expression over full names (which can also choose layers).
    """
    use_rslora: bool = False
    """Scale by alpha / sqrt(r): a larger rank does not shrink the update."""
    use_dora: bool = False
    """DoRA: learn the length of every weight row separately from its direction."""
    init: str = "default"
    """default (B = 0), gaussian (A normal, B = 0), or orthogonal (B A = 0, neither is 0; even r)."""
    merge: bool = True
    """sdar: add the adapter to the weights of the result folder, as serving engines need it. false keeps the
    AR weights and the adapter apart; `opdlm merge` can join them later. preserve never merges.
    """


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class SourceSection:
    """An entry of `data.path` with settings of its own. None: that of the data section."""

    path: str = ""
    """A file or a `datasets` name."""
    weight: Annotated[float, Field(gt=0, le=10**9)] | None = None
    """Share of the prompts of a step, relative to the other sources, of which each has epochs of its own.
    None: 1, or if no source has a weight, the prompts of all sources are shuffled together.
    """
    split: str | None = None
    """Split of a `datasets` name."""
    config: str | None = None
    """Configuration of a `datasets` name."""
    prompt_column: str | None = None
    """Column that holds the prompt."""
    limit: OptionalCount = None
    """Use only the first prompts of this source, this many."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class DataSection:
    path: str | tuple[str | SourceSection, ...] = ""
    """Prompts: .jsonl or .json (also .gz, .zst), .parquet or a `datasets` name, one or a list. Rows need
    `prompt` (text or messages), `messages`, `conversations` (ShareGPT), or `instruction` (Alpaca). An entry
    of the list may be a mapping with path, weight, split, config, prompt_column and limit:
    [{path: a.jsonl, weight: 3}, b.jsonl] takes 3 of 4 prompts of each step from a.jsonl.
    """
    self_prompts: Steps = 0
    """Number of prompts that the model writes before training, in addition to those of path. Beside weights
    in path they are a source of weight 1.
    """
    config: str = ""
    """Configuration of a `datasets` name that has several, for example main."""
    split: str = "train"
    """Split of a `datasets` name; slices such as train[:1000] work."""
    prompt_column: str = ""
    """Column that holds the prompt, as text or as messages, whose final response is left out; empty: the
    first of those above.
    """
    enable_thinking: bool | None = None
    """Passed to the chat templates that know it (Qwen3, SmolLM3); None = the template's default."""
    date: str = ""
    """The day that chat templates with a date print, as 2026-11-29; empty: the day on which the run starts,
    also where it resumes later.
    """
    max_prompt_tokens: Count = 1024
    """Longer prompts are an error, never cut."""
    drop_long_prompts: bool = False
    """Drop longer prompts instead, and report how many."""
    system_prompt: str = ""
    """Put before every prompt through the chat template."""
    limit: OptionalCount = None
    """Use only the first prompts, this many; None = all. With mappings in path: of each source."""


@plain_dataclass(frozen=True, slots=True, kw_only=True)
class RolloutDecode(DecodeConfig):
    """How rollouts are decoded. The states are the student's own, so the AR model replaces nothing."""

    mode: Literal["static", "threshold", "lossless"] = "threshold"
    """How many tokens a denoising step reveals: a fixed number, or all that exceed confidence_threshold.
    lossless is for teacher responses (draft, off_policy, sft): the same text in fewer forwards, as the drafts
    improve; otherwise the teacher writes token by token.
    """
    temperature: float = 1.0
    """0 = arg-max."""
    ar_accept_threshold: Literal[0] = 0
    """Always 0: rollouts keep every token that the student revealed."""
    draft_sampling: Literal["shared_noise"] = "shared_noise"
    """Always shared_noise: a rollout depends on no other, whatever the number of devices."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class RolloutSection:
    engine: Literal["own", "vllm"] = "own"
    """Decoder of rollouts and teacher responses: this package's, or vLLM (an extra; Qwen3 and Llama, on a
    GPU), which holds a second copy of the weights.
    """
    prompts_per_step: Annotated[int, Field(ge=1, le=10**6)] = 64
    """Prompts that get a response in each step, over all devices."""
    decode: RolloutDecode = Field(default_factory=RolloutDecode)
    start_new_tokens: OptionalCount = None
    """Length cap at step 0; None = no curriculum."""
    ramp_steps: Count = 100
    """Steps from the first cap to the last."""
    ramp: Literal["cosine", "linear"] = "cosine"
    """Shape of the length curriculum."""
    warm_start_steps: Steps = 0
    """First steps that train on randomly masked teacher responses, before the student can write."""
    path: str = ""
    """Train on the rollouts of this file, written by `opdlm rollout`. Of this section only prompts_per_step
    is used, and data.path is not read. The states one_per_block and all need a file that was denoised with
    the same block size and grid.
    """
    compile: bool = False
    """Decode with torch.compile (CUDA graphs on GPUs): the same tokens up to rounding, at a lower cost per
    step. The first step includes compilation, which needs a C++ compiler on CPUs. Not with engine=vllm, FSDP2
    or ZeRO.
    """
    asynchronous: bool = False
    """Generate the rollouts of the next step while a step trains, with a copy of the student from before the
    step. The copy needs the memory of the trained weights; train.max_staleness is counted in addition.
    """


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class StatesSection:
    selection: Selection = "all"
    """Which denoising states of a rollout are trained on (objective opd)."""
    selection_schedule: tuple[tuple[int, Selection], ...] = ()
    """Pairs (first step, selection) that end with selection: [[0, random_mask], [50, all]]."""
    anchors_per_row: OptionalCount = None
    """draft: tokens of a response after which a draft is trained, drawn anew in each pass; None = one for
    every format.block_size tokens.
    """


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class MaskSection:
    """Random masks of sft, off_policy, opd_random, of random_mask and complementary states, and of text."""

    sampler: Literal["bernoulli", "exact"] = "bernoulli"
    """bernoulli: each token independently with probability t. exact: a share t of the tokens, rounded up."""
    windows: Windows = ((0.0, 1.0),)
    """Ranges that t is drawn from, for every block (conversion) or row (text): [[0.45, 0.55]]. auto: a range
    around the best t for the n-grams of the training text. Evaluation always uses [0, 1].
    """
    window_weights: tuple[float, ...] = ()
    """Relative frequency of each window. Empty: equal."""
    auto_width: Share = 0.1
    """Width of the window that auto chooses."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """ε of p = (1 - ε) t + ε: no token is masked less often."""
    position_rates: tuple[float, ...] = ()
    """Multipliers of t from the first to the last token that can be masked, linear in between: [0.5, 1.5].
    Empty: 1 everywhere.
    """
    always_mask: tuple[int, ...] = ()
    """These tokens are always masked, counted as in a Python list: [-1] is the last one that can be. With
    windows [[0, 0]] nothing else is.
    """
    schedule: tuple[tuple[int, Windows], ...] = ()
    """Pairs (first step, windows) that end with windows: [[0, [[0, 1]]], [500, auto]]. Empty: constant."""
    ramp_steps: Steps = 0
    """Steps over which the upper end of every window grows from its lower end."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class LossSection:
    objective: Literal["opd", "opd_random", "off_policy", "sft", "draft"] = "opd"
    """opd: own rollouts and their states; opd_random: own rollouts, random masks; off_policy: teacher
    responses; sft: teacher responses, cross-entropy weighted 1/t. draft (preserve): teacher responses, and
    after any of their tokens the draft that lossless decoding makes there.
    """
    reach_weights: bool = False
    """draft: a position counts with the probability that all draft tokens before it are accepted at
    temperature 1, as the updates so far have measured it.
    """
    divergence: Divergence = "forward_kl"
    """Between teacher and student token distributions. total_variation is the share of draft tokens that
    speculative sampling rejects at temperature 1; it learns nothing from an untrained student.
    """
    divergence_schedule: tuple[tuple[int, Divergence], ...] = ()
    """Pairs (first step, divergence) that end with divergence: [[0, forward_kl], [50, total_variation]]."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture of the Jensen-Shannon divergence."""
    reverse_weight: Share = 0.0
    """Share of reverse KL mixed into forward_kl."""
    variation_weight: Share = 0.0
    """Share of total variation mixed into forward_kl."""
    top_k: OptionalCount = None
    """Use the teacher's k most likely tokens only; None = full vocabulary."""
    tail: bool = True
    """With top_k: the rest of the mass is one more outcome, so the loss stays a divergence."""
    normalization: Literal["row", "token"] = "token"
    """Mean over rows of the row mean (the paper), or mean over all supervised positions."""
    ar_weight: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """sdar: weight of an additional autoregressive loss: the divergence from the teacher at every token of
    the clean text under a causal mask. It takes one more forward pass.
    """


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class OptimizerSection:
    name: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw is torch's, fused. adamw8bit keeps its moments in 8 bits (bitsandbytes: 'opdlm[quant]')."""
    learning_rate: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] = 1e-5
    """Peak learning rate."""
    min_learning_rate_ratio: Share = 0.1
    """The cosine ends at this share of the peak."""
    warmup_steps: Steps = 0
    """Optimiser updates of linear warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """AdamW."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class LoopSection:
    """Settings of every training."""

    num_steps: Annotated[int, Field(ge=1, le=10**6)] = 100
    """Rollout steps. Each generates responses, then makes the updates below."""
    rows_per_update: Count = 8
    """Rollouts per optimiser update, over all devices."""
    micro_batch_rows: Count = 8
    """Rollouts per forward and backward on one device, counted at the length of the update's longest; shorter
    ones are packed. It changes memory, not results.
    """
    ema_decay: Decay | None = None
    """Write the exponential moving average of the weights with this decay; None = the last weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    gradient_checkpointing_every: Count = 1
    """With gradient_checkpointing: recompute every n-th layer; the others keep their activations."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 runs the forward under autocast."""
    seed: Annotated[int, Field(ge=-(10**12), le=10**12)] = 0
    """Every random draw is a function of (seed, step, prompt), whatever the number of devices."""
    save_every: Count = 50
    """Steps between checkpoints."""
    save_total_limit: Count = 2
    """Older checkpoints are deleted."""
    resume_from_checkpoint: bool = True
    """Continue the run found in output_dir, interrupted or to a larger num_steps; false starts over and
    deletes its checkpoints.
    """
    time_limit: Annotated[str, Field(pattern=DURATION)] = ""
    """Stop with a checkpoint before the command has run for so long: seconds, or 90m, 2h30m, 1d. The same
    command continues. One step is always made, and the measurement at the end is not limited. Empty or 0: no
    limit.
    """
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers beside metrics.jsonl: tensorboard, trackio, wandb."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class TrainSection(LoopSection):
    """Training on rollouts."""

    epochs_per_rollout: Annotated[int, Field(ge=1, le=1000)] = 1
    """Passes of a step over its rollouts."""
    max_staleness: Steps = 0
    """Number of later steps that also train on a rollout; 0 = none."""


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class MeasureSection:
    """Measurements during training."""

    every: Steps = 0
    """Evaluate every n training steps, into metrics.jsonl; 0 = only at the end."""
    patience: OptionalCount = None
    """Stop after this many evaluations without improvement; None = never."""
    load_best_model_at_end: bool = False
    """The result is the step that scored best while training, not the last: in a conversion by tokens per
    forward × retention, in training on text by held-out loss. Its checkpoint is kept.
    """


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class EvalSection(MeasureSection):
    path: str = ""
    """Prompts in a form of data.path, optionally with `answer` (one, or a list of accepted ones), `skill`,
    `held_out`. Empty: the prompts that held_back keeps from training.
    """
    held_back: Steps = 32
    """Without path: prompts of the training data, at most an eighth of them, that are not trained on, and
    measured at the end. Some of them also show while training whether the run learns. 0 = none.
    """
    scoring: Literal["exact", "gsm8k", "math", "choice", "code"] = "exact"
    """exact: the whole response equals `answer`. gsm8k: a GSM8K file (`question`, `answer`), the number after
    ####; the last number of the response is scored apart. math: equal as mathematics (math-verify:
    'opdlm[eval]'). choice: names the letter in `answer`. code: its code passes the tests in `answer`.
    """
    run_code: bool = False
    """Allow scoring=code to run what models write: in a process with limits on time, memory and files. It is
    cut off from the network where bubblewrap (`bwrap`) is installed and works.
    """
    modes: tuple[Literal["ar", "static", "threshold", "lossless"], ...] = ()
    """Decodings to measure. Empty: static, threshold and, where the format can do it, lossless."""
    decode: DecodeConfig = Field(default_factory=DecodeConfig)
    seeds: Count = 1
    """At a temperature above 0: number of seeds; mean and spread are reported."""
    thresholds: tuple[float, ...] = ()
    """Confidence thresholds for a plot of accuracy against tokens per forward; each is one more decoding."""
    limit: OptionalCount = None
    """Prompts per skill; None = all."""
    subset: Count = 40
    """Prompts, evenly spaced, whose retention (of the worst mode) is measured during training."""
    timed_prompts: Annotated[int, Field(ge=0, le=10**6)] = 16
    """preserve: prompts on which lossless decoding is timed against AR decoding, one after the other, in the
    report at the end; 0 = no.
    """
    agreement: bool = True
    """Also report the distance of responses and visited states from the teacher."""
    likelihood_samples: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Also report the likelihood of the teacher's responses, the student's as a bound over this many pairs of
    orders; 0 = no.
    """


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class RunConfig:
    """What conversion and text training share."""

    model: ModelSection = Field(default_factory=ModelSection)
    format: FormatSection = Field(default_factory=FormatSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    masking: MaskSection = Field(default_factory=MaskSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    train: LoopSection = Field(default_factory=LoopSection)
    eval: MeasureSection = Field(default_factory=MeasureSection)
    output_dir: str = "runs/opdlm"
    """The model and everything about the run."""

    def to_dict(self) -> dict[str, Any]:
        return plain(asdict(self))

    def flat(self) -> dict[str, Any]:
        """Dotted key -> value."""
        return flat(self.to_dict())

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, slots=True, kw_only=True, config=STRICT)
class Config(RunConfig):
    """A conversion."""

    data: DataSection = Field(default_factory=DataSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    states: StatesSection = Field(default_factory=StatesSection)
    loss: LossSection = Field(default_factory=LossSection)
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalSection = Field(default_factory=EvalSection)


BUNDLED = "bundled:"


def resolve_path(path: str) -> str:
    """`bundled:NAME` is a file or folder that ships inside the package; anything else is itself."""
    if path.startswith(BUNDLED):
        return str(Path(__file__).parent.parent / "bundled" / path.removeprefix(BUNDLED))
    return path


def seconds_of(duration: str) -> float:
    """The seconds of a `DURATION`: 9000 for 2h30m."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1, "": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)(\D?)", duration))


def scheduled(pairs: Sequence[tuple[int, Value]], step: int, default: Value) -> Value:
    """The value of the last pair (first step, value) that has begun; `default` without pairs."""
    return [value for first, value in pairs if first <= step][-1] if pairs else default
