"""`opdlm eval`: what a converted model kept, and likelihoods of text. `opdlm runs`: which runs there are.
`opdlm report`: the curves of a run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import opdlm
from opdlm.cli.flags import Parser, Verbs, add_decode_flags, add_dtype, add_verb, given_decode
from opdlm.errors import ConfigError

DESCRIPTION = """Measure a converted folder against its teacher: accuracy per skill in each decoding mode,
tokens per forward with every forward counted, share of outputs identical to the teacher's. Several folders
are measured on the same prompts and compared. eval.key=value changes any other setting."""
EXAMPLES = """  opdlm eval runs/tiny/model
  opdlm eval runs/tiny/model --limit 10 --modes static lossless --out report
  opdlm eval runs/tiny/model --temperature 1 --seeds 3 --out sampled
  opdlm eval runs/a/model runs/b/model --thresholds 0.5 0.7 0.9 0.99 --out comparison
  opdlm eval runs/text/model runs/dual/model --text held_out.jsonl --out likelihood
  opdlm eval runs/dual/model --text questions.jsonl --metrics ar_nll,md_bound,options"""

LISTED = ("modes", "thresholds", "limit", "seeds")
"""Flags that stand for the setting `eval.NAME`; decoding flags stand for `eval.decode.NAME`."""
DECODED_BY_TASKS = ("mode", "entropy_bound", "logprobs")
"""Decoding settings that a measurement does not read."""


def add_eval(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "eval",
        run_eval,
        add_eval_flags,
        summary="retention report of converted checkpoints",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )


def add_eval_flags(parser: Parser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument(
        "--teacher", help="the original checkpoint, for sdar folders (default: the one that the run names)"
    )
    parser.add_argument("--modes", nargs="+", metavar="MODE", help="ar, static, threshold, lossless")
    parser.add_argument("--limit", type=int, metavar="N", help="prompts per skill, or with --text rows")
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="with --temperature: mean and spread over so many seeds"
    )
    parser.add_argument(
        "--thresholds", nargs="+", metavar="X", help="draw accuracy against tokens per forward over these"
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="write report.html, report.md, retention.json, timing.json, pictures and generations.jsonl "
        "here; a killed command continues",
    )
    add_dtype(parser, default=None)
    add_decode_flags(parser, leave_out=DECODED_BY_TASKS, default_text="that of the run")
    add_task_flags(parser.add_argument_group("tasks of lm-evaluation-harness"))
    add_text_flags(parser.add_argument_group("likelihood of text"))
    parser.set_defaults(overrides=[])


def add_task_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tasks", metavar="NAMES", help="by commas, instead (pip install 'opdlm[eval]')")
    group.add_argument("--include-path", metavar="FOLDER", help="YAML tasks of your own, with --tasks")
    group.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question, with --tasks"
    )
    group.add_argument("--chat-template", action="store_true", help="ask through it, with --tasks")


def add_text_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--text",
        metavar="FILE",
        help="likelihood of this text instead, or of questions with `prompt`, `options` and the index "
        "`answer`; for any checkpoint",
    )
    group.add_argument(
        "--metrics",
        metavar="NAMES",
        help="with --text: ar_nll, prefix_nll, md_bound, pll, pll_right1, pll_right2 (tokens masked beside "
        "it), options; by commas (default: what the model was trained for)",
    )
    group.add_argument(
        "--num-rates", type=int, metavar="N", help="mask rates per row of md_bound, with --text (default: 32)"
    )
    group.add_argument(
        "--prediction",
        choices=("same_position", "next_position"),
        help="what masked positions predict, with --text and a plain checkpoint that has a mask token",
    )


def add_runs(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "runs",
        run_runs,
        add_runs_flags,
        summary="the runs in a folder, with state, step and time left",
        description="List the runs of opdlm convert and train in FOLDER and below it. The time left is that "
        "of the steps, at the speed of the last ones.",
        examples="  opdlm runs\n  opdlm runs experiments",
    )


def add_runs_flags(parser: Parser) -> None:
    parser.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="default: runs")


def run_runs(options: argparse.Namespace) -> int:
    from rich.console import Console

    from opdlm.reporting.tables import print_table, runs_table

    print_table(runs_table(opdlm.runs(options.folder)), Console())
    return 0


def add_report(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "report",
        run_report,
        add_report_flags,
        summary="curves of runs, finished or not",
        description="Draw the curves that a run has logged so far, and what was measured, into "
        "RUN/report.html; those of several runs in the same axes, into FOLDER/report.html.",
        examples="  opdlm report runs/tiny\n  opdlm report runs/a runs/b --out runs/compared\n"
        "  opdlm report runs/tiny --watch 10",
    )


def add_report_flags(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", metavar="FOLDER", help="where the page of several runs is written")
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        type=int,
        help="draw it again every so many seconds until the runs end; the open page reloads itself",
    )


def run_eval(options: argparse.Namespace) -> int:
    from opdlm.api import on_this_machine

    is_override = {text: "=" in text and not Path(text).exists() for text in options.folders}
    folders = [Path(on_this_machine(text)) for text in options.folders if not is_override[text]]
    if not folders:
        raise ConfigError("eval needs a DIR written by opdlm convert, before any eval.key=value.")
    overrides = [*(text for text in options.folders if is_override[text]), *options.overrides]
    if options.dtype and (options.text or options.tasks or len(folders) > 1):
        raise ConfigError("--dtype is for the report of one DIR: leave it out.")
    if options.text:
        return run_text(options, folders, overrides)
    if options.metrics or options.num_rates is not None or options.prediction:
        raise ConfigError("--metrics, --num-rates and --prediction belong to --text: give the file.")
    for_tasks = (options.include_path, options.num_fewshot is not None, options.chat_template)
    if not options.tasks and any(for_tasks):
        raise ConfigError(
            "--include-path, --num-fewshot and --chat-template belong to --tasks: name the tasks."
        )
    from rich.console import Console

    from opdlm.checkpoints.folders import check_is_converted

    for folder in folders:
        check_is_converted(folder)
    overrides += settings_of_flags(options)
    if options.tasks:
        return run_tasks(options, folders, overrides)
    if len(folders) > 1:
        return run_comparison(options, folders, overrides)
    report = opdlm.evaluate(
        folders[0],
        teacher=options.teacher,
        out=options.out,
        dtype=options.dtype,
        overrides=overrides,
        console=Console(stderr=True),
    )
    from opdlm.reporting.pages import HTML_FILE
    from opdlm.reporting.tables import print_report

    print_report(report, Console())
    if options.out:
        print(f"report: {Path(options.out) / HTML_FILE}")
    return 0


def settings_of_flags(options: argparse.Namespace) -> list[str]:
    """What the flags say, as `eval.key=value`."""
    listed = {name: vars(options)[name] for name in LISTED}
    values = listed | {f"decode.{name}": value for name, value in given_decode(options).items()}
    return [
        f"eval.{name}={','.join(value) if isinstance(value, list) else value}"
        for name, value in values.items()
        if value is not None
    ]


def run_comparison(options: argparse.Namespace, folders: Sequence[Path], overrides: Sequence[str]) -> int:
    """The reports of several folders, and one table."""
    from rich.console import Console

    from opdlm.evaluation.retention import compare_folders, eval_config
    from opdlm.reporting.pages import HTML_FILE
    from opdlm.reporting.tables import comparison_table, print_table

    configs = [eval_config(folder, overrides) for folder in folders]
    if options.out is None:
        raise ConfigError("several DIRs need --out FOLDER, where their reports and the table are written.")
    out = Path(options.out)
    print_table(
        comparison_table(compare_folders(folders, configs, out, options.teacher, Console(stderr=True))),
        Console(),
    )
    print(f"\nreport: {out / HTML_FILE}")
    return 0


def run_tasks(options: argparse.Namespace, folders: Sequence[Path], overrides: Sequence[str]) -> int:
    """Tasks of lm-evaluation-harness in every mode."""
    if len(folders) > 1:
        raise ConfigError("--tasks measures one DIR: run it for each of them.")
    if options.teacher:
        raise ConfigError("--teacher has no effect with --tasks: leave it out.")
    from opdlm.evaluation.lm_eval import check_overrides, evaluate_tasks
    from opdlm.evaluation.retention import eval_config

    check_overrides(overrides)
    results = evaluate_tasks(
        folders[0],
        eval_config(folders[0], overrides),
        options.tasks.split(","),
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        chat_template=options.chat_template,
        out=Path(options.out) if options.out else None,
    )
    for mode, tasks in results.items():
        for task, numbers in tasks.items():
            shown = {k: v for k, v in numbers.items() if isinstance(v, int | float)}
            print(f"{mode} {task} " + " ".join(f"{k}={v:.4f}" for k, v in shown.items()))
    return 0


def run_text(options: argparse.Namespace, folders: Sequence[Path], overrides: Sequence[str]) -> int:
    """Likelihoods of a file of text or of questions."""
    elsewhere = (*LISTED, "teacher", "tasks", "include_path", "num_fewshot", "chat_template")
    for flag in sorted({*elsewhere, *given_decode(options)} - {"limit"}):
        if vars(options)[flag] not in (None, False):
            raise ConfigError(f"--{flag.replace('_', '-')} has no effect with --text: leave it out.")
    from rich.console import Console

    from opdlm.checkpoints.folders import check_is_checkpoint

    for folder in folders:
        check_is_checkpoint(str(folder), setting="")
    from opdlm.reporting.tables import print_table
    from opdlm.text.evaluate import RESULT_FILE, evaluate_text
    from opdlm.text.likelihood_models import LikelihoodOptions

    out = Path(options.out) if options.out else None
    rates = {} if options.num_rates is None else {"num_rates": options.num_rates}
    table = evaluate_text(
        folders,
        options.text,
        options.metrics.split(",") if options.metrics else (),
        options.limit,
        LikelihoodOptions(prediction=options.prediction, overrides=tuple(overrides), **rates),
        out,
    )
    print_table(table, Console())
    if out is not None:
        print(f"\nreport: {out / RESULT_FILE}")
    return 0


def run_report(options: argparse.Namespace) -> int:
    from opdlm.reporting.pages import write_overlay, write_run_page
    from opdlm.training.run_folder import is_owned

    runs = list(map(Path, options.runs))
    if (len(runs) > 1) != (options.out is not None):
        raise ConfigError("report writes one RUN into its own folder, and several RUNs into --out FOLDER.")
    if options.watch is not None and options.watch < 1:
        raise ConfigError(f"--watch ({options.watch}) is a number of seconds: give 1 or more.")
    while True:
        reload_seconds = options.watch if any(map(is_owned, runs)) else None
        if options.out:
            page = write_overlay(runs, Path(options.out), reload_seconds)
        else:
            page = write_run_page(runs[0], reload_seconds)
        if reload_seconds is None:
            break
        print(f"report: {page}, drawn again every {reload_seconds} s until the end", flush=True)
        time.sleep(reload_seconds)
    print(f"report: {page}")
    return 0
