"""`opdlm study`: a grid of small trainings, and whether published findings hold in it."""

from __future__ import annotations

import argparse
from pathlib import Path

from opdlm.cli.flags import Parser, Verbs, add_overrides, add_verb
from opdlm.config.recipes import bundled_recipes
from opdlm.errors import ConfigError, DataError

EXAMPLES = """  opdlm study
  opdlm study parity --out runs/parity
  opdlm study mask_window --run.train.num_steps 300 seeds=0,1 --out runs/mask_window --processes 1
  opdlm study dual_repetition_paper --dry-run"""


def add_study(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "study",
        run,
        add_study_flags,
        summary="a grid of small trainings and what it says about published findings",
        description="Run a study: many small trainings with several seeds, one process per core. table.md, "
        "results.json and study.png in DIR say for each published finding whether it holds, by rules on the "
        "data. The same command continues after an interruption. NAME is a bundled study or a file of your "
        "own; without it the studies are listed.",
        examples=EXAMPLES,
    )


def add_study_flags(parser: Parser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME")
    add_overrides(parser, "section.key=value")
    parser.add_argument("--out", metavar="DIR", help="where everything is written")
    parser.add_argument("--processes", type=int, metavar="N", help="runs at a time (default: one per core)")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (default: the study's own)")
    parser.add_argument("--dry-run", action="store_true", help="check every run, list them, and stop")


def run(options: argparse.Namespace) -> int:
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
        value = vars(options)[flag]
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} ({value}) must be at least 1.")
    recipe = Path(options.name) if is_file else studies[options.name]
    from rich.console import Console

    from opdlm.studies.run import TABLE_FILE, describe_plan, read_plan, run_study

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
