"""Settings from a recipe and the command line, and the rules they must keep, within a key and across keys.

Defaults < recipe < command line. Every broken rule is one ConfigError that names key, value, rule and fix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdlm.config.loader import build_section, plain, read_settings
from opdlm.config.schedules import FROM_TEACHER
from opdlm.config.sections import Config, MaskSection, RunConfig
from opdlm.decoding.decode_config import READ_BY
from opdlm.errors import ConfigError


def load_config(recipe: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the recipe, then `section.key=value` strings; checked as a whole."""
    config = build_section(Config, read_settings(recipe, overrides))
    check_config(config)
    return config


def check_config(config: Config) -> None:
    """Rules across keys. Raises ConfigError for the first that does not hold."""
    check_schedule("format.block_growth", config.format.block_growth, "format.block_size", config)
    check_schedule("states.selection_schedule", config.states.selection_schedule, "states.selection", config)
    check_schedule("loss.divergence_schedule", config.loss.divergence_schedule, "loss.divergence", config)
    check_curricula(config)
    check_masking(config)
    check_draft(config)
    check_noise(config)
    check_decode_groups(config)
    rollout = config.rollout
    b = min([size for _, size in config.format.block_growth], default=config.format.block_size)
    if rollout.decode.denoising_steps is not None and rollout.decode.denoising_steps > b:
        raise ConfigError(
            f"rollout.decode.denoising_steps ({rollout.decode.denoising_steps}) exceeds format.block_size "
            f"({b}): each step reveals at least one token, so use at most block_size steps."
        )
    if rollout.start_new_tokens is not None and rollout.start_new_tokens > rollout.decode.max_new_tokens:
        raise ConfigError(
            f"rollout.start_new_tokens ({rollout.start_new_tokens}) exceeds rollout.decode.max_new_tokens "
            f"({rollout.decode.max_new_tokens}): the curriculum only grows. Lower the start."
        )
    if config.train.rows_per_update > rollout.prompts_per_step:
        raise ConfigError(
            f"train.rows_per_update ({config.train.rows_per_update}) exceeds rollout.prompts_per_step "
            f"({rollout.prompts_per_step}): an update uses the rollouts of one step. Lower rows_per_update."
        )
    if rollout.prompts_per_step % config.train.rows_per_update:
        raise ConfigError(
            f"rollout.prompts_per_step ({rollout.prompts_per_step}) is not a multiple of "
            f"train.rows_per_update ({config.train.rows_per_update}): the rows of the last, smaller "
            "update would count for more."
        )
    if config.loss.ar_weight and config.format.name == "preserve":
        raise ConfigError(
            f"loss.ar_weight ({config.loss.ar_weight:g}) has nothing to keep with format.name=preserve, "
            "whose autoregressive mode is the teacher: leave it out, or use format.name=sdar."
        )
    for key in ("reverse_weight", "variation_weight"):
        if lookup(config, f"loss.{key}") and {
            config.loss.divergence,
            *dict(config.loss.divergence_schedule).values(),
        } != {"forward_kl"}:
            raise ConfigError(
                f"loss.{key} ({lookup(config, f'loss.{key}')}) is mixed into forward_kl only: set "
                "loss.divergence=forward_kl, or leave it out."
            )
    sparse = config.loss.top_k is not None and not config.loss.tail
    if sparse and config.loss.divergence == "reverse_kl":
        raise ConfigError(
            "loss.divergence (reverse_kl) with loss.top_k and loss.tail=false has a degenerate optimum: "
            "set loss.tail=true or use forward_kl."
        )
    if config.format.name == "preserve" and b < 2:
        raise ConfigError("format.block_size (1) leaves preserve nothing to draft: use at least 2.")
    check_evaluation(config)
    check_adapter(config)
    check_recorded(config)
    check_asynchronous(config)
    check_compile(config)
    check_engine(config)


ONLY_LOSSLESS = "it is for rollout.decode.mode=lossless"
WITHOUT_EFFECT = {
    "eval.decode.mode": "eval.modes lists the modes",
    **{
        f"{name}.decode.entropy_bound": "mode entropy is for `opdlm generate`" for name in ("eval", "rollout")
    },
    **{f"{name}.decode.logprobs": "`opdlm generate --logprobs` shows them" for name in ("eval", "rollout")},
    **{f"rollout.decode.{key}": ONLY_LOSSLESS for key, modes in READ_BY.items() if modes == ("lossless",)},
}
"""Settings of a decode group that the section does not read, and why."""


def check_decode_groups(config: Config) -> None:
    """A setting that would not be read is refused."""
    given, defaults = config.flat(), Config().flat()
    for key, reason in WITHOUT_EFFECT.items():
        is_read = reason == ONLY_LOSSLESS and config.rollout.decode.mode == "lossless"
        if given[key] != defaults[key] and not is_read:
            raise ConfigError(f"{key} ({given[key]}) has no effect: {reason}. Leave it out.")


def check_draft(config: Config) -> None:
    """What belongs to the objective draft, and what lossless rollouts need."""
    loss, given, defaults = config.loss, config.flat(), Config().flat()
    if loss.objective == "draft" and config.format.name != "preserve":
        raise ConfigError(
            "loss.objective (draft) trains drafts that the AR weights verify, and format.name is sdar, which "
            "changes them: use format.name=preserve, or another objective."
        )
    only = ("states.anchors_per_row", "loss.reach_weights", "format.draft_head")
    never = [key for key in given if key.startswith("masking.") or key.startswith("states.selection")]
    for key in never if loss.objective == "draft" else only:
        if given[key] != defaults[key]:
            raise ConfigError(
                f"{key} ({given[key]}) has no effect with loss.objective={loss.objective}: leave it out."
            )
    if config.rollout.decode.mode == "lossless" and not (
        loss.objective in FROM_TEACHER and config.format.name == "preserve"
    ):
        raise ConfigError(
            "rollout.decode.mode (lossless) writes the teacher's text with drafts that it verifies: use "
            f"format.name=preserve and one of the objectives {', '.join(FROM_TEACHER)}, or mode=threshold."
        )


def check_noise(config: Config) -> None:
    """Uniform noise and causal drafts: where known and unknown tokens are mixed, they mean nothing."""
    if config.format.can_denoise:
        return
    given, defaults = config.flat(), Config().flat()
    key = "format.noise" if config.format.noise == "uniform" else "format.draft_attention"
    if config.format.name != "preserve" or config.loss.objective != "draft":
        raise ConfigError(
            f"{key} ({given[key]}) is for drafts that the AR weights verify: use format.name=preserve and "
            "loss.objective=draft, or leave it out."
        )
    if {"static", "threshold"} & {*config.eval.modes} or config.eval.thresholds:
        raise ConfigError(
            "eval.modes and eval.thresholds ask for decoding without the AR model, which "
            f"{key}={given[key]} cannot do: set eval.modes=[lossless] and eval.thresholds=[]."
        )
    without_effect = {"eval.likelihood_samples": "the bound takes masks in any order"}
    if config.format.noise == "uniform":
        reason = "no token is masked with format.noise=uniform"
        without_effect |= {"format.mask_init": reason, "format.mask_token": reason}
    for name, reason in without_effect.items():
        if given[name] != defaults[name]:
            raise ConfigError(f"{name} ({given[name]}) cannot be used here: {reason}. Leave it out.")


def check_evaluation(config: Config) -> None:
    """Rules between the settings of the measurement."""
    if config.eval.scoring == "code" and not config.eval.run_code:
        raise ConfigError(
            "eval.scoring (code) runs what models write on this machine: set eval.run_code=true if you want "
            "that, preferably in a container or with bubblewrap (bwrap) installed."
        )
    if config.format.name == "sdar" and "lossless" in config.eval.modes:
        raise ConfigError(
            "eval.modes contains lossless, but format.name is sdar, which changes the AR weights and cannot "
            "verify: drop lossless or use format.name=preserve."
        )
    decode = config.eval.decode
    is_sampled = config.format.name == "preserve" and "lossless" in (config.eval.modes or ["lossless"])
    if decode.draft_sampling != "shared_noise" and not (is_sampled and decode.temperature):
        raise ConfigError(
            f"eval.decode.draft_sampling ({decode.draft_sampling}) has no effect: it is for mode lossless at "
            "eval.decode.temperature above 0. Leave it out."
        )
    if config.eval.likelihood_samples == 1:
        raise ConfigError(
            "eval.likelihood_samples (1) leaves the error of the bound unknown: use 0 (off) or at least 2."
        )
    if config.eval.seeds > 1 and not config.eval.decode.temperature:
        raise ConfigError(
            f"eval.seeds ({config.eval.seeds}) repeats what is always the same: eval.decode.temperature is "
            "0, which draws nothing. Use one seed, or a temperature above 0."
        )
    if config.eval.every and not config.eval.path:
        raise ConfigError(
            f"eval.every ({config.eval.every}) measures during training, but eval.path is empty: give a file "
            "of evaluation prompts, or set eval.every=0."
        )
    if config.eval.patience is not None and not config.eval.every:
        raise ConfigError(
            f"eval.patience ({config.eval.patience}) counts measurements during training, but eval.every is "
            "0: set it to a number of steps."
        )
    holds_back = config.eval.held_back and not config.eval.path
    if config.eval.load_best_model_at_end and not (config.eval.every or holds_back):
        raise ConfigError(
            "eval.load_best_model_at_end (true) chooses by measurements during training, and there are none: "
            "set eval.every to a number of steps, or leave eval.path empty and eval.held_back above 0."
        )
    if any(not 0 <= threshold <= 1 for threshold in config.eval.thresholds):
        raise ConfigError(f"eval.thresholds ({config.eval.thresholds}) must lie between 0 and 1.")


def check_recorded(config: Config) -> None:
    """What generates has nothing to do where rollouts come from a file."""
    for key in ("rollout.warm_start_steps", "data.self_prompts"):
        if config.rollout.path and lookup(config, key):
            raise ConfigError(
                f"{key} ({lookup(config, key)}) generates, and rollout.path ({config.rollout.path}) takes "
                f"prompts and rollouts from a file: set {key}=0."
            )


def check_asynchronous(config: Config) -> None:
    """Our decoder generates while the student trains."""
    if not config.rollout.asynchronous:
        return
    if config.rollout.path:
        raise ConfigError(
            f"rollout.asynchronous (true) generates nothing: rollout.path ({config.rollout.path}) gives "
            "the rollouts. Set rollout.asynchronous=false."
        )
    if config.rollout.engine != "own":
        raise ConfigError(
            f"rollout.asynchronous (true) generates in a thread beside training, and rollout.engine "
            f"({config.rollout.engine}) is used between updates only: use rollout.engine=own, or "
            "rollout.asynchronous=false."
        )


def check_compile(config: Config) -> None:
    """Our decoder generates, in this run, with layers that torch.compile can trace."""
    section = config.rollout
    if section.compile and config.lora.enabled and config.lora.use_dora:
        raise ConfigError(
            "rollout.compile (true) cannot trace PEFT's DoRA (lora.use_dora=true): set rollout.compile=false."
        )
    for key, value in (("engine", section.engine != "own" and section.engine), ("path", section.path)):
        if section.compile and value:
            raise ConfigError(
                f"rollout.compile (true) is for our own decoder, and rollout.{key} ({value}) lets another "
                "one generate: set rollout.compile=false."
            )


def check_engine(config: Config) -> None:
    """vLLM runs the teacher from its checkpoint folder, and the student with the weights of each step."""
    if config.rollout.engine == "own":
        return
    if config.rollout.path:
        raise ConfigError(
            f"rollout.engine (vllm) has nothing to generate: rollout.path ({config.rollout.path}) gives the "
            "rollouts. Set rollout.engine=own."
        )
    asks_teacher = config.loss.objective in FROM_TEACHER or config.rollout.warm_start_steps > 0
    if config.rollout.decode.temperature > 2 and asks_teacher:
        raise ConfigError(
            f"rollout.decode.temperature ({config.rollout.decode.temperature}) must not exceed 2 with "
            "rollout.engine=vllm: vLLM refuses it. Use rollout.engine=own."
        )
    if config.model.load_in_4bit:
        raise ConfigError(
            "rollout.engine (vllm) runs the teacher in model.dtype, but model.load_in_4bit makes it 4-bit: "
            "the responses would be another model's. Use rollout.engine=own."
        )


LORA_INITS = ("default", "gaussian", "orthogonal")


def check_adapter(config: RunConfig) -> None:
    """Rules between the adapter, the frozen base under it and the optimiser."""
    lora, in_4bit = config.lora, config.model.load_in_4bit
    if lora.init not in LORA_INITS:
        raise ConfigError(
            f"lora.init ({lora.init!r}) must be one of {', '.join(LORA_INITS)}: others (pissa, olora, loftq) "
            "rewrite the base weights, which are the teacher, or need data of their own (eva, corda)."
        )
    if lora.init == "orthogonal" and (lora.r % 2 or in_4bit):
        raise ConfigError(
            f"lora.init (orthogonal) needs an even lora.r ({lora.r}) and model.load_in_4bit=false "
            f"({str(in_4bit).lower()}): use lora.init=default."
        )
    if in_4bit and not lora.enabled:
        raise ConfigError(
            "model.load_in_4bit (true) freezes the weights, and lora.enabled=false trains them: set "
            "lora.enabled=true."
        )
    if in_4bit and lora.use_dora:
        raise ConfigError(
            "lora.use_dora (true) measures rows of the base weights, which model.load_in_4bit packs away: "
            "set one of the two to false."
        )


def check_schedule(name: str, pairs: Sequence[tuple[int, Any]], final: str, config: RunConfig) -> None:
    """Pairs (first step, value) start at step 0, rise, reach the final value, and each gets its turn."""
    if not pairs:
        return
    steps, value = [step for step, _ in pairs], lookup(config, final)
    if steps[0] != 0 or any(left >= right for left, right in itertools.pairwise(steps)):
        raise ConfigError(f"{name} has the first steps {steps}: start with 0 and let them rise.")
    if pairs[-1][1] != value:
        raise ConfigError(
            f"{name} ends with {plain(pairs[-1][1])}, but {final} is {plain(value)}, which the result has: "
            "make them equal."
        )
    if steps[-1] >= config.train.num_steps:
        raise ConfigError(
            f"{name} reaches {value} at step {steps[-1]}, but train.num_steps is {config.train.num_steps}: "
            "it would never be trained. Start it earlier."
        )


def check_curricula(config: Config) -> None:
    """Blocks grow."""
    sizes = [size for _, size in config.format.block_growth]
    if any(not 0 < left < right for left, right in itertools.pairwise(sizes)):
        raise ConfigError(f"format.block_growth has the block sizes {sizes}: they must be positive and grow.")


def check_masking(config: RunConfig) -> None:
    """Windows are ranges of probabilities, their weights fit, and every token has a probability."""
    masking = config.masking
    check_schedule("masking.schedule", masking.schedule, "masking.windows", config)
    for windows in (masking.windows, *(windows for _, windows in masking.schedule)):
        check_windows(masking, ((0.0, 1.0),) if windows == "auto" else windows)
    if any(not 0 < weight < math.inf for weight in masking.window_weights):
        raise ConfigError(
            f"masking.window_weights ({plain(masking.window_weights)}) must be positive: leave a window out "
            "instead."
        )
    rates = masking.position_rates
    if rates and (len(rates) < 2 or max(rates) == 0 or any(not 0 <= rate < math.inf for rate in rates)):
        raise ConfigError(
            f"masking.position_rates ({plain(rates)}) must be at least two multipliers, none negative and "
            "one above 0, for example [0.5, 1.5]."
        )
    if masking.sampler == "exact" and (rates or masking.always_mask):
        key = "position_rates" if rates else "always_mask"
        raise ConfigError(
            f"masking.{key} ({plain(getattr(masking, key))}) gives each token its own probability, and "
            "masking.sampler (exact) gives all the same: use masking.sampler=bernoulli."
        )


def check_windows(masking: MaskSection, windows: tuple[tuple[float, float], ...]) -> None:
    if not windows or any(not 0 <= low <= high <= 1 for low, high in windows):
        raise ConfigError(
            f"masking.windows ({plain(windows)}) must be ranges with 0 <= lower end <= upper end <= 1, for "
            "example [[0.45, 0.55]]."
        )
    if max(high for _, high in windows) == 0 and not masking.floor and not masking.always_mask:
        raise ConfigError(
            f"masking.windows ({plain(windows)}) masks nothing: raise an upper end, or set "
            "masking.always_mask."
        )
    if masking.window_weights and len(masking.window_weights) != len(windows):
        raise ConfigError(
            f"masking.window_weights has {len(masking.window_weights)} numbers for {len(windows)} windows "
            f"({plain(windows)}): give one for each."
        )


def lookup(config: RunConfig, dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value
