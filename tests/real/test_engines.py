"""The adapter that `opdlm export --to uno` writes for a pretrained checkpoint, decoded by the engines' loop.

`make test-real OPDLM_REAL=FOLDER`; a family that the engines do not draft for is refused in words.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pretrained import MODELS, QUESTIONS
from transformers import AutoModelForCausalLM
from uno_loop import our_loop, uno_loop

import opdlm
from opdlm.cli.main import main
from opdlm.data.chat_template import encode_prompt
from opdlm.data.messages import Conversation
from opdlm.decoding.unmasking import uniform_ids

UNO = ["format.noise=uniform", "format.draft_attention=causal", "loss.objective=draft", "format.block_size=4"]
LENGTH = 48
pytestmark = pytest.mark.real


@pytest.mark.parametrize("source", MODELS, ids=lambda path: path.name)
def test_the_engines_loop_decodes_the_checkpoint_and_accepts_what_we_do(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    small = [
        "train.num_steps=6",
        "rollout.prompts_per_step=4",
        "rollout.decode.max_new_tokens=48",
        "train.rows_per_update=4",
    ]
    settings = [f"data.path={prompts}", f"output_dir={tmp_path / 'run'}", "eval.held_back=2", *small, *UNO]
    assert main(["convert", str(source), *settings, "eval.timed_prompts=0"]) == 0
    folder, adapter = tmp_path / "run" / "model", tmp_path / "uno"
    code = main(["export", str(folder), str(adapter), "--to", "uno"])
    if code:
        assert code == 2 and "one cache for all layers" in capsys.readouterr().err
        return
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    ours, tokenizer = opdlm.load(folder, "float32")
    size, every = ours.spec.noise_vocab_size, list[int]()
    assert size
    for seed, question in enumerate(QUESTIONS[:4]):
        prompt = encode_prompt(tokenizer, Conversation(prompt=question))

        def noise_at(first: int, seed: int = seed) -> list[int]:
            places = torch.arange(first, first + 3)
            return uniform_ids(torch.full_like(places, seed), places, size).tolist()

        text, accepted = uno_loop(model, prompt, noise_at, LENGTH)
        ids = torch.tensor([prompt])
        with model.disable_adapter():
            expected = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=LENGTH,
                do_sample=False,
                eos_token_id=None,
            )
        assert text[:LENGTH] == expected[0, len(prompt) :].tolist()
        assert (text, accepted) == our_loop(folder, prompt, seed, LENGTH)
        every += accepted
    print(f"{source.name}: {sum(every)} drafts accepted in {len(every)} cycles")
    assert 0 in every
