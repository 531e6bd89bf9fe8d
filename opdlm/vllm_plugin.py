"""Block-diffusion decoding of `sdar` students in vLLM's diffusion path (0.32, Model Runner V2: CUDA).

vLLM schedules a block ("canvas") as draft tokens. A denoising step accepts none of them, so its keys and
values are rolled back; a complete block is forwarded once more and accepted: that commits it. To the
attention every block of a prompt is a query of its own, which makes the context block-causal. What of the
prompt lies in the first unfinished block travels in `extra_args` and starts as known. Proposals, draws and
remasking are `unmasking`'s, so rollouts equal our decoder's. vLLM loads this room itself (entry point
`vllm.general_plugins`).
Not here: `preserve`, whose noised slots have weights of their own; the response grid.

Shape suffixes: R request places, T tokens of a block, D requests that decode now, V vocabulary, M masked.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from opdlm.diffusion import DiffusionSpec
from opdlm.rows import REMASKING, DecodeConfig
from opdlm.unmasking import choose_revealed, noise_keys, num_to_reveal, propose_tokens

FAMILIES = {"OpdlmQwen3": ("qwen3", "Qwen3ForCausalLM"), "OpdlmLlama": ("llama", "LlamaForCausalLM")}


class Canvases:
    """The block that every request is denoising, and the trajectories of what was committed."""

    def __init__(
        self, spec: DiffusionSpec, decode: DecodeConfig, max_requests: int, device: torch.device
    ) -> None:
        self.spec, self.decode, self.device = spec, decode, device
        size = (max_requests, spec.block_size)
        self.ids_RT = torch.full(size, spec.mask_token_id, device=device)
        self.step_RT = torch.zeros(size, dtype=torch.long, device=device)
        zeros_R = torch.zeros(max_requests, dtype=torch.long, device=device)
        self.start_R, self.num_prompt_R, self.seed_R = zeros_R, zeros_R.clone(), zeros_R.clone()
        self.block_step_R, self.num_steps_R = zeros_R.clone(), zeros_R.clone()
        self.row_of: dict[int, int] = {}
        self.committed: dict[int, list[tuple[int, int]]] = {}

    def start(self, place: int, num_prefilled: int, known: list[int], seed: int, row: int) -> None:
        """A request takes a place; `known` are the prompt's tokens in the first block."""
        self.ids_RT[place] = self.spec.mask_token_id
        self.ids_RT[place, : len(known)] = torch.tensor(known, dtype=torch.long, device=self.device)
        self.step_RT[place] = 0
        self.start_R[place], self.num_prompt_R[place] = num_prefilled, num_prefilled + len(known)
        self.seed_R[place] = seed
        self.block_step_R[place], self.num_steps_R[place] = 0, 0
        self.row_of[place] = row
        self.committed[row] = []

    def advance(self, place_D: Tensor, logits_DTV: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the requests in these places: `[D, T]` ids and bool `[D]`, which blocks were committed.

        A committed stop token is reported as [MASK], the only id that ends a request: a prompt's tokens in
        the first block may be stop tokens, and must not.
        """
        ids_DT, mask_id = self.ids_RT[place_D], self.spec.mask_token_id
        masked_DT = ids_DT == mask_id
        done_D = ~masked_DT.any(1)
        for place in place_D[done_D].tolist():
            pairs = zip(self.ids_RT[place].tolist(), self.step_RT[place].tolist(), strict=True)
            self.committed[self.row_of[place]] += pairs
        position_DT = self.start_R[place_D, None] + torch.arange(ids_DT.shape[1], device=self.device)
        stops = torch.tensor(self.spec.stop_token_ids, device=self.device)
        is_stop_DT = torch.isin(ids_DT, stops) & (position_DT >= self.num_prompt_R[place_D, None])
        reported_DT = ids_DT.masked_fill(is_stop_DT, mask_id)

        self.num_steps_R[place_D] += (~done_D).long()
        ids_DT = self.reveal(place_D, ids_DT, masked_DT, position_DT, logits_DTV)
        complete_D = ~(ids_DT == mask_id).any(1)
        self.block_step_R[place_D] = torch.where(complete_D, 0, self.block_step_R[place_D] + 1)
        self.start_R[place_D] += done_D.long() * ids_DT.shape[1]
        self.ids_RT[place_D] = ids_DT.masked_fill(done_D[:, None], mask_id)
        return reported_DT, done_D

    def reveal(
        self, place_D: Tensor, ids_DT: Tensor, masked_DT: Tensor, position_DT: Tensor, logits_DTV: Tensor
    ) -> Tensor:
        """The blocks after one denoising step; those without masks stay as they are."""
        row_M, offset_M = masked_DT.nonzero(as_tuple=True)
        logits_MV = logits_DTV[row_M, offset_M].float()
        logits_MV[:, list(self.spec.banned_token_ids)] = -torch.inf
        step_D = self.num_steps_R[place_D]
        key_M = noise_keys(self.seed_R[place_D][row_M], position_DT[row_M, offset_M], step_D[row_M])
        decode, size = self.decode, ids_DT.shape[1]
        ids_M, confidence_M = propose_tokens(logits_MV, decode.temperature, decode.top_k, decode.top_p, key_M)
        confidence_DT = torch.zeros(masked_DT.shape, device=self.device)
        confidence_DT[row_M, offset_M] = confidence_M
        num_D = num_to_reveal(self.block_step_R[place_D], size, min(decode.denoising_steps or size, size))
        remasking = REMASKING[decode.mode]
        revealed_DT = choose_revealed(confidence_DT, masked_DT, num_D, remasking, decode.confidence_threshold)
        proposed_DT = ids_DT.index_put((row_M, offset_M), ids_M)
        self.step_RT[place_D] = torch.where(revealed_DT, step_D[:, None], self.step_RT[place_D])
        return torch.where(revealed_DT, proposed_DT, ids_DT)


class Sampler:
    """What vLLM calls after every forward, in place of its own sampler."""

    penalties_state = SimpleNamespace(output_bin_counts=None)

    def __init__(self, canvases: Canvases, draft_tokens_RT: Tensor) -> None:
        self.canvases, self.draft_tokens_RT = canvases, draft_tokens_RT

    def add_request(self, place: int, params: Any) -> None:
        """The model state has seen the request already."""

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def __call__(self, logits: Tensor, batch: Any, draft_logits: Tensor | None = None) -> Any:
        from vllm.v1.worker.gpu.sample.output import SamplerOutput

        device, size = self.canvases.device, self.canvases.ids_RT.shape[1]
        sampled = torch.zeros((batch.num_reqs, size), dtype=torch.int32, device=device)
        num_sampled = torch.zeros(batch.num_reqs, dtype=torch.int32, device=device)
        num_rejected = torch.zeros_like(num_sampled)
        if batch.num_draft_tokens:
            num_logits = torch.from_numpy(batch.cu_num_logits_np[: batch.num_reqs + 1]).diff()
            decoding_D = num_logits.nonzero()[:, 0].to(device)
            place_D = batch.idx_mapping[: batch.num_reqs].long()[decoding_D]
            ids_DT, done_D = self.canvases.advance(place_D, logits.view(len(place_D), size, -1))
            sampled[decoding_D] = ids_DT.int()
            num_sampled[decoding_D] = done_D.int() * size
            num_rejected[decoding_D] = (~done_D).int() * size
            self.draft_tokens_RT[place_D, :size] = self.canvases.ids_RT[place_D]
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )


def block_queries(num_tokens: Iterable[int], size: int) -> tuple[list[int], list[int]]:
    """Every block of every request is a query of the attention: its request, and where it ends."""
    rows, ends, first = [], [], 0
    for row, count in enumerate(num_tokens):
        found = [*range(first + size, first + count, size), first + count]
        rows += [row] * len(found)
        ends += found
        first += count
    return rows, ends


@functools.cache
def state_class() -> type:
    """vLLM's model state, made here because vLLM is optional."""
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class BlockDiffusionState(DefaultModelState):
        """Requests denoise blocks; in every forward a block sees itself and all before it."""

        num_new_sampled_tokens_per_step = 0

        def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
            super().__init__(vllm_config, model, encoder_cache, device)
            config = self.model_config.hf_config
            spec = DiffusionSpec.from_dict(dict(config.block_diffusion))
            assert vllm_config.diffusion_config.canvas_length == spec.block_size
            decode = DecodeConfig(**config.opdlm_decode)
            self.canvases = Canvases(spec, decode, self.max_num_reqs, device)

        def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
            self.draft_tokens_RT = sampler.req_states.draft_tokens
            return Sampler(self.canvases, self.draft_tokens_RT), None

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            extra = (new_req_data.sampling_params.extra_args or {}).get("opdlm", {})
            known, seed, row = extra.get("known", []), extra.get("seed", 0), extra.get("row", -1)
            self.canvases.start(req_index, len(new_req_data.prompt_token_ids), known, seed, row)
            self.draft_tokens_RT[req_index, : self.canvases.ids_RT.shape[1]] = self.canvases.ids_RT[req_index]

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
            rows, ends = block_queries(input_batch.num_scheduled_tokens, self.canvases.spec.block_size)
            first_N = torch.tensor([0, *ends], dtype=torch.int32)
            request_ends = torch.from_numpy(input_batch.query_start_loc_np)[1:]
            unseen_N = (request_ends[rows] - first_N[1:]).to(self.device)
            row_N = torch.tensor(rows, device=self.device)
            return build_attn_metadata(
                attn_groups=attn_groups,
                num_reqs=len(row_N),
                num_tokens=input_batch.num_tokens,
                query_start_loc_gpu=first_N.to(self.device),
                query_start_loc_cpu=first_N,
                max_query_len=int(first_N.diff().max()),
                seq_lens=input_batch.seq_lens[row_N] - unseen_N,
                max_seq_len=self.max_model_len,
                block_tables=[table[row_N] for table in block_tables],
                slot_mappings=slot_mappings,
                kv_cache_config=kv_cache_config,
                causal=False,
            )

    return BlockDiffusionState


@functools.cache
def model_class(module: str, name: str) -> type:
    """vLLM's class of a family, with our state."""
    import importlib

    base: Any = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    return type(f"Opdlm{name}", (base,), {"get_model_state_cls": staticmethod(state_class)})


def register() -> None:
    """Called by vLLM when it starts, in each of its processes."""
    from vllm import ModelRegistry

    for architecture, (module, name) in FAMILIES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, model_class(module, name))
