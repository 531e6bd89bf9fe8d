"""Whatever stands after `=`, a setting is accepted or refused in one sentence: no other error gets out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opdlm.config.loader import describe_fields, read_recipe
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
