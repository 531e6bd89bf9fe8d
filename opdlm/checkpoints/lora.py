"""The LoRA adapter: created by PEFT on frozen weights, gated, merged.

A layer computes `base(x) + delta(x)`. LoRA has `delta(x) = s B A x` with s = alpha / r (rsLoRA: alpha /
sqrt(r)). DoRA has `delta(x) = (m / |W + s B A| - 1) W x + m / |W + s B A| s B A x`, so a gate on `B` alone
would not suffice. The gate computes delta(x) for noised slots only; clean slots keep `base(x)` bit for bit.
Settings that initialise the adapter by changing the base weights are refused, since those weights are the
teacher.

LoRA arXiv 2106.09685, rsLoRA 2312.03732, DoRA 2402.09353, QLoRA 2305.14314.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from opdlm.config.sections import LoraSection
from opdlm.errors import ConfigError, DataError
from opdlm.modeling.gate import Adapted

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"
"""PEFT's name of the adapter."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
GATED = "acts_on_masked_slots_only_so_load_it_with_opdlm"
"""Entry of adapter_config.json in `preserve`. Stock PEFT names it in a warning: it would apply the adapter to
every token.
"""


def add_lora(model: PreTrainedModel, section: LoraSection) -> PeftModel:
    """Add a new float32 adapter to the model and freeze the base, whose output is unchanged while the adapter
    is disabled. ConfigError if `lora.target_modules` matches no layer, or one without a gate.
    """
    from peft import LoraConfig, get_peft_model

    target = section.target_modules
    if target == "all-linear" and any(p.dim() == 3 for p in model.parameters()):
        target = attention_layers(model)
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=target if isinstance(target, str) else list(target),
        exclude_modules=outside_text_model(model),
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        init_lora_weights=True if section.init == "default" else section.init,  # type: ignore[arg-type]
        task_type="CAUSAL_LM",
    )
    try:
        with no_future_warnings():
            peft_model = get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise ConfigError(f"lora.target_modules: {str(error).strip().splitlines()[0]}") from error
    check_targets(peft_model, section)
    return peft_model


def load_lora(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Put the adapter of a folder on the model. PEFT only warns of keys that do not match: ValueError."""
    from peft import PeftModel, get_peft_model_state_dict

    with no_future_warnings():
        peft_model = PeftModel.from_pretrained(model, str(folder))
    wanted = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    differing = load_file(folder / ADAPTER_WEIGHTS).keys() ^ wanted.keys()
    if differing:
        raise ValueError(f"{folder.name}: {len(differing)} keys do not match, first {min(differing)}")
    return peft_model


@contextmanager
def no_future_warnings() -> Iterator[None]:
    """Silence the warnings that PEFT 0.21 causes by using deprecated names of transformers 5."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", f".*{GATED}")
        yield


def check_targets(peft_model: PeftModel, section: LoraSection) -> None:
    """ConfigError if a layer is adapted whose output cannot be gated."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    base: Any = peft_model.get_base_model()
    if any(isinstance(m, ParamWrapper) for m in peft_model.modules()):
        raise ConfigError(
            f"lora.target_modules ({section.target_modules}) matches stacked expert weights, where an "
            "adapter cannot be switched per token. Name attention layers only, for example [q_proj, v_proj]."
        )
    if any(isinstance(m, LoraLayer) for m in (base.get_input_embeddings(), base.get_output_embeddings())):
        raise ConfigError(
            f"lora.target_modules ({section.target_modules}) matches the embedding or the LM head, which "
            "teacher and student share. Name layers between them, for example [q_proj, v_proj]."
        )


def outside_text_model(model: PreTrainedModel) -> str | None:
    """A pattern of the modules that read images or sound, which no text reaches; None without any."""
    if model.config.get_text_config() is model.config:
        return None
    (prefix,) = (name for name, module in model.named_modules() if module is model.get_decoder())
    return rf"(?!{re.escape(prefix)}\.).*"


def attention_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """all-linear for a mixture of experts, without stacked expert *weights*, which have no gate."""
    linear = [
        name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and "att" in name
    ]
    return tuple(sorted({name.split(".")[-1] for name in linear}))


def adapted_layers(peft_model: PeftModel) -> list[Adapted]:
    """The layers with an adapter, which the gate controls."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [m for m in peft_model.modules() if isinstance(m, LoraLayer)]
    return [Adapted(layer, layer.base_layer.forward, adapter_delta(layer)) for layer in layers]


def adapter_delta(layer: Any) -> Callable[[Tensor, Tensor], None]:
    """A function that adds delta(inputs), inputs `[N, in]`, to the base layer's output `[N, out]` in place,
    without dropout. It reads the weights at each call, since sharding replaces them.
    """
    down, up, scale = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.scaling[ADAPTER]

    def lora(inputs: Tensor, output: Tensor) -> None:
        # products in the base's precision, as under autocast; product, scale and sum in one kernel
        low = F.linear(inputs, down.weight.to(inputs.dtype))
        output.addmm_(low, up.weight.to(inputs.dtype).t(), alpha=scale)

    def dora(inputs: Tensor, output: Tensor) -> None:
        change = layer.lora_magnitude_vector[ADAPTER]
        inputs = inputs.to(down.weight.dtype)
        output.add_(
            change(
                inputs, lora_A=down, lora_B=up, scaling=scale, base_layer=layer.base_layer, base_result=output
            )
        )

    return dora if layer.lora_magnitude_vector else lora


def check_mergeable(base: PreTrainedModel) -> None:
    """DataError for packed weights that transformers cannot unpack, to which no adapter can be added."""
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None and type(quantizer)._dequantize is HfQuantizer._dequantize:
        method = quantizer.quantization_config.quant_method.value
        raise DataError(
            f"the weights of {base.name_or_path}, quantised by {method}, cannot be unpacked by transformers, "
            "so no adapter can be added to them: leave it apart "
            "(lora.merge=false), or give the checkpoint in full precision."
        )


def merge_adapter(peft_model: PeftModel) -> PreTrainedModel:
    """Merge the adapter into the weights of the base, in place, and return it. A quantised base is
    dequantised first, since rounding the sum to a few bits would lose most of the adapter.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    base: Any = peft_model.get_base_model()
    check_mergeable(base)
    if getattr(base, "hf_quantizer", None) is not None:
        weights, config = get_peft_model_state_dict(peft_model), peft_model.peft_config[ADAPTER]
        peft_model = get_peft_model(peft_model.unload().dequantize(), config)
        set_peft_model_state_dict(peft_model, weights)
    return peft_model.merge_and_unload()
