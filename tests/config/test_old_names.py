"""Old names of settings are read, in recipes and on the command line, with one line about the new ones."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from opdlm.config import loader
from opdlm.config.loader import OLD_KEYS, describe_fields
from opdlm.config.rules import load_config
from opdlm.config.sections import Config
from opdlm.errors import ConfigError


@pytest.fixture(autouse=True)
def forget_notices() -> None:
    loader.tell_renamed.cache_clear()


def test_old_names_mean_the_settings_that_exist_now() -> None:
    known = {key for key, _, _ in describe_fields(Config)}
    assert set(OLD_KEYS.values()) <= known
    assert not set(OLD_KEYS) & known


def test_an_old_recipe_is_read_as_a_new_one_with_one_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {
        "rollout": {"temperature": 0.5, "remasking": "static", "max_new_tokens": 9},
        "eval": {"veto_below": 0.2, "batch_size": 3},
        "train": {"passes_per_rollout": 2},
    }
    recipe = tmp_path / "old.yaml"
    recipe.write_text(yaml.safe_dump(values))
    with caplog.at_level(logging.WARNING):
        config = load_config(recipe)
        load_config(recipe)
    assert (config.rollout.decode.temperature, config.rollout.decode.mode) == (0.5, "static")
    assert config.rollout.decode.max_new_tokens == 9 and config.train.epochs_per_rollout == 2
    assert (config.eval.decode.ar_accept_threshold, config.eval.decode.batch_size) == (0.2, 3)
    assert len(caplog.records) == 1
    assert "rollout.remasking is now rollout.decode.mode" in caplog.text and "3 more" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "train: {passes_per_rollout: 2, epochs_per_rollout: 3}",
        "rollout: {temperature: 0.5, decode: {temperature: 0.7}}",
        "eval: {veto_below: 0.1, decode: {ar_accept_threshold: 0.1}}",
    ],
)
def test_a_setting_by_both_of_its_names_is_refused(text: str, tmp_path: Path) -> None:
    recipe = tmp_path / "both.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=r"is an old name of .*, and both are given"):
        load_config(recipe)


def test_an_old_name_on_the_command_line_is_read_with_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(None, ["rollout.temperature=0.25"])
    assert config.rollout.decode.temperature == 0.25
    assert "rollout.temperature is now rollout.decode.temperature" in caplog.text


def test_a_result_folder_from_before_is_read_by_its_own_names(tmp_path: Path) -> None:
    """The record of a run says what today's record would say: a new run continues an old one."""
    new = load_config(None, ["rollout.decode.temperature=0.5", "eval.decode.ar_accept_threshold=0"])
    old = new.to_dict()
    old["rollout"]["temperature"] = old["rollout"].pop("decode")["temperature"]
    old["eval"]["veto_below"] = old["eval"].pop("decode")["ar_accept_threshold"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert load_config(tmp_path / "config.yaml") == new
