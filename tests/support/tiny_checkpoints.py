"""Tiny random checkpoints of real families, written to disk: what the end-to-end tests convert."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from opdlm.cli.main import main
from opdlm.training import loop as loop

CHARACTERS = " abcdefghijklmnopqrstuvwxyz0123456789+-*=>\n"
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}> {% endif %}"
)
NUM_TOKENS = len(CHARACTERS) + 3

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    **{"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None, "head_dim": 4, "v_head_dim": 8},
    **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 2, "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
}
"""Attention over latent keys (MLA)."""
VISION: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 28, "patch_size": 14},
}
MIXED: dict[str, Any] = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
STATE_SPACE: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
EXTRA: dict[str, dict[str, Any]] = {  # `...`: an entry of SMALL that the family's config must not have
    "bamba": STATE_SPACE | {"attn_layer_indices": [1]},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "falcon": {"head_dim": ...},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5},
    "gemma3": MIXED,
    "gemma3_text": MIXED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "granitemoehybrid": STATE_SPACE | {"layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8},
    "minicpm3": LATENT,
    "mistral": {"sliding_window": 6},
    "qwen3_5_text": HYBRID,
    "qwen3_moe": EXPERTS,
    "qwen3_next": HYBRID | {"num_experts": 0},
    "smollm3": {"no_rope_layers": [1, 0]},
}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "mm_tokens_per_image": 4,
        "image_token_index": 60,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    },
}
"""Families whose config holds those of a text and a vision part."""


def tiny_tokenizer(characters: str = CHARACTERS, template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per character, an eos, a pad and a one-line chat template."""
    tokens = dict.fromkeys(["<pad>", "<eos>", "<unk>", *characters])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model of a family, with weights large enough that predictions differ from token to token."""
    torch.manual_seed(0)
    values = {key: value for key, value in (SMALL | EXTRA.get(family, {})).items() if value is not ...}
    if family in WRAPPERS:
        values = WRAPPERS[family] | {"text_config": values, "vision_config": VISION}
    config = AutoConfig.for_model(family, **values | changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


def write_checkpoint(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A checkpoint folder as a hub download would look."""
    tiny_model(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_data(folder: Path) -> tuple[Path, Path]:
    """`prompts.jsonl` and `eval.jsonl` of a few short prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [{"prompt": f"add {i} {7 * i % 10}"} for i in range(10)]
    tasks = [
        {"prompt": "add 1 2", "answer": "3", "skill": "add"},
        {"prompt": "copy ab", "answer": "ab", "skill": "copy", "held_out": True},
        {"prompt": "what is 12", "skill": "open"},
    ]
    return write_rows(folder / "prompts.jsonl", prompts), write_rows(folder / "eval.jsonl", tasks)


SETTINGS_OF_THE_PROFILE = (
    *("format.block_size=4", "format.mask_init=zero", "states.selection=all", "train.epochs_per_rollout=1"),
    *("rollout.decode.batch_size=64", "optimizer.warmup_steps=0", "train.gradient_checkpointing=false"),
    "loss.objective=opd",
)
"""What `opdlm convert MODEL` would choose, fixed, so that a test does not depend on the machine."""


def tiny_overrides(model: Path, data: Path, output_dir: Path) -> list[str]:
    """Settings of a conversion that takes a second; `data` must hold what `write_data` wrote."""
    return [
        f"model.path={model}",
        f"data.path={data / 'prompts.jsonl'}",
        f"output_dir={output_dir}",
        "lora.r=4",
        "lora.alpha=8",
        "rollout.prompts_per_step=4",
        "rollout.decode.max_new_tokens=10",
        "train.rows_per_update=2",
        "train.micro_batch_rows=2",
        "train.num_steps=2",
        "optimizer.learning_rate=1e-2",
        "eval.decode.max_new_tokens=10",
        "eval.held_back=0",
        *SETTINGS_OF_THE_PROFILE,
    ]


@contextmanager
def failing_after_a_save(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The disk fails right after a checkpoint is complete."""
    save = loop.save

    def save_and_fail(run: loop.Loop, step: int) -> None:
        save(run, step)
        raise OSError(5, "the machine went away")

    with patch.context() as inner:
        inner.setattr(loop, "save", save_and_fail)
        yield


def convert_both(root: Path) -> dict[str, Path]:
    """Converted folders of both formats."""
    write_data(root)
    teacher = write_checkpoint(root / "teacher")
    for name in ("preserve", "sdar"):
        settings = tiny_overrides(teacher, root, root / name)
        assert main(["convert", str(teacher), *settings[1:], f"format.name={name}"]) == 0
    return {name: root / name / "model" for name in ("preserve", "sdar")}
