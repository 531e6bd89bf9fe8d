"""The class that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` returns.

It needs torch, transformers and safetensors only: the adapter is read from its PEFT files and attached by
hooks, and the decode loop is the project's own, copied beside this file. Without `trust_remote_code` the same
folder is the plain autoregressive model. Not here: training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .attention import SlotCache as SlotCache
from .blocks import Grid as Grid
from .cache import DecodeCache as DecodeCache
from .denoise import denoise_step as denoise_step
from .diffusion import Adapted, DiffusionLM, DiffusionSpec
from .generate import DecodeConfig, generate
from .lossless import lossless_step as lossless_step
from .records import Rollout as Rollout
from .rows import Rows as Rows
from .unmasking import Remasking as Remasking


class Adapter:
    """A PEFT LoRA folder put onto a model's layers; `off` silences it."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = load_file(folder / "adapter_model.safetensors")
        scale = config["lora_alpha"] / config["r"]
        self.enabled = True
        self.layers: list[Adapted] = []
        for key, down_RI in weights.items():
            if key.endswith(".lora_A.weight"):
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                up_OR = weights[key.replace("lora_A", "lora_B")]
                host = model.get_submodule(name)
                host.lora_A, host.lora_B = as_linear(down_RI), as_linear(up_OR)
                layer = Adapted(host, host.forward, host.lora_A.weight, host.lora_B.weight, scale)
                host.forward = self._adapted(layer)
                self.layers.append(layer)

    def _adapted(self, layer: Adapted) -> Any:
        def forward(inputs: Tensor) -> Tensor:
            output = layer.base(inputs)
            if not self.enabled:
                return output
            change = (
                F.linear(F.linear(inputs.to(layer.down_RI.dtype), layer.down_RI), layer.up_OR) * layer.scale
            )
            return output + change.to(output.dtype)

        return forward

    @contextmanager
    def off(self) -> Iterator[None]:
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True


def as_linear(weight_OI: Tensor) -> nn.Linear:
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, dtype=weight_OI.dtype)
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    return layer


class OpdlmForCausalLM(nn.Module):
    """A converted checkpoint as a diffusion language model with `.generate()`."""

    def __init__(self, config: PreTrainedConfig, diffusion: DiffusionLM) -> None:
        super().__init__()
        self.config, self.diffusion = config, diffusion

    @classmethod
    def from_pretrained(
        cls, name: str, *_: Any, config: PreTrainedConfig, **options: Any
    ) -> OpdlmForCausalLM:
        """Load a folder or hub id written by `opdlm convert`. `dtype` and `revision` work as usual."""
        loading = {
            key: options[key] for key in ("dtype", "torch_dtype", "revision", "token") if key in options
        }
        base = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **loading)
        spec = DiffusionSpec.from_dict(config.block_diffusion)
        if spec.format == "sdar":
            return cls(config, DiffusionLM(base, spec)).eval()
        revision = loading.get("revision")
        embedding_file: Any = cached_file(name, "mask_embedding.safetensors", revision=revision)
        mask_embedding = load_file(embedding_file)["mask_embedding"].to(base.dtype)
        if not spec.adapter:
            student = AutoModelForCausalLM.from_pretrained(name, subfolder="student", **loading)
            return cls(config, DiffusionLM(student, spec, teacher=base, mask_embedding=mask_embedding)).eval()
        weights_file: Any = cached_file(name, "adapter/adapter_model.safetensors", revision=revision)
        cached_file(name, "adapter/adapter_config.json", revision=revision)
        adapter = Adapter(base, Path(weights_file).parent)
        diffusion = DiffusionLM(
            base,
            spec,
            mask_embedding=mask_embedding,
            adapted=adapter.layers,
            adapter_off=adapter.off,
        )
        return cls(config, diffusion).eval()

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Called by transformers; the folder's config.json already says so."""

    @property
    def device(self) -> torch.device:
        return self.diffusion.device

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        mode: str = "threshold",
        seed: int = 0,
        **decoding: Any,
    ) -> Tensor:
        """Prompt ids `[B, P]` (padding marked by `attention_mask`) -> ids `[B, P + R]`, right-padded.

        `mode` is static, threshold, lossless or ar; further keywords are those of `DecodeConfig`.
        """
        kept_BP = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, kept_BP, strict=True)]
        rng = torch.Generator(device=self.device).manual_seed(seed)
        rollouts, _ = generate(self.diffusion, prompts, DecodeConfig(mode=mode, **decoding), rng)  # type: ignore[arg-type]
        width = max(rollout.num_response for rollout in rollouts)
        padding = self.config.pad_token_id or 0
        rows = [list(r.text_ids) + [padding] * (width - r.num_response) for r in rollouts]
        return torch.cat([input_ids, torch.tensor(rows, device=input_ids.device)], 1)
