"""Dataclasses from YAML files and `section.key=value` strings, with every mistake explained.

Nothing here knows which settings exist: a tree of dataclasses says that, its types are checked, and the
docstring under a field is its help text.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from opdlm.errors import ConfigError

Section = TypeVar("Section")


def plain(value: Any) -> Any:
    """Tuples as lists, recursively, as YAML and JSON have them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_recipe(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the recipe {path}: {error.strerror}. Give an existing YAML file."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first_line = " ".join(str(error).split())
        raise ConfigError(f"recipe {path} is not valid YAML: {first_line}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path} must be a mapping of sections, not {type(values).__name__}.")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"override {override!r} is not of the form section.key=value, for example train.num_steps=10."
        )
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {section} is a value, not a section.")
    values[name] = value


def build_section(
    cls: type[Section],
    values: Mapping[str, Any],
    prefix: str = "",
    root: type | None = None,
    verb: str = "convert",
) -> Section:
    """A dataclass from plain values; unknown keys (of the tree `root` of `verb`) and wrong types are
    explained.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(unknown_key(f"{prefix}{key}", cls, prefix, root or cls, verb))
    built = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{name} is a section: set its keys, for example {name}.{fields(hints[key])[0].name}."
                )
            built[key] = build_section(hints[key], value, f"{name}.", root or cls, verb)
        else:
            built[key] = convert_value(name, value, hints[key])
    return cls(**built)


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


def convert_value(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or a ConfigError naming key, value and rule."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        return convert_value(name, value, fitting(value, options))
    if origin is Literal:
        if isinstance(value, bool):  # YAML reads a bare `no` as false
            words = ("yes", "on") if value else ("no", "off")
            value = next((word for word in words if word in arguments), value)
        if value not in arguments:
            near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
            hint_text = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{name} ({value!r}) must be one of {', '.join(map(str, arguments))}.{hint_text}"
            )
        return value
    if origin is tuple:
        items = items_of(value, int in arguments)
        kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
        if len(items) != len(kinds):
            raise ConfigError(f"{name} ({value!r}) needs {len(kinds)} values.")
        return tuple(convert_value(name, item, kind) for item, kind in zip(items, kinds, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} ({value!r}) must be a mapping: {name}.KEY=VALUE.")
        return {str(k): convert_value(f"{name}.{k}", v, arguments[1]) for k, v in value.items()}
    return convert_scalar(name, value, hint)


def items_of(value: Any, are_whole_numbers: bool) -> Any:
    """A list, or `a,b` as overrides give it; a single value is a list of one."""
    if isinstance(value, list | tuple):
        return value
    parts = [part for part in str(value).split(",") if part]
    return [yaml.safe_load(part) for part in parts] if are_whole_numbers else parts


def fitting(value: Any, options: list[Any]) -> Any:
    """The member of a union that a value is meant for: a known word, a list, or anything else."""
    is_list = isinstance(value, list | tuple) or "," in str(value)
    for option in options:
        origin = typing.get_origin(option)
        if (origin is tuple and is_list) or (origin is Literal and str(value) in typing.get_args(option)):
            return option
    scalars = [option for option in options if typing.get_origin(option) is None]
    return (scalars or options)[0]


def convert_scalar(name: str, value: Any, kind: type) -> Any:
    is_bool = isinstance(value, bool)
    if kind is bool and is_bool:
        return value
    if kind is int and isinstance(value, int) and not is_bool:
        return value
    if kind is float and not is_bool and isinstance(value, int | float | str):
        try:
            return float(value)  # YAML reads 1e-5 as text
        except ValueError:
            pass
    if kind is str and isinstance(value, str | int | float) and not is_bool:
        return str(value)
    raise ConfigError(f"{name} ({value!r}) must be {kind.__name__}, not {type(value).__name__}.")


def describe_fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, default, help text) of every setting."""
    hints = typing.get_type_hints(cls)
    docs = field_docstrings(cls)
    default = cls()
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
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
