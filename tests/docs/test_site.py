"""The site is built without a warning, loads nothing from other hosts, and its search finds every page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import opdlm

ROOT = Path(__file__).parents[2]


def test_the_site_has_no_dead_link_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """`--strict`: a dead link or anchor, a page outside the navigation or a bad docstring is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    pages = list(tmp_path.rglob("*.html"))
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]* rel="(?:stylesheet|preconnect|icon)"[^>]* href="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]* href="([^"]+)"[^>]* rel="(?:stylesheet|preconnect|icon)"', text)
        assert loaded and not [target for target in loaded if target.startswith(("http", "//"))], page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", sheet.read_text()), sheet
    index = json.loads((tmp_path / "search" / "search_index.json").read_text())
    found = {entry["location"] for entry in index["docs"]}
    assert {page.relative_to(tmp_path).as_posix() for page in pages} - {"404.html"} <= found
    assert {f"api.html#opdlm.{name}" for name in opdlm.__all__ if name != "__version__"} <= found
    assert "command_line.html#opdlm-convert" in found


def test_every_link_between_pages_also_works_in_the_checkout() -> None:
    """The site has pages that are no files; docs/ must not link them."""
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"
