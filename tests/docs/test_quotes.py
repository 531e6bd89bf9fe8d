"""What the pages quote of the code is there: messages, files, functions, settings of commands."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def texts_of(tree: ast.AST) -> list[str]:
    """Every string of the code, with `…` for what is inserted."""
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def test_every_sentence_of_the_troubleshooting_page_is_in_the_code() -> None:
    texts = [t for file in (ROOT / "opdlm").rglob("*.py") for t in texts_of(ast.parse(file.read_text()))]
    quotes = re.findall(r"^> (.+)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quotes) > 30
    assert not [quote for quote in quotes if not any(quote in text for text in texts)]


def names_of(file: Path) -> set[str]:
    """Functions, classes and constants of a module."""
    tree = ast.parse(file.read_text())
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return found | {target.id for target in targets if isinstance(target, ast.Name)}


def test_every_file_and_function_that_a_page_names_exists() -> None:
    """`folder/file.py` and `folder/file.py::name`; concepts.md leaves out `opdlm/`. Files of other projects
    stand in folders that are none of ours.
    """
    named = [
        (page.name, *reference)
        for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
        for reference in re.findall(r"`((?:\w+/)+\w+\.(?:py|yaml))(?:::(\w+))?`", page.read_text())
    ]
    assert {"papers.md", "concepts.md", "extending.md"} <= {page for page, _, _ in named}
    for page, path, name in named:
        if not any((root / path.split("/")[0]).is_dir() for root in (ROOT, ROOT / "opdlm")):
            continue
        file = next((place for place in (ROOT / path, ROOT / "opdlm" / path) if place.is_file()), None)
        assert file is not None, f"{page}: {path}"
        assert not name or name in names_of(file), f"{page}: {path}::{name}"


def test_the_plan_at_scale_is_what_its_benchmark_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    page = (DOCS / "scale.md").read_text()
    assert all(table in page for table in importlib.import_module("scale_plan").tables().split("\n\n"))
