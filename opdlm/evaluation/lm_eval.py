"""Converted checkpoints in lm-evaluation-harness: generation by `generate`, likelihoods exact or as bounds.

`ar` and `lossless` score text with the AR model's exact likelihood, `static` and `threshold` with the
diffusion bound (`likelihood.nll_bound`); in these modes a continuation is greedy if decoding returns it.
Tokenisation, chat templates, batching and stop strings are those of the harness's Hugging Face class, so
scores are comparable with `lm_eval --model hf`. So is the truncation of long contexts from the left; in
`static` and `threshold` two blocks less fit. Needs the extra `eval`. The harness's own command,
with this model registered:

    python -m opdlm.evaluation.lm_eval run --model opdlm --model_args pretrained=DIR,mode=threshold
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from opdlm.checkpoints.load import check_decode, load, max_total_tokens, read_spec
from opdlm.config.sections import Config
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.generate import generate
from opdlm.errors import ConfigError
from opdlm.evaluation.likelihood import nll_bound
from opdlm.files import write_atomic
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.slots import clean_slots
from opdlm.objectives.states import text_to_rollout
from opdlm.seeds import generator_for

MODES: tuple[Mode, ...] = ("ar", "static", "threshold", "lossless")
SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "attention_mask"}
DEFAULT_SAMPLES = 16
"""Pairs of orders in a likelihood bound."""
FROM_TASKS = ("mode", "max_new_tokens", "temperature", "top_k", "top_p", "logprobs")
"""Decode settings that are the task's, or have no meaning for it."""
READ = ("modes", "limit", "likelihood_samples")
"""Settings `eval.NAME` that a run of tasks reads, beside those of decoding."""


@functools.cache
def harness_class() -> type:
    """The model class, defined here because lm_eval is optional. ConfigError if it is not installed."""
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install 'opdlm[eval]'.") from error

    @register_model("opdlm")
    class OpdlmLM(HFLM):
        """A converted folder in one decoding mode."""

        def __init__(
            self,
            pretrained: str,
            mode: Mode = "threshold",
            batch_size: int = 1,
            dtype: str = "auto",
            confidence_threshold: float | None = None,
            ar_accept_threshold: float | None = None,
            likelihood_samples: int = DEFAULT_SAMPLES,
            seed: int = 0,
            decode: DecodeConfig | None = None,
            **options: Any,
        ) -> None:
            self.diffusion, tokenizer = load(pretrained, dtype, str(PartialState().device))
            self.decoding = mode_settings(
                self.diffusion, mode, decode or DecodeConfig(), confidence_threshold, ar_accept_threshold
            )
            self.likelihood_samples, self.seed = likelihood_samples, seed
            super().__init__(
                pretrained=self.diffusion.student, tokenizer=tokenizer, batch_size=batch_size, **options
            )

        def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
            lengths_B = torch.full((len(inps),), inps.shape[1], device=inps.device)
            text = clean_slots(inps, lengths_B, lengths_B, self.diffusion.spec.block_grid, "preserve")
            hidden_BLH = self.diffusion.teacher_hidden(text)
            return self.diffusion.logits(hidden_BLH, torch.ones_like(inps, dtype=torch.bool))

        def _model_generate(
            self, context: Tensor, max_length: int, stop: list[str], **settings: Any
        ) -> Tensor:
            prompts = unpadded(context, settings["attention_mask"])
            config = with_sampling(self.decoding, settings, max_length - context.shape[1])
            rng = generator_for(self.seed, device=self.diffusion.device)
            rollouts = generate(self.diffusion, prompts, config, rng)
            width = max(rollout.num_response for rollout in rollouts)
            pad = self.tokenizer.eos_token_id
            rows = [[*r.text_ids, *[pad] * (width - r.num_response)] for r in rollouts]
            return torch.cat([context, torch.tensor(rows, device=context.device)], 1)

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], *arguments: Any, **options: Any
        ) -> list[tuple[float, bool]]:
            if self.decoding.mode in ("ar", "lossless"):
                return super()._loglikelihood_tokens(requests, *arguments, **options)
            pairs = [(context, continuation) for _, context, continuation in requests]
            size = int(self.batch_size)
            batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]
            return [score for batch in batches for score in self._bounds(batch)]

        def _bounds(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            """(lower bound on the log-likelihood, whether decoding returns the continuation) of each pair."""
            longest = max(len(text) for _, text in pairs)
            room = max_total_tokens(self.diffusion) - longest
            pairs = [(context[-int(max(1, min(room, len(context)))) :], text) for context, text in pairs]
            rows = [text_to_rollout(context, text, self.diffusion.spec) for context, text in pairs]
            bound = nll_bound(self.diffusion, rows, self.likelihood_samples, self.seed)
            decoding = replace(self.decoding, max_new_tokens=longest)
            decoded = generate(self.diffusion, [context for context, _ in pairs], decoding)
            greedy = [
                r.text_ids[: len(text)] == tuple(text) for r, (_, text) in zip(decoded, pairs, strict=True)
            ]
            return list(zip((-bound.nats_B).tolist(), greedy, strict=True))

    return OpdlmLM


def mode_settings(
    model: DiffusionLM,
    mode: Mode,
    decode: DecodeConfig,
    confidence_threshold: float | None,
    ar_accept_threshold: float | None,
) -> DecodeConfig:
    """`decode` in one mode, with the given thresholds. ConfigError if the mode or the checkpoint does not use
    one of these.
    """
    if mode not in MODES:
        raise ConfigError(f"mode ({mode}) must be one of {', '.join(MODES)}.")
    if model.spec.format == "sdar" and mode in ("ar", "lossless"):
        raise ConfigError(
            f"mode {mode} needs a preserve checkpoint; this one is sdar, whose AR model is the original "
            "checkpoint: measure that with lm_eval --model hf."
        )
    given = {"confidence_threshold": confidence_threshold, "ar_accept_threshold": ar_accept_threshold}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if confidence_threshold is not None and mode != "threshold":
        raise ConfigError(f"confidence_threshold only acts in mode threshold, not {mode}: leave it out.")
    if ar_accept_threshold is not None and (mode in ("ar", "lossless") or model.spec.format == "sdar"):
        raise ConfigError(
            "ar_accept_threshold only acts in modes static and threshold of preserve: leave it out."
        )
    config = replace(decode, mode=mode, **chosen)
    check_decode(config, model.spec)
    return config


def with_sampling(config: DecodeConfig, settings: dict[str, Any], max_new_tokens: int) -> DecodeConfig:
    """`config` with the generation settings of a task. ConfigError for settings without a counterpart."""
    unknown = sorted(set(settings) - SAMPLING)
    if unknown:
        raise ConfigError(f"generation settings {', '.join(unknown)} have no counterpart here: remove them.")
    is_greedy = not settings.get("do_sample", False)
    return replace(
        config,
        max_new_tokens=max_new_tokens,
        temperature=0.0 if is_greedy else settings.get("temperature", 1.0),
        top_k=None if is_greedy else settings.get("top_k"),
        top_p=None if is_greedy else settings.get("top_p"),
    )


def unpadded(context_BL: Tensor, kept_BL: Tensor) -> list[list[int]]:
    """The token ids of each row without padding."""
    return [row[kept.bool()].tolist() for row, kept in zip(context_BL, kept_BL, strict=True)]


def run_tasks(
    folder: str,
    tasks: Sequence[str],
    modes: Sequence[Mode],
    *,
    include_path: str | None = None,
    model_options: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Results of the harness: {mode: {task: {metric: value}}}. `model_options` are arguments of its model,
    `options` are passed to `simple_evaluate`.

    ConfigError if lm_eval or a task is missing.
    """
    model_class = harness_class()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    known = set(manager.all_tasks)
    missing = [task for task in tasks if task not in known]
    if missing:
        raise ConfigError(
            f"--tasks: no task is called {', '.join(missing)}. Give --include-path FOLDER of YAML."
        )
    results: dict[str, Any] = {}
    for mode in modes:
        model = model_class(pretrained=folder, mode=mode, **(model_options or {}))
        evaluated = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **options)
        assert evaluated is not None  # None on other ranks only
        results[mode] = evaluated["results"]
    return results


def evaluate_tasks(
    folder: Path,
    config: Config,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
    out: Path | None = None,
) -> dict[str, Any]:
    """Results per mode of a converted folder (`run_tasks`), in the modes of `eval.modes` or all that the
    format has; written to lm_eval.json in `out`, with the settings that acted.
    """
    modes: tuple[Mode, ...] = config.eval.modes
    if not modes:
        spec = read_spec(folder)
        modes = ("ar",) if spec.format == "preserve" else ()
        modes = (*modes, "static", "threshold") if spec.can_denoise else modes
    decode = config.eval.decode
    samples = {"likelihood_samples": config.eval.likelihood_samples or DEFAULT_SAMPLES}
    asked: dict[str, Any] = {"num_fewshot": num_fewshot, "apply_chat_template": chat_template}
    asked |= {"limit": config.eval.limit}
    results = run_tasks(
        str(folder),
        tasks,
        modes,
        include_path=include_path,
        model_options={"batch_size": decode.batch_size, "decode": decode} | samples,
        **asked,
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        acted = {name: value for name, value in asdict(decode).items() if name not in FROM_TASKS}
        settings = asked | samples | {"modes": modes, "decode": acted}
        record = {"folder": str(folder), "settings": settings, "results": results}
        write_atomic(out / "lm_eval.json", json.dumps(record, indent=2, default=str))
    return results


def check_overrides(overrides: Sequence[str]) -> None:
    """ConfigError for an override of a setting that tasks do not read."""
    decoding = {field.name for field in fields(DecodeConfig)} - set(FROM_TASKS)
    read = {f"eval.{name}" for name in READ} | {f"eval.decode.{name}" for name in decoding}
    for name in (override.partition("=")[0] for override in overrides):
        if name not in read:
            raise ConfigError(f"{name} has no effect with --tasks: leave it out. Tasks bring their own.")


def main() -> None:
    """The harness's own command line."""
    harness_class()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
