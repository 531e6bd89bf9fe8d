"""`opdlm recipes`: bundled settings. `opdlm env`: versions and hardware."""

from __future__ import annotations

import argparse
from pathlib import Path

from opdlm.cli.flags import Parser, Verbs, add_verb
from opdlm.config.recipes import bundled_recipes, nearest_recipes
from opdlm.errors import ConfigError


def add_recipes(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "recipes",
        run_recipes,
        add_recipes_flags,
        summary="list bundled recipes, or copy one",
        description="List the bundled recipes, print one, or copy it to a file of your own.",
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
    from opdlm.environment import describe_environment

    for name, value in describe_environment().items():
        print(f"{name}: {value}")
    return 0
