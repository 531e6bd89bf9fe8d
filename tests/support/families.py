"""Model families as tiny random checkpoints, and what the probe and our decoding make of each.

`python tests/support/families.py docs/families.md` writes the table of the documentation.
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_checkpoints import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from opdlm.checkpoints.convert import make_student
from opdlm.config.rules import load_config
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.generate import generate
from opdlm.errors import OpdlmError
from opdlm.modeling.diffusion_lm import DiffusionLM

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [20]]
STOP = 1
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3 (longrope)": (
        "phi3",
        {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}
            | {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
            "original_max_position_embeddings": 64,
        },
    ),
    "llama (llama3 rope)": (
        "llama",
        {
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
            | {"original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        },
    ),
    "llama (dynamic rope)": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama (yarn)": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    "falcon (ALiBi)": ("falcon", {"alibi": True}),
}
"""Families in another than their default form: (model type, changes of its config)."""
GIVES_SOFTCAP = Version(transformers.__version__) >= Version("5.21.1")
"""Whether transformers tells an attention function Gemma 2's softcap; 5.19 does not."""
NEEDS_SOFTCAP = pytest.mark.skipif(not GIVES_SOFTCAP, reason="Gemma 2 needs transformers 5.21.1")
EXACT = (
    *(
        "apertus",
        "arcee",
        "biogpt",
        "bitnet",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "doge",
        "ernie4_5",
    ),
    *(
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
    ),
    *(
        "granite",
        "granitemoe",
        "helium",
        "hunyuan_v1_dense",
        "internlm3",
        "jetmoe",
        "llama",
        "llama (dynamic rope)",
    ),
    *("llama (llama3 rope)", "llama (yarn)", "ministral", "mistral", "mixtral", "olmo", "olmo2", "olmo3"),
    *("olmoe", "opt", "persimmon", "phi", "phi3", "phi3 (longrope)", "phimoe", "qwen2", "qwen2_moe"),
    *("qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2"),
)
REFUSED = (
    *(
        "bamba",
        "bert",
        "bloom",
        "codegen",
        "diffllama",
        "falcon",
        "falcon (ALiBi)",
        "falcon_h1",
    ),
    *(
        "gptj",
        "granitemoehybrid",
        "jamba",
        "lfm2",
        "llama4_text",
        "mamba",
        "mamba2",
        "minicpm3",
        "mpt",
        "nemotron",
    ),
    *("qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "stablelm", "xglm"),
)


def model_of(family: str) -> PreTrainedModel:
    """A tiny random model of a family, or of one of its `VARIANTS`."""
    model_type, changes = VARIANTS.get(family, (family, {}))
    return tiny_model(model_type, **changes)


@torch.no_grad()
def plain_greedy(model: torch.nn.Module, prompt: list[int], num_tokens: int, banned: list[int]) -> list[int]:
    """The family's own greedy decoding, without a cache, a mask or a line of this project."""
    ids = list(prompt)
    while len(ids) < len(prompt) + num_tokens:
        logits_V = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].clone()
        logits_V[banned] = -torch.inf
        ids.append(int(logits_V.argmax()))
        if ids[-1] == STOP:
            break
    return ids[len(prompt) :]


def decode(model: DiffusionLM, mode: Mode, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy responses of at most 12 tokens."""
    config = DecodeConfig(mode=mode, max_new_tokens=12, ar_accept_threshold=0.0)
    return [list(rollout.text_ids) for rollout in generate(model, prompts, config)]


def examine(family: str) -> str:
    """`exact`; or the reason for which the family is refused; or how decoding differs from its own."""
    model = model_of(family)
    stock = copy.deepcopy(model)
    try:
        student = make_student(model, tiny_tokenizer(), load_config(None, ["model.path=unused", "lora.r=4"]))
    except OpdlmError as error:
        return str(error)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    student.eval()
    banned = [i for i in student.spec.banned_token_ids if i < 64]
    expected = [plain_greedy(stock, prompt, 12, banned) for prompt in PROMPTS]
    modes: tuple[Mode, ...] = ("ar", "lossless")
    for mode in modes:
        if decode(student, mode, PROMPTS) != expected:
            return f"{mode} decoding differs from stock transformers"
        if [decode(student, mode, [prompt])[0] for prompt in PROMPTS] != expected:
            return f"{mode} decoding of a row alone differs from that in a batch"
    return "exact"


HEAD = """# Model families

Written by `python tests/support/families.py docs/families.md`; a test (`make test-slow`) checks that it is up
to date. Each row is a random two-layer float32 model of the family's own code (transformers {version}).
*exact*: greedy `ar` and `lossless` decoding, with a random adapter, give the tokens of an uncached loop of
stock transformers, in a batch and alone. Any other family is tried in the same way when it is converted, and
refused with the reason.

A longrope model is exact up to the position where its rotary tables switch
(`original_max_position_embeddings`); longer texts are refused. Gemma 2 needs transformers 5.21.1; with an
earlier version it is refused.

| family | result |
|---|---|
"""


def table() -> str:
    """The page of the documentation."""
    import transformers

    rows = (f"| {family} | {in_words(examine(family))} |\n" for family in sorted({*EXACT, *REFUSED}))
    return HEAD.format(version=transformers.__version__) + "".join(rows)


def in_words(result: str) -> str:
    """A result without what was measured, which depends on the machine."""
    without_numbers = re.sub(r" by \S+ of their size \(.*\)", "", result)
    return re.sub(r"^\S+ models cannot be converted: (.*)\.$", r"refused: \1", without_numbers)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table())
