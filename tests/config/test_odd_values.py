"""Whatever stands after `=`, a setting is accepted or refused in one sentence: no other error gets out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from opdlm.config.loader import describe_fields, read_recipe, read_yaml
from opdlm.config.rules import load_config
from opdlm.config.sections import Config, SourceSection
from opdlm.config.text import TextConfig, load_text_config
from opdlm.errors import ConfigError
from opdlm.training.run_folder import changed_settings

VALUES = (
    *("1", "0", "-1", "1.5", "1e400", ".nan", ".inf", "-.inf", "99999999999999999999", "0x10", "1_000"),
    *("true", "no", "null", "~", "", "x", "auto", "'", "[", "a,b", "2026-01-01", "12:30:45", "\ud800"),
    *("[1,2]", "[[1,2]]", "[[1,2,3]]", "[null]", "[[null,[0,1]]]", "[[0,auto]]", "{a: 1}", "&a *a"),
    *("!!python/object:os.system x",),
)
NO_SETTINGS = ("rollout", "rollout.decode", "x.y", "rollout.decode.zzz", "train.num_steps.x", "")


@pytest.mark.parametrize(("load", "tree"), [(load_config, Config), (load_text_config, TextConfig)])
def test_odd_values_are_accepted_or_refused_in_one_sentence(load: Callable[..., Any], tree: type) -> None:
    keys = [key for key, _, _ in describe_fields(tree)]
    pairs = [(key, value) for key in (*keys, *NO_SETTINGS) for value in VALUES]
    num_refused = 0
    for key, value in random.Random(0).sample(pairs, 300):
        try:
            load(None, [f"{key}={value}"])
        except ConfigError as error:
            num_refused += 1
            assert "\n" not in str(error) and str(error).endswith((".", "?")), (key, value, str(error))
    assert 150 < num_refused < 300


def test_a_pair_of_another_length_is_told_its_length() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.betas \(\[0.9, 0.9, 0.9\]\) needs 2 values"):
        load_config(None, ["optimizer.betas=[0.9,0.9,0.9]"])


def test_sources_of_prompts_are_read_from_overrides_and_from_the_saved_settings(tmp_path: Path) -> None:
    text = "data.path=[{path: a.jsonl, weight: 3}, b.jsonl, {path: org/c, split: 'train[:9]', limit: 2}]"
    config = load_config(None, [text])
    assert config.data.path == (
        SourceSection(path="a.jsonl", weight=3),
        "b.jsonl",
        SourceSection(path="org/c", split="train[:9]", limit=2),
    )
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml())
    assert load_config(saved) == config
    assert changed_settings(read_recipe(saved), config.to_dict(), Config().to_dict()) == {}
    other = load_config(saved, [text.replace("weight: 3", "weight: 2")])
    assert changed_settings(read_recipe(saved), other.to_dict(), Config().to_dict()).keys() == {"data.path"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("no", "no"), ("on", "on"), ("true", True), ("1:30", "1:30"), ("0o7", "0o7"), ("010", "010")),
        *(("0x10", 16), ("-7", -7), ("2026-13-45", "2026-13-45"), ("=", "="), ("null", None), ("0.5", 0.5)),
        *(("1_000", "1_000"), ("-.inf", float("-inf")), ("1.5e+3", 1500.0), ("1e3", "1e3"), ("00", "00")),
    ],
)
def test_plain_words_of_a_recipe_are_not_those_of_yaml_1_1(text: str, value: Any) -> None:
    assert read_yaml(text) == value and type(read_yaml(text)) is type(value)
    assert read_yaml(yaml.safe_dump({"key": value})) == {"key": value}


def test_words_for_truth_values_and_decimal_numbers_are_read() -> None:
    config = load_config(
        None, ["eval.agreement=no", "loss.tail=off", "train.mixed_precision=no", "lora.r=010"]
    )
    assert (config.eval.agreement, config.loss.tail) == (False, False)
    assert (config.train.mixed_precision, config.lora.r) == ("no", 10)


def test_saved_settings_are_read_as_they_were(tmp_path: Path) -> None:
    """Whatever a text looks like, it comes back from the recipe that a run saves."""
    words = ("no", "1:30", "0o7", "010", "2026-01-01", "1e5", "1.5e3", "null", "0x1F", "1_0", "~", "=", "<<")
    for word in words:
        config = Config(output_dir=word)
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        assert load_config(tmp_path / "config.yaml").output_dir == word
