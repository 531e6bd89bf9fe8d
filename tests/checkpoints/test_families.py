"""Families go convert, train, write, load, decode. One that cannot is refused with the reason. The table in
docs/families.md holds more of them.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import (
    EXACT,
    GIVES_SOFTCAP,
    NEEDS_SOFTCAP,
    PROMPTS,
    REFUSED,
    examine,
    plain_greedy,
    table,
)
from tiny_checkpoints import tiny_model, tiny_overrides, tiny_tokenizer, write_checkpoint, write_data

import opdlm
from opdlm.checkpoints.convert import make_student
from opdlm.checkpoints.load import load_causal_lm
from opdlm.checkpoints.lora import add_lora
from opdlm.cli.main import main
from opdlm.config.rules import load_config
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.generate import generate
from opdlm.errors import ConfigError, DataError
from opdlm.modeling.diffusion_lm import DiffusionLM

FAMILIES = [
    *("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma3_text", "gpt2", "phi3"),
    *("smollm3", "olmo2", "granite", "glm4"),
]


def convert(folder: Path, family: str, *overrides: str) -> Path:
    """The folder of a converted checkpoint of this family."""
    model = write_checkpoint(folder / family, family)
    write_data(folder)
    assert main(["convert", str(model), *tiny_overrides(model, folder, folder / "run")[1:], *overrides]) == 0
    return folder / "run" / "model"


def decode(model: DiffusionLM, mode: Mode, num_tokens: int = 12) -> list[tuple[int, ...]]:
    rollouts = generate(
        model, PROMPTS, DecodeConfig(mode=mode, max_new_tokens=num_tokens, ar_accept_threshold=0.0)
    )
    return [rollout.text_ids for rollout in rollouts]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_converts_and_lossless_decoding_equals_its_own(family: str, tmp_path: Path) -> None:
    folder = convert(tmp_path, family)
    model, _ = opdlm.load(folder)
    with torch.no_grad():
        teacher = load_causal_lm(str(tmp_path / family), "float32")
        banned = list(model.spec.banned_token_ids)
        expected = [tuple(plain_greedy(teacher, prompt, 12, banned)) for prompt in PROMPTS]
    assert decode(model, "ar") == expected
    assert decode(model, "lossless") == expected
    assert decode(model, "static") != expected  # the adapter is there, and open on drafts


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "gpt2", "mistral"])
@pytest.mark.parametrize("lora", ["true", "false"])
def test_a_family_converts_to_sdar(family: str, lora: str, tmp_path: Path) -> None:
    folder = convert(tmp_path, family, "format.name=sdar", f"lora.enabled={lora}")
    model, _ = opdlm.load(folder)
    assert [len(ids) for ids in decode(model, "static")] == [
        min(len(ids), 12) for ids in decode(model, "static")
    ]
    trained = load_causal_lm(str(folder), "float32").state_dict()
    before = load_causal_lm(str(tmp_path / family), "float32").state_dict()
    assert any(not torch.equal(trained[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("family", ["gemma3_text", "granite"])
def test_the_mask_enters_the_folder_as_it_entered_the_model(family: str, tmp_path: Path) -> None:
    """Families that scale their embeddings: the row that is stored must give back the trained vector."""
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    config = load_config(None, ["format.name=sdar", "format.mask_init=mean", "lora.enabled=false"])
    student = make_student(model, tokenizer, config)
    embedding = model.get_input_embeddings()
    used = [i for i in range(64) if i not in student.spec.banned_token_ids]
    mean_H = embedding(torch.tensor(used)).mean(0)
    mask_H = embedding(torch.tensor(student.spec.mask_token_id))
    torch.testing.assert_close(mask_H, mean_H, atol=1e-5, rtol=1e-4)


def test_adapters_of_a_mixture_of_experts_stay_where_the_gate_is() -> None:
    section = load_config(None, ["lora.r=4"]).lora
    peft_model = add_lora(tiny_model("qwen3_moe"), section)
    adapted = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert adapted and all("self_attn" in name for name in adapted)
    with pytest.raises(ConfigError, match=r"expert weights|not found in the base model"):  # peft 0.18
        add_lora(
            tiny_model("qwen3_moe"),
            load_config(None, ["lora.target_modules=[gate_proj,up_proj]"]).lora,
        )


@pytest.mark.parametrize(
    "family",
    [
        *("deepseek_v3", "gemma3", "gpt_oss", "opt", "phi3 (longrope)"),
        pytest.param("gemma2", marks=NEEDS_SOFTCAP),
    ],
)
def test_decoding_is_the_family_s_own(family: str) -> None:
    assert examine(family) == "exact"


@pytest.mark.skipif(GIVES_SOFTCAP, reason="this version of transformers computes Gemma 2 through our mask")
def test_a_family_that_transformers_computes_wrongly_is_refused() -> None:
    assert "gemma2 models cannot be converted: its logits under our causal mask differ" in examine("gemma2")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bert", "it is not causal"),
        ("bloom", "its positions are added to the scores (ALiBi)"),
        ("falcon", "its attention is not called through transformers' attention interface"),
        ("lfm2", "its conv layers are neither full nor sliding attention"),
        ("minicpm3", "its head is more than a linear map"),
        ("nemotron", "its layers do not pass keywords on to the attention function"),
        ("qwen3_next", "it has recurrent layers"),
    ],
)
def test_a_family_that_cannot_work_is_refused_with_the_reason(family: str, reason: str) -> None:
    assert examine(family).startswith(f"{family} models cannot be converted: {reason}")


def test_a_row_that_depends_on_the_rows_beside_it_is_refused() -> None:
    """Rotary tables that change with the longest position of a forward, inside the declared context."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=64)
    model.model.rotary_emb.config = copy.deepcopy(model.config)
    model.config.max_position_embeddings = 128
    with pytest.raises(DataError, match="a row at later positions changes the states of the row beside it"):
        make_student(model, tiny_tokenizer(), load_config(None, ["model.path=unused"]))


def test_a_class_that_no_file_defines_is_refused_with_the_way_on() -> None:
    """As one of a notebook: transformers reads a class's source before it sets another attention."""
    model = tiny_model("llama")
    attributes = {"__module__": "no_file", "_can_set_attn_implementation_cached_value": None}
    model.__class__ = type("Notebook", (type(model),), attributes)
    with pytest.raises(DataError, match="cannot read the source of Notebook: define it in a file"):
        make_student(model, tiny_tokenizer(), load_config(None, ["model.path=unused"]))


@pytest.mark.slow
def test_the_table_of_the_documentation_is_what_the_families_give() -> None:
    page = table()
    assert page == (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    for family in (*EXACT, *REFUSED):
        assert (f"| {family} | exact |" in page) == (family in EXACT), family
