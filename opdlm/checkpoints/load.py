"""Load tokenizers, causal LMs and converted folders, and assemble a `DiffusionLM` from them.

LoRA uses PEFT. In `preserve` the student is the teacher plus a gated adapter, with one set of weights. A
checkpoint that is missing, damaged or not a causal LM raises a `DataError` that names the fix.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoHfQuantizer

from opdlm.checkpoints.folders import (
    check_intact,
    check_is_checkpoint,
    check_is_converted,
    gguf_file,
    is_code_trusted,
)
from opdlm.checkpoints.lora import adapted_layers, add_lora, load_lora
from opdlm.config.sections import LoraSection, RunConfig, resolve_path
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import check_settings
from opdlm.errors import ConfigError, DataError
from opdlm.modeling.cpu_linear import cpu_multiplies, use_faster_linear
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.modeling.draft_head import DraftHead

if TYPE_CHECKING:
    from peft import PeftModel

Settings = TypeVar("Settings", bound=RunConfig)

ADAPTER_FOLDER = "adapter"
STUDENT_FOLDER = "student"
MASK_EMBEDDING_FILE = "mask_embedding.safetensors"
DRAFT_HEAD_FILE = "draft_head.safetensors"
AR_CLASS = "autoregressive_class"
"""Entry of a converted folder's config.json: the class of its AR model, where the checkpoint brings it."""
CONFIG_ERRORS = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, ImportError),
    StrictDataclassError,
)
"""What transformers, or the code of a checkpoint, raises where it cannot be used."""
log = logging.getLogger(__name__)


def load_tokenizer(
    path: str, trust_remote_code: bool = False, *, needs_weights: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or hub id; DataError if there is none."""
    path = resolve_path(path)
    check_is_checkpoint(path, needs_weights=needs_weights)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            **source_of(path, trust_remote_code)
        )
        tokenizer("a")  # finds values of a wrong type
        return tokenizer
    except Exception as error:  # what is wrong in tokenizer.json, `tokenizers` raises as Exception itself
        raise DataError(
            f"no tokenizer can be loaded from {path} ({one_line(error)}). Copy the checkpoint's own "
            "tokenizer.json and tokenizer_config.json into it."
        ) from error


def source_of(path: str, trust_remote_code: bool) -> dict[str, Any]:
    """Where `from_pretrained` finds a folder, hub id or GGUF file, and whether it may run code from there."""
    trust = {"trust_remote_code": trust_remote_code or is_code_trusted.get()}
    file = gguf_file(path)
    if file is None:
        return {"pretrained_model_name_or_path": path, **trust}
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, **trust}


def load_causal_lm(
    path: str, dtype: str = "auto", trust_remote_code: bool = False, *, load_in_4bit: bool = False
) -> PreTrainedModel:
    """An autoregressive checkpoint, optionally in 4-bit NF4; DataError if it is incomplete or not finite.

    dtype: `auto` is the precision of the checkpoint's files, or float32 (`computing_dtype`).
    """
    path = resolve_path(path)
    check_is_checkpoint(path)
    check_intact(path)
    options = source_of(path, trust_remote_code)
    options["config"] = config = read_architecture(path, trust_remote_code)
    stored = stored_dtype(config)
    if dtype == "auto" and stored:
        dtype = computing_dtype(stored)
    options["dtype"] = dtype
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        )
    try:
        method = quantization_method(path, config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except SafetensorError as error:
        raise DataError(
            f"the weights in {path} are damaged or cut off ({one_line(error)}). Download them again."
        ) from error
    except (OSError, RuntimeError, *CONFIG_ERRORS) as error:
        raise DataError(f"cannot load {path} as a causal language model: {one_line(error)}") from error
    model, found = loaded
    check_weights(path, model, found)
    if is_quantized(model):
        make_savable(model)
    if method and not is_quantized(model):
        log.warning(f"{path}: its {method} weights are dequantised to {model.dtype}")
    use_faster_linear(model)
    return model.eval()


def check_weights(path: str, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """DataError for weights that are missing, of another shape or not finite, by transformers' report."""
    if found["missing_keys"]:
        raise DataError(
            f"{path}: {len(found['missing_keys'])} weights are missing, first {min(found['missing_keys'])}. "
            "Download or copy the checkpoint again."
        )
    if found["mismatched_keys"]:
        name, in_files, in_model = min(found["mismatched_keys"])
        raise DataError(
            f"{path}: weight {name} has the shape {tuple(in_files)} in the files, and config.json says "
            f"{tuple(in_model)}. Download or copy the checkpoint again."
        )
    for name, parameter in model.named_parameters():
        values = parameter if type(parameter.data) is Tensor else parameter.dequantize()
        if values.is_floating_point() and not torch.isfinite(values.to(model.dtype)).all():
            raise DataError(
                f"{path}: weight {name} holds NaN or infinite values; the checkpoint is damaged. Download it "
                "again."
            )


def quantization_method(path: str, config: PretrainedConfig) -> str | None:
    """How the files are quantised; DataError if transformers does not know that method."""
    section = getattr(config, "quantization_config", None)
    if section is None:
        return "gguf" if gguf_file(path) else None
    if not AutoHfQuantizer.supports_quant_method(section):
        raise DataError(
            f"{path} holds weights quantised by {section['quant_method']}, which transformers cannot read. "
            "Give the checkpoint in full precision."
        )
    unpack_when_loaded(section)
    method = str(section.get("quant_method", "bitsandbytes"))
    if method in ("gptq", "awq") and find_spec("gptqmodel") is None:  # optimum would fail on a missing name
        raise DataError(
            f"{path} holds weights quantised by {method}, which transformers reads with gptqmodel: install "
            "that, or give the checkpoint in full precision."
        )
    return method


def unpack_when_loaded(section: dict[str, Any]) -> None:
    """Let compressed-tensors dequantise while it loads: the first forward of the whole model would do it, and
    rollouts and updates call its backbone.
    """
    if section.get("quant_method") == "compressed-tensors":
        section["dequantize"] = True


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether the model computes with packed weights, which can be frozen but not trained."""
    return getattr(model, "hf_quantizer", None) is not None


def make_savable(model: Any) -> None:
    """Make a quantised model save the weights that were loaded: transformers cannot reverse its conversion of
    the files, and the packed CPU kernel of bitsandbytes rounds the scales when it unpacks a weight.
    """
    vars(model).pop("_weight_conversions", None)
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def with_known_dtype(config: Settings) -> Settings:
    """The settings with the precision that `model.dtype=auto` means for this checkpoint."""
    if config.model.dtype != "auto" or not config.model.path:
        return config
    if getattr(config.model, "from_scratch", False):
        return replace(config, model=replace(config.model, dtype="float32"))
    values = read_architecture(config.model.path, config.model.trust_remote_code)
    found: Any = computing_dtype(stored_dtype(values) or "float32")
    return replace(config, model=replace(config.model, dtype=found))


def stored_dtype(config: PretrainedConfig) -> str | None:
    """The precision of a checkpoint's files, as its config.json says."""
    found = config.dtype or config.get_text_config().dtype
    return str(found).removeprefix("torch.") if found else None


@cache
def computing_dtype(stored: str) -> str:
    """What `auto` means for weights in this precision: that, or float32 where everything runs on a CPU that
    has no instructions for it. The values of the weights are the same. Says so once.
    """
    if torch.accelerator.is_available() or cpu_multiplies(stored):
        return stored
    log.warning(
        f"computing in float32: this CPU has no instructions for {stored}, the checkpoint's precision "
        f"(model.dtype={stored} or --dtype {stored} keeps the weights in it, with half the memory)"
    )
    return "float32"


def read_architecture(path: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config.json of a checkpoint, of a converted folder that of its AR model; DataError if there is none
    that transformers can read.
    """
    path = resolve_path(path)
    try:
        config = AutoConfig.from_pretrained(**source_of(path, trust_remote_code))
    except OSError as error:
        raise DataError(
            f"model.path ({path}) is no folder with a config.json, and neither cache nor hub has one: "
            "fetch it where there is a network (hf download ORG/NAME config.json), or give a folder."
        ) from error
    except CONFIG_ERRORS as error:
        raise DataError(
            f"model.path ({path}): transformers cannot use its config.json: {one_line(error)}"
        ) from error
    classes = vars(config).get("auto_map") or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in classes:
        raise DataError(
            f"model.path ({path}) holds no causal language model: AutoModelForCausalLM has none of "
            f"the type {config.model_type}. Give a text checkpoint."
        )
    if hasattr(config, "block_diffusion"):  # its AutoModelForCausalLM is the diffusion model
        classes = {**classes, "AutoModelForCausalLM": getattr(config, AR_CLASS, None)}
        classes = {name: where for name, where in classes.items() if where}
        vars(config).pop("auto_map", None)
        if classes:
            config.auto_map = classes
    return config


def new_causal_lm(path: str, dtype: str, shape: Mapping[str, int], seed: int) -> PreTrainedModel:
    """A random model with the config.json of `path` changed by `shape`; ConfigError if that is invalid.

    dtype: `auto` is float32, since no weights are loaded.
    """
    path = resolve_path(path)
    check_is_checkpoint(path, needs_weights=False)
    values = read_architecture(path).get_text_config().to_dict()
    unknown = sorted(set(shape) - set(values))
    if unknown:
        raise ConfigError(f"model.shape.{unknown[0]} is no entry of {path}/config.json. Correct its name.")
    if "num_hidden_layers" in shape:
        values.pop("layer_types", None)  # one entry per layer; transformers recreates it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = AutoConfig.for_model(**(values | dict(shape)))
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype)
            )
        except (RuntimeError, *CONFIG_ERRORS) as error:
            raise ConfigError(f"model.shape ({dict(shape)}) makes no model: {one_line(error)}") from error
    use_faster_linear(model)
    return model.eval()


def one_line(error: Exception) -> str:
    """The start of an error's message, in one line."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            "it brings Python code, which is run only with --trust-remote-code (model.trust_remote_code=true)"
        )
    return (text if len(text) <= 300 else f"{text[:300]} ...") or type(error).__name__


def assemble(
    base: PreTrainedModel,
    spec: DiffusionSpec,
    *,
    lora: LoraSection | PeftModel | None,
    teacher: PreTrainedModel | None = None,
    mask_embedding: Tensor | None = None,
    draft_head: DraftHead | None = None,
) -> DiffusionLM:
    """A trainable student. With LoRA it shares the base with the teacher; otherwise `base` is the student,
    and `teacher` a separate copy.
    """
    if lora is None:
        return DiffusionLM(base, spec, teacher=teacher, mask_embedding=mask_embedding, draft_head=draft_head)
    peft_model = add_lora(base, lora) if isinstance(lora, LoraSection) else lora
    student: Any = peft_model.get_base_model()
    model = DiffusionLM(
        student,
        spec,
        mask_embedding=mask_embedding,
        draft_head=draft_head,
        adapted=adapted_layers(peft_model),
        adapter_off=peft_model.disable_adapter,
    )
    object.__setattr__(model, "peft_model", peft_model)  # not a submodule: its weights are the student's
    return model


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    """A second, frozen set of the same weights."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def read_spec(folder: str | Path) -> DiffusionSpec:
    """`block_diffusion` in the config.json of a converted folder; DataError if it is none."""
    check_is_converted(folder)
    values = json.loads((Path(folder) / "config.json").read_text())["block_diffusion"]
    try:
        return DiffusionSpec.from_dict(values)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{folder}/config.json: block_diffusion is not valid: {error} Convert the checkpoint again."
        ) from error


def load(folder: str | Path, dtype: str = "auto", device: str = "cpu") -> tuple[DiffusionLM, Any]:
    """A converted folder as (DiffusionLM, tokenizer), in evaluation mode; DataError if it is none."""
    folder = Path(folder)
    spec = read_spec(folder)
    base = load_causal_lm(str(folder), dtype)
    lora = None
    own: dict[str, Any] = {}
    try:
        needs_mask = spec.format == "preserve" and spec.noise_vocab_size is None
        if needs_mask or (folder / MASK_EMBEDDING_FILE).is_file():
            own["mask_embedding"] = load_file(folder / MASK_EMBEDDING_FILE)["mask_embedding"]
        if (folder / DRAFT_HEAD_FILE).is_file():
            own["draft_head"] = DraftHead.of(load_file(folder / DRAFT_HEAD_FILE))
        if spec.adapter:
            lora = load_lora(base, folder / ADAPTER_FOLDER)
    except (SafetensorError, OSError, RuntimeError, *CONFIG_ERRORS) as error:
        raise DataError(
            f"{folder} is damaged or incomplete ({one_line(error)}). Copy it again, or convert again."
        ) from error
    if spec.adapter:
        model = assemble(base, spec, lora=lora, **own)
    elif spec.format == "sdar":  # the folder's weights are the student
        model = assemble(base, spec, lora=None)
    else:
        student = load_causal_lm(str(folder / STUDENT_FOLDER), str(base.dtype).removeprefix("torch."))
        model = assemble(student, spec, lora=None, teacher=base, **own)
    return model.to(device).eval().requires_grad_(False), load_tokenizer(str(folder))


def set_embedding_row(model: PreTrainedModel, token_id: int, entering_H: Tensor) -> None:
    """Make the embedding layer, which may scale its rows, return `entering_H` for a token."""
    embedding = input_embedding(model)
    with torch.no_grad():
        embedding.weight[token_id] = 1.0
        scale_H = embedding(torch.tensor(token_id, device=model.device))
        embedding.weight[token_id] = entering_H / scale_H


def check_fits(model: DiffusionLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, key: str) -> None:
    """DataError if prompts, responses (limited by setting `key`) and drafts exceed the model's context."""
    longest, config = max(len(ids) for ids in prompts), model.student.config
    context = context_length(config)
    if longest + max_new_tokens > max_total_tokens(model):
        switch = "" if rotary_switch(config) is None else ", where its rotary tables switch"
        raise DataError(
            f"the longest prompt ({longest} tokens) plus {key} ({max_new_tokens}) and two blocks of drafts "
            f"exceeds the model's context ({context}{switch}). Lower {key} or shorten the prompt."
        )
    check_ids(model, prompts)


def check_ids(model: DiffusionLM, texts: Iterable[Sequence[int]]) -> None:
    """DataError if a text holds a token that the tokenizer names and the model has no embedding for."""
    known = range(vocabulary_rows(model.student))
    foreign = {token for ids in texts for token in ids if token not in known} - {model.spec.mask_token_id}
    if foreign:
        raise DataError(
            f"a text holds the token id {min(foreign)}, but the model's embedding has only {len(known)} "
            "rows. Remove that token from the text, or use the checkpoint's own tokenizer."
        )


def check_decode(config: DecodeConfig, spec: DiffusionSpec) -> None:
    """Raises ConfigError for settings by which the checkpoint cannot decode."""
    try:
        check_settings(config, spec)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def context_length(config: PretrainedConfig) -> float:
    """Positions of a model; infinite if its config has no `max_position_embeddings`. Positions from
    `rotary_switch` on do not count.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    return min(positions, rotary_switch(config) or math.inf)


def rotary_switch(config: PretrainedConfig) -> int | None:
    """The position from which longrope rotates all keys of a forward by other angles; None without it.

    Keys in a cache, and rows that are decoded beside a longer one, would have the wrong ones.
    """
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    sections = [rope, *(section for section in rope.values() if isinstance(section, dict))]
    found = [
        section["original_max_position_embeddings"]
        for section in sections
        if section.get("rope_type") == "longrope"
    ]
    return min(found, default=None)


def max_total_tokens(model: DiffusionLM) -> float:
    """Maximum tokens of prompt and response together: the context minus two blocks for drafts."""
    return context_length(model.student.config) - 2 * model.spec.block_size


def input_embedding(model: PreTrainedModel) -> nn.Embedding:
    """The embedding layer of the tokens."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the embedding, used or not."""
    return input_embedding(model).weight.shape[0]
