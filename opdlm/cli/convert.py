"""`opdlm convert`: an autoregressive checkpoint becomes a diffusion model. `opdlm resume`: a run goes on."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import opdlm
from opdlm.cli.flags import Parser, Verbs, add_overrides, add_settings, add_verb, publish, read_settings

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

DESCRIPTION = """Turn an autoregressive checkpoint into a block-diffusion model and measure what it kept.

TARGET is a recipe file, the name of a bundled recipe, or a checkpoint folder or hub id (then give
data.path)."""
EXAMPLES = """  opdlm convert tiny                                        # minutes on a laptop
  opdlm convert tiny output_dir=runs/b8 --format.block_size 8
  opdlm convert preserve_lora --dry-run                     # what it would need and write
  opdlm convert ./my-model data.path=prompts.jsonl format.name=sdar lora.enabled=false \\
      loss.objective=off_policy"""


def add_convert(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "convert",
        run,
        add_convert_flags,
        summary="checkpoint -> diffusion checkpoint",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )


def add_convert_flags(parser: Parser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print parameters, memory, FLOPs, tokens and files, and stop"
    )


def add_resume(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "resume",
        run_resume,
        add_resume_flags,
        summary="continue a run of convert or train with its own settings",
        description="Continue the run in RUN, the output_dir of opdlm convert or train, from its newest "
        "checkpoint. Settings that may change can be given, such as more steps. `opdlm runs` lists runs.",
        examples="  opdlm resume runs/tiny\n  opdlm resume runs/tiny train.num_steps=200",
    )


def add_resume_flags(parser: Parser) -> None:
    parser.add_argument("run_folder", metavar="RUN")
    add_overrides(parser, "section.key=value")


def run_resume(options: argparse.Namespace) -> int:
    from opdlm.api import main_console

    console = main_console()
    folder = opdlm.resume(options.run_folder, overrides=options.overrides, console=console)
    show_report(folder, console)
    console.out(f"\nmodel: {folder}", highlight=False)
    return 0


def show_report(folder: Path, console: Console) -> None:
    """What was measured at the end of a conversion, in the main process of a launch."""
    from opdlm.reporting.pages import read_retention
    from opdlm.reporting.tables import print_report

    report = None if console.quiet else read_retention(folder)
    if report is not None:
        print_report(report, console)


def run(options: argparse.Namespace) -> int:
    from opdlm.api import convert_settings, main_console
    from opdlm.config.sections import Config

    console = main_console()
    shown = None if options.print_config else console
    prints = options.print_config or options.list_keys
    with nullcontext() if prints else console.status("loading libraries and settings"):
        config = read_settings("convert", options, Config, partial(convert_settings, console=shown))
    if config is None:
        return 0
    if options.dry_run:
        console.out(describe(config), highlight=False)
        return 0
    folder = opdlm.convert(config, console=console)
    show_report(folder, console)
    console.out(f"\nconverted checkpoint: {folder}")
    mode = "lossless" if config.format.name == "preserve" else "threshold"
    console.out(f"next: opdlm chat {folder} --mode {mode}", highlight=False)
    publish(folder, options, console)
    return 0


def describe(config: opdlm.Config) -> str:
    """What the run would need and write. Its data and trackers are checked as the run would."""
    from opdlm.api import check_model_path

    check_model_path(config, needs_weights=False)
    from opdlm.distill.plan import check_prompts, describe_plan, make_plan

    return describe_plan(make_plan(config), check_prompts(config))
