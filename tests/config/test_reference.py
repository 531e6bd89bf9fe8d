"""The configuration reference and the schemas in docs/ are generated from the settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from opdlm.config.loader import describe_fields
from opdlm.config.reference import TREES, json_schema, reference

DOCS = Path(__file__).parents[2] / "docs"


def test_the_configuration_page_is_generated_from_the_settings() -> None:
    assert (DOCS / "configuration.md").read_text() == reference(), "python -m opdlm.config.reference docs"


@pytest.mark.parametrize("verb", TREES)
def test_the_schema_is_generated_from_the_settings(verb: str) -> None:
    file = json.loads((DOCS / f"{verb}.schema.json").read_text())
    assert file == json.loads(json.dumps(json_schema(TREES[verb]))), "python -m opdlm.config.reference docs"


@pytest.mark.parametrize("verb", TREES)
def test_every_setting_has_a_help_text_and_a_place_in_the_schema(verb: str) -> None:
    schema = json_schema(TREES[verb])
    for key, _, text in describe_fields(TREES[verb]):
        place = schema
        for name in key.split("."):
            place = place["properties"][name]
            place = schema["$defs"][place["$ref"].split("/")[-1]] if "$ref" in place else place
        assert text and place["description"] == text, key


def test_the_schema_knows_bounds_choices_and_unknown_keys() -> None:
    schema = json_schema(TREES["convert"])
    assert schema["$defs"]["TrainSection"]["properties"]["num_steps"]["minimum"] == 1
    assert schema["$defs"]["FormatSection"]["properties"]["name"]["enum"] == ["preserve", "sdar"]
    assert not schema["additionalProperties"]


def test_every_recipe_keeps_to_the_schema() -> None:
    for verb, folder in (("convert", DOCS.parent / "recipes"), ("train", DOCS.parent / "recipes" / "train")):
        schema = json_schema(TREES[verb])
        for recipe in sorted(folder.glob("*.yaml")):
            for section, values in yaml.safe_load(recipe.read_text()).items():
                if isinstance(values, dict):
                    name = schema["properties"][section]["$ref"].split("/")[-1]
                    assert values.keys() <= schema["$defs"][name]["properties"].keys(), recipe.name
