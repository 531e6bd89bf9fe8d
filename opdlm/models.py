"""Load what a run needs: tokenizer, teacher, student, adapter; and converted folders back as a `DiffusionLM`.

LoRA goes through PEFT. In `preserve` the student is the teacher plus a gated adapter: one set of weights.
Anything a checkpoint can be wrong about (missing, not causal, broken numbers, wrong vocabulary) is one
`DataError` here.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opdlm.config import LoraSection, resolve_path
from opdlm.diffusion import DiffusionLM, DiffusionSpec, head_constants
from opdlm.errors import DataError
from opdlm.losses import Head

ADAPTER_FOLDER = "adapter"
STUDENT_FOLDER = "student"
MASK_EMBEDDING_FILE = "mask_embedding.safetensors"


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    path = resolve_path(path)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise DataError(f"no tokenizer in {path}: {first_line(error)}") from error


def load_causal_lm(path: str, dtype: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """An autoregressive checkpoint, checked for finite weights."""
    path = resolve_path(path)
    check_is_checkpoint(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"cannot load {path} as a causal language model: {first_line(error)}") from error
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise DataError(f"{path}: weight {name} holds NaN or infinite values; the checkpoint is damaged.")
    return model.eval()


def check_is_checkpoint(path: str) -> None:
    """A path that looks local must exist and hold a config; anything else is left to the hub."""
    folder = Path(path)
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise DataError(f"model.path ({path}) does not exist. Give a checkpoint folder or a hub id.")
    if folder.is_file():
        raise DataError(f"model.path ({path}) is a file. Give the folder that holds config.json.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(
            f"model.path ({path}) has no config.json, so it is not a Hugging Face checkpoint folder."
        )


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def head_of(model: PreTrainedModel, banned: Tensor | None = None) -> Head:
    """The LM head as plain tensors, for the chunked loss."""
    softcap, scale = head_constants(model)
    linear = model.get_output_embeddings()
    return Head(
        weight=linear.weight, bias=getattr(linear, "bias", None), softcap=softcap, scale=scale, banned=banned
    )


def add_lora(model: PreTrainedModel, section: LoraSection) -> PeftModel:
    """Wrap the model with a fresh adapter; the base is frozen, and bit for bit itself while the adapter is
    off.
    """
    target = (
        section.target_modules if isinstance(section.target_modules, str) else list(section.target_modules)
    )
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=target,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def adapter_outputs(peft_model: PeftModel) -> list[nn.Module]:
    """The `lora_B` of every adapted layer: where a gate can act."""
    return [m for name, m in peft_model.named_modules() if name.endswith("lora_B.default")]


def assemble(
    base: PreTrainedModel,
    spec: DiffusionSpec,
    *,
    lora: LoraSection | PeftModel | None,
    teacher: PreTrainedModel | None = None,
    mask_embedding: Tensor | None = None,
) -> DiffusionLM:
    """A trainable student. With LoRA the base is shared with the teacher, else the student is a copy of
    it.
    """
    if lora is None:
        return DiffusionLM(base, spec, teacher=teacher, mask_embedding=mask_embedding)
    peft_model = lora if isinstance(lora, PeftModel) else add_lora(base, lora)
    model = DiffusionLM(
        peft_model.get_base_model(),
        spec,
        mask_embedding=mask_embedding,
        adapter_outputs=adapter_outputs(peft_model),
        adapter_off=peft_model.disable_adapter,
    )
    object.__setattr__(model, "peft_model", peft_model)  # not a submodule: its weights are the student's
    return model


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A second, frozen set of the same weights."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def as_autoregressive(model: PreTrainedModel, spec: DiffusionSpec) -> DiffusionLM:
    """A plain causal LM behind the decode loop: mode `ar` only."""
    return DiffusionLM(
        model, DiffusionSpec.from_dict(spec.to_dict() | {"format": "preserve", "adapter": False})
    )


def read_spec(folder: str | Path) -> DiffusionSpec:
    """`block_diffusion` of a converted folder."""
    try:
        values = json.loads((Path(folder) / "config.json").read_text())["block_diffusion"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder} is not a folder written by opdlm convert (no block_diffusion in config.json)."
        ) from error
    return DiffusionSpec.from_dict(values)


def load(folder: str | Path, dtype: str = "float32", device: str = "cpu") -> tuple[DiffusionLM, Any]:
    """A converted folder as (DiffusionLM, tokenizer), ready for `opdlm.generate`."""
    folder = Path(folder)
    spec = read_spec(folder)
    base = load_causal_lm(str(folder), dtype)
    mask_embedding = None
    if (folder / MASK_EMBEDDING_FILE).is_file():
        mask_embedding = load_file(folder / MASK_EMBEDDING_FILE)["mask_embedding"].to(base.dtype)
    if spec.format == "sdar":  # the folder's weights are the student
        model = assemble(base, spec, lora=None)
    elif spec.adapter:
        peft_model = PeftModel.from_pretrained(base, str(folder / ADAPTER_FOLDER))
        model = assemble(base, spec, lora=peft_model, mask_embedding=mask_embedding)
    else:
        student = load_causal_lm(str(folder / STUDENT_FOLDER), dtype)
        model = assemble(student, spec, lora=None, teacher=base, mask_embedding=mask_embedding)
    return model.to(device).eval().requires_grad_(False), load_tokenizer(str(folder))


def vocabulary_rows(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[0]
