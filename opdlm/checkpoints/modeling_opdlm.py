"""The class that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` returns.

It is the class of the model's family with another `generate`: transformers prepares the call (generation
config, lengths, stopping criteria, streamer), and the decode loop takes the place of its `_sample`. The file
needs torch, transformers and safetensors only: the adapter is read from its PEFT files and attached to the
layers, and the modules of the decode loop are copied beside this file. Without `trust_remote_code` the same
folder is the autoregressive model. Not here: training.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, logging

# transformers copies only the files that this one imports itself: those it does not use are named `x as x`.
from ..decoding.decode_config import DecodeConfig, check_is_read
from ..decoding.decode_state import DecodeState as DecodeState
from ..decoding.denoise import denoise_step as denoise_step
from ..decoding.draft_policy import DraftPolicy as DraftPolicy
from ..decoding.generate import PROCESSED_MODES, FindEnd, check_settings, generate
from ..decoding.lossless import lossless_step as lossless_step
from ..decoding.prompt_lookup import look_up as look_up
from ..decoding.rollout import Rollout as Rollout
from ..decoding.unmasking import Remasking as Remasking
from ..modeling.attention import ATTENTION_NAME
from ..modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from ..modeling.dot_product import Scoring as Scoring
from ..modeling.draft_head import DraftHead
from ..modeling.gate import Adapted
from ..modeling.kv_cache import DecodeCache as DecodeCache
from ..modeling.slots import Grid as Grid

logger = logging.get_logger(__name__)

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DRAFT_HEAD_FILE = "draft_head.safetensors"
DECODE_SETTINGS = {field.name for field in fields(DecodeConfig)} - {
    *("max_new_tokens", "temperature", "top_k", "top_p", "logprobs", "prompt_lookup_num_tokens")
}
"""Arguments of `generate` beside those of transformers."""
HONOURED = DECODE_SETTINGS | {
    *("max_length", "max_new_tokens", "max_time", "stop_strings", "eos_token_id", "pad_token_id"),
    *("bos_token_id", "do_sample", "temperature", "top_k", "top_p", "num_return_sequences"),
    *("return_dict_in_generate", "transformers_version", "prompt_lookup_num_tokens"),
}
"""Entries of a `GenerationConfig` that decoding follows."""
PROCESSED = {
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "min_length"),
    *("min_new_tokens", "suppress_tokens", "begin_suppress_tokens"),
}
"""Entries that change the AR model's logits, which `PROCESSED_MODES` follow."""
REFUSED = (
    *("logits_processor", "prefix_allowed_tokens_fn", "assistant_model", "synced_gpus", "custom_generate"),
    *("negative_prompt_ids", "negative_prompt_attention_mask"),
)
"""Further arguments of transformers' `generate`."""


class LowRank(nn.Module):
    """The adapter's delta in one layer: s B A x, or (f - 1) W x + f s B A x with DoRA's row factors f."""

    down_RI: Tensor
    up_OR: Tensor
    factor_O: Tensor | None

    def __init__(self, down_RI: Tensor, up_OR: Tensor, scale: float, factor_O: Tensor | None) -> None:
        super().__init__()
        self.scale = scale
        for name, value in (("down_RI", down_RI), ("up_OR", up_OR), ("factor_O", factor_O)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, inputs: Tensor, plain: Tensor) -> Tensor:
        """In the adapter's precision. `plain` is the base layer's output without its bias."""
        low_rank = F.linear(F.linear(inputs.to(self.down_RI.dtype), self.down_RI), self.up_OR) * self.scale
        return low_rank if self.factor_O is None else (self.factor_O - 1) * plain + self.factor_O * low_rank

    def add(self, inputs: Tensor, output: Tensor, bias: Tensor | None) -> None:
        """Add the delta to the base layer's output in place, LoRA's in the precision of the base."""
        if self.factor_O is not None:
            output.add_(self(inputs, output if bias is None else output - bias))
            return
        low_rank = F.linear(inputs, self.down_RI.to(inputs.dtype))
        output.addmm_(low_rank, self.up_OR.to(inputs.dtype).t(), alpha=self.scale)


def attach_adapter(model: PreTrainedModel, folder: Path, *, is_gated: bool) -> list[Adapted]:
    """Attach a PEFT LoRA folder to the layers of a model. `is_gated`: the forward of the model stays without
    the adapter. ValueError for tensors that belong to no layer.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    rank = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    scale = config["lora_alpha"] / rank
    layers = []
    for key, down_RI in weights.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            host: Any = model.get_submodule(name)
            device = host.weight.device
            down_RI, up_OR = down_RI.to(device), weights[key.replace("lora_A", "lora_B")].to(device)
            factor_O = None
            if config.get("use_dora"):
                length_O = weights[key.replace("lora_A.weight", "lora_magnitude_vector")].to(device)
                factor_O = length_O / row_lengths(host, scale * up_OR @ down_RI)
            layers.append(adapt(host, LowRank(down_RI, up_OR, scale, factor_O), is_gated=is_gated))
    if len(weights) != len(layers) * (3 if config.get("use_dora") else 2):
        raise ValueError(f"{folder}: some tensors of the adapter belong to no layer. Copy the folder again.")
    return layers


def adapt(host: Any, low_rank: LowRank, *, is_gated: bool) -> Adapted:
    """Attach the adapter to one layer."""
    base = host.forward
    host.low_rank = low_rank  # a submodule, so that it moves with the layer

    def forward(inputs: Tensor) -> Tensor:
        output = base(inputs)
        plain = output if host.bias is None else output - host.bias
        return (output + low_rank(inputs, plain)).to(output.dtype)

    if not is_gated:
        host.forward = forward
    return Adapted(host, base, lambda inputs, output: low_rank.add(inputs, output, host.bias))


def row_lengths(layer: Any, change_OI: Tensor) -> Tensor:
    """Euclidean norm `[O]` of every row of the adapted weight. Conv1D stores its weight transposed."""
    weight = layer.weight
    weight_OI = weight.T if isinstance(layer, Conv1D) else weight
    return (weight_OI.to(change_OI.dtype) + change_OI).norm(dim=1)


class OpdlmForCausalLM(GenerationMixin):
    """A converted checkpoint: a model of transformers whose `generate` decodes blocks.

    `from_pretrained` gives the model of the family a subclass of this class and of its own, with the name of
    the latter, by which transformers recognises it. Everything but `generate` is the family's: `forward`
    computes the autoregressive logits (`preserve`: those of the original), `parameters` are its weights. This
    class itself is no `PreTrainedModel`, since transformers 5.16 refuses one that has no config class.
    """

    config: Any
    diffusion: DiffusionLM
    """Holds this model, and beside it what the student has of its own. Not a submodule."""
    adapter_folder: Path | None

    @classmethod
    def from_pretrained(cls, name: Any, *arguments: Any, **options: Any) -> Any:
        """Load a folder or hub id, with the options of transformers.

        ValueError for an attention implementation other than sdpa, by which blocks are decoded, and for a
        `device_map` of several devices, since the decoding cache is on one. `auto` is one device.
        """
        config = options.get("config")
        attention = options.get("attn_implementation") or getattr(config, "_attn_implementation", None)
        if attention not in (None, "sdpa", ATTENTION_NAME):
            raise ValueError(
                f"attn_implementation={attention!r} cannot decode blocks: leave it out for sdpa, or load "
                "without trust_remote_code for the autoregressive model."
            )
        if options.get("device_map") == "auto" and "max_memory" not in options:
            options["device_map"] = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        wants_info = options.pop("output_loading_info", False)
        own_class = getattr(config, "autoregressive_class", None)
        options["trust_remote_code"] = own_class is not None  # as for this class: the user trusts the folder
        if config is not None and own_class is not None:
            options["config"] = copy.deepcopy(config)
            options["config"].auto_map = {**config.auto_map, "AutoModelForCausalLM": own_class}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, *arguments, output_loading_info=True, **options
        )
        model, info = loaded
        devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
        if len(devices) > 1 or "disk" in devices:
            raise ValueError(
                f"device_map puts the model on {', '.join(sorted(devices))}, and blocks are decoded on one "
                "device: pass for example device_map='cuda:0'."
            )
        family = type(model)
        model.__class__ = type(family.__name__, (OpdlmForCausalLM, family), {"__module__": cls.__module__})
        model._attach(name, options)
        return (model, info) if wants_info else model

    def _attach(self: Any, name: Any, options: dict[str, Any]) -> None:
        """Load what the folder holds beside the model's own weights."""
        spec = DiffusionSpec.from_dict(self.config.block_diffusion)
        hub = {key: options[key] for key in HUB_OPTIONS if key in options}
        device = self.get_input_embeddings().weight.device
        mask_embedding, draft_head, student, adapted = None, None, None, []
        file: Any
        if spec.noise_vocab_size is None and (spec.adapter or spec.format == "preserve"):
            file = cached_file(name, "mask_embedding.safetensors", **hub)
            mask_embedding = load_file(file)["mask_embedding"].to(device)
        if spec.adapter or spec.format == "preserve":
            file = cached_file(name, DRAFT_HEAD_FILE, _raise_exceptions_for_missing_entries=False, **hub)
            draft_head = None if file is None else DraftHead.of(load_file(file)).to(device)
        self.adapter_folder = None
        if spec.adapter:
            files: list[Any] = [cached_file(name, f"adapter/{file}", **hub) for file in ADAPTER_FILES]
            self.adapter_folder = Path(files[0]).parent
            adapted = attach_adapter(self, self.adapter_folder, is_gated=spec.format == "preserve")
        elif spec.format == "preserve":
            subfolder = Path(options.pop("subfolder", ""), "student").as_posix()
            options = {key: value for key, value in options.items() if key not in ("config", "torch_dtype")}
            options["dtype"] = self.dtype
            student = AutoModelForCausalLM.from_pretrained(name, subfolder=subfolder, **options)
        vars(self)["diffusion"] = DiffusionLM(
            self if student is None else student,
            spec,
            teacher=None if student is None else self,
            mask_embedding=mask_embedding,
            draft_head=draft_head,
            adapted=adapted,
        ).eval()
        defaults = self.generation_config
        defaults.eos_token_id = list(spec.stop_token_ids) or None
        defaults._from_model_config = False  # transformers would drop `DECODE_SETTINGS` when it is saved
        for key, value in unsupported(defaults).items():
            logger.warning(f"generation_config.json: {key}={value!r} has no effect when blocks are decoded.")
            setattr(defaults, key, None)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Called by transformers. Nothing to do: the folder's config.json has the entry already."""

    def _apply(self, fn: Any, *arguments: Any, **options: Any) -> Any:
        """Move or cast also what is no submodule."""
        if self.diffusion.mask_embedding is not None:
            self.diffusion.mask_embedding = nn.Parameter(fn(self.diffusion.mask_embedding.data))
        if self.diffusion.draft_head is not None:
            self.diffusion.draft_head._apply(fn)
        if self.diffusion.student is not self:
            self.diffusion.student._apply(fn, *arguments, **options)
        parent: Any = super()
        return parent._apply(fn, *arguments, **options)

    def save_pretrained(self, save_directory: Any, *, push_to_hub: bool = False, **options: Any) -> None:
        """Write a folder that loads as this one did, without the record of the run. The adapter's files are
        copied.
        """
        if push_to_hub:
            raise ValueError("push_to_hub=True is not supported here: call model.push_to_hub(repo_id).")
        folder = Path(save_directory)
        (folder / "manifest.json").unlink(missing_ok=True)  # it describes what this replaces
        self.config.auto_map = {"AutoModelForCausalLM": f"{Path(__file__).stem}.OpdlmForCausalLM"}
        parent: Any = super()
        parent.save_pretrained(folder, **options)
        if not options.get("is_main_process", True):
            return
        custom_object_save(self, folder)
        if self.diffusion.mask_embedding is not None:
            save_file(
                {"mask_embedding": self.diffusion.mask_embedding.data.contiguous()},
                folder / "mask_embedding.safetensors",
            )
        if self.diffusion.draft_head is not None:
            save_file(self.diffusion.draft_head.state_dict(), folder / DRAFT_HEAD_FILE)
        if self.diffusion.student is not self:
            self.diffusion.student.save_pretrained(folder / "student", **options | {"state_dict": None})
        target = folder / "adapter"
        if self.adapter_folder is not None and self.adapter_folder.resolve() != target.resolve():
            target.mkdir(exist_ok=True)
            for file in ADAPTER_FILES:
                shutil.copyfile(self.adapter_folder / file, target / file)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self, inputs: Any = None, generation_config: Any = None, **options: Any
    ) -> Any:
        """As in transformers, by block diffusion. Prompts may be padded on either side.

        Further keywords are fields of `DecodeConfig`, such as `mode`. Sampling draws from the global
        generator, which `torch.manual_seed` sets. ValueError for an argument that cannot be honoured.
        """
        given = {key: options[key] for key in REFUSED if key in options}
        refuse({key: value for key, value in given.items() if value is not None and value is not False})
        parent: Any = super()
        return parent.generate(inputs, generation_config, **options)

    def _prepare_generation_config(self, generation_config: Any, **options: Any) -> Any:
        """Merge defaults and arguments as transformers does, and refuse what cannot be honoured."""
        parent: Any = super()
        merged, inputs = parent._prepare_generation_config(generation_config, **options)
        merged._given_settings = [key for key in inputs if key in DECODE_SETTINGS]
        for key in merged._given_settings:
            setattr(merged, key, inputs.pop(key))
        given = {key: value for key, value in inputs.items() if value is not None}
        followed = (
            PROCESSED if getattr(merged, "mode", DecodeConfig().mode) in PROCESSED_MODES else set[str]()
        )
        refuse(
            {key: value for key, value in unsupported(merged).items() if key not in followed}
            | {key: given[key] for key in given.keys() - {"input_ids", "attention_mask"}}
        )
        # transformers would decode by itself
        merged._copied_tokens, merged.prompt_lookup_num_tokens = merged.prompt_lookup_num_tokens, None
        return merged, inputs

    def _sample(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        **_: Any,
    ) -> Any:
        """The decode loop on what transformers has prepared: ids `[B, P]` -> `[B, P + R]`, right-padded."""
        eos = [
            int(token_id)
            for criterion in stopping_criteria
            if isinstance(criterion, EosTokenCriteria)
            for token_id in criterion.eos_token_id
            if token_id >= 0
        ]
        criteria = StoppingCriteriaList(
            c for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)
        )
        longest: Any = stopping_criteria.max_length
        config = decode_config(generation_config, longest - input_ids.shape[1])
        model = copy.copy(self.diffusion)
        model.spec = replace(model.spec, stop_token_ids=tuple(eos))
        check_settings(config, model.spec)
        prompts = unpadded(input_ids, attention_mask)
        if any(model.spec.mask_token_id in ids for ids in prompts):
            raise ValueError(
                f"input_ids hold the mask token ({model.spec.mask_token_id}), which stands for unknown text: "
                "remove it, or fill gaps with opdlm.generate(model, prompts, infill=True)."
            )
        if streamer is not None and len(prompts) > 1:
            raise ValueError(f"streamer takes one sequence, and {len(prompts)} are decoded: pass one prompt.")
        padding = next((i for i in (generation_config.pad_token_id, *eos) if i is not None), None)
        if padding is None and criteria and len(prompts) > 1:
            raise ValueError("pad_token_id is not set, and sequences may end at different lengths: pass one.")
        find_end = [
            token_watcher(row_P, config.max_new_tokens, criteria, streamer) for row_P in input_ids.cpu()
        ]
        watched = bool(criteria) or streamer is not None
        width = input_ids.shape[1]
        processors = [self._processors_of(generation_config, len(ids), width) for ids in prompts]
        rollouts = generate(
            model,
            prompts,
            config,
            find_end=find_end if watched else None,
            logits_processors=processors,
        )
        if streamer is not None:
            streamer.end()
        width = max(rollout.num_response for rollout in rollouts)
        rows = [[*r.text_ids, *[padding] * (width - r.num_response)] for r in rollouts]
        sequences: Any = torch.cat([input_ids, torch.tensor(rows, device=input_ids.device)], 1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    def _processors_of(self: Any, generation_config: Any, num_prompt: int, width: int) -> Any:
        """What the entries of `PROCESSED` do to the logits of a prompt that was padded to `width` tokens."""
        config = copy.copy(generation_config)
        config.do_sample = False  # temperature and filters are those of the decode loop
        if config.min_length:
            config.min_length = max(0, config.min_length - width + num_prompt)
        return self._get_logits_processor(config, num_prompt, device=self.device, model_kwargs={})


def unsupported(config: GenerationConfig) -> dict[str, Any]:
    """The entries of a generation config that would change the output and that decoding cannot follow."""
    neutral = GenerationConfig._get_default_generation_params()
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in HONOURED and not key.startswith("_")
        if value is not None and value != neutral.get(key, False)
    }


def refuse(given: dict[str, Any]) -> None:
    """ValueError that names the first argument, if any."""
    for key, value in given.items():
        shown = f"{key}={value!r}" if isinstance(value, bool | int | float | str) else key
        raise ValueError(
            f"{shown} cannot be honoured when blocks are decoded: leave it out, or load the folder without "
            "trust_remote_code for the autoregressive model and transformers' own generate."
        )


def decode_config(generation: Any, max_new_tokens: int) -> DecodeConfig:
    """The settings of the decode loop in a prepared generation config. ValueError for one that this call
    gives and that its mode does not read.
    """
    settings = {key: getattr(generation, key) for key in DECODE_SETTINGS if hasattr(generation, key)}
    settings["prompt_lookup_num_tokens"] = generation._copied_tokens
    if generation.do_sample:
        settings["temperature"] = 1.0 if generation.temperature is None else generation.temperature
        settings |= {"top_k": generation.top_k or None, "top_p": generation.top_p}
    config = DecodeConfig(max_new_tokens=max_new_tokens, **settings)
    check_is_read(config, [*generation._given_settings, "prompt_lookup_num_tokens"], is_sampled=True)
    return config


def unpadded(input_ids_BP: Tensor, attention_mask_BP: Tensor | None) -> list[list[int]]:
    """The prompts without the tokens that the mask excludes; ValueError for one of no token."""
    kept_BP = torch.ones_like(input_ids_BP) if attention_mask_BP is None else attention_mask_BP
    prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids_BP, kept_BP, strict=True)]
    if not all(prompts):
        raise ValueError(
            f"attention_mask excludes every token of prompt {prompts.index([])}: keep at least one."
        )
    return prompts


def token_watcher(prompt_P: Tensor, limit: int, criteria: StoppingCriteriaList, streamer: Any) -> FindEnd:
    """Give each final token once and in order to the streamer and the stopping criteria, which see prompt and
    response as one row of ids.
    """
    row = prompt_P.tolist()

    def find_end(ids: Sequence[int]) -> int | None:
        while (seen := len(row) - len(prompt_P)) < min(len(ids), limit):
            row.append(ids[seen])
            if streamer is not None:
                streamer.put(torch.tensor(row[-1:]))
            if criteria and criteria(torch.tensor([row]), None).item():
                return seen + 1
        return None

    return find_end
