"""`preserve` students in vLLM: `opdlm export`, and vLLM alone on the folder, on a CPU through Triton's
interpreter. What it writes is the text of the AR model, token for token.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from interpreted_vllm import interpreter as interpreter
from interpreted_vllm import running
from tiny_checkpoints import tiny_overrides, write_checkpoint, write_data

from opdlm.checkpoints.load import load
from opdlm.cli.main import main
from opdlm.data.chat_template import encode_prompt
from opdlm.data.messages import Conversation
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Rollout

QUESTIONS = ["", "a", "ab", "add 3 4", "copy xyz", "what is 7 + 12?", "the longest of these prompts: " * 2]
NEW_TOKENS = 24


def export(folder: Path, *settings: str) -> Path:
    write_checkpoint(folder / "base", "qwen3", head_dim=32, max_position_embeddings=256)
    write_data(folder)
    overrides = tiny_overrides(folder / "base", folder, folder / "run")[1:]
    fixed = ["format.name=preserve", "optimizer.learning_rate=0.05"]
    assert main(["convert", str(folder / "base"), *overrides, *fixed, *settings]) == 0
    assert main(["export", str(folder / "run" / "model"), str(folder / "vllm")]) == 0
    return folder / "vllm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("mask"))


def own(folder: Path, mode: Any, questions: list[str] = QUESTIONS) -> list[Rollout]:
    """Greedy responses of our decoder in the folder that was exported."""
    model, tokenizer = load(folder.parent / "run" / "model")
    prompts = [encode_prompt(tokenizer, Conversation(prompt=text)) for text in questions]
    return generate(model, prompts, DecodeConfig(mode=mode, max_new_tokens=NEW_TOKENS).repeatable())


@pytest.mark.vllm
def test_greedy_texts_are_those_of_ar_decoding_in_fewer_forwards(folder: Path, interpreter: None) -> None:
    from vllm import SamplingParams

    with running(folder, max_num_seqs=4) as llm:
        chats = [[{"role": "user", "content": text}] for text in QUESTIONS]
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=NEW_TOKENS), use_tqdm=False)
        print(llm.llm_engine.engine_core)
    ours = own(folder, "ar")
    print([len(r.text_ids) for r in ours], [r.num_steps for r in own(folder, "lossless")])
    assert [tuple(output.outputs[0].token_ids) for output in outputs] == [r.text_ids for r in ours]
    assert 0
