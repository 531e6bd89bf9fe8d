"""Lossless decoding of `preserve` students in vLLM's path of speculative decoding (0.32, Model Runner V2).

A request alternates between two forwards over b slots, b being the block size; u is its last token:

    draft     u  M   ..  M         the AR model gives the token r after u, the masks with the adapter d_1 ..
    verify    r  d_1 ..  d_(b-1)   the AR model accepts a prefix of the draft and gives one more token

For vLLM both verify b - 1 draft tokens. The masks are all rejected, so the next forward overwrites their keys
and values; everything else is vLLM's own: its rejection sampler accepts drafts at any temperature, and the
cache holds keys and values of the AR model only. So the output is that of the AR model in vLLM, up to the
rounding of other batches. It is also what our decoder writes, whose schedule is another (docs/engines.md).

vLLM reads the number of draft tokens from its `DiffusionConfig`, since a `SpeculativeConfig` would bring one
of its own drafters. Without `canvas_length` in config.json it treats the model as autoregressive otherwise.
Drafts stay in the worker, which needs vLLM's asynchronous scheduler: it schedules them unseen.

Shape suffixes: R rows of vLLM's request table, B requests of a forward, D draft tokens, N positions with
logits, M some of them, H hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from opdlm.decoding.unmasking import uniform_ids
from opdlm.modeling.diffusion_lm import DiffusionSpec
from opdlm.vllm.gate import SlotGate
from opdlm.vllm.queries import query_metadata, slot_queries

DRAFTER_FILE = "drafter/drafter.safetensors"
"""The adapter and the embedding of [MASK] in an exported folder: not beside the weights, all of which vLLM
loads as those of the AR model.
"""
MASK_EMBEDDING, DOWN, UP = "mask_embedding", ".down", ".up"
"""The names in it: of the embedding, and the ends of those of A and the scaled B of a layer."""


class DraftingSampler:
    """Replaces vLLM's sampler: verifies drafts by vLLM's own samplers, and writes what is scheduled next."""

    def __init__(self, state: Any, sampler: Any) -> None:
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

        settings: Any = SimpleNamespace(
            num_speculative_tokens=state.spec.block_size - 1,
            enable_adaptive_verification=False,
            rejection_sample_method="standard",
        )
        self.state, self.sampler = state, sampler
        self.rejection_sampler = RejectionSampler(sampler, settings, state.device)
        self.add_request, self.apply_staged_writes = sampler.add_request, sampler.apply_staged_writes
        self.penalties_state = sampler.penalties_state

    def __call__(self, logits_NV: Tensor, batch: Any) -> Any:
        state = self.state
        banned = [token for token in state.spec.banned_token_ids if token < logits_NV.shape[1]]
        logits_NV[:, banned] = -torch.inf
        draft_RD = self.sampler.req_states.draft_tokens
        if not batch.num_draft_tokens:
            output = self.sampler(logits_NV, batch)
            draft_RD[batch.idx_mapping] = self.masks(batch, output.num_rejected)
            state.has_masks_R[batch.idx_mapping_np] = True
            return output
        is_draft_N = torch.from_numpy(state.is_drafting_B.repeat(np.diff(batch.cu_num_logits_np)))
        is_draft_N = is_draft_N.to(logits_NV.device)
        # vLLM has no grammar for drafts that it schedules unseen
        invalid_N = torch.ones_like(is_draft_N) if batch.has_structured_output_reqs else is_draft_N
        ids_N = logits_NV.argmax(-1)
        output = self.rejection_sampler(logits_NV, batch, None, invalid_N)
        draft_RD[batch.idx_mapping] = self.masks(batch, output.num_rejected)
        is_draft_N &= batch.expanded_local_pos > 0
        place_M, offset_M = batch.expanded_idx_mapping[is_draft_N], batch.expanded_local_pos[is_draft_N] - 1
        draft_RD[place_M, offset_M.long()] = ids_N[is_draft_N]
        state.has_masks_R[batch.idx_mapping_np] = ~state.is_drafting_B
        return output

    def masks(self, batch: Any, num_rejected_B: Tensor) -> Tensor:
        """Ids `[B, D]` of the masks after the next token: uniformly drawn ones, or any for [MASK], whose
        embedding replaces theirs.
        """
        spec, num_reqs = self.state.spec, batch.num_reqs
        if spec.noise_vocab_size is None:
            return num_rejected_B.new_zeros(num_reqs, spec.block_size - 1).long()
        next_B1 = (batch.seq_lens[:num_reqs] - num_rejected_B).long()[:, None]
        position_BD = next_B1 + torch.arange(1, spec.block_size, device=next_B1.device)
        return uniform_ids(torch.zeros_like(position_BD), position_BD, spec.noise_vocab_size)


@functools.cache
def lossless_state_class() -> type:
    """Our model state for vLLM; a function, because importing vLLM is optional."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class LosslessState(DefaultModelState):
        """Requests draft and verify in turn."""

        def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
            super().__init__(vllm_config, model, encoder_cache, device)
            self.spec = DiffusionSpec.from_dict(dict(self.model_config.hf_config.block_diffusion))
            self.has_masks_R = np.zeros(self.max_num_reqs, dtype=bool)
            """Whether the draft tokens of a request are masks."""
            self.is_drafting_B = np.zeros(0, dtype=bool)
            config = self.model_config
            weights = load_file(cached_file(config.model, DRAFTER_FILE, revision=config.revision))
            named = model.named_modules()
            self.gate = SlotGate({name: m for name, m in named if isinstance(m, LinearBase)})
            layers = [name.removesuffix(DOWN) for name in weights if name.endswith(DOWN)]
            self.gate.load({name: (weights[name + DOWN], weights[name + UP]) for name in layers})
            if MASK_EMBEDDING in weights:
                self.gate.embed_masks(model.model.embed_tokens, weights[MASK_EMBEDDING].to(device))

        def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
            return DraftingSampler(self, sampler), None

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.has_masks_R[req_index] = False

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
            num_tokens_B = input_batch.num_scheduled_tokens
            num_drafts_B = input_batch.num_draft_tokens_per_req
            if num_drafts_B is None:
                num_drafts_B = np.zeros_like(num_tokens_B)
            self.is_drafting_B = self.has_masks_R[input_batch.idx_mapping_np] & (num_drafts_B > 0)
            num_noised_B = np.where(self.is_drafting_B, num_drafts_B, 0)
            is_noised_N = np.arange(num_tokens_B.sum())
            last_N = input_batch.query_start_loc_np[1 : input_batch.num_reqs + 1].repeat(num_tokens_B)
            is_noised_N = is_noised_N >= last_N - num_noised_B.repeat(num_tokens_B)
            self.gate.noised_N = torch.from_numpy(is_noised_N.nonzero()[0]).to(self.device)
            if self.spec.draft_attention == "causal" or not num_noised_B.any():
                return super().prepare_attn(
                    input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config
                )
            return query_metadata(
                input_batch,
                slot_queries(num_tokens_B, num_noised_B),
                causal=True,
                max_seq_len=self.max_model_len,
                attn_groups=attn_groups,
                block_tables=block_tables,
                slot_mappings=slot_mappings,
                kv_cache_config=kv_cache_config,
            )

    return LosslessState


@functools.cache
def lossless_config_class() -> type:
    """Settings of vLLM that these models need, whatever its command line says."""
    from vllm.config.diffusion import DiffusionConfig
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class LosslessConfig(VerifyAndUpdateConfig):
        """ValueError for what would be ignored or wrong."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            scheduler = vllm_config.scheduler_config
            refused = {
                "Model Runner V1 (V2 needs Triton and a GPU)": not vllm_config.use_v2_model_runner,
                "--speculative-config: the student drafts": vllm_config.speculative_config is not None,
                "--enable-lora: its own adapter is one already": vllm_config.lora_config is not None,
                "tensor, pipeline or context parallelism": vllm_config.parallel_config.world_size > 1,
                "--no-async-scheduling: drafts stay in the worker": scheduler.async_scheduling is False,
            }
            for name, is_given in refused.items():
                if is_given:
                    raise ValueError(f"preserve students of opdlm do not run with {name}.")
            size = vllm_config.model_config.hf_config.block_diffusion["block_size"]
            vllm_config.diffusion_config = DiffusionConfig(canvas_length=size - 1)
            scheduler.async_scheduling = True
            vllm_config.model_config.enforce_eager = True

    return LosslessConfig
