"""What each verb does once its command line is read: check, call the room, print. Rooms are imported then."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from opdlm.config.loader import apply_override, build_section, describe_fields
from opdlm.config.recipes import bundled_recipes, nearest_recipes, resolve_target
from opdlm.config.rules import check_config, load_config
from opdlm.config.sections import Config, RunConfig
from opdlm.errors import ConfigError, DataError

AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def read_settings(
    verb: str,
    options: argparse.Namespace,
    tree: type[AnyConfig],
    load: Callable[[Path | None, Sequence[str]], AnyConfig],
) -> AnyConfig | None:
    """The settings of a run; None where showing them was all that was asked."""
    if options.list_keys:
        for key, default, text in describe_fields(tree):
            print(f"{key} = {default!r}\n    {text}")
        return None
    if options.target is None:
        raise ConfigError(
            f"{verb} needs a TARGET: a recipe, a recipe's name or a model. See: opdlm {verb} --help"
        )
    recipe, target = resolve_target(options.target, "" if verb == "convert" else verb)
    config = load(recipe, [*target, *options.overrides])
    if options.print_config:
        print(config.to_yaml(), end="")
        return None
    return config


def run_convert(options: argparse.Namespace) -> int:
    config = read_settings("convert", options, Config, load_config)
    if config is None:
        return 0
    quiet_libraries()
    if options.dry_run:
        from opdlm.distill.plan import describe_plan, make_plan

        print(describe_plan(config, make_plan(config)))
        return 0
    from rich.console import Console

    from opdlm.distill.pipeline import convert_checkpoint
    from opdlm.reporting.pages import read_retention

    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    folder = convert_checkpoint(config, console)
    report = None if console.quiet else read_retention(folder)
    if report is not None:
        from opdlm.reporting.tables import measured_text

        console.print(measured_text(report), markup=False, soft_wrap=True)
    console.print(f"\nconverted checkpoint: {folder}", soft_wrap=True)
    return 0


def run_train(options: argparse.Namespace) -> int:
    from opdlm.config.text import TextConfig, load_text_config

    config = read_settings("train", options, TextConfig, load_text_config)
    if config is None:
        return 0
    quiet_libraries()
    from rich.console import Console

    from opdlm.text.pipeline import train_text

    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    folder = train_text(config, console)
    console.print(f"\ntrained checkpoint: {folder}", soft_wrap=True)
    return 0


def run_generate(options: argparse.Namespace) -> int:
    quiet_libraries()
    from opdlm.cli.verbs import answer_prompts

    return answer_prompts(options)


def run_chat(options: argparse.Namespace) -> int:
    quiet_libraries()
    from opdlm.cli.chat import chat

    return chat(options)


def run_serve(options: argparse.Namespace) -> int:
    quiet_libraries()
    from opdlm.serving.server import serve_folder

    return serve_folder(options)


def run_rollout(options: argparse.Namespace) -> int:
    quiet_libraries()
    from opdlm.cli.verbs import record_rollouts

    return record_rollouts(options)


EVAL_FLAGS = ("modes", "limit", "temperature", "seeds", "thresholds")
"""Flags of `eval` that are short for eval.key=value."""


def run_eval(options: argparse.Namespace) -> int:
    quiet_libraries()
    from opdlm.checkpoints.load import read_spec

    is_override = {text: "=" in text and not Path(text).exists() for text in options.folders}
    folders = [Path(text) for text in options.folders if not is_override[text]]
    if not folders:
        raise ConfigError("eval needs a DIR written by opdlm convert, before any eval.key=value.")
    overrides = [text for text in options.folders if is_override[text]] + options.overrides
    if options.text:
        return run_text_eval(options, folders, overrides)
    if options.metrics or options.num_rates is not None or options.prediction:
        raise ConfigError("--metrics, --num-rates and --prediction belong to --text: give the file.")
    for flag in EVAL_FLAGS:
        value = getattr(options, flag)
        if value is not None:
            overrides.append(f"eval.{flag}={','.join(value) if isinstance(value, list) else value}")
    for folder in folders:
        read_spec(folder)
    configs = [eval_config(folder, overrides) for folder in folders]
    if options.tasks:
        return run_harness(options, folders, configs[0])
    if options.include_path or options.num_fewshot is not None:
        raise ConfigError("--include-path and --num-fewshot belong to --tasks: give the names of the tasks.")
    if not all(config.eval.path for config in configs):
        raise ConfigError("eval.path is empty: the run had no evaluation set. Give eval.path=FILE.jsonl.")
    return run_retention(options, folders, configs)


def run_text_eval(options: argparse.Namespace, folders: Sequence[Path], overrides: Sequence[str]) -> int:
    """Likelihoods of a file of text or of questions."""
    from opdlm.text.evaluate import RESULT_FILE, evaluate_text
    from opdlm.text.likelihood_models import LikelihoodOptions

    flags = ("teacher", "modes", "temperature", "seeds", "thresholds", "tasks", "include_path", "num_fewshot")
    for flag in (*flags, "chat_template"):
        if getattr(options, flag) not in (None, False):
            raise ConfigError(f"--{flag.replace('_', '-')} has no effect with --text: leave it out.")
    if options.limit is not None and not options.limit.isdigit():
        raise ConfigError(f"--limit ({options.limit}) must be a whole number.")
    out = Path(options.out) if options.out else None
    rates = {} if options.num_rates is None else {"num_rates": options.num_rates}
    table = evaluate_text(
        folders,
        options.text,
        options.metrics.split(",") if options.metrics else (),
        None if options.limit is None else int(options.limit),
        LikelihoodOptions(prediction=options.prediction, overrides=tuple(overrides), **rates),
        out,
    )
    print(f"{table.title}\n\n{table.markdown()}\n\n{table.note}")
    if out is not None:
        print(f"\nreport: {out / RESULT_FILE}")
    return 0


def eval_config(folder: Path, overrides: Sequence[str]) -> Config:
    """The settings of the run that made the folder, with other `eval.*` keys."""
    from dataclasses import replace

    from opdlm.evaluation.retention import read_config_of

    record = read_config_of(folder)
    values = {"eval": record.to_dict()["eval"]}
    for override in overrides:
        if not override.startswith("eval."):
            raise ConfigError(f"{override}: only eval.* keys matter here, for example eval.limit=10.")
        apply_override(values, override)
    config = replace(record, eval=build_section(Config, values).eval)
    check_config(config)
    return config


def run_retention(options: argparse.Namespace, folders: Sequence[Path], configs: Sequence[Config]) -> int:
    """The report of one folder, or of several in one table."""
    from opdlm.evaluation.retention import compare_folders, measure_folder
    from opdlm.reporting.pages import HTML_FILE
    from opdlm.reporting.tables import comparison_table, measured_text, skill_table

    out = Path(options.out) if options.out else None
    if len(folders) > 1:
        if out is None:
            raise ConfigError(
                "several DIRs need --out FOLDER, where their reports and the table are written."
            )
        text = comparison_table(compare_folders(folders, configs, out, options.teacher)).markdown()
    else:
        report = measure_folder(folders[0], configs[0], out, options.teacher)
        text = f"{measured_text(report)}\n\n{skill_table(report).markdown()}"
    print(text)
    if out is not None:
        print(f"\nreport: {out / HTML_FILE}")
    return 0


def run_report(options: argparse.Namespace) -> int:
    from opdlm.reporting.pages import write_run_page

    print(f"report: {write_run_page(Path(options.folder))}")
    return 0


def run_harness(options: argparse.Namespace, folders: Sequence[Path], config: Config) -> int:
    """Tasks of lm-evaluation-harness in every mode."""
    if len(folders) > 1:
        raise ConfigError("--tasks measures one DIR: run it for each of them.")
    import json

    from opdlm.checkpoints.load import read_spec
    from opdlm.evaluation.lm_eval import run_tasks

    folder = str(folders[0])
    fmt = read_spec(folder).format
    modes = config.eval.modes or (
        ("ar", "static", "threshold") if fmt == "preserve" else ("static", "threshold")
    )
    results = run_tasks(
        folder,
        options.tasks.split(","),
        modes,
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        apply_chat_template=options.chat_template,
        limit=config.eval.limit,
        batch_size=config.eval.decode.batch_size,
    )
    for mode, tasks in results.items():
        for task, numbers in tasks.items():
            shown = {k: v for k, v in numbers.items() if isinstance(v, int | float)}
            print(f"{mode} {task} " + " ".join(f"{k}={v:.4f}" for k, v in shown.items()))
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        record = {"folder": folder, "eval": config.to_dict()["eval"], "results": results}
        (Path(options.out) / "lm_eval.json").write_text(json.dumps(record, indent=2, default=str))
    return 0


def run_merge(options: argparse.Namespace) -> int:
    quiet_libraries()
    from opdlm.checkpoints.export import merge_folder

    merge_folder(Path(options.folder), Path(options.out), full_copy=options.full_copy)
    print(f"merged checkpoint: {options.out}")
    return 0


def run_export(options: argparse.Namespace) -> int:
    quiet_libraries()
    from opdlm.cli.verbs import export_folder

    return export_folder(options)


def run_bench(options: argparse.Namespace) -> int:
    if min(options.limit, options.max_new_tokens, options.repeats, *options.batch_sizes) < 1:
        raise ConfigError("--limit, --max-new-tokens, --repeats and --batch-sizes must be at least 1.")
    quiet_libraries()
    from accelerate import PartialState
    from rich.console import Console

    from opdlm.checkpoints.load import check_fits, load, load_causal_lm
    from opdlm.data.prompts import load_tasks
    from opdlm.evaluation.retention import read_config_of, versions
    from opdlm.evaluation.speed import measure_speed, speed_table, write_speed
    from opdlm.vllm.engine import check_vllm, installed_version, is_tested_version

    if options.vllm == "always":
        check_vllm("--vllm always")
    with_vllm = options.vllm != "never" and is_tested_version(installed_version())
    model, tokenizer = load(options.folder, device=str(PartialState().device))
    is_preserve = model.spec.format == "preserve"
    modes = options.modes or [*(("ar", "lossless") if is_preserve else ()), "static", "threshold"]
    if not is_preserve and {"ar", "lossless"} & set(modes):
        raise ConfigError("--modes ar and lossless need a preserve checkpoint; this one is sdar.")
    path = options.prompts or read_config_of(Path(options.folder)).eval.path
    if not path:
        raise ConfigError("the run had no evaluation set: give --prompts FILE.jsonl.")
    tasks = load_tasks(path, tokenizer, model.spec.mask_token_id, limit=None)
    prompts = [task.prompt.ids for task in tasks][:: max(1, len(tasks) // options.limit)][: options.limit]
    check_fits(model, prompts, options.max_new_tokens, "--max-new-tokens")
    console = Console()
    ar_model = load_causal_lm(options.folder, "float32")
    ar_model.to(model.device)  # type: ignore[arg-type]
    rows = measure_speed(
        model,
        ar_model,
        prompts,
        modes,
        options.batch_sizes,
        max_new_tokens=options.max_new_tokens,
        repeats=options.repeats,
        compiles=options.compile,
        vllm_folder=options.folder if with_vllm else None,
        on_row=lambda row: console.print(
            f"batch {row.batch_size}: {row.name} {row.tokens_per_second:.0f} tokens/s", soft_wrap=True
        ),
    )
    console.print(speed_table(rows), markup=False, soft_wrap=True)
    if options.out:
        settings = {"prompts": len(prompts), "file": path, "repeats": options.repeats}
        settings |= {"vllm": installed_version()} if with_vllm else {}
        write_speed(rows, Path(options.out), settings | versions())
    return 0


def run_study(options: argparse.Namespace) -> int:
    studies = bundled_recipes("studies")
    if options.name is None:
        for name, path in studies.items():
            print(f"{name:{max(map(len, studies))}} {path.read_text().splitlines()[0].lstrip('# ')}")
        return 0
    is_file = options.name.endswith((".yaml", ".yml"))
    if not is_file and options.name not in studies:
        raise ConfigError(f"no study is called {options.name}. There are: {', '.join(studies)}.")
    if not options.dry_run and not options.out:
        raise ConfigError(f"--out is missing: opdlm study {options.name} --out runs/{options.name}.")
    for flag in ("processes", "seeds"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise ConfigError(f"--{flag} ({getattr(options, flag)}) must be at least 1.")
    quiet_libraries()
    from rich.console import Console

    from opdlm.studies.run import TABLE_FILE, describe_plan, read_plan, run_study

    recipe = Path(options.name) if is_file else studies[options.name]
    plan = read_plan(recipe, options.overrides, options.seeds)
    if options.dry_run:
        print(describe_plan(plan))
        return 0
    out = Path(options.out)
    result = run_study(plan, out, Console(), options.processes)
    if result.records:
        print((out / TABLE_FILE).read_text())
    if result.errors:
        raise DataError(
            f"{len(result.errors)} of {len(plan.cells)} runs failed ({', '.join(result.errors)}); the same "
            "command tries them again."
        )
    return 0


def run_recipes(options: argparse.Namespace) -> int:
    verbs = {"convert": bundled_recipes(), "train": bundled_recipes("train")}
    recipes = verbs["convert"] | verbs["train"]
    if options.name is None:
        width = max(map(len, recipes))
        for verb, found in verbs.items():
            for name, path in found.items():
                print(f"{verb:7} {name:{width}} {path.read_text().splitlines()[0].lstrip('# ')}")
        return 0
    if options.name not in recipes:
        raise ConfigError(f"no bundled recipe is called {options.name}.{nearest_recipes(options.name)}")
    if options.file is None:
        print(recipes[options.name].read_text(), end="")
        return 0
    target = Path(options.file)
    if target.exists():
        raise ConfigError(f"{target} exists already. Choose another name.")
    target.write_text(recipes[options.name].read_text())
    return 0


def run_env(_: argparse.Namespace) -> int:
    from opdlm.evaluation.retention import versions

    for name, version in versions().items():
        print(f"{name} {version}")
    return 0


def quiet_libraries() -> None:
    """Progress bars and notices of the libraries would tear our own apart."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch|accelerate)\.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
