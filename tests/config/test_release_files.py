"""Workflows, issue templates, pre-commit and Docker files: they parse, and what they run exists."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import opdlm
from opdlm.cli.main import parse

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
LOCK = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text().lower(), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_commands_of_a_workflow_exist(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load(path.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    commands = [shlex.split(step["run"]) for step in steps if "run" in step]
    assert commands and all(step.keys() & {"run", "uses"} for step in steps)
    for program, *arguments in commands:
        if program == "make":
            assert targets >= set(arguments), arguments
        elif program == "opdlm":
            parse(arguments)
        else:
            assert program in ("pip", "python")


def test_python_versions_of_workflow_and_package_agree() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    tested = jobs["newest"]["strategy"]["matrix"]["python"]
    classifiers = PYPROJECT["project"]["classifiers"]
    assert [c.rpartition(" ")[2] for c in classifiers if "Python :: 3." in c] == tested
    assert PYPROJECT["project"]["requires-python"] == f">={tested[0]}"


def test_versions_that_are_written_twice_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == opdlm.__version__ == PYPROJECT["project"]["version"]
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["rev"] == f"v{LOCK['ruff']}"
    assert f"torch=={LOCK['torch']} " in (ROOT / "docker" / "cpu.Dockerfile").read_text()


def test_the_lowest_lock_holds_the_lower_bounds() -> None:
    text = (ROOT / "requirements-lowest.lock").read_text().lower()
    lowest = {
        name: Version(version) for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    }
    for requirement in map(Requirement, PYPROJECT["project"]["dependencies"]):
        (bound,) = (Version(s.version) for s in requirement.specifier if s.operator == ">=")
        found = lowest[requirement.name]
        assert found.release[:2] == (*bound.release, 0)[:2], (requirement, found)
        assert requirement.specifier.contains(LOCK[requirement.name])


def test_issue_templates_are_forms() -> None:
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert templates
    for template in templates:
        assert {"name", "description", "body"} <= yaml.safe_load(template.read_text()).keys()
