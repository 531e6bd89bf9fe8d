"""Block-diffusion decoding in vLLM's diffusion path (0.32, Model Runner V2: CUDA).

vLLM schedules a block (its "canvas") as draft tokens. A denoising step accepts none of them, so their keys
and values are rolled back. A complete block is computed once more and accepted, which commits it. Every block
of a prompt is one query of the attention, which makes the context block-causal. In `preserve` every noised
slot is one query (`queries`), and the adapter acts on these slots (`gate`). How `preserve` students are
served losslessly: `lossless`.

Tokens of a prompt that belong to the first block (`block_state`) are rolled back after the prefill: the
sampler reports them as rejected. vLLM's worker follows that report; its scheduler ignores it, because it
counts drafts only. The first commit reports only new tokens, and the scheduler counts the others as rejected
drafts. After it worker and scheduler agree (in `preserve` except for one token, which every block computes
again).

vLLM loads this module itself (entry point `vllm.general_plugins`); it reads all settings from config.json
(`vllm_config_values`).

Shape suffixes: R rows of vLLM's request table, T tokens of a block, B requests, D those that decode now.
"""

from __future__ import annotations

import functools
import importlib
import logging
import zlib
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from opdlm.decoding.decode_config import DecodeConfig
from opdlm.errors import ConfigError
from opdlm.modeling.attention import layer_windows
from opdlm.modeling.diffusion_lm import DiffusionSpec
from opdlm.vllm.block_state import BlockStates
from opdlm.vllm.gate import SlotGate
from opdlm.vllm.lossless import lossless_config_class, lossless_state_class
from opdlm.vllm.queries import block_queries, query_metadata, slot_queries

VERSION = "0.32.0"
"""The only tested version of vLLM: the interfaces used here are internal and change."""
FAMILIES = {"qwen3": ("OpdlmQwen3", "Qwen3ForCausalLM"), "llama": ("OpdlmLlama", "LlamaForCausalLM")}
"""model_type -> our architecture, and the class of vLLM that it extends."""
LOSSLESS = "Lossless"
"""End of the architectures that decode losslessly."""
MODES = ("static", "threshold", "left_to_right")


def vllm_config_values(config: PretrainedConfig, spec: DiffusionSpec, decode: DecodeConfig) -> dict[str, Any]:
    """Keys that vLLM needs in config.json. Raises ConfigError for students that it cannot run."""
    check_runs_in_vllm(config, spec, decode)
    return {
        "architectures": [FAMILIES[config.model_type][0]],
        "canvas_length": spec.block_size,
        "block_diffusion": spec.to_dict(),
        "opdlm_decode": asdict(decode),
    }


def lossless_config_values(config: PretrainedConfig, spec: DiffusionSpec) -> dict[str, Any]:
    """The same for a `preserve` student that decodes losslessly."""
    check_loads_in_vllm(config, spec)
    if hasattr(config, "quantization_config"):
        raise ConfigError("preserve students with quantised weights do not run in vLLM. Use `opdlm serve`.")
    architecture = FAMILIES[config.model_type][0] + LOSSLESS
    return {"architectures": [architecture], "block_diffusion": spec.to_dict()}


def check_runs_in_vllm(config: PretrainedConfig, spec: DiffusionSpec, decode: DecodeConfig) -> None:
    check_loads_in_vllm(config, spec)
    if spec.format == "preserve" and decode.ar_accept_threshold:
        raise ConfigError(
            f"ar_accept_threshold ({decode.ar_accept_threshold:g}) does not run in vLLM: a committed block "
            "stays. Set it to 0."
        )
    if decode.mode not in MODES:
        raise ConfigError(f"mode {decode.mode} does not run in vLLM: use {', '.join(MODES)}.")


def check_loads_in_vllm(config: PretrainedConfig, spec: DiffusionSpec) -> None:
    """ConfigError for students that the plugin cannot load, however they decode."""
    if spec.format == "preserve" and not spec.adapter:
        raise ConfigError(
            "preserve students without an adapter do not run in vLLM: they are two sets of weights, and it "
            "holds one. Use our own engine, or convert with lora.enabled=true."
        )
    if config.model_type not in FAMILIES or any(window is not None for window in layer_windows(config)):
        raise ConfigError(
            f"{config.model_type} students do not run in vLLM: its plugin knows {' and '.join(FAMILIES)} "
            "without sliding windows. Use our own engine."
        )


class Sampler:
    """Replaces vLLM's own sampler, which runs after every forward."""

    penalties_state = SimpleNamespace(output_bin_counts=None)

    def __init__(self, block_states: BlockStates, draft_tokens_RT: Tensor) -> None:
        self.block_states, self.draft_tokens_RT = block_states, draft_tokens_RT

    def add_request(self, place: int, params: Any) -> None:
        """Nothing to do: `BlockDiffusionState.add_request` has added it."""

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def __call__(self, logits: Tensor, batch: Any, draft_logits: Tensor | None = None) -> Any:
        from vllm.v1.worker.gpu.sample.output import SamplerOutput

        block_states, size = self.block_states, self.block_states.spec.block_size
        place_B = batch.idx_mapping[: batch.num_reqs].long()
        sampled = torch.full(
            (batch.num_reqs, size), block_states.spec.mask_token_id, device=block_states.device
        )
        num_sampled = torch.zeros(batch.num_reqs, dtype=torch.long, device=block_states.device)
        num_rejected = torch.zeros_like(num_sampled)
        if batch.num_draft_tokens:
            first_B = torch.from_numpy(batch.cu_num_logits_np[: batch.num_reqs + 1]).long()
            width_B = first_B.diff().to(block_states.device)
            whole_D = (width_B == size).nonzero()[:, 0]
            first_D = first_B.to(block_states.device)[whole_D]
            sampled[whole_D], num_new_D = block_states.advance(place_B[whole_D], logits, first_D)
            num_sampled[whole_D] = num_new_D
            num_rejected[whole_D] = (num_new_D == 0).long() * size
            self.draft_tokens_RT[place_B[whole_D], :size] = block_states.slots(place_B[whole_D])
            # the context ends inside this block: its masks are reported as text, and the request ends
            cut_B = (width_B > 0) & (width_B < size)
            num_sampled = torch.where(cut_B, width_B, num_sampled)
            prefilled_D = (width_B == 0).nonzero()[:, 0]
        else:
            prefilled_D = torch.arange(batch.num_reqs, device=block_states.device)
        num_rejected[prefilled_D] = block_states.roll_back(place_B[prefilled_D])
        return SamplerOutput(
            sampled_token_ids=sampled.int(),
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled.int(),
            num_rejected=num_rejected.int(),
        )


@functools.cache
def state_class() -> type:
    """Our model state for vLLM; a function, because importing vLLM is optional."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class BlockDiffusionState(DefaultModelState):
        """Requests denoise blocks; a block sees itself and everything before it."""

        num_new_sampled_tokens_per_step = 0

        def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
            super().__init__(vllm_config, model, encoder_cache, device)
            config = self.model_config.hf_config
            spec = DiffusionSpec.from_dict(dict(config.block_diffusion))
            assert vllm_config.diffusion_config.canvas_length == spec.block_size
            decode = DecodeConfig(**config.opdlm_decode)
            self.block_states = BlockStates(spec, decode, self.max_num_reqs, device)
            if spec.format == "preserve":
                named = model.named_modules()
                self.gate = SlotGate({name: m for name, m in named if isinstance(m, LinearBase)})

        def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
            self.draft_tokens_RT = sampler.req_states.draft_tokens
            return Sampler(self.block_states, self.draft_tokens_RT), None

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            extra = new_req_data.sampling_params.extra_args or {}
            seed = extra.get("opdlm_seed", zlib.crc32(new_req_data.req_id.encode()))
            row = extra.get("opdlm_row")
            self.block_states.start(req_index, list(new_req_data.prefill_token_ids), seed, row)
            place_1 = torch.tensor([req_index], device=self.device)
            self.draft_tokens_RT[place_1, : self.block_states.spec.block_size] = self.block_states.slots(
                place_1
            )

        def prepare_attn(
            self,
            input_batch: Any,
            cudagraph_mode: Any,
            block_tables: Any,
            slot_mappings: Any,
            attn_groups: Any,
            kv_cache_config: Any,
            for_capture: bool = False,
            ubatch_idx: int = 0,
        ) -> dict[str, Any]:
            spec, num_tokens = self.block_states.spec, input_batch.num_scheduled_tokens
            is_preserve = spec.format == "preserve"
            if is_preserve:
                queries = slot_queries(num_tokens, self.begin_blocks(input_batch))
            else:
                queries = block_queries(num_tokens, spec.block_size, spec.grid)
            return query_metadata(
                input_batch,
                queries,
                causal=is_preserve,
                max_seq_len=self.max_model_len,
                attn_groups=attn_groups,
                block_tables=block_tables,
                slot_mappings=slot_mappings,
                kv_cache_config=kv_cache_config,
            )

        def begin_blocks(self, batch: Any) -> list[int]:
            """`preserve`: how many slots of each request are noised; the adapter acts on these.

            Writes the token ids of the blocks, because vLLM may schedule a first block as the rest of its
            prompt.
            """
            counts = torch.as_tensor(batch.num_scheduled_tokens).long()
            first_B = counts.cumsum(0) - counts
            width_B = torch.from_numpy(batch.cu_num_logits_np[: batch.num_reqs + 1]).diff()
            num_clean_B = counts.clone()
            is_whole_B = width_B == self.block_states.spec.block_size
            place_D = batch.idx_mapping[: batch.num_reqs].long()[is_whole_B.to(self.device)]
            num_clean_B[is_whole_B] = self.block_states.num_clean(place_D).cpu()
            offset_T = torch.arange(self.block_states.spec.block_size)
            column_DT = first_B[is_whole_B, None] + offset_T
            batch.input_ids[column_DT.to(self.device)] = self.block_states.slots(place_D).to(
                batch.input_ids.dtype
            )
            is_noised_DT = offset_T >= num_clean_B[is_whole_B, None]
            self.gate.noised_N = column_DT[is_noised_DT].to(self.device)
            return (counts - num_clean_B).tolist()

    return BlockDiffusionState


@functools.cache
def model_class(architecture: str, base_name: str, module: str, state: Callable[[], type]) -> type:
    """vLLM's class of a model family, with our model state."""
    base: Any = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), base_name)
    return type(architecture, (base,), {"get_model_state_cls": staticmethod(state)})


@functools.cache
def config_class() -> type:
    """Settings of vLLM that these models need, whatever its command line says."""
    from vllm.config.diffusion import DiffusionConfig
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class BlockDiffusionConfig(VerifyAndUpdateConfig):
        """A prompt is prefilled in one forward, because chunks would split blocks. Prefix caching is off,
        because the keys of a prefix depend on where the blocks of its prompt start.
        """

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
            size = model.hf_config.canvas_length
            if not vllm_config.use_v2_model_runner:
                raise ValueError(
                    "block-diffusion students of opdlm need vLLM's Model Runner V2, which needs Triton and a "
                    "GPU: run them with `opdlm generate` here."
                )
            if vllm_config.parallel_config.pipeline_parallel_size > 1:
                raise ValueError("block-diffusion students of opdlm run without --pipeline-parallel-size.")
            vllm_config.diffusion_config = DiffusionConfig(canvas_length=size)
            scheduler.async_scheduling = scheduler.enable_chunked_prefill = False
            num_tokens = max(
                scheduler.max_num_batched_tokens, model.max_model_len, scheduler.max_num_seqs * size
            )
            scheduler.max_num_batched_tokens = -(-num_tokens // size) * size
            vllm_config.cache_config.enable_prefix_caching = False
            model.enforce_eager = True

    return BlockDiffusionConfig


def register() -> None:
    """vLLM calls this at the start of each of its processes, whatever model it runs."""
    import vllm

    if vllm.__version__.partition("+")[0] != VERSION:
        logging.getLogger("vllm").warning(
            "opdlm's block-diffusion models are not registered: they need vllm==%s, and this is %s.",
            VERSION,
            vllm.__version__,
        )
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    kinds = (("", state_class, config_class), (LOSSLESS, lossless_state_class, lossless_config_class))
    for module, (name, base_name) in FAMILIES.items():
        for suffix, state, config in kinds:
            architecture = name + suffix
            if architecture not in ModelRegistry.get_supported_archs():
                model = model_class(architecture, base_name, module, state)
                ModelRegistry.register_model(architecture, model)
                MODELS_CONFIG_MAP[architecture] = config()
