"""The Python API: every verb of the command line as a function, named `opdlm.NAME`.

Paths and settings are checked before torch is imported; the packages that do the work are imported inside the
functions. `opdlm.generate` is `opdlm.serving.text_generation.generate`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from opdlm.checkpoints.folders import (
    check_can_decode,
    check_is_checkpoint,
    check_is_converted,
    trust_remote_code,
)
from opdlm.config.loader import apply_override, build_section, override_of
from opdlm.config.recipes import resolve_target
from opdlm.config.rules import check_config, load_config
from opdlm.config.sections import Config, RunConfig, resolve_path
from opdlm.config.text import TextConfig, build_text_config, load_text_config
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.errors import ConfigError, DataError
from opdlm.files import MANIFEST, find_damage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opdlm.evaluation.speed import Speed
    from opdlm.modeling.diffusion_lm import DiffusionLM
    from opdlm.training.run_folder import RunState

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def load(
    folder: str | Path, dtype: Dtype = "auto", device: str | None = None, *, mode: Mode | None = None
) -> tuple[DiffusionLM, PreTrainedTokenizerBase]:
    """Load a model to decode with.

    Args:
        folder: the folder `model` of a run's output_dir, or the hub id under which it was pushed. Also any
            causal checkpoint (a folder, a hub id or `bundled:teacher`), as the autoregressive model that it
            is: it decodes in mode `ar` only.
        dtype: precision of the weights in memory; auto: that of the files, or
            float32 on a CPU that has no instructions for it.
        device: `cpu`, `cuda:0` and so on; None: this process's GPU, or the CPU where there is none.
        mode: the mode it is wanted for, which is checked before anything is loaded.

    Returns:
        The model, without gradients, and its tokenizer.

    Raises:
        DataError: the folder is missing, incomplete or damaged.
        ConfigError: the checkpoint cannot decode in `mode`.

    Example:
        >>> model, tokenizer = opdlm.load("runs/tiny/model")
    """
    folder = on_this_machine(folder)
    check_is_checkpoint(resolve_path(folder), setting="")
    if mode is not None:
        check_can_decode(folder, mode)
    from opdlm.checkpoints.convert import load_decoder

    return load_decoder(folder, dtype, device)


def convert(
    source: str | Path | Config,
    *,
    data: str | Path | None = None,
    output_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> Path:
    """Turn an autoregressive checkpoint into a block-diffusion model, and measure what it kept.

    A run that was interrupted continues from its last checkpoint in `output_dir`; a finished one is left
    as it is.

    Args:
        source: a recipe file, the name of a bundled recipe (`tiny`), a checkpoint folder or hub id, or
            settings.
        data: prompts: .jsonl, .parquet or a `datasets` name (data.path).
        output_dir: where the model and everything about the run is written.
        overrides: other settings as `section.key=value`, for example `train.num_steps=100`.
        console: where progress is printed; None: standard output of the main process.

    Returns:
        The folder of the converted model, which `opdlm.load`, `evaluate`, `serve` and `export` take.

    Raises:
        ConfigError: a setting that cannot work.
        DataError: a checkpoint or prompts that cannot be used.
        TimeLimitReached: `train.time_limit` is over, before the training was; call again to continue.

    Example:
        >>> folder = opdlm.convert("tiny", output_dir="runs/tiny", overrides=["train.num_steps=10"])
    """
    console = console or main_console()
    config = convert_settings(
        source, [*given("data.path", data), *given("output_dir", output_dir), *overrides], console
    )
    check_model_path(config, needs_weights=True)
    from opdlm.distill.pipeline import convert_checkpoint

    with trust_remote_code(config.model.trust_remote_code):
        return convert_checkpoint(config, console)


def train(
    source: str | Path | TextConfig,
    *,
    data: str | Path | None = None,
    output_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> Path:
    """Train on given text: autoregressive, masked diffusion, block diffusion, or both at once.

    Args:
        source: a recipe file, the name of a bundled recipe of `opdlm train` (`byte`), a checkpoint folder or
            hub id, or settings.
        data: text: .jsonl, .parquet or a `datasets` name (data.path).
        output_dir: where the model and everything about the run is written.
        overrides: other settings as `section.key=value`, for example `objective.name=dual`.
        console: where progress is printed; None: standard output of the main process.

    Returns:
        The folder of the trained model.

    Raises:
        ConfigError: a setting that cannot work.
        DataError: a checkpoint or text that cannot be used.
        TimeLimitReached: `train.time_limit` is over, before the training was; call again to continue.

    Example:
        >>> folder = opdlm.train("byte", data="mine.jsonl", output_dir="runs/byte")
    """
    config = train_settings(source, [*given("data.path", data), *given("output_dir", output_dir), *overrides])
    check_model_path(config, needs_weights=not config.model.from_scratch)
    from opdlm.text.pipeline import train_text

    with trust_remote_code(config.model.trust_remote_code):
        return train_text(config, console or main_console())


def evaluate(
    folder: str | Path,
    *,
    data: str | Path | None = None,
    modes: Sequence[str] = (),
    limit: int | None = None,
    teacher: str | Path | None = None,
    out: str | Path | None = None,
    dtype: Dtype | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure a converted folder against its teacher, on the same prompts.

    Args:
        folder: written by `opdlm.convert`.
        data: evaluation prompts: .jsonl with `prompt`, and optionally `answer`, `skill`, `held_out`
            (eval.path); None: those of the run that made the folder.
        modes: decodings to measure; empty: those of the run.
        limit: prompts per skill; None: that of the run.
        teacher: the original checkpoint, for an `sdar` folder; None: the one that the run names.
        out: a folder for report.html, report.md, retention.json, timing.json, pictures and
            generations.jsonl; an interrupted measurement continues there.
        dtype: precision of the weights in memory; None: that of the run.
        overrides: other settings of the measurement as `eval.key=value`.
        console: where progress is printed; None: standard output of the main process.

    Returns:
        The report as plain values: `teacher` and every mode of `student` (accuracy, by_skill, retention,
        tokens_per_forward, identical_to_teacher, replaced; shares are between 0 and 1, intervals are 95 %),
        `timing` (tokens per second), for `preserve` `speed` (lossless beside AR decoding), and `settings`.

    Raises:
        ConfigError: a setting that cannot work, or no evaluation prompts.
        DataError: a folder or prompts that cannot be used.

    Example:
        >>> report = opdlm.evaluate("runs/tiny/model", modes=["lossless"], limit=4)
        >>> {mode["name"]: mode["retention"] for mode in report["student"]}
    """
    folder = on_this_machine(folder)
    check_is_converted(folder)
    changes = [
        *given("eval.path", data),
        *given("eval.modes", ",".join(modes) or None),
        *given("eval.limit", limit),
    ]
    from opdlm.evaluation.retention import eval_config, measure_folder

    config = eval_config(Path(folder), [*changes, *overrides])
    if not config.eval.path:
        raise ConfigError("eval.path is empty: the run had no evaluation set. Give eval.path=FILE.jsonl.")
    if dtype is not None:
        config = replace(config, model=replace(config.model, dtype=dtype))
    return measure_folder(
        Path(folder),
        config,
        None if out is None else Path(out),
        None if teacher is None else str(teacher),
        console or main_console(),
    )


def bench(
    folder: str | Path,
    config: DecodeConfig | None = None,
    *,
    prompts: str | Path | None = None,
    modes: Sequence[Mode] = (),
    batch_sizes: Sequence[int] = (1, 8, 64),
    limit: int = 64,
    repeats: int = 3,
    compile: bool = False,
    vllm: Literal["auto", "always", "never"] = "auto",
    assistant: str | Path | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
) -> list[Speed]:
    """Measure decoding speed against AR decoding of the same folder (`transformers.generate` and our own) and
    the speculative decoding of transformers.

    Greedy, the same prompts for all, interleaved. Close other programs first.

    Args:
        folder: written by `opdlm.convert`.
        config: how to decode; its `mode`, `batch_size` and sampling are replaced. None: 128 new tokens.
        prompts: .jsonl with `prompt`; None: eval.path of the run, else its held-back prompts.
        modes: decodings to measure; empty: all that the format has.
        batch_sizes: rows decoded at once, one after the other.
        limit: prompts, evenly spaced over the file.
        repeats: how often everything is timed; the median counts.
        compile: every mode with torch.compile too.
        vllm: also the AR model in vLLM: where it is installed (auto), always or never.
        assistant: a small model with the same tokenizer, for assisted generation of transformers. It and
            prompt lookup decode one prompt at a time, so they are measured at batch size 1 only.
        out: a folder for bench.json, bench.png and acceptance.png.
        console: where progress is printed; None: standard output.

    Returns:
        A `Speed` per batch size and way of decoding: tokens per second, `speedup` over
        `transformers.generate`, `over_fastest_ar` over the fastest of the AR decoders measured, tokens per
        forward, and the share of responses equal to those of `transformers.generate`.

    Raises:
        ConfigError: a setting that cannot work, or no prompts.
        DataError: a folder or prompts that cannot be used.

    Example:
        >>> rows = opdlm.bench("runs/tiny/model", modes=["lossless"], batch_sizes=[1], limit=8)
    """
    folder = on_this_machine(folder)
    check_is_converted(folder)
    for name, values in {"limit": [limit], "repeats": [repeats], "batch_sizes": batch_sizes}.items():
        if min(values, default=0) < 1:
            raise ConfigError(f"{name} ({', '.join(map(str, values))}) must be at least 1.")
    from opdlm.evaluation.bench import bench_folder

    return bench_folder(
        Path(folder),
        config or DecodeConfig(max_new_tokens=128),
        prompts=None if prompts is None else str(prompts),
        modes=modes,
        batch_sizes=batch_sizes,
        limit=limit,
        repeats=repeats,
        compiles=compile,
        vllm=vllm,
        assistant=None if assistant is None else str(assistant),
        out=None if out is None else Path(out),
        console=console or main_console(),
    )


def rollout(
    model: str | Path,
    prompts: str | Path,
    out: str | Path,
    config: DecodeConfig | None = None,
    *,
    engine: Literal["own", "vllm"] = "own",
    seed: int = 0,
    limit: int | None = None,
    dtype: Dtype = "auto",
    compile: bool = False,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> Path:
    """Answer every prompt of a file and write the responses with their trajectories to a Parquet file.

    `rollout.path` of a conversion trains on that file. An interrupted call continues when it is made again,
    and the file is the same, byte for byte.

    Args:
        model: a converted folder, or with mode `ar` any causal checkpoint.
        prompts: .jsonl, .parquet or a `datasets` name, as data.path.
        out: name of the .parquet file.
        config: how to decode; log-probabilities are always recorded. None: temperature 1, without
            `ar_accept_threshold`.
        engine: `vllm` decodes the autoregressive model in vLLM; mode `ar` only.
        seed: prompt i draws from (seed, i).
        limit: the first so many prompts; None: all.
        dtype: precision of the weights in memory; auto: that of the files, or
            float32 on a CPU that has no instructions for it.
        compile: decode with torch.compile; our engine only.
        overrides: how the prompts are read, as `data.key=value`.
        console: where progress is printed; None: standard output.

    Returns:
        `out`.

    Raises:
        ConfigError: a setting that cannot work, or a file of other settings under this name.
        DataError: a checkpoint or prompts that cannot be used.

    Example:
        >>> opdlm.rollout("runs/tiny/model", "bundled:prompts.jsonl", "own.parquet", limit=64)
    """
    config = (config or DecodeConfig(temperature=1.0, ar_accept_threshold=0.0)).repeatable()
    model = on_this_machine(model)
    check_can_decode(model, config.mode)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit ({limit}) must be at least 1.")
    from opdlm.distill.recording import record_rollouts

    return record_rollouts(
        model,
        str(prompts),
        Path(out),
        config,
        engine=engine,
        seed=seed,
        limit=limit,
        dtype=dtype,
        compiles=compile,
        overrides=overrides,
        console=console or main_console(),
    )


def serve(
    folder: str | Path,
    config: DecodeConfig | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    max_rows: int = 16,
    max_waiting: int = 1024,
    max_length: int | None = None,
    dtype: Dtype = "auto",
    compile: bool = False,
    request_log: str | Path | None = None,
) -> None:
    """Answer over HTTP as OpenAI's API does (/v1/chat/completions, /v1/completions), until Ctrl-C.

    Needs the extra `serve` (pip install 'opdlm[serve]').

    Args:
        folder: a converted folder, or with mode `ar` any causal checkpoint.
        config: what a request does not say; `batch_size` is `max_rows` here.
        host: `0.0.0.0` for other machines too.
        port: 0 for any free one.
        name: of the model in requests; None: `folder`.
        api_key: what requests must bring, or several, of which one is enough; empty: $OPDLM_API_KEY, and
            nothing where that is not set.
        cors_origins: web pages whose scripts may read the answers, such as `https://example.org`; `*`: all.
        max_rows: responses decoded at once.
        max_waiting: responses that may wait for a row; further requests get status 429.
        max_length: prompt and response together, in tokens; None: the context, at most 4096.
        dtype: precision of the weights in memory; auto: that of the files, or
            float32 on a CPU that has no instructions for it.
        compile: decode with torch.compile.
        request_log: a file to which a line of JSON is appended per request.

    Raises:
        ConfigError: a setting that cannot work, or a port that is taken.
        DataError: a checkpoint that cannot be used.

    Example:
        >>> opdlm.serve("runs/tiny/model", opdlm.DecodeConfig(mode="lossless"), port=8000)
    """
    config, name = config or DecodeConfig(), name or str(folder)
    folder = on_this_machine(folder)
    check_can_decode(folder, config.mode)
    from opdlm.serving.server import serve_folder

    serve_folder(
        folder,
        host=host,
        port=port,
        name=name,
        api_key=[api_key] if isinstance(api_key, str) else api_key,
        cors_origins=cors_origins,
        max_rows=max_rows,
        max_waiting=max_waiting,
        max_length=max_length,
        decode=config,
        dtype=dtype,
        compile=compile,
        request_log=None if request_log is None else str(request_log),
    )


def export(
    folder: str | Path,
    out: str | Path,
    *,
    to: Literal["vllm", "sdar", "uno"] = "vllm",
    config: DecodeConfig | None = None,
) -> Path:
    """Write a converted folder as an inference engine reads it.

    Args:
        folder: written by `opdlm.convert`: for `sdar` with format.name=sdar, for `uno` a preserve one.
        out: a folder that does not exist yet.
        to: `vllm`: `vllm serve OUT`, where this package is installed too. `sdar`: as SGLang and LMDeploy load
            SDAR checkpoints (Qwen3, absolute grid). `uno`: the adapter, with which SGLang and a proposal for
            vLLM draft beside `folder` (format.noise=uniform and format.draft_attention=causal).
        config: for `vllm` and a folder with format.name=sdar, how tokens are chosen, which is fixed in `out`;
            modes static, threshold and left_to_right. A preserve folder is served losslessly.

    Returns:
        `out`.

    Raises:
        ConfigError: a folder or settings that the engine cannot run.
        DataError: a folder that cannot be used.

    Example:
        >>> opdlm.export("runs/sdar/model", "runs/sdar/vllm")
    """
    folder = on_this_machine(folder)
    check_is_converted(folder)
    if to != "vllm" and config is not None:
        raise ConfigError(f"config has no effect with `to={to}`, whose engines decide how tokens are chosen.")
    from opdlm.checkpoints.export import export_to_sdar
    from opdlm.checkpoints.load import check_decode, read_spec
    from opdlm.checkpoints.uno import export_to_uno
    from opdlm.vllm.export import export_to_vllm

    if to == "sdar":
        export_to_sdar(Path(folder), Path(out))
    elif to == "uno":
        export_to_uno(Path(folder), Path(out))
    else:
        if config is not None:
            check_decode(config, read_spec(folder))
        export_to_vllm(Path(folder), Path(out), config)
    return Path(out)


def import_adapter(
    base: str | Path, adapter: str | Path, out: str | Path, *, block_size: int = 8, dtype: Dtype = "auto"
) -> Path:
    """Write a model and a published adapter in the layout of Uno as a converted folder.

    Args:
        base: the checkpoint that the adapter was trained on: a folder or hub id.
        adapter: a folder with adapter_config.json and adapter_model.safetensors.
        out: a folder that does not exist yet.
        block_size: the longest draft and the token before it.
        dtype: precision of the weights in memory; auto: that of the files, or
            float32 on a CPU that has no instructions for it.

    Returns:
        `out`, which `opdlm.load`, `bench` and `evaluate` take.

    Raises:
        ConfigError: a setting outside its range, or `out` exists.
        DataError: a base or an adapter that cannot be used, or that do not fit together.

    Example:
        >>> opdlm.import_adapter("Qwen/Qwen3-8B", "uno/adapter", "runs/uno")
    """
    path = resolve_path(str(base))
    check_is_checkpoint(path, setting="")
    if block_size < 2:
        raise ConfigError(f"block_size ({block_size}) leaves nothing to draft: use at least 2.")
    from opdlm.checkpoints.uno import import_uno

    import_uno(path, Path(adapter), Path(out), block_size, dtype)
    return Path(out)


def merge(folder: str | Path, out: str | Path, *, full_copy: bool = False) -> Path:
    """Write a converted folder again with its LoRA adapter added to the weights.

    Args:
        folder: written by `opdlm.convert`, with an adapter.
        out: a folder that does not exist yet.
        full_copy: for `preserve`, whose adapter acts on noised slots only: write the merged student as a
            second set of weights beside the untouched AR weights (twice the size).

    Returns:
        `out`.

    Raises:
        ConfigError: no adapter, or a `preserve` folder without `full_copy`.
        DataError: a folder that cannot be used.

    Example:
        >>> opdlm.merge("runs/tiny/model", "runs/tiny/copy", full_copy=True)
    """
    folder = on_this_machine(folder)
    check_is_converted(folder)
    from opdlm.checkpoints.export import merge_folder

    merge_folder(Path(folder), Path(out), full_copy=full_copy)
    return Path(out)


def push(folder: str | Path, name: str, *, private: bool = False) -> str:
    """Publish a result folder as a model repository on the Hugging Face Hub.

    The repository becomes a copy of the folder: other files in it are deleted, and stay in its history. The
    card in the folder learns the name, and the licence of the base model where only the Hub knows it.

    Args:
        folder: written by `opdlm.convert`, `train`, `export` or `merge`.
        name: USER/NAME, which is created if it does not exist.
        private: create it for its owner alone; a public one of that name is refused.

    Returns:
        The address of the repository; `opdlm.load(name)` loads the model.

    Raises:
        ConfigError: a name that cannot be, no token, or `private` where the repository is public.
        DataError: a folder that is damaged or no checkpoint, a Hub that refuses or cannot be reached.

    Example:
        >>> opdlm.push("runs/tiny/model", "ada/tiny-diffusion")
    """
    from opdlm.checkpoints.hub import push_folder

    return push_folder(Path(folder), name, private=private)


def verify(folder: str | Path) -> dict[Path, list[str]]:
    """Compare the files of a result folder, or of the checkpoints and the result of a run, with its manifest.

    Args:
        folder: written by `opdlm.convert`, `train`, `export` or `merge`, a checkpoint, or an output_dir.

    Returns:
        The folders compared, each with what is wrong: a phrase per damaged file.

    Raises:
        DataError: no such folder, or none that could be compared.

    Example:
        >>> opdlm.verify("runs/tiny")
    """
    root = Path(folder)
    inside = [path for path in root.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    found = [root] if (root / MANIFEST).exists() else [*inside, *root.glob("model")]
    if not found:
        lacks = f"holds no {MANIFEST}, no checkpoint-N and no model" if root.exists() else "does not exist"
        raise DataError(f"{folder} {lacks}. Give a run or its result.")
    missing = [f"{MANIFEST} is missing, so nothing was compared"]
    return {
        path: [" ".join(damage) for damage in find_damage(path)] if (path / MANIFEST).exists() else missing
        for path in found
    }


def runs(folder: str | Path = "runs") -> list[RunState]:
    """The runs of `convert` and `train` in a folder and up to three levels below it.

    Returns:
        Of each: its folder, `convert` or `train`, running, finished or stopped, its step, and the seconds
        that are left at the speed of the last steps.

    Raises:
        DataError: there is no run.

    Example:
        >>> [run.folder for run in opdlm.runs() if run.state == "stopped"]
    """
    from opdlm.training.run_folder import read_runs

    return read_runs(Path(folder))


def resume(run: str | Path, *, overrides: Sequence[str] = (), console: Console | None = None) -> Path:
    """Continue a run of `convert` or `train` with its own settings.

    Args:
        run: its output_dir.
        overrides: settings that may change (docs/runs.md), for example `train.num_steps=400`.
        console: where progress is printed; None: standard output of the main process.

    Returns:
        The folder of the model.

    Raises:
        ConfigError: a setting that may not change, or another command that works in the folder.
        DataError: there is no run, or its checkpoint or data cannot be used.

    Example:
        >>> opdlm.resume("runs/tiny", overrides=["train.num_steps=400"])
    """
    from opdlm.training.run_folder import CONFIG_FILE, read_run

    folder = Path(run)
    action = convert if read_run(folder).verb == "convert" else train
    return action(folder / CONFIG_FILE, output_dir=folder, overrides=overrides, console=console)


def convert_settings(
    source: str | Path | Config, overrides: Sequence[str] = (), console: Console | None = None
) -> Config:
    """The settings of a conversion from a recipe, its name, a checkpoint or settings; checked. For a
    checkpoint, the profile fills what `overrides` leave open, and is printed on `console`.
    """
    if not isinstance(source, Config):
        recipe, target = resolve_target(str(source))
        if recipe is not None:
            return load_config(recipe, [*target, *overrides])
        check_is_checkpoint(resolve_path(str(source)), needs_weights=False)
        from opdlm.distill.profile import describe_profile, profile

        chosen = profile(str(source), overrides)
        if console is not None:
            console.out(describe_profile(chosen), highlight=False)
        return load_config(None, [*map(str, chosen), *target, *overrides])
    config = build_section(Config, changed(source, overrides))
    check_config(config)
    return config


def train_settings(source: str | Path | TextConfig, overrides: Sequence[str] = ()) -> TextConfig:
    """The settings of a training on text from a recipe, its name, a checkpoint or settings; checked."""
    if not isinstance(source, TextConfig):
        recipe, target = resolve_target(str(source), "train")
        return load_text_config(recipe, [*target, *overrides])
    return build_text_config(changed(source, overrides))


def changed(config: RunConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of settings, with `section.key=value` strings entered."""
    values = config.to_dict()
    for override in overrides:
        apply_override(values, override)
    return values


def on_this_machine(path: str | Path) -> str:
    """A converted model that is named by its hub id as a folder; anything else as it is."""
    if Path(path).exists():  # without waiting for huggingface_hub
        return str(path)
    from opdlm.checkpoints.hub import local_folder

    return local_folder(str(path))


def given(key: str, value: object) -> list[str]:
    """`key=value` where there is a value."""
    if isinstance(value, str | Path):
        return [override_of(key, str(value))]
    return [] if value is None else [f"{key}={value}"]


def check_model_path(config: Config | TextConfig, *, needs_weights: bool) -> None:
    """Raises DataError where `model.path` looks like a path and is no checkpoint."""
    if config.model.path:
        check_is_checkpoint(resolve_path(config.model.path), needs_weights=needs_weights)


def main_console() -> Console:
    """Standard output of the first process of a launch; the others are silent. Plain text in notebooks, where
    rich and ipykernel flush each other without end while a status is shown.
    """
    return Console(quiet=os.environ.get("RANK", "0") != "0", force_jupyter=False)
