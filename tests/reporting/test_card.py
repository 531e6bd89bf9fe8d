"""Model cards: metadata that the Hub reads, and no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.utils
import pytest
from huggingface_hub import ModelCard

from opdlm.config.rules import load_config
from opdlm.config.sections import Config
from opdlm.config.text import TextConfig, TextModelSection
from opdlm.reporting.card import model_card, text_card

ROOT = Path(__file__).parents[2]
RESULTS = {"train_seconds": 90.0, "rollout_tokens": 12_345.0, "versions": {"torch": "2.0"}}
BASE_CARD = "---\nlicense: other\nlicense_name: mine\nlanguage: en\n---\nA base."


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a card needs no network")

    monkeypatch.setattr(huggingface_hub.utils, "get_session", refuse)


def config(*settings: str) -> Config:
    return load_config(ROOT / "recipes" / "tiny.yaml", settings)


def committed_report() -> dict[str, Any]:
    report: dict[str, Any] = json.loads((ROOT / "docs" / "results" / "tiny" / "retention.json").read_text())
    report["settings"] |= {"config": config().to_dict(), "seeds": [0]}  # newer than the file
    return report


def test_a_base_on_the_hub_is_named_with_its_relation() -> None:
    card = ModelCard(model_card(config("model.path=org/base", "lora.enabled=true"), RESULTS, None))
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "transformers",
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["opdlm", "diffusion", "block-diffusion"],
    }
    assert "12,345 rollout tokens in 1.5 minutes" in card.text and "Not measured" in card.text
    sdar = config("model.path=org/base", "format.name=sdar", "eval.modes=[static]")
    assert ModelCard(model_card(sdar, RESULTS, None)).data.base_model_relation == "finetune"


def test_a_local_base_gives_its_licence_and_no_hub_id(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(BASE_CARD)
    data = ModelCard(model_card(config(f"model.path={tmp_path}"), RESULTS, None)).data.to_dict()
    assert {key: data.get(key) for key in ("license", "license_name", "base_model", "language")} == {
        "license": "other",
        "license_name": "mine",
        "base_model": None,
        "language": None,
    }


def test_data_sets_of_the_hub_are_named_and_files_are_not() -> None:
    sources = "data.path=[org/prompts, {path: org/more, weight: 2}, bundled:prompts.jsonl, mine.jsonl.gz]"
    assert ModelCard(model_card(config(sources), RESULTS, None)).data.datasets == ["org/prompts", "org/more"]
    assert "datasets" not in ModelCard(model_card(config(), RESULTS, None)).data.to_dict()


def test_the_limits_of_each_format_are_told() -> None:
    kept = model_card(config(), RESULTS, None)
    assert "the text of the base model, with its errors" in kept and "differ from those" not in kept
    lost = model_card(config("format.name=sdar", "eval.modes=[static]"), RESULTS, None)
    assert "differ from those of the base" in lost and "with its errors" not in lost
    assert "on responses of at most" in kept and "\n\n\n" not in kept + lost


def test_the_model_index_holds_the_measured_accuracies() -> None:
    report = committed_report()
    data = ModelCard(model_card(config("output_dir=runs/name"), RESULTS, report)).data
    assert data.model_name == "name" and {"accuracy", "retention"} <= set(data.metrics)
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    for mode in report["student"]:
        name, is_the_students = mode["name"], mode["replaced"] is None
        assert (f"accuracy ({name})" in found) == is_the_students
        if is_the_students:
            assert found[f"accuracy ({name})"] == round(mode["accuracy"], 4)
            assert found[f"retention ({name})"] == round(mode["retention"], 4)


def test_the_card_of_a_trained_model_names_its_losses() -> None:
    results = RESULTS | {"tokens": 1000.0, "heldout_ar_nll": 1.23456}
    scratch = TextConfig(model=TextModelSection(path="bundled:byte", from_scratch=True), output_dir="runs/t")
    card = ModelCard(text_card(scratch, results))
    assert "random weights" in card.text and "heldout_ar_nll 1.2346" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [1.2346]
    assert "base_model" not in card.data.to_dict() and "license" not in card.data.to_dict()
