"""Rollouts of a whole file of prompts, written to Parquet: what `opdlm rollout` does.

Loads model and prompts, decodes them in pieces (`rollout_file` keeps what is finished) and writes the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from opdlm import __version__
from opdlm.checkpoints.convert import load_decoder
from opdlm.checkpoints.load import check_decode, check_fits
from opdlm.config.rules import load_config
from opdlm.config.sections import DataSection, resolve_path
from opdlm.data.messages import conversation_of
from opdlm.data.prompts import encode_rows, load_rows
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import DecodeStats
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Prompt, Rollout, digest_of
from opdlm.distill.rollout_file import decode_resumably, is_finished, recorded_date, write_rollouts
from opdlm.errors import ConfigError
from opdlm.evaluation.generation_log import BATCHES_PER_PIECE, fingerprint
from opdlm.modeling.compiled import compiled_decoding
from opdlm.modeling.diffusion_lm import DiffusionSpec
from opdlm.seeds import seed_of
from opdlm.training.metrics import PhaseProgress
from opdlm.vllm.engine import check_vllm, start_ar_model


def record_rollouts(
    model_path: str,
    prompts_path: str,
    out: Path,
    config: DecodeConfig,
    *,
    engine: Literal["own", "vllm"],
    seed: int,
    limit: int | None,
    dtype: str,
    compiles: bool,
    overrides: Sequence[str],
    console: Console,
) -> Path:
    """Answer every prompt and write the file; `opdlm.rollout` documents the arguments."""
    if engine == "vllm":
        check_vllm_engine(config, compiles)
    section = data_section(prompts_path, limit, overrides)
    section = replace(section, date=section.date or recorded_date(out))  # as before midnight
    model, tokenizer = load_decoder(model_path, dtype)
    check_decode(config, model.spec)
    if config.draft_sampling != "shared_noise":
        raise ConfigError(
            f"draft_sampling ({config.draft_sampling}) makes responses depend on the rows beside them, so "
            "an interrupted file would not continue as it began: leave it out."
        )
    config = replace(config, logprobs=True)
    rows = load_rows(section)
    prompts = encode_rows(rows, tokenizer, section=section, mask_token_id=model.spec.mask_token_id)
    ids = [prompt.ids for prompt in prompts]
    check_fits(model, ids, config.max_new_tokens, "max_new_tokens")
    settings = {
        **identity_of(model_path, model.spec, prompts),
        **{"engine": engine, "compile": compiles, "dtype": dtype, "seed": seed, "date": section.date},
        **asdict(config),
    }
    if is_finished(out, settings):
        console.out(f"{out} is finished already: {len(prompts)} rollouts")
        return out
    vllm = start_ar_model(model_path, model, ids, config) if engine == "vllm" else None
    with compiled_decoding(model, compiles), PhaseProgress("rollout", len(prompts), console) as progress:

        def decode(piece: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Rollout]:
            if vllm is None:
                return generate(model, piece, config, seeds, progress.on_step)
            responses = vllm.responses(piece, config, seeds)
            progress.num_tokens += sum(one.num_response for one in responses)
            return responses

        def on_piece(rollouts: Sequence[Rollout], seconds: float) -> None:
            (progress.advance if seconds else progress.skip)(len(rollouts))

        rollouts = decode_resumably(
            out,
            prompts,
            [seed_of(seed, prompt.index) for prompt in prompts],
            decode,
            settings,
            piece_size=BATCHES_PER_PIECE * config.batch_size,
            on_piece=on_piece,
        )
    texts = [
        conversation_of(*rows[prompt.index], column=section.prompt_column).last_text for prompt in prompts
    ]
    write_rollouts(out, texts, rollouts, tokenizer, settings)
    stats = DecodeStats.of(rollouts)
    console.out(
        f"rollouts: {out} ({len(rollouts)} responses, {stats.num_tokens} tokens, "
        f"{stats.tokens_per_forward:.2f} per forward)"
    )
    return out


def check_vllm_engine(config: DecodeConfig, compiles: bool) -> None:
    check_vllm("`engine=vllm`")
    if compiles:
        raise ConfigError("`compile` is for our own decoder: leave it out with `engine=vllm`.")
    if config.mode != "ar":
        raise ConfigError(
            f"`engine=vllm` with `mode={config.mode}`: vLLM decodes the autoregressive model here. Use "
            "`mode=ar`, or `engine=own`."
        )


def data_section(path: str, limit: int | None, overrides: Sequence[str]) -> DataSection:
    """Where the prompts come from, with other `data.*` keys."""
    for override in overrides:
        if not override.startswith("data."):
            raise ConfigError(
                f"{override}: only data.* keys matter here, for example data.prompt_column=text."
            )
    section = load_config(None, overrides).data
    return replace(section, path=path, limit=section.limit if limit is None else limit)


def identity_of(model_path: str, spec: DiffusionSpec, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Which weights answer which prompts; with the decoding settings it decides what is in the file."""
    path = resolve_path(model_path)
    return {
        "opdlm": __version__,
        "model": str(Path(path).resolve()) if Path(path).is_dir() else path,
        "checkpoint": fingerprint(path),
        "prompts": digest_of(prompt.ids for prompt in prompts),
        "block_size": spec.block_size,
        "grid": spec.grid,
    }
