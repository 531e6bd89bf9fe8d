"""Pretrained checkpoints: `make test-real OPDLM_REAL=FOLDER`, whose sub-folders hold one model each."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from everyday_calls import run
from pretrained import MODELS
from transformers import AutoModelForCausalLM

import opdlm
from opdlm.data.chat_template import encode_prompt
from opdlm.data.messages import Conversation

pytestmark = pytest.mark.real


def test_there_are_models() -> None:
    if not MODELS:
        pytest.skip("OPDLM_REAL names no folder with checkpoints")


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".jinja", ".model", ".txt") or "token" in path.name
    }


def test_weights_and_tokenizer_are_those_of_the_original(desk: Any) -> None:
    original, result = digests(desk.source), digests(desk.model)
    assert original and {name: result[name] for name in original} == original


def test_lossless_text_is_that_of_transformers_in_float32(desk: Any) -> None:
    model, tokenizer = opdlm.load(desk.model, "float32")
    plain: Any = AutoModelForCausalLM.from_pretrained(desk.source, dtype=torch.float32)
    for number in (40, 49, 58):
        ids = encode_prompt(tokenizer, Conversation(prompt=f"What is {number} plus 7?"))
        (ours,) = opdlm.generate(model, [ids], mode="lossless", max_new_tokens=24)
        stops = list(model.spec.stop_token_ids)
        theirs = plain.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=stops)
        assert list(ours.text_ids) == theirs[0, len(ids) :].tolist()


def test_everyday_calls_of_transformers_work(desk: Any, tmp_path: Path) -> None:
    outcomes = run(desk.model, desk.source, tmp_path / "modules")
    failed = {name: error for name, error in outcomes.items() if error}
    assert outcomes and not failed, "\n".join(failed.values())
