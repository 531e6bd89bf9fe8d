"""What `opdlm generate` shows: gaps filled, responses ended before a string, and the same text streamed."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_checkpoints import convert_both, tiny_tokenizer

from opdlm.checkpoints.load import load
from opdlm.cli.flags import MODES
from opdlm.cli.main import main
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.decoding.streaming import GAP, ResponseView, StablePrefix, StopStrings, encode_gaps
from opdlm.errors import ConfigError
from opdlm.modeling.diffusion_lm import DiffusionSpec
from opdlm.modeling.slots import Grid

TOKENIZER = tiny_tokenizer()
MASK = 99


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted tiny checkpoints of both formats."""
    return convert_both(tmp_path_factory.mktemp("answer"))


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["generate", *arguments]) == 0
    return capsys.readouterr().out


def test_gaps_become_masks_and_the_rest_stays_text() -> None:
    ids = encode_gaps(TOKENIZER, "a<gap:3>bc<gap>", MASK, 2)
    a, b, c = TOKENIZER("abc")["input_ids"]
    assert ids == [a, MASK, MASK, MASK, b, c, MASK, MASK]


@pytest.mark.parametrize("text", ["no gap", "<gap> at the start", "none <gap:0>"])
def test_a_text_without_a_gap_that_can_be_filled_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        encode_gaps(TOKENIZER, text, MASK, 2)


TEXTS = st.text("abc", max_size=12)
STRINGS = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3).map(tuple)


@settings(deadline=None)  # a busy machine is no mistake
@given(text=TEXTS, strings=STRINGS)
def test_a_response_keeps_the_fewest_tokens_that_hold_a_stop_string(
    text: str, strings: tuple[str, ...]
) -> None:
    stops, ids = StopStrings(TOKENIZER, strings), TOKENIZER(text)["input_ids"] if text else []
    found = re.search("|".join(map(re.escape, strings)), text)
    end = stops.find_end(ids)
    if found is None:
        assert end is None and stops.cut(text) == text
    else:
        ends = [text.find(string) + len(string) for string in strings if string in text]
        assert end == min(ends)
        assert stops.cut(text) == text[: found.start()]


@settings(deadline=None)
@given(text=TEXTS, more=TEXTS, strings=STRINGS)
def test_stable_text_never_changes(text: str, more: str, strings: tuple[str, ...]) -> None:
    stops = StopStrings(TOKENIZER, strings)
    assert stops.cut(text + more).startswith(stops.stable(text))


@pytest.mark.parametrize("flags", [[], ["--stop", "e"], ["--temperature", "1", "--seed", "5"]])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["preserve", "sdar"])
def test_streamed_text_is_the_text(
    folders: dict[str, Path], name: str, mode: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "sdar" and mode == "lossless":
        return
    command = [str(folders[name]), "add 1 2", "copy ab", "--mode", mode, "--max-new-tokens", "18", *flags]
    whole = output(capsys, *command)
    assert output(capsys, *command, "--stream") == whole
    if "--stop" in flags:
        assert "e" not in whole


def test_a_terminal_shows_open_positions_until_they_are_revealed(folders: dict[str, Path]) -> None:
    model, tokenizer = load(folders["sdar"])
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, legacy_windows=False)
    ids = tokenizer("add 1 2")["input_ids"]
    config = DecodeConfig(mode="static", max_new_tokens=8)
    shown = range(len(ids), len(ids) + 8)
    stable_prefix = StablePrefix(StopStrings(tokenizer), model.spec, model.spec.block_grid, shown)
    with ResponseView(stable_prefix, console) as view:
        (rollout,) = generate(model, [ids], config, [1], view.on_step)
        view.finish(rollout)
    frames = screen.getvalue()
    assert "\x1b[2m" in frames and "·" in frames  # dim, with open positions
    text = tokenizer.decode(list(rollout.text_ids), skip_special_tokens=True)
    assert text.splitlines()[0] in frames and "·" not in frames.splitlines()[-1]


@pytest.mark.parametrize("mode", ["static", "threshold", "entropy", "left_to_right"])
@pytest.mark.parametrize("name", ["preserve", "sdar"])
def test_gaps_are_filled_and_the_text_around_them_stays(
    folders: dict[str, Path], name: str, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "add <gap:3> 4 = <gap> done"
    command = [str(folders[name]), "--infill", text, "--mode", mode, "--temperature", "1"]
    assert output(capsys, *command, "--stream") == output(capsys, *command)
    record = json.loads(output(capsys, *command, "--json"))
    # special tokens are not shown; every other token of the tiny tokenizer is one character
    pattern = "".join(
        re.escape(part) if i % 2 == 0 else f"[\\s\\S]{{0,{part or 4}}}"
        for i, part in enumerate(GAP.split(text))
    )
    assert re.fullmatch(pattern, record["response"])
    assert record["finish_reason"] == "length"  # no gap was filled with a stop token


def test_json_has_tokens_steps_and_logprobs(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "more.jsonl"
    file.write_text('{"prompt": "add 1 2"}\n{"messages": [{"role": "user", "content": "copy ab"}]}\n')
    command = [str(folders["preserve"]), "--prompts-file", str(file), "--max-new-tokens", "9"]
    records = [json.loads(line) for line in output(capsys, *command, "--json", "--logprobs").splitlines()]
    assert [record["prompt"] for record in records] == ["add 1 2", "copy ab"]
    for record in records:
        assert len(record["token_ids"]) == len(record["unmask_step"]) == len(record["logprobs"])
        assert record["response"] == TOKENIZER.decode(record["token_ids"], skip_special_tokens=True)
        assert all(logprob <= 0 for logprob in record["logprobs"])
    assert "logprobs" not in json.loads(output(capsys, *command, "--json").splitlines()[0])
    lines = output(capsys, *command[:1], "add 1 2", "--max-new-tokens", "9", "--logprobs")
    for logprob in records[0]["logprobs"]:
        assert f"{logprob:9.4f}  " in lines


def test_the_answer_to_a_prompt_does_not_depend_on_those_after_it(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(folders["preserve"]), "--temperature", "1", "--max-new-tokens", "9", "--json"]
    one, two = (output(capsys, *command, *prompts) for prompts in (["add 1 2"], ["add 1 2", "copy ab"]))
    assert one.splitlines() == two.splitlines()[:1]


def test_ar_and_lossless_stream_token_by_token() -> None:
    """A grid of single tokens: one unknown position after the stable text."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=False)
    spec = DiffusionSpec(
        format="preserve",
        block_size=4,
        grid="absolute",
        mask_token_id=MASK,
        stop_token_ids=(1,),
        banned_token_ids=(MASK,),
    )
    view = ResponseView(StablePrefix(StopStrings(TOKENIZER), spec, Grid(block_size=1), range(1, 9)), console)
    ids = TOKENIZER("abcd")["input_ids"]
    for known in (2, 3, 4):
        tokens_BL = torch.tensor([[*ids[:known], *[MASK] * (10 - known)]])
        view.on_step(torch.tensor([0]), tokens_BL, tokens_BL != MASK)
    assert screen.getvalue() == "bc"
