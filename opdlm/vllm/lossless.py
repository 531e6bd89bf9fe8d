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
Drafts stay in the worker: vLLM's asynchronous scheduler schedules them unseen, whether or not steps overlap.

Shape suffixes: R rows of vLLM's request table, B requests of a forward, E those of them that draft, D draft
tokens, N positions with logits, H hidden size, W width of the draft head, V vocabulary.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import cached_file

from opdlm.decoding.unmasking import uniform_ids
from opdlm.modeling.diffusion_lm import DiffusionSpec
from opdlm.modeling.draft_head import DraftHead
from opdlm.vllm.gate import SlotGate
from opdlm.vllm.queries import query_metadata, slot_queries

DRAFTER_FILE = "drafter/drafter.safetensors"
"""Adapter, embedding of [MASK] and draft head in an exported folder: not beside the weights, all of which
vLLM loads as those of the AR model.
"""
MASK_EMBEDDING, HEAD, DOWN, UP = "mask_embedding", "draft_head.", ".down", ".up"
"""The names in it: of the embedding, the beginning of those of the draft head, and the ends of those of A and
the scaled B of a layer.
"""


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
        likely_N, is_drafting_B = logits_NV.argmax(-1), np.zeros(batch.num_reqs, dtype=bool)
        if batch.num_draft_tokens:
            is_drafting_B = state.is_drafting_B
            # grammars do not know drafts that are scheduled unseen
            is_invalid_B = is_drafting_B | batch.has_structured_output_reqs
            is_invalid_N = torch.from_numpy(is_invalid_B.repeat(np.diff(batch.cu_num_logits_np)))
            output = self.rejection_sampler(logits_NV, batch, None, is_invalid_N.to(state.device))
        else:
            output = self.sampler(logits_NV, batch)
        draft_BD = self.masks(batch, output.num_rejected)
        index_E = torch.from_numpy(is_drafting_B.nonzero()[0]).to(state.device)
        if len(index_E):
            end_B = batch.cu_num_logits.long()
            row_ED = end_B[index_E, None] + torch.arange(1, state.spec.block_size, device=state.device)
            row_ED = row_ED.minimum(end_B[index_E + 1, None] - 1)  # a shorter draft repeats its last mask
            if state.draft_head is None:
                draft_BD[index_E] = likely_N[row_ED]
            else:
                token_E = output.sampled_token_ids[index_E, 0].long()
                draft_BD[index_E] = self.with_head(token_E, row_ED, banned)
        self.sampler.req_states.draft_tokens[batch.idx_mapping] = draft_BD
        state.has_masks_R[batch.idx_mapping_np] = ~is_drafting_B
        return output

    def with_head(self, token_E: Tensor, row_ED: Tensor, banned: list[int]) -> Tensor:
        """Drafts `[E, D]` of the draft head, which reads the tokens before each, from `token_E` on."""
        state, state_EW, drafts = self.state, None, []
        for row_E in row_ED.unbind(1):
            embedded_EH = F.embedding(token_E, state.model.model.embed_tokens.weight)
            state_EW = state.draft_head.advance(embedded_EH, state_EW)
            logits_EV = state.plain_logits(state.draft_head(state.hidden_NH[row_E], state_EW))
            logits_EV[:, banned] = -torch.inf
            token_E = logits_EV.argmax(-1)
            drafts.append(token_E)
        return torch.stack(drafts, 1)

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
            file: Any = cached_file(config.model, DRAFTER_FILE, revision=config.revision)
            weights = load_file(file)
            named = model.named_modules()
            self.gate = SlotGate({name: m for name, m in named if isinstance(m, LinearBase)})
            layers = [name.removesuffix(DOWN) for name in weights if name.endswith(DOWN)]
            self.gate.load({name: (weights[name + DOWN], weights[name + UP]) for name in layers})
            head = {name[len(HEAD) :]: weights[name] for name in weights if name.startswith(HEAD)}
            self.draft_head = DraftHead.of(head).to(device) if head else None
            self.plain_logits, model.compute_logits = model.compute_logits, self.compute_logits
            if MASK_EMBEDDING in weights:
                self.gate.embed_masks(model.model.embed_tokens, weights[MASK_EMBEDDING].to(device))

        def compute_logits(self, hidden_NH: Tensor) -> Tensor:
            """Those of the model; the draft head reads the hidden states, too."""
            self.hidden_NH = hidden_NH
            return self.plain_logits(hidden_NH)

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
            num_tokens_B, num_noised_B = input_batch.num_scheduled_tokens, np.zeros(input_batch.num_reqs, int)
            if input_batch.num_draft_tokens:
                has_masks_B = self.has_masks_R[input_batch.idx_mapping_np]
                num_noised_B = input_batch.num_draft_tokens_per_req * has_masks_B
            self.is_drafting_B = num_noised_B > 0
            ends = zip(num_tokens_B.cumsum(), num_noised_B, strict=True)
            slots = [slot for end, count in ends for slot in range(end - count, end)]
            self.gate.noised_N = torch.tensor(slots, dtype=torch.long, device=self.device)
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
                "--scheduler-cls: drafts need vLLM's own": scheduler.scheduler_cls is not None,
            }
            for name, is_given in refused.items():
                if is_given:
                    raise ValueError(f"preserve students of opdlm do not run with {name}.")
            size = vllm_config.model_config.hf_config.block_diffusion["block_size"]
            vllm_config.diffusion_config = DiffusionConfig(canvas_length=size - 1)
            scheduler.scheduler_cls = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
            vllm_config.model_config.enforce_eager = True

    return LosslessConfig
