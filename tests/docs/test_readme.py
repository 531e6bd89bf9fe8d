"""README: its tables are those of the committed reports, and its links exist."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result of a real model that README links is shown as its benchmark prints it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    real_models = importlib.import_module("real_models")
    results = re.findall(r"\]\((docs/results/real/\w+\.json)\)", README)
    assert results
    for path in results:
        assert real_models.table(json.loads((ROOT / path).read_text())) in README, path


def test_the_toy_drafts_as_its_committed_report_says() -> None:
    report = json.loads((ROOT / "docs" / "results" / "tiny" / "retention.json").read_text())
    (lossless,) = (mode for mode in report["student"] if mode["name"] == "lossless")
    assert f"drafts {lossless['tokens_per_forward']:.2f} tokens per forward pass" in README


def test_the_demo_answers_as_the_committed_run_did() -> None:
    shown = json.loads((ROOT / "docs" / "results" / "stranger_avx2.json").read_text())["demo"]
    end = max(n for n, line in enumerate(shown) if line.startswith("> ")) - 1
    assert "```\n" + "\n".join(shown[end - 1 : end + 1]) + "\n```" in README


@pytest.mark.parametrize("recipe", ["tiny", "tiny_full", "tiny_sdar"])
def test_the_header_of_a_recipe_says_what_its_committed_report_says(recipe: str) -> None:
    report = json.loads((ROOT / "docs" / "results" / recipe / "retention.json").read_text())
    modes = {mode["name"]: mode for mode in report["student"]}
    lines = (ROOT / "recipes" / f"{recipe}.yaml").read_text().splitlines()
    header = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    accuracy = {
        name.removesuffix(", alone"): f"{100 * mode['accuracy']:.1f} %" for name, mode in modes.items()
    }
    assert f"teacher {100 * report['teacher']['accuracy']:.1f} %" in header
    assert f"static {accuracy['static']} and threshold {accuracy['threshold']}" in header
    speed = modes["lossless" if "lossless" in modes else "threshold"]
    seen, others = speed["tokens_per_forward_seen"], speed["tokens_per_forward_held_out"]
    assert f"{speed['tokens_per_forward']:.2f} tokens per forward" in header
    assert f"({seen:.2f} on the skills of the prompt file, {others:.2f} on the others)" in header


def test_as_many_responses_are_identical_as_the_committed_results_say() -> None:
    found: dict[str, list[int]] = {"float32": [], "bfloat16": []}
    for path in (ROOT / "docs" / "results" / "real").glob("identity_*.json"):
        result = json.loads(path.read_text())
        assert result["num_prompts"] == 100
        found[result["dtype"]].append(result["num_identical"])
    assert found["float32"] == [100, 100, 100] and "100 of 100 responses of each of three" in README
    counts = sorted(found["bfloat16"])
    assert "bfloat16 {}, {} and {} of 100".format(*counts) in README


def test_the_page_is_short_and_its_links_exist() -> None:
    assert 100 <= len(README.splitlines()) <= 140
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
