"""The class that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` returns.

It needs torch, transformers and safetensors only: the adapter is read from its PEFT files and attached to the
layers, and the modules of the decode loop are copied beside this file. Without `trust_remote_code` the same
folder is the autoregressive model. Not here: training.
"""

from __future__ import annotations

import copy
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
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

# transformers copies only the files that this one imports itself: those it does not use are named `x as x`.
from ..decoding.decode_config import DecodeConfig
from ..decoding.decode_state import DecodeState as DecodeState
from ..decoding.denoise import denoise_step as denoise_step
from ..decoding.generate import generate
from ..decoding.lossless import lossless_step as lossless_step
from ..decoding.rollout import Rollout as Rollout
from ..decoding.unmasking import Remasking as Remasking
from ..modeling.attention import choose_backend as choose_backend
from ..modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from ..modeling.gate import Adapted
from ..modeling.kv_cache import DecodeCache as DecodeCache
from ..modeling.slots import Grid as Grid


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


class LoadedAdapter:
    """A PEFT LoRA folder attached to the layers of a model. `off` disables it."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = load_file(folder / "adapter_model.safetensors")
        rank = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
        scale = config["lora_alpha"] / rank
        self.enabled = True
        self.layers: list[Adapted] = []
        for key, down_RI in weights.items():
            if key.endswith(".lora_A.weight"):
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                up_OR = weights[key.replace("lora_A", "lora_B")]
                host, factor_O = model.get_submodule(name), None
                if config.get("use_dora"):
                    length_O = weights[key.replace("lora_A.weight", "lora_magnitude_vector")]
                    factor_O = length_O / row_lengths(host, scale * up_OR @ down_RI)
                self.layers.append(self._adapt(host, LowRank(down_RI, up_OR, scale, factor_O)))

    def _adapt(self, host: Any, low_rank: LowRank) -> Adapted:
        base = host.forward
        host.low_rank = low_rank  # a submodule, so that it moves with the layer

        def forward(inputs: Tensor) -> Tensor:
            output = base(inputs)
            if not self.enabled:
                return output
            plain = output if host.bias is None else output - host.bias
            return (output + low_rank(inputs, plain)).to(output.dtype)

        host.forward = forward
        return Adapted(host, base, lambda inputs, output: low_rank.add(inputs, output, host.bias))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Disable the adapter inside the block."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True


def row_lengths(layer: Any, change_OI: Tensor) -> Tensor:
    """Euclidean norm `[O]` of every row of the adapted weight. Conv1D stores its weight transposed."""
    weight = layer.weight
    weight_OI = weight.T if isinstance(layer, Conv1D) else weight
    return (weight_OI.to(change_OI.dtype) + change_OI).norm(dim=1)


class OpdlmForCausalLM(nn.Module):
    """A converted checkpoint as a diffusion language model with `.generate()`."""

    def __init__(self, config: PreTrainedConfig, diffusion: DiffusionLM) -> None:
        super().__init__()
        self.config, self.diffusion = config, diffusion

    @classmethod
    def from_pretrained(
        cls, name: str, *_: Any, config: PreTrainedConfig, **options: Any
    ) -> OpdlmForCausalLM:
        """Load a folder or hub id. `dtype`, `revision` and `token` as in transformers."""
        loading = {
            key: options[key] for key in ("dtype", "torch_dtype", "revision", "token") if key in options
        }
        plain, own_class = copy.deepcopy(config), getattr(config, "autoregressive_class", None)
        plain.auto_map = {**config.auto_map, "AutoModelForCausalLM": own_class} if own_class else {}
        loading["trust_remote_code"] = (
            own_class is not None
        )  # as for this class, whose user trusts the folder
        base = AutoModelForCausalLM.from_pretrained(name, config=plain, **loading)
        spec = DiffusionSpec.from_dict(config.block_diffusion)
        if spec.format == "sdar" and not spec.adapter:
            return cls(config, DiffusionLM(base, spec)).eval()
        revision = loading.get("revision")
        embedding_file: Any = cached_file(name, "mask_embedding.safetensors", revision=revision)
        mask_embedding = load_file(embedding_file)["mask_embedding"]
        if not spec.adapter:
            student = AutoModelForCausalLM.from_pretrained(name, subfolder="student", **loading)
            return cls(config, DiffusionLM(student, spec, teacher=base, mask_embedding=mask_embedding)).eval()
        weights_file: Any = cached_file(name, "adapter/adapter_model.safetensors", revision=revision)
        cached_file(name, "adapter/adapter_config.json", revision=revision)
        adapter = LoadedAdapter(base, Path(weights_file).parent)
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
        """Called by transformers. Nothing to do: the folder's config.json has the entry already."""

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

        `mode` and further keywords are fields of `DecodeConfig`.
        """
        kept_BP = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, kept_BP, strict=True)]
        rng = torch.Generator(device=self.device).manual_seed(seed)
        rollouts = generate(self.diffusion, prompts, DecodeConfig(mode=mode, **decoding), rng)  # type: ignore[arg-type]
        width = max(rollout.num_response for rollout in rollouts)
        padding = self.config.pad_token_id or 0
        rows = [list(r.text_ids) + [padding] * (width - r.num_response) for r in rollouts]
        return torch.cat([input_ids, torch.tensor(rows, device=input_ids.device)], 1)
