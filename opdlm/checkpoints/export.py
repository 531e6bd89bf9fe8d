"""The result folder: one directory that holds the AR model, the diffusion model and the record of the run.

`AutoModelForCausalLM.from_pretrained(folder)` loads the base architecture with the base weights (`preserve`:
the teacher, bit for bit). With `trust_remote_code=True` it loads the diffusion model. The remote code is a
copy of this package's modules `modeling` and `decoding`, so there is one implementation. Also here: merging
an adapter, and export for SGLang, LMDeploy and vLLM.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from opdlm.checkpoints.folders import gguf_file
from opdlm.checkpoints.load import (
    ADAPTER_FOLDER,
    AR_CLASS,
    DRAFT_HEAD_FILE,
    MASK_EMBEDDING_FILE,
    STUDENT_FOLDER,
    load,
    load_causal_lm,
    read_architecture,
    read_spec,
    set_embedding_row,
    stored_dtype,
    unpack_when_loaded,
)
from opdlm.checkpoints.lora import GATED, merge_adapter
from opdlm.config.sections import resolve_path
from opdlm.errors import ConfigError
from opdlm.files import atomic_folder
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec

REMOTE_FILES = (
    "checkpoints/modeling_opdlm.py",
    "decoding/generate.py",
    "decoding/lossless.py",
    "decoding/draft_policy.py",
    "decoding/prompt_lookup.py",
    "decoding/denoise.py",
    "decoding/decode_config.py",
    "decoding/decode_state.py",
    "modeling/diffusion_lm.py",
    "modeling/gate.py",
    "modeling/draft_head.py",
    "modeling/attention.py",
    "modeling/dot_product.py",
    "modeling/kv_cache.py",
    "decoding/unmasking.py",
    "modeling/slots.py",
    "decoding/rollout.py",
)
PACKAGE_IMPORT = re.compile(r"^from \.\.?(?:\w+\.)?(\w+) import", re.MULTILINE)
"""An import from a sub-package, which is flattened: transformers reads remote code from one flat folder."""
RECORDS = (
    *("README.md", "opdlm_config.yaml", "all_results.json", "retention.json", "timing.json"),
    "generations.jsonl",
)
CHECKPOINT_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*"),
    *("*vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model"),
    *("*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
"""What makes up an autoregressive checkpoint, as patterns of file names."""
TEMPLATES_FOLDER = "additional_chat_templates"
SDAR_MASK_ID = 151_669
"""The first unused row of Qwen3's embedding, which the source code of the engines contains as a constant."""
AUTO_CLASS = "modeling_opdlm.OpdlmForCausalLM"


def write_model(
    folder: Path, model: DiffusionLM, tokenizer: PreTrainedTokenizerBase, source: str | Path
) -> None:
    """Write weights, adapter, tokenizer, config and remote code.

    With `preserve` the AR model is the files of `source`, the folder or hub id that it was loaded from, so
    they stay the same, byte for byte; a GGUF file becomes safetensors. This removes the LoRA layers from
    `model`; load the folder to use the model again.
    """
    spec = model.spec
    is_packed = getattr(model.student, "is_loaded_in_4bit", False)  # the adapter belongs to the 4-bit weights
    is_copied = spec.format == "preserve" and not is_packed and not gguf_file(resolve_path(str(source)))
    base = write_student(folder, model)
    if model.mask_embedding is not None:
        if spec.format == "sdar" and not spec.adapter:
            set_embedding_row(base, spec.mask_token_id, model.mask_embedding)
        else:
            save_file(
                {"mask_embedding": model.mask_embedding.detach().contiguous()}, folder / MASK_EMBEDDING_FILE
            )
    if model.draft_head is not None:
        save_file(model.draft_head.state_dict(), folder / DRAFT_HEAD_FILE)
    if is_copied:
        copy_checkpoint(checkpoint_folder(source), folder)
    else:
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values["block_diffusion"] = spec.to_dict()
    unpack_when_loaded(values.get("quantization_config", {}))
    classes = values.get("auto_map", {})
    if classes.get("AutoModelForCausalLM", AUTO_CLASS) != AUTO_CLASS:
        values[AR_CLASS] = classes["AutoModelForCausalLM"]
    values["auto_map"] = classes | {"AutoModelForCausalLM": AUTO_CLASS}
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    package = Path(__file__).parent.parent
    for file in REMOTE_FILES:
        code = (package / file).read_text()
        (folder / Path(file).name).write_text(PACKAGE_IMPORT.sub(r"from .\1 import", code))


def checkpoint_folder(source: str | Path) -> Path:
    """The folder that holds the files of a checkpoint: itself, or its place in the hub's cache."""
    path = resolve_path(str(source))
    found: Any = path if Path(path).is_dir() else Path(cached_file(path, "config.json")).parent  # type: ignore[arg-type]
    return Path(found)


def copy_checkpoint(source: Path, folder: Path) -> None:
    """Copy config, tokenizer, generation config and chat template of an AR checkpoint, and link its weights,
    which need no second place on the disk where both folders are on one file system.
    """
    for pattern in CHECKPOINT_FILES:
        for file in source.glob(pattern):
            own = (MASK_EMBEDDING_FILE, DRAFT_HEAD_FILE, *map(base_name, REMOTE_FILES))
            if file.name not in own:
                copy = link_or_copy if file.suffix == ".safetensors" else shutil.copyfile
                copy(file.resolve(), folder / file.name)
    if (source / TEMPLATES_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATES_FOLDER, folder / TEMPLATES_FOLDER)


def base_name(file: str) -> str:
    return Path(file).name


def link_or_copy(file: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def write_student(folder: Path, model: DiffusionLM) -> PreTrainedModel:
    """Write the adapter or the student's own weights, if any, into a subfolder; return the base."""
    peft_model: Any = vars(model).get("peft_model")
    if model.spec.adapter:
        write_adapter(folder / ADAPTER_FOLDER, peft_model, is_gated=model.spec.format == "preserve")
        return peft_model.unload()
    if peft_model is not None:
        return merge_adapter(peft_model)
    if model.spec.format == "sdar":
        return model.student
    assert model.teacher is not None
    model.student.save_pretrained(folder / STUDENT_FOLDER)
    return model.teacher


def write_adapter(folder: Path, peft_model: Any, *, is_gated: bool) -> None:
    """Write the LoRA tensors as PEFT does. PEFT warns of entries that it does not know: `GATED` is one."""
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    if is_gated:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {GATED: True}, indent=2))


def merge_folder(folder: Path, out: Path, *, full_copy: bool) -> None:
    """Write a converted folder again with its adapter merged into the weights.

    `sdar`: one set of weights. `preserve`: only with `full_copy`, as the unchanged AR weights and a second,
    merged set for the noised slots. ConfigError if there is no adapter, or `preserve` is merged without
    `full_copy`.
    """
    spec = read_spec(folder)
    if not spec.adapter:
        raise ConfigError(f"{folder} holds no adapter: its weights are complete. Use it as it is.")
    if spec.format == "preserve" and not full_copy:
        raise ConfigError(
            f"{folder} cannot be merged: its adapter acts on noised slots only, and merged into the weights "
            "it would change every token of the AR model. Keep the folder (AR weights + adapter), or give "
            "--full-copy to write the AR weights and a merged student beside them (twice the size)."
        )
    check_free(out)
    dtype = dtype_of(folder)
    model, tokenizer = load(folder, dtype)
    teacher = load_causal_lm(str(folder), dtype) if spec.format == "preserve" else None
    plain = without_adapter(model, teacher)
    with atomic_folder(out) as partial:
        for record in folder.iterdir():
            if record.suffix == ".png" or record.name in RECORDS:
                shutil.copyfile(record, partial / record.name)
        write_model(partial, plain, tokenizer, folder)


def dtype_of(folder: Path) -> str:
    """The dtype of the AR model's files in a folder; `auto` where its config.json does not say."""
    return stored_dtype(read_architecture(str(folder))) or "auto"


def without_adapter(model: DiffusionLM, teacher: PreTrainedModel | None = None) -> DiffusionLM:
    """The student with the adapter merged into its weights. Removes the LoRA layers from `model`."""
    student = merge_adapter(vars(model)["peft_model"])
    spec = replace(model.spec, adapter=False)
    own: dict[str, Any] = {"mask_embedding": model.mask_embedding, "draft_head": model.draft_head}
    return DiffusionLM(student, spec, teacher=teacher, **own)


def complete_student(folder: Path, spec: DiffusionSpec) -> tuple[DiffusionLM, PreTrainedTokenizerBase]:
    """The student of an `sdar` folder as one set of weights, and its tokenizer."""
    model, tokenizer = load(folder, dtype_of(folder))
    return without_adapter(model) if spec.adapter else model, tokenizer


def check_free(out: Path) -> None:
    """ConfigError if `out` exists."""
    if out.exists():
        raise ConfigError(f"OUT ({out}) exists already. Choose another name.")


def export_to_sdar(folder: Path, out: Path) -> None:
    """Write an `sdar` folder in the layout of SDAR checkpoints (arXiv 2510.06303), which SGLang and LMDeploy
    load with --trust-remote-code.

    ConfigError if the engines would decode it differently: both require Qwen3's architecture, the absolute
    grid and one id of [MASK]; SGLang also one block size. According to their sources (SGLang 0.5.23, LMDeploy
    0.18.0); not yet run in either.
    """
    spec, values = read_spec(folder), json.loads((folder / "config.json").read_text())
    rules = {
        "format.name": (spec.format, "sdar"),
        "the family": (values["model_type"], "qwen3"),
        "format.grid": (spec.grid, "absolute"),
        "the id of [MASK]": (spec.mask_token_id, SDAR_MASK_ID),
        "use_sliding_window": (bool(values.get("use_sliding_window")), False),
    }
    for name, (found, needed) in rules.items():
        if found != needed:
            raise ConfigError(
                f"{folder} cannot be exported to SDAR's engines: {name} is {found}, and they accept {needed} "
                "only. Convert again with that, or serve it with `opdlm serve`."
            )
    check_free(out)
    plain, tokenizer = complete_student(folder, spec)
    if plain.mask_embedding is not None:
        set_embedding_row(plain.student, spec.mask_token_id, plain.mask_embedding)
    rope = dict(plain.student.config.rope_parameters)
    with atomic_folder(out) as partial:
        plain.student.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.copyfile(Path(__file__).with_name("configuration_sdar.py"), partial / "configuration_sdar.py")
        config_file = partial / "config.json"
        values = json.loads(config_file.read_text())
        for key in ("block_diffusion", "auto_map"):
            values.pop(key, None)
        values |= {
            "architectures": ["SDARForCausalLM"],
            "model_type": "sdar",
            "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
            "rope_theta": rope.pop("rope_theta"),
            "rope_scaling": None if rope == {"rope_type": "default"} else rope,
            "torch_dtype": values["dtype"],
            "block_size": spec.block_size,
            "mask_token_id": spec.mask_token_id,
        }
        config_file.write_text(json.dumps(values, indent=2))
