"""What `opdlm generate` and `opdlm rollout` do once their command line is read: load, check, decode; and
`opdlm export`, which fixes how a server will decode.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from opdlm import __version__
from opdlm.checkpoints.convert import plain_decoder
from opdlm.checkpoints.export import export_to_sdar
from opdlm.checkpoints.load import check_fits, load, load_causal_lm, load_tokenizer, read_spec
from opdlm.config.loader import apply_override, build_section
from opdlm.config.rules import check_config
from opdlm.config.sections import Config, DataSection, resolve_path
from opdlm.data.prompts import encode_prompt, encode_rows, load_rows, messages_of
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.generate import OnStep, generate, grid_of
from opdlm.decoding.rollout import Prompt, Rollout, digest_of
from opdlm.decoding.streaming import StablePrefix, StopStrings, Stream, encode_gaps
from opdlm.distill.rollout_file import Engine, decode_resumably, is_finished, write_rollouts
from opdlm.errors import ConfigError
from opdlm.evaluation.generation_log import fingerprint
from opdlm.modeling.compiled import compiled_decoding
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.seeds import seed_of
from opdlm.training.metrics import DecodingProgress
from opdlm.vllm.engine import VllmTeacher, check_vllm, start_teacher
from opdlm.vllm.export import export_to_vllm

BATCHES_PER_PIECE = 4
"""`opdlm rollout` keeps so many batches on disk at a time: rows of one piece make room for each other."""


def check_decoding(options: argparse.Namespace) -> None:
    """The numbers of `add_decoding`."""
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens ({options.max_new_tokens}) must be at least 1.")
    if options.temperature < 0:
        raise ConfigError(f"--temperature ({options.temperature:g}) must be 0 (arg-max) or greater.")
    if not 0 <= options.threshold <= 1:
        raise ConfigError(f"--threshold ({options.threshold:g}) must lie between 0 and 1.")
    if options.top_k is not None and options.top_k < 1:
        raise ConfigError(f"--top-k ({options.top_k}) must be at least 1.")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p ({options.top_p:g}) must lie in (0, 1].")


def decode_config(options: argparse.Namespace, spec: DiffusionSpec, **others: Any) -> DecodeConfig:
    """The settings of a verb, checked against the checkpoint."""
    if options.mode == "lossless" and spec.format == "sdar":
        raise ConfigError(
            "--mode lossless needs a preserve checkpoint; this one is sdar. Use static or threshold."
        )
    if options.denoising_steps is not None and not 1 <= options.denoising_steps <= spec.block_size:
        raise ConfigError(
            f"--denoising-steps ({options.denoising_steps}) must lie between 1 and the block size "
            f"({spec.block_size})."
        )
    return DecodeConfig(
        mode=options.mode,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        denoising_steps=options.denoising_steps,
        confidence_threshold=options.threshold,
        **others,
    )


def check_answering(options: argparse.Namespace) -> None:
    check_decoding(options)
    if not options.prompts and not options.prompts_file:
        raise ConfigError("generate needs a PROMPT, or --prompts-file FILE. See: opdlm generate --help")
    if not all(text.strip() for text in options.prompts):
        raise ConfigError("PROMPT is empty: give some text.")
    if options.ar_accept_threshold is not None and not 0 <= options.ar_accept_threshold <= 1:
        raise ConfigError(
            f"--ar-accept-threshold ({options.ar_accept_threshold:g}) must lie between 0 and 1."
        )
    if not all(options.stop):
        raise ConfigError("--stop is empty: give the text that ends a response.")
    if options.stream and options.json:
        raise ConfigError("--stream shows text as it comes, and --json whole answers: choose one.")
    if options.infill and options.stop:
        raise ConfigError("--stop ends a response, and --infill keeps the text after a gap: choose one.")
    if options.infill and options.mode in ("ar", "lossless"):
        raise ConfigError(
            f"--infill with --mode {options.mode}, which writes from left to right and would cut off what "
            "follows a gap: use threshold, static, entropy or left_to_right."
        )
    if options.infill and options.ar_accept_threshold:
        raise ConfigError(
            f"--infill with --ar-accept-threshold {options.ar_accept_threshold:g}: a rejected token "
            "masks all that follows, the text after the gap too. Leave --ar-accept-threshold out."
        )


def answer_prompts(options: argparse.Namespace) -> int:
    """`opdlm generate`."""
    check_answering(options)
    model, tokenizer = load_decoder(options.folder, options.mode, options.dtype)
    if options.infill:  # what ends a response would cut off the text after the gap
        banned = (*model.spec.banned_token_ids, *model.spec.stop_token_ids)
        model.spec = replace(model.spec, banned_token_ids=banned)
    ar_accept_threshold = 0.0 if options.infill else options.ar_accept_threshold
    chosen = {} if ar_accept_threshold is None else {"ar_accept_threshold": ar_accept_threshold}
    config = decode_config(options, model.spec, logprobs=options.logprobs, **chosen)
    texts, prompts = read_prompts(options, model, tokenizer)
    stops = StopStrings(tokenizer, tuple(options.stop))
    seeds = [seed_of(options.seed, place) for place in range(len(prompts))]
    find_end = stops.find_end if stops.strings else None
    if options.stream:
        rollouts = [
            stream(model, ids, config, seed, stops, infill=options.infill)
            for ids, seed in zip(prompts, seeds, strict=True)
        ]
    else:
        rollouts = generate(model, prompts, config, seeds, find_end=find_end)
    for text, rollout in zip(texts, rollouts, strict=True):
        show(text, rollout, stops, options)
    stats = DecodeStats.of(rollouts)
    print(
        f"{stats.num_tokens} tokens in {stats.num_forwards} forwards, "
        f"{stats.tokens_per_forward:.2f} per forward",
        file=sys.stderr,
    )
    return 0


def read_prompts(
    options: argparse.Namespace, model: DiffusionLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[list[int]]]:
    """Prompts as the user wrote them, and as token ids."""
    conversations = [[{"role": "user", "content": text}] for text in options.prompts]
    if options.prompts_file:
        rows = load_rows(DataSection(path=options.prompts_file))
        conversations += [messages_of(place, row, "") for place, row in rows]
    texts, spec = [messages[-1]["content"] for messages in conversations], model.spec
    if any(spec.mask_token_id in tokenizer(text)["input_ids"] for text in texts):
        raise ConfigError("PROMPT contains the mask token, which stands for unknown text: remove it.")
    if options.infill:
        prompts = [encode_gaps(tokenizer, text, spec.mask_token_id, spec.block_size) for text in texts]
        check_fits(model, prompts, 0, "--max-new-tokens")
    else:
        prompts = [encode_prompt(tokenizer, messages) for messages in conversations]
        check_fits(model, prompts, options.max_new_tokens, "--max-new-tokens")
    return texts, prompts


def stream(
    model: DiffusionLM,
    ids: list[int],
    config: DecodeConfig,
    seed: int,
    stops: StopStrings,
    *,
    infill: bool = False,
) -> Rollout:
    """Answer one prompt, or fill its gaps, in sight of the user."""
    shown = range(len(ids)) if infill else range(len(ids), len(ids) + config.max_new_tokens)
    stable_prefix = StablePrefix(stops, model.spec, grid_of(config.mode, model.spec), shown)
    find_end = stops.find_end if stops.strings else None
    with Stream(stable_prefix, Console(highlight=False)) as view:
        (rollout,) = generate(model, [ids], config, [seed], view.on_step, find_end)
        view.finish(rollout)
    return rollout


def show(text: str, rollout: Rollout, stops: StopStrings, options: argparse.Namespace) -> None:
    """One answer on stdout: text, or a line of JSON; then its tokens with their log-probabilities."""
    ids = rollout.prompt_ids + rollout.text_ids if options.infill else rollout.text_ids
    response = stops.cut(stops.text(ids))
    if options.json:
        record = {
            "prompt": text,
            "response": response,
            "finish_reason": rollout.finish_reason,
            "token_ids": rollout.text_ids,
            "unmask_step": rollout.unmask_step[: rollout.num_response],
            "num_forwards": rollout.num_forwards,
            "num_steps": rollout.num_steps,
        }
        record |= {"logprobs": rollout.logprobs} if options.logprobs else {}
        print(json.dumps(record, ensure_ascii=False))
        return
    if not options.stream:
        print(response)
    for token, step, logprob in zip(rollout.text_ids, rollout.unmask_step, rollout.logprobs, strict=False):
        if step:  # 0: the user's own text around a gap
            print(f"{logprob:9.4f}  {stops.tokenizer.decode([token])!r}")


def check_recording(options: argparse.Namespace) -> None:
    check_decoding(options)
    for name in ("batch_size", "limit"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be at least 1.")
    if options.engine == "vllm":
        check_vllm("--engine vllm")
        if options.compile:
            raise ConfigError("--compile is for our own decoder: leave it out with --engine vllm.")
        if options.mode != "ar":
            raise ConfigError(
                f"--engine vllm with --mode {options.mode}: vLLM decodes the autoregressive model here. Use "
                "--mode ar, or --engine own."
            )


def record_rollouts(options: argparse.Namespace) -> int:
    """`opdlm rollout`."""
    check_recording(options)
    section = data_section(options)
    model, tokenizer = load_decoder(options.model, options.mode, options.dtype)
    config = decode_config(
        options, model.spec, batch_size=options.batch_size, ar_accept_threshold=0.0, logprobs=True
    )
    rows = load_rows(section)
    prompts = encode_rows(rows, tokenizer, section=section, mask_token_id=model.spec.mask_token_id)
    check_fits(model, [prompt.ids for prompt in prompts], options.max_new_tokens, "--max-new-tokens")
    settings, out, console = settings_of(options, model, prompts, config), Path(options.out), Console()
    if is_finished(out, settings):
        console.print(f"{out} is finished already: {len(prompts)} rollouts", soft_wrap=True)
        return 0
    engine = start_engine(options, model, prompts) if options.engine == "vllm" else None
    with compiled_decoding(model, options.compile), DecodingProgress(len(prompts), console) as progress:
        rollouts = decode_resumably(
            out,
            prompts,
            [seed_of(options.seed, prompt.index) for prompt in prompts],
            own_engine(model, config, progress.on_step)
            if engine is None
            else lambda ids, seeds: engine.responses(ids, config, seeds),
            settings,
            piece_size=BATCHES_PER_PIECE * options.batch_size,
            on_piece=progress.on_piece,
        )
    texts = [messages_of(*rows[prompt.index], "", section.prompt_column)[-1]["content"] for prompt in prompts]
    write_rollouts(out, texts, rollouts, tokenizer, settings)
    stats = DecodeStats.of(rollouts)
    console.print(
        f"rollouts: {out} ({len(rollouts)} responses, {stats.num_tokens} tokens, "
        f"{stats.tokens_per_forward:.2f} per forward)",
        soft_wrap=True,
    )
    return 0


def own_engine(model: DiffusionLM, config: DecodeConfig, on_step: OnStep) -> Engine:
    """This package's decode loop."""
    return lambda prompts, seeds: generate(model, prompts, config, seeds, on_step)


def start_engine(options: argparse.Namespace, model: DiffusionLM, prompts: Sequence[Prompt]) -> VllmTeacher:
    """vLLM with the checkpoint as the autoregressive model that it is."""
    return start_teacher(
        options.model,
        model.student.config,
        model.spec,
        dtype=options.dtype,
        max_rows=options.batch_size,
        max_tokens=max(len(prompt.ids) for prompt in prompts) + options.max_new_tokens,
    )


def data_section(options: argparse.Namespace) -> DataSection:
    """Where the prompts come from, with other `data.*` keys."""
    values: dict[str, Any] = {"data": asdict(DataSection())}
    for override in options.overrides:
        if not override.startswith("data."):
            raise ConfigError(
                f"{override}: only data.* keys matter here, for example data.prompt_column=text."
            )
        apply_override(values, override)
    values["data"]["path"] = options.source
    config = build_section(Config, values)
    check_config(config)
    limit = config.data.limit if options.limit is None else options.limit
    return replace(config.data, limit=limit)


def load_decoder(model: str, mode: str, dtype: str = "float32") -> tuple[DiffusionLM, Any]:
    """A converted folder, or (mode ar) a checkpoint as it is, on the GPU if there is one."""
    path, device = resolve_path(model), str(PartialState().device)
    if is_converted(Path(path)):
        return load(path, dtype, device)
    tokenizer = load_tokenizer(path)
    if mode != "ar":
        raise ConfigError(
            f"--mode {mode} needs a diffusion model, and {model} is not a folder written by opdlm convert: "
            "give one, or use --mode ar."
        )
    return plain_decoder(load_causal_lm(path, dtype), tokenizer).to(device), tokenizer


def is_converted(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "block_diffusion" in config.read_text()


def settings_of(
    options: argparse.Namespace, model: DiffusionLM, prompts: Sequence[Prompt], config: DecodeConfig
) -> dict[str, Any]:
    """Everything that decides what is in the file."""
    path = resolve_path(options.model)
    return {
        "opdlm": __version__,
        "model": str(Path(path).resolve()) if Path(path).is_dir() else path,
        "checkpoint": fingerprint(path),
        "prompts": digest_of(prompt.ids for prompt in prompts),
        "engine": options.engine,
        "compile": options.compile,
        "dtype": options.dtype,
        "seed": options.seed,
        "block_size": model.spec.block_size,
        "grid": model.spec.grid,
    } | asdict(config)


def export_folder(options: argparse.Namespace) -> int:
    """`opdlm export`."""
    check_decoding(options)
    folder, out = Path(options.folder), Path(options.out)
    if options.to == "vllm":
        export_to_vllm(folder, out, decode_config(options, read_spec(folder)))
        command = f"vllm serve {out}"
    else:
        given = [name for name, value in options.defaults.items() if getattr(options, name) != value]
        if given:
            raise ConfigError(
                f"--{given[0].replace('_', '-')} has no effect with --to sdar, whose engines decide how "
                "tokens are chosen: leave it out."
            )
        export_to_sdar(folder, out)
        size = read_spec(folder).block_size
        command = f"lmdeploy serve api_server {out} --trust-remote-code --dllm-block-length {size}"
        if size == 4:  # the one that SGLang knows
            command += (
                f", or python -m sglang.launch_server --model-path {out} --trust-remote-code "
                "--dllm-algorithm LowConfidence"
            )
    print(f"exported checkpoint: {out}\nserve it: {command}")
    return 0
