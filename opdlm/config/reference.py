"""The configuration reference and the JSON schemas of recipes, generated from the settings themselves.

`python -m opdlm.config.reference docs` writes docs/configuration.md, docs/convert.schema.json and
docs/train.schema.json. Editors check a recipe whose first line is
`# yaml-language-server: $schema=docs/convert.schema.json`.
"""

from __future__ import annotations

import json
import sys
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from opdlm.config.loader import describe_fields, field_docstrings, plain
from opdlm.config.sections import Config, RunConfig
from opdlm.config.text import TextConfig

TREES: dict[str, type[RunConfig]] = {"convert": Config, "train": TextConfig}
"""The settings of each verb that has a recipe."""

HEAD = """# Configuration

Every setting of `opdlm convert` and `opdlm train`, with its default. A recipe is a YAML file with these
sections; `section.key=value` or `--section.key value` on the command line changes a setting.
`opdlm convert --list-keys` prints the same list.

Recipes are read as YAML 1.2 has it: only `true` and `false` are truth values (settings that want one also
take yes, no, on and off), `010` is ten, and `1:30` or a date is a text. A key that stands twice is an error.

Written by `python -m opdlm.config.reference docs`.
"""


def reference() -> str:
    """All settings as Markdown, a table per section."""
    parts = [HEAD]
    for verb, tree in TREES.items():
        parts.append(f"\n## `opdlm {verb}`\n")
        section = ""
        for key, default, text in describe_fields(tree):
            name = key.rpartition(".")[0]
            if name != section:
                section = name
                parts.append(f"\n### {section or 'run'}\n\n| key | default | meaning |\n|---|---|---|\n")
            cells = f"`{key}`", f"`{json.dumps(plain(default), ensure_ascii=False)}`", text
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


def json_schema(tree: type[RunConfig]) -> dict[str, Any]:
    """The JSON schema of a recipe. pydantic knows the docstrings of a class, not those that it inherits."""
    schema = TypeAdapter(tree).json_schema()
    for cls in sections_of(tree):
        definition = schema["$defs"].get(cls.__name__, schema)
        for name, text in field_docstrings(cls).items():
            definition["properties"][name]["description"] = text
    return schema


def sections_of(tree: type) -> list[type]:
    """A tree of settings and every section under it."""
    hints = typing.get_type_hints(tree).values()
    below = [hint for hint in hints if isinstance(hint, type) and is_dataclass(hint)]
    return [tree, *(section for hint in below for section in sections_of(hint))]


def main(folder: Path) -> None:
    (folder / "configuration.md").write_text(reference(), encoding="utf-8")
    for verb, tree in TREES.items():
        text = json.dumps(json_schema(tree), indent=1, ensure_ascii=False)
        (folder / f"{verb}.schema.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
