"""Adapters in the layout of Uno (arXiv 2609.04010), which SGLang and a proposal for vLLM serve: a stock PEFT
LoRA folder beside the untouched base model (docs/engines.md).

A cycle there takes two forwards. The first one, [last token, F - 1 uniformly drawn ids], is causal, with the
adapter on all rows but the first: the drafts of a `preserve` student with `format.noise=uniform` and
`format.draft_attention=causal`, whose block size is F. The second one verifies the drafts with the base.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opdlm.checkpoints.convert import make_student
from opdlm.checkpoints.export import check_free, write_model
from opdlm.checkpoints.load import (
    ADAPTER_FOLDER,
    DRAFT_HEAD_FILE,
    load_causal_lm,
    load_tokenizer,
    one_line,
    read_architecture,
    read_spec,
)
from opdlm.checkpoints.lora import GATED
from opdlm.config.loader import build_section
from opdlm.config.rules import check_config
from opdlm.config.sections import CONFIG_COPY, Config
from opdlm.errors import ConfigError, DataError
from opdlm.files import atomic_folder
from opdlm.modeling.attention import layer_kinds

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
"""Layers that SGLang adapts; it joins q, k and v, and gate and up."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank."""


def export_to_uno(folder: Path, out: Path) -> None:
    """Write the adapter of a `preserve` folder as the engines read it. ConfigError if they would draft
    differently, or cannot load it.
    """
    spec, model_config = read_spec(folder), read_architecture(str(folder))
    rules: dict[str, tuple[object, object, str]] = {
        "format.name": (spec.format, "preserve", "the base model verifies drafts"),
        "lora.enabled": (spec.adapter, True, "they load an adapter, not a second model"),
        "format.noise": (
            "mask" if spec.noise_vocab_size is None else "uniform",
            "uniform",
            "they feed drafts uniformly drawn ids, and no mask embedding",
        ),
        "format.draft_attention": (spec.draft_attention, "causal", "their attention is causal"),
        "format.draft_head": (
            "used" if (folder / DRAFT_HEAD_FILE).is_file() else "unused",
            "unused",
            "they have no such head",
        ),
        "the attention of its layers": (
            ", ".join(sorted({*layer_kinds(model_config)})),
            "full_attention",
            "they keep one cache for all layers",
        ),
        "what the model reads": (
            "text" if model_config.get_text_config() is model_config else "more than text",
            "text",
            "they draft for text models",
        ),
    }
    for name, (found, needed, reason) in rules.items():
        if found != needed:
            raise ConfigError(
                f"{folder} cannot be exported to Uno's engines: {name} is {found}, and {reason} ({needed} "
                "only). Convert again with that, or serve it with `opdlm serve`."
            )
    config, weights = read_adapter(folder / ADAPTER_FOLDER)
    names = Counter(key.split(".")[-3] for key in weights if key.endswith("lora_A.weight"))
    check_layers(folder, config, names, model_config.num_hidden_layers)
    if config.get("use_rslora"):  # SGLang divides by r in any case
        factor = config["r"] ** 0.5
        weights = {key: value * factor if "lora_B" in key else value for key, value in weights.items()}
    check_free(out)
    config = {key: value for key, value in config.items() if key != GATED}
    config |= {"use_rslora": False, "target_modules": sorted(names), "exclude_modules": None}
    with atomic_folder(out) as partial:
        save_file(weights, partial / WEIGHTS_FILE)
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2))


def check_layers(folder: Path, config: dict[str, Any], names: Counter[str], num_layers: int) -> None:
    """ConfigError for an adapter that the engines cannot load: a rank above those of vLLM, or for SGLang
    DoRA, or layers that it does not join.
    """
    if config["r"] > LORA_RANKS[-1]:
        raise ConfigError(
            f"{folder} cannot be exported to Uno's engines: lora.r ({config['r']}) exceeds {LORA_RANKS[-1]}, "
            "the largest rank that vLLM serves. Convert again with a smaller one, or serve it with `opdlm "
            "serve`."
        )
    unknown = sorted({*names} - {*ATTENTION, *FEED_FORWARD})
    partly = sorted(name for name, number in names.items() if number != num_layers)
    problem = ""
    if config.get("use_dora"):
        problem = "lora.use_dora (true) rescales the base weights, and they add LoRA only"
    elif unknown:
        problem = f"lora.target_modules adapts {', '.join(unknown)}, which they do not know"
    elif partly:
        problem = f"lora.target_modules adapts {', '.join(partly)} in some layers only, and they expect all"
    elif ("q_proj" in names) != ("v_proj" in names) or ("k_proj" in names and "q_proj" not in names):
        problem = "lora.target_modules adapts one of q_proj and v_proj, which they load together"
    if problem:
        raise ConfigError(
            f"{folder} cannot be exported to Uno's engines: {problem}. Convert again with use_dora=false and "
            "target_modules=all-linear, or serve it with `opdlm serve`."
        )


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a PEFT folder; DataError where its files are missing or damaged."""
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise DataError(f"{folder} holds no {CONFIG_FILE} and {WEIGHTS_FILE}: give the folder of an adapter.")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}/{CONFIG_FILE} is damaged or cut off ({one_line(error)}). Download or copy it again."
        ) from error
    for key in ("r", "lora_alpha"):
        value = config.get(key) if isinstance(config, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(
                f"{folder}/{CONFIG_FILE}: {key} ({value}) must be a number. Download or copy it again."
            )
    try:
        return config, load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{folder}/{WEIGHTS_FILE} is damaged or cut off ({one_line(error)}). Download or copy it again."
        ) from error


def import_uno(base: str, adapter: Path, out: Path, block_size: int, dtype: str = "auto") -> None:
    """Write a base model and an adapter of this layout as a folder that `opdlm convert` would have written.

    ConfigError or DataError if the adapter holds more than LoRA, or does not fit the base.
    """
    values, weights = read_adapter(adapter)
    for key, plain in {"peft_type": "LORA", "bias": "none"}.items():
        if values.get(key, plain) != plain:
            raise DataError(f"{adapter}/{CONFIG_FILE}: {key} ({values[key]}) must be {plain}.")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"):
        if values.get(key):
            raise DataError(f"{adapter}/{CONFIG_FILE}: {key} is not supported: all layers have one rank.")
    check_free(out)
    lora = {key: values[key] for key in ("r", "target_modules", "use_rslora", "use_dora") if key in values}
    settings = {
        "model": {"path": base, "dtype": dtype},
        "format": {"block_size": block_size, "noise": "uniform", "draft_attention": "causal"},
        "lora": lora | {"alpha": values["lora_alpha"]},
        "loss": {"objective": "draft"},
    }
    config = build_section(Config, settings)
    check_config(config)
    tokenizer = load_tokenizer(base)
    student = make_student(load_causal_lm(base, dtype), tokenizer, config)
    from peft import set_peft_model_state_dict

    try:
        found: Any = set_peft_model_state_dict(vars(student)["peft_model"], weights)
    except RuntimeError as error:  # shapes
        raise DataError(f"{adapter} does not fit {base}: {str(error).splitlines()[-1].strip()}") from error
    wrong = [*found.unexpected_keys, *(key for key in found.missing_keys if "lora_" in key)]
    if wrong:
        raise DataError(f"{adapter} does not fit {base}: {min(wrong)} is in one of the two only.")
    with atomic_folder(out) as partial:
        write_model(partial, student.eval(), tokenizer, base)
        (partial / CONFIG_COPY).write_text(config.to_yaml())
