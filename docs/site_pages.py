"""The site's pages that are not files of docs/: the pages at the top of the checkout, `opdlm VERB --help` and
the Python API. MkDocs runs this file (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import os
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import opdlm
from opdlm.cli.main import build_parser

ROOT = Path(__file__).parents[1]
TOP = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "ARCHITECTURE.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
"""Pages at the top of the checkout and their places in the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages. Links of the top pages into docs/ become links beside them."""
    pages = {place: (ROOT / name).read_text().replace("](docs/", "](") for name, place in TOP.items()}
    for place, text in {**pages, "command_line.md": command_line(), "api.md": api()}.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """A page that is alone in its tab needs no bar beside it."""
    if page.parent is None:
        page.meta["hide"] = ["navigation"]


def command_line() -> str:
    """The help of every verb, 92 columns wide."""
    os.environ["COLUMNS"] = "92"
    parser = build_parser()
    (verbs,) = parser._subparsers._group_actions
    text = f"# Command line\n\n```text\n{parser.format_help()}```\n"
    for name, verb in verbs.choices.items():
        if verb.add_flags is not None:
            verb.add_flags(verb)
        text += f"\n## opdlm {name}\n\n```text\n{verb.format_help()}```\n"
    return text


def api() -> str:
    """The docstring of every public name."""
    names = [name for name in opdlm.__all__ if name != "__version__"]
    functions = sorted(names, key=lambda name: (name[0].isupper(), name))
    blocks = "\n".join(f"::: opdlm.{name}\n" for name in functions)
    return f"# Python API\n\n[The guide](python_api.md) shows these functions at work.\n\n{blocks}"
