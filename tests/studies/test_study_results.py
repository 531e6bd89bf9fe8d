"""The committed results of the studies are those of the bundled recipes, and docs/studies.md is theirs."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from opdlm.config.loader import plain, rename_old_keys
from opdlm.studies.run import STUDIES, read_plan
from opdlm.studies.text_runs import prepare_text

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "study"
NAMES = sorted(path.parent.name for path in RESULTS.glob("*/results.json"))
PAGE = ROOT / "docs" / "studies.md"
MINUTES = 60
"""Of one core: half an hour on two."""
HEAD = """# Studies: published claims on small models

`opdlm study NAME` tests published claims about training objectives on small models with several seeds.
Each study takes about half an hour on two cores. A fixed rule computes every verdict from the runs; the
table of each study, linked below, states the rule with the numbers and a plot.

- `holds`: the data support the claim, usually by a 95 % interval over seeds.
- `does not hold`: the data exclude an effect that would matter.
- `undecided`: the data allow both.
- `regime-dependent`: the claim holds in some settings of the study and not in others.

A verdict is valid at the size of its study, not at the size of the publication. Recipes at published size
are included as `opdlm study NAME_paper`; they were not run here.

Written by `python tests/studies/test_study_results.py > docs/studies.md`."""


def committed(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / name / "results.json").read_text())
    return found


def test_every_study_was_run() -> None:
    assert set(NAMES) >= set(STUDIES)


@pytest.mark.parametrize("name", NAMES)
def test_results_are_those_of_the_recipe_and_of_half_an_hour_on_two_cores(name: str) -> None:
    found, plan = committed(name), read_plan(ROOT / f"recipes/studies/{name}.yaml", [])
    assert found["seeds"] == list(plan.seeds)
    assert found["grid"] == json.loads(json.dumps(plain(asdict(plan.grid))))
    rename_old_keys(found["run"])
    assert found["run"] == json.loads(json.dumps(plain(plan.run)))
    assert set(found["cells"]) == {cell.name for cell in plan.cells} and not found["errors"]
    assert sum(cell["seconds"] for cell in found["cells"].values()) <= 60 * MINUTES


@pytest.mark.parametrize("name", NAMES)
def test_verdicts_are_those_of_the_present_rules(name: str, tmp_path: Path) -> None:
    found, plan = committed(name), read_plan(ROOT / f"recipes/studies/{name}.yaml", [])
    if name.startswith("dual"):
        pytest.importorskip("sklearn", reason="the extra `study` draws the optimum")
    if name == "mask_window":  # t* comes from the standard library of the Python that ran
        if found["versions"]["python"] != platform.python_version():
            pytest.skip("another standard library")
        prepare_text(tmp_path)
    findings = plan.study.module.conclude(list(found["cells"].values()), plan.grid, tmp_path)
    assert [asdict(claim) for claim in findings.claims] == found["predictions"]


def test_the_page_of_studies_is_true() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def page() -> str:
    """docs/studies.md."""
    parts = [HEAD]
    for name in NAMES:
        found = committed(name)
        runs, seeds = len(found["cells"]), len(found["seeds"])
        parts += [f"\n## [{name}](results/study/{name}/table.md): {runs} runs, {seeds} seeds\n"]
        parts += [f"{read_plan(ROOT / f'recipes/studies/{name}.yaml', []).title}\n"]
        parts += ["| claim | verdict |", "|---|---|"]
        parts += [f"| {p['claim']} | {p['verdict']} |" for p in found["predictions"]]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
