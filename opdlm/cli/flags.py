"""Flags and arguments that several verbs share, and how they become settings."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NoReturn,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import opdlm
from opdlm.decoding.decode_config import DecodeConfig, Mode, check_is_read
from opdlm.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from opdlm.config.sections import RunConfig

AnyConfig = TypeVar("AnyConfig", bound="RunConfig")
Run = Callable[[argparse.Namespace], int]

MODES: tuple[Mode, ...] = get_args(Mode)
DECODE_FLAGS = tuple(field.name for field in fields(DecodeConfig))
OLD_FLAGS = {"confidence_threshold": "--threshold", "ar_accept_threshold": "--veto-below"}
"""Earlier names of decoding flags, which are still read."""


class Parser(argparse.ArgumentParser):
    """Explains a wrong command line in one line, as every other mistake. A verb's flags are added when the
    verb is asked for.
    """

    add_flags: Callable[[Parser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.add_flags is not None:
            add_flags, self.add_flags = self.add_flags, None
            add_flags(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"opdlm: {printable(message)}. See: {self.prog} --help\n")


def printable(text: str) -> str:
    """The text in one line: control characters and halves of surrogate pairs as in Python's literals."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_verb(
    verbs: Verbs,
    name: str,
    run: Run,
    add_flags: Callable[[Parser], None] | None = None,
    *,
    summary: str,
    description: str,
    examples: str,
) -> None:
    """A verb whose help ends with examples, one command a line; paragraphs of the description are wrapped."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description="\n\n".join(map(textwrap.fill, description.split("\n\n"))),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, trust_remote_code=False)
    parser.add_flags = add_flags


def add_settings(parser: Parser) -> None:
    """What every verb that trains takes."""
    add_trust(parser)
    parser.add_argument("target", nargs="?", metavar="TARGET")
    add_overrides(parser, "section.key=value")
    parser.add_argument(
        "--list-keys", action="store_true", help="print every setting with its default and meaning"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
    parser.add_argument(
        "--push-to-hub", metavar="USER/NAME", help="publish the result there, as `opdlm push` does"
    )


def add_overrides(parser: Parser, metavar: str) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar=metavar,
        help=f"also written --{metavar} or --{metavar.split('=')[0]} VALUE",
    )


def read_settings(
    verb: str,
    options: argparse.Namespace,
    tree: type[AnyConfig],
    settings_of: Callable[[str, Sequence[str]], AnyConfig],
) -> AnyConfig | None:
    """The settings of a run; None where showing them was all that was asked."""
    if options.list_keys:
        from opdlm.config.loader import describe_fields

        for key, default, text in describe_fields(tree):
            print(f"{key} = {default!r}\n    {text}")
        return None
    if options.target is None:
        raise ConfigError(
            f"{verb} needs a TARGET: a recipe, a recipe's name or a model. See: opdlm {verb} --help"
        )
    trust = ["model.trust_remote_code=true"] if options.trust_remote_code else []
    config = settings_of(options.target, [*options.overrides, *trust])
    if options.print_config:
        print(config.to_yaml(), end="")
        return None
    if options.push_to_hub:
        from opdlm.checkpoints.hub import check_can_push

        check_can_push(options.push_to_hub)
    return config


def publish(folder: Path, options: argparse.Namespace, console: Console) -> None:
    """`--push-to-hub`, in the main process of a launch."""
    if options.push_to_hub and not console.quiet:
        console.out(f"published: {opdlm.push(folder, options.push_to_hub)}", highlight=False)


def add_trust(parser: Parser) -> None:
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that the checkpoint brings; leave it off unless you trust its author",
    )


def add_seed(parser: Parser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every random draw (default: 0)")


def add_dtype(parser: Parser, default: str | None = "auto") -> None:
    """And whether code of the checkpoint is run. `default` None: the precision of the run."""
    add_trust(parser)
    text = "that of the run" if default is None else f"{default}: that of the files, if the processor has it"
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default=default,
        help=f"of the weights (default: {text})",
    )


def add_compile(parser: Parser, what: str) -> None:
    parser.add_argument("--compile", action="store_true", help=f"{what}; the first steps wait for it")


def add_decode_flags(
    parser: Parser,
    *,
    leave_out: Sequence[str] = (),
    modes: Sequence[Mode] = MODES,
    default_text: str | None = None,
    **defaults: Any,
) -> None:
    """A flag for every field of `DecodeConfig` but those left out.

    default_text: what the help says where the flags do not decide the default. defaults: values that differ
    from the class's.
    """
    from opdlm.config.loader import field_docstrings

    group = parser.add_argument_group("decoding")
    hints, docs = get_type_hints(DecodeConfig), field_docstrings(DecodeConfig)
    for field in fields(DecodeConfig):
        if field.name in leave_out:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        default = default_text or defaults.get(field.name, field.default)
        text = f"{docs[field.name]} (default: {default})".replace("%", "%%")
        kind = type_of(hints[field.name])
        if kind is bool:
            group.add_argument(flag, action="store_const", const=True, help=text)
        elif kind is str:
            choices = modes if field.name == "mode" else get_args(hints[field.name])
            group.add_argument(flag, choices=choices, help=text)
        else:
            group.add_argument(flag, type=kind, metavar="N" if kind is int else "X", help=text)
        if field.name in OLD_FLAGS:
            old = OLD_FLAGS[field.name]
            group.add_argument(old, dest=field.name, type=kind, action=OldFlag, help=argparse.SUPPRESS)
    parser.set_defaults(decode_defaults=defaults)


def type_of(hint: Any) -> type:
    """The type of a value on the command line: `int` for `int | None`, `str` for words."""
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) in (Union, types.UnionType):
        return next(option for option in get_args(hint) if option is not type(None))
    assert isinstance(hint, type)
    return hint


class OldFlag(argparse.Action):
    """An earlier name of a flag: it works, and says how the flag is called now."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        print(f"opdlm: {option_string} is now --{self.dest.replace('_', '-')}.", file=sys.stderr)
        setattr(namespace, self.dest, values)


def given_decode(options: argparse.Namespace) -> dict[str, Any]:
    """The decoding flags that the user gave, by the field's name."""
    values = vars(options)
    return {name: values[name] for name in DECODE_FLAGS if values.get(name) is not None}


def decode_config(options: argparse.Namespace) -> DecodeConfig:
    """The decoding flags as settings; ConfigError where a number is out of range."""
    try:
        return DecodeConfig(**{**options.decode_defaults, **given_decode(options)})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def one_mode_config(options: argparse.Namespace, *, is_sampled: bool | None = None) -> DecodeConfig:
    """As `decode_config`, for a verb that decodes in that mode alone: ConfigError also for a flag that the
    mode does not read. `is_sampled`: whether tokens are drawn; None: as the temperature says.
    """
    config = decode_config(options)
    try:
        check_is_read(config, given_decode(options), is_sampled=is_sampled)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return config


SETTING = re.compile(r"`(\w+)(?:=([^`]+))?`|(?<![\w.`-])([a-z]+(?:_[a-z]+)+)\b(?!=)|^(\w+)(?= \()")
"""Where messages of the API name its arguments: in backticks, a name with `_`, or at the start before `(`."""


def with_flag_names(message: str, options: argparse.Namespace) -> str:
    """A message of the API with `max_new_tokens` or `mode=ar` written as the flags of the verb."""

    def flag_of(match: re.Match[str]) -> str:
        name = match[1] or match[3] or match[4]
        if name not in vars(options):
            return match[0]
        return f"--{name.replace('_', '-')}" + (f" {match[2]}" if match[2] and match[2] != "True" else "")

    return SETTING.sub(flag_of, message)
