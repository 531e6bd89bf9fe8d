"""Pretrained checkpoints: `make test-real OPDLM_REAL=FOLDER`, whose sub-folders hold one model each."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from everyday_calls import run
from transformers import AutoModelForCausalLM

import opdlm
from opdlm.cli.main import main
from opdlm.data.chat_template import encode_prompt
from opdlm.data.messages import Conversation

MODELS = sorted(path.parent for path in Path(os.environ.get("OPDLM_REAL", "/nowhere")).glob("*/config.json"))
QUESTIONS = [f"What is {a} plus {b}? Explain it in one sentence." for a, b in enumerate(range(40, 72), 3)]
SHORT = [
    "train.num_steps=1",
    "rollout.prompts_per_step=4",
    "rollout.decode.max_new_tokens=16",
    "eval.held_back=2",
    "eval.timed_prompts=0",
]
pytestmark = pytest.mark.real


def test_there_are_models() -> None:
    if not MODELS:
        pytest.skip("OPDLM_REAL names no folder with checkpoints")


@pytest.fixture(scope="module", params=MODELS, ids=lambda path: path.name)
def converted(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the folder that the command makes of it."""
    root = tmp_path_factory.mktemp(request.param.name)
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    settings = [f"data.path={prompts}", f"output_dir={root / 'run'}", *SHORT]
    assert main(["convert", str(request.param), *settings]) == 0
    return request.param, root / "run" / "model"


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".jinja", ".model", ".txt") or "token" in path.name
    }


def test_weights_and_tokenizer_are_those_of_the_original(converted: tuple[Path, Path]) -> None:
    source, folder = converted
    original, result = digests(source), digests(folder)
    assert original and {name: result[name] for name in original} == original


def test_lossless_text_is_that_of_transformers_in_float32(converted: tuple[Path, Path]) -> None:
    source, folder = converted
    model, tokenizer = opdlm.load(folder, "float32")
    plain: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for text in QUESTIONS[:3]:
        ids = encode_prompt(tokenizer, Conversation(prompt=text))
        (ours,) = opdlm.generate(model, [ids], mode="lossless", max_new_tokens=24)
        stops = list(model.spec.stop_token_ids)
        theirs = plain.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=stops)
        assert list(ours.text_ids) == theirs[0, len(ids) :].tolist()


def test_everyday_calls_of_transformers_work(converted: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = converted
    outcomes = run(folder, source, tmp_path / "modules")
    failed = {name: error for name, error in outcomes.items() if error}
    assert outcomes and not failed, "\n".join(failed.values())
