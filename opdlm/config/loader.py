"""Settings from YAML files and `section.key=value` strings, with every mistake explained in one sentence.

Nothing here knows which settings exist: pydantic validates a tree of dataclasses, and the docstring under a
field is its help text.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import logging
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from opdlm.errors import ConfigError

Section = TypeVar("Section")

logger = logging.getLogger(__name__)

DECODE_KEYS = {
    **{key: key for key in ("max_new_tokens", "batch_size", "temperature", "confidence_threshold")},
    "veto_below": "ar_accept_threshold",
}
OLD_KEYS = {
    "train.passes_per_rollout": "train.epochs_per_rollout",
    "rollout.remasking": "rollout.decode.mode",
    **{f"rollout.{key}": f"rollout.decode.{key}" for key in ("top_k", "top_p", "denoising_steps")},
    **{f"rollout.{old}": f"rollout.decode.{new}" for old, new in DECODE_KEYS.items()},
    **{f"eval.{old}": f"eval.decode.{new}" for old, new in DECODE_KEYS.items()},
    "eval.forward_overhead": "eval.decode.forward_overhead",
}
"""Earlier names of settings, which recipes and result folders may still use."""


YAML_1_1 = re.compile(r"(?i)yes|no|on|off|=|.*[:_].*|\d{4}-\d.*|[-+]?0[0-7b].*")
"""Plain words that are truth values, base-60 and base-8 numbers or dates in YAML 1.1, and texts here."""
NO_TEXT = re.compile("[\0\ud800-\udfff]")
"""NUL, and halves of surrogate pairs, which stand for undecodable bytes in arguments and standard input."""


class RecipeLoader(yaml.SafeLoader):
    """YAML without the surprises of version 1.1 (`YAML_1_1`), and without keys that occur twice."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        is_text = kind is yaml.ScalarNode and implicit[0] and YAML_1_1.fullmatch(value)
        return self.DEFAULT_SCALAR_TAG if is_text else super().resolve(kind, value, implicit)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise yaml.YAMLError(f"{key.value} stands twice, in line {lines[key.value]} and {line}")
                lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and NO_TEXT.search(value):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1} has NUL or half a surrogate pair")
        return value


def read_yaml(text: str) -> Any:
    """The value of a YAML text. YAMLError where it is none, nests too deeply or has numbers without end."""
    try:
        return yaml.load(text, RecipeLoader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, LookupError, AttributeError) as error:  # such as thousands of digits, `!!bool x`
        raise yaml.YAMLError(f"a value does not fit its type ({error})") from error


def plain(value: Any) -> Any:
    """Tuples as lists, recursively, as YAML and JSON have them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def read_recipe(path: Path) -> dict[str, Any]:
    """The tree of a YAML file, old names replaced. ConfigError where it is not one."""
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the recipe {path}: {error.strerror}. Give an existing YAML file."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first_line = " ".join(str(error).split())
        raise ConfigError(f"recipe {path} is not valid YAML: {first_line}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path} must be a mapping of sections, not {type(values).__name__}.")
    rename_old_keys(values)
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Enter `section.key=value` into a tree. The value is read as YAML; an old name is replaced."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"override {override!r} is not of the form section.key=value, for example train.num_steps=10."
        )
    try:
        value = read_yaml(text) if text else ""
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{key} ({text!r}) has a character that is no text ({error.reason}).") from None
    except yaml.YAMLError as error:
        if text.startswith(("[{", "{")):
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{key} ({text}) is not valid YAML: quote texts with brackets ({reason})."
            ) from None
        value = text
    if key in OLD_KEYS:
        tell_renamed(f"{key} is now {OLD_KEYS[key]}")
    set_value(values, OLD_KEYS.get(key, key), value)


def override_of(key: str, text: str) -> str:
    """`key=value` that `apply_override` reads as this text, whatever YAML would make of it."""
    if NO_TEXT.search(text):
        raise ConfigError(f"{key} ({text!r}) has a character that is no text.")
    quoted = yaml.safe_dump(text, default_style='"', width=math.inf, allow_unicode=True)
    return f"{key}={quoted.rstrip()}"


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section.")
    values[name] = value


def read_settings(recipe: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """A recipe changed by overrides."""
    values = read_recipe(recipe) if recipe is not None else {}
    for override in overrides:
        apply_override(values, override)
    return values


def rename_old_keys(values: dict[str, Any]) -> None:
    """Replace old names of settings, in place. ConfigError where the new name is there too."""
    found, given = [], flat(values)
    for old, new in OLD_KEYS.items():
        section, key = old.split(".")
        tree = values.get(section)
        if isinstance(tree, dict) and key in tree:
            if new in given:
                raise ConfigError(f"{old} is an old name of {new}, and both are given: leave {old} out.")
            set_value(values, new, tree.pop(key))
            found.append(f"{old} is now {new}")
    if found:
        tell_renamed("; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else ""))


@cache
def tell_renamed(names: str) -> None:
    """One notice per process: the settings of a result folder are read several times."""
    logger.warning("opdlm: settings have new names: %s.", names)


def build_section(
    cls: type[Section],
    values: Mapping[str, Any],
    prefix: str = "",
    root: type | None = None,
    verb: str = "convert",
) -> Section:
    """A section from plain values. ConfigError names the first wrong key; unknown keys are looked for in the
    tree `root` of `verb`.
    """
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:  # pydantic ignores those that a plain dataclass, such as a study's grid, lacks
            raise ConfigError(unknown_key(f"{prefix}{key}", cls, prefix, root or cls, verb))
    try:
        return TypeAdapter(cls).validate_python(prepare(cls, values, prefix))
    except ValidationError as error:
        raise ConfigError(explain(error, cls, prefix, root or cls, verb)) from None


def prepare(cls: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What YAML and command lines write differently from Python: `a,b` for a list, `true` for a word."""
    hints = typing.get_type_hints(cls)
    prepared: dict[str, Any] = {}
    for key, value in values.items():
        hint = hints.get(key)
        if isinstance(hint, type) and is_dataclass(hint):
            if not isinstance(value, Mapping):
                example = f"{prefix}{key}.{fields(hint)[0].name}"
                raise ConfigError(f"{prefix}{key} is a section: set its keys, for example {example}.")
            prepared[key] = prepare(hint, value, f"{prefix}{key}.")
        else:
            prepared[key] = prepare_value(value, hint, f"{prefix}{key}")
    return prepared


def prepare_value(value: Any, hint: Any, name: str) -> Any:
    options = members(hint)
    entries = [entry for option in options for part in typing.get_args(option) for entry in members(part)]
    for cls in filter(is_dataclass, entries):  # a list whose entries may be sections
        if isinstance(value, Mapping):
            raise ConfigError(f"{name} ({value}) must be a list of such mappings: [{{...}}].")
        if isinstance(value, list | tuple):
            return [
                build_section(cls, item, f"{name}[{i}].") if isinstance(item, Mapping) else item  # type: ignore[arg-type]
                for i, item in enumerate(value)
            ]
    if any(typing.get_origin(option) is tuple for option in options) and not isinstance(value, list | tuple):
        is_word = any(typing.get_origin(option) is Literal for option in options)
        if value is None or is_word or (str in options and "," not in str(value)):
            return value
        return [part for part in str(value).split(",") if part]
    if isinstance(value, bool) and bool not in options:
        return str(value).lower()
    return value


def members(hint: Any) -> list[Any]:
    """The types of a union, without their bounds."""
    if typing.get_origin(hint) is Annotated:
        return members(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [member for option in typing.get_args(hint) for member in members(option)]
    return [hint]


def explain(error: ValidationError, cls: type, prefix: str, root: type, verb: str) -> str:
    """The first wrong key as one sentence: name, value, rule."""
    errors = error.errors()
    path, owner = field_path(cls, errors[0]["loc"])
    name = prefix + ".".join(path)
    if errors[0]["type"] == "unexpected_keyword_argument":
        return unknown_key(name, owner, name.removesuffix(path[-1]), root, verb)
    if errors[0]["type"] == "value_error":  # of a section that checks itself, which names its key
        return f"{name}.{errors[0]['ctx']['error']}"
    found = most_telling([other for other in errors if field_path(cls, other["loc"])[0] == path])
    hint = typing.get_type_hints(owner, include_extras=True)[path[-1]]
    return f"{name} ({found['input']!r}) {rule_of(found, hint, name)}"


def field_path(cls: type, loc: Sequence[int | str]) -> tuple[list[str], type]:
    """Names of the sections and of the key that an error lies in, and the section that has the key."""
    path: list[str] = []
    for part in loc:
        path.append(str(part))
        hint = typing.get_type_hints(cls).get(str(part))
        if not (isinstance(hint, type) and is_dataclass(hint)):
            break
        cls = hint
    return path, cls


def most_telling(errors: list[ErrorDetails]) -> ErrorDetails:
    """Every member of a union has its own error: that of the words for a word, else the innermost other."""
    words = [error for error in errors if error["type"] == "literal_error"]
    others = [error for error in errors if error["type"] != "literal_error"]
    if words and (not others or isinstance(words[0]["input"], str)):
        return words[0]
    return max(others, key=lambda error: len(error["loc"]))


def rule_of(error: ErrorDetails, hint: Any, name: str) -> str:
    """What a value must be, as the end of a sentence that starts with its key."""
    kind, value = error["type"], error["input"]
    match kind:
        case "literal_error":
            choices = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
            near = difflib.get_close_matches(str(value), choices.split(", "), n=1)
            others = ", or float" if float in members(hint) else ""
            return f"must be one of {choices}{others}." + (f" Did you mean {near[0]}?" if near else "")
        case "finite_number":
            return "must be finite."
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return f"must {bounds_of(hint)}."
        case "tuple_type" if not isinstance(error["loc"][-1], int):
            return "must be a list."
        case "tuple_type" | "too_long" | "too_short" | "missing":
            return "needs 2 values."
        case "string_pattern_mismatch":
            return "must be seconds, or a time such as 90m, 2h30m or 1d."
        case "string_too_short":
            return "must not be empty."
        case "dict_type":
            return f"must be a mapping: {name}.KEY=VALUE."
    wanted = kind.split("_")[0]
    return f"must be {WORDS.get(wanted, wanted)}, not {type(value).__name__}."


WORDS = {"string": "str"}
"""Names of types where pydantic's errors have others."""


def bounds_of(hint: Any) -> str:
    """The range of a number: its ends, or the one that it has."""
    ends: dict[str, Any] = {}
    for option in [hint, *typing.get_args(hint)]:
        for info in typing.get_args(option)[1:] if typing.get_origin(option) is Annotated else ():
            ends |= {name: bound for item in info.metadata for name, bound in asdict(item).items()}
    low, high = ends.get("ge", ends.get("gt")), ends.get("le", ends.get("lt"))
    if high is not None:
        return f"lie between {low} and {high}"
    return f"be greater than {low}" if "gt" in ends else f"be at least {low}"


def unknown_key(name: str, cls: type, prefix: str, root: type, verb: str) -> str:
    key = name.removeprefix(prefix)
    near = difflib.get_close_matches(key, [f.name for f in fields(cls)], n=1, cutoff=0.6)
    candidates = [prefix + near[0]] if near else []
    everything = [full for full, _, _ in describe_fields(root)]
    if not candidates:  # the right name in another section
        candidates = [full for full in everything if full.split(".")[-1] == key.split(".")[-1]]
    if not candidates:
        candidates = difflib.get_close_matches(name, everything, n=1, cutoff=0.4)
    hint = f" Did you mean {candidates[0]}?" if candidates else ""
    return f"unknown key {name}.{hint} `opdlm {verb} --list-keys` shows all."


def describe_fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, default, help text) of every setting."""
    hints = typing.get_type_hints(cls)
    docs = field_docstrings(cls)
    default = cls()
    for f in fields(cls):
        if isinstance(hints[f.name], type) and is_dataclass(hints[f.name]):
            yield from describe_fields(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", getattr(default, f.name), docs.get(f.name, "")


def field_docstrings(cls: type) -> dict[str, str]:
    """The string literal that stands under each field, here or in a base class."""
    docs = field_docstrings(cls.__base__) if is_dataclass(cls.__base__) else {}
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    for statement, following in itertools.pairwise(body):
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and is_text:
            docs[ast.unparse(statement.target)] = " ".join(following.value.value.split())
    return docs
