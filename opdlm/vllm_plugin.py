"""Block-diffusion decoding in vLLM's diffusion path (0.32, Model Runner V2: CUDA).

vLLM schedules a block ("canvas") as draft tokens. A denoising step accepts none of them, so its keys and
values are rolled back; a complete block is forwarded once more and accepted: that commits it. To the
attention every block of a prompt is a query of its own, which makes the context block-causal.

On the absolute grid the last P mod b tokens of a prompt lie in the block that the response starts in. They
are prefilled like the others, then taken back (reported as rejected, which vLLM's worker heeds and its
scheduler does not), so that the first canvas starts with them; of that block only the response's tokens are
reported, and worker and scheduler agree again. On the response grid every canvas starts where vLLM puts it.

In `preserve` slot i - 1 predicts token i, so a canvas is the b slots before its tokens: one more token of
the prompt is taken back, for good. What a block knows from its left edge on is clean, each such slot a query
of its own (causal), and the adapter is computed for the others (`vllm_gate`).

Proposals, draws and remasking are `unmasking`'s, so rollouts equal our decoder's. vLLM loads this room itself
(entry point `vllm.general_plugins`); its config.json says everything (`vllm_config_values`).

Shape suffixes: R request places, T tokens of a block, D requests that decode now, V vocabulary, M masked,
N places whose logits were computed.
"""

from __future__ import annotations

import functools
import importlib
import logging
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from opdlm.attention import layer_windows
from opdlm.blocks import GridKind
from opdlm.diffusion import DiffusionSpec
from opdlm.errors import ConfigError
from opdlm.rows import REMASKING, DecodeConfig
from opdlm.unmasking import choose_revealed, noise_keys, num_to_reveal, propose_tokens
from opdlm.vllm_gate import SlotGate

VERSION = "0.32.0"
"""Of vLLM: what is used of it here is internal and changes."""
FAMILIES = {"qwen3": ("OpdlmQwen3", "Qwen3ForCausalLM"), "llama": ("OpdlmLlama", "LlamaForCausalLM")}
"""model_type: our architecture, and vLLM's class that it extends."""


MODES = ("static", "threshold", "left_to_right")


def vllm_config_values(config: PretrainedConfig, spec: DiffusionSpec, decode: DecodeConfig) -> dict[str, Any]:
    """What config.json says to vLLM beyond the base architecture; ConfigError for students it cannot run."""
    check_runs_in_vllm(config, spec, decode)
    return {
        "architectures": [FAMILIES[config.model_type][0]],
        "canvas_length": spec.block_size,
        "block_diffusion": spec.to_dict(),
        "opdlm_decode": asdict(decode),
    }


def check_runs_in_vllm(config: PretrainedConfig, spec: DiffusionSpec, decode: DecodeConfig) -> None:
    if spec.format == "preserve" and not spec.adapter:
        raise ConfigError(
            "preserve students without an adapter do not run in vLLM: they are two sets of weights, and it "
            "holds one. Use our own engine, or convert with lora.enabled=true."
        )
    if spec.format == "preserve" and decode.veto_below:
        raise ConfigError(
            f"veto_below ({decode.veto_below:g}) does not run in vLLM: a committed block stays. Set it to 0."
        )
    if config.model_type not in FAMILIES or any(window is not None for window in layer_windows(config)):
        raise ConfigError(
            f"{config.model_type} students do not run in vLLM: its plugin knows {' and '.join(FAMILIES)} "
            "without sliding windows. Use our own engine."
        )
    if decode.mode not in MODES:
        raise ConfigError(f"mode {decode.mode} does not run in vLLM: use {', '.join(MODES)}.")


class Canvases:
    """The block that every request is denoising, and the trajectories of what was committed."""

    def __init__(
        self, spec: DiffusionSpec, decode: DecodeConfig, max_requests: int, device: torch.device
    ) -> None:
        self.spec, self.decode, self.device = spec, decode, device
        self.shift = 1 if spec.format == "preserve" else 0
        size = (max_requests, spec.block_size)
        self.ids_RT = torch.full(size, spec.mask_token_id, device=device)
        self.step_RT = torch.zeros(size, dtype=torch.long, device=device)
        zeros_R = torch.zeros(max_requests, dtype=torch.long, device=device)
        self.start_R, self.seed_R = zeros_R, zeros_R.clone()
        self.num_known_R, self.num_taken_back_R = zeros_R.clone(), zeros_R.clone()
        self.before_R = zeros_R.clone()
        self.block_step_R, self.num_steps_R = zeros_R.clone(), zeros_R.clone()
        self.row_of: dict[int, int | None] = {}
        self.committed: dict[int, list[tuple[int, int]]] = {}

    def start(self, place: int, ids: list[int], seed: int, row: int | None) -> None:
        """A request takes a place; `ids` are its prompt, and what it had written where vLLM lets it start
        again. The trajectory is kept if it has a `row`.
        """
        size = self.spec.block_size
        num_known = len(ids) % size if self.spec.grid == "absolute" else 0
        known = torch.tensor(ids[len(ids) - num_known :], dtype=torch.long, device=self.device)
        self.ids_RT[place] = self.spec.mask_token_id
        self.ids_RT[place, :num_known] = known
        self.step_RT[place] = 0
        self.start_R[place], self.seed_R[place] = len(ids) - num_known, seed
        self.num_known_R[place], self.num_taken_back_R[place] = num_known, num_known + self.shift
        self.before_R[place] = ids[len(ids) - num_known - 1]
        self.block_step_R[place], self.num_steps_R[place] = 0, 0
        self.row_of[place] = row
        if row is not None:
            self.committed.setdefault(row, [])

    def slots(self, place_D: Tensor) -> Tensor:
        """Token ids `[D, T]` of the slots that predict the blocks' tokens."""
        if not self.shift:
            return self.ids_RT[place_D]
        return torch.cat([self.before_R[place_D, None], self.ids_RT[place_D, :-1]], 1)

    def num_clean(self, place_D: Tensor) -> Tensor:
        """`preserve`: how many of these slots are clean `[D]`, from the left."""
        masked_DT = self.ids_RT[place_D] == self.spec.mask_token_id
        size = self.spec.block_size
        return torch.where(masked_DT.any(1), masked_DT.long().argmax(1) + 1, size)

    def take_back(self, place_D: Tensor) -> Tensor:
        """How many tokens of their prompts, now prefilled, the first canvases start with `[D]`."""
        num_D = self.num_taken_back_R[place_D]
        self.num_taken_back_R[place_D] = 0
        return num_D

    def advance(self, place_D: Tensor, logits_NV: Tensor, first_D: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the requests in these places, whose logits start at rows `first_D`: ids `[D, T]`, and
        how many of them, from the left, are new text `[D]`: none while the block has masks.
        """
        ids_DT, mask_id, size = self.ids_RT[place_D], self.spec.mask_token_id, self.spec.block_size
        offset_T = torch.arange(size, device=self.device)
        masked_DT = ids_DT == mask_id
        done_D = ~masked_DT.any(1)
        num_known_D = self.num_known_R[place_D]
        self.record(place_D[done_D])
        new_DT = ids_DT.gather(1, (offset_T + num_known_D[:, None]) % size)

        self.num_steps_R[place_D] += (~done_D).long()
        position_DT = self.start_R[place_D, None] + offset_T
        ids_DT = self.reveal(place_D, ids_DT, masked_DT, position_DT, logits_NV, first_D)
        complete_D = ~(ids_DT == mask_id).any(1)
        self.block_step_R[place_D] = torch.where(complete_D, 0, self.block_step_R[place_D] + 1)
        self.before_R[place_D] = torch.where(done_D, ids_DT[:, -1], self.before_R[place_D])
        self.start_R[place_D] += done_D.long() * size
        self.num_known_R[place_D] = torch.where(done_D, 0, num_known_D)
        self.ids_RT[place_D] = ids_DT.masked_fill(done_D[:, None], mask_id)
        return new_DT, done_D.long() * (size - num_known_D)

    def record(self, place_D: Tensor) -> None:
        """Keep the trajectories of blocks that are committed, without the prompt's tokens."""
        for place in place_D.tolist():
            row, num_known = self.row_of[place], int(self.num_known_R[place])
            if row is not None:
                pairs = zip(self.ids_RT[place].tolist(), self.step_RT[place].tolist(), strict=True)
                self.committed[row] += list(pairs)[num_known:]

    def reveal(
        self,
        place_D: Tensor,
        ids_DT: Tensor,
        masked_DT: Tensor,
        position_DT: Tensor,
        logits_NV: Tensor,
        first_D: Tensor,
    ) -> Tensor:
        """The blocks after one denoising step; those without masks stay as they are."""
        row_M, offset_M = masked_DT.nonzero(as_tuple=True)
        logits_MV = logits_NV[first_D[row_M] + offset_M].float()
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

        canvases, size = self.canvases, self.canvases.spec.block_size
        place_B = batch.idx_mapping[: batch.num_reqs].long()
        sampled = torch.full((batch.num_reqs, size), canvases.spec.mask_token_id, device=canvases.device)
        num_sampled = torch.zeros(batch.num_reqs, dtype=torch.long, device=canvases.device)
        num_rejected = torch.zeros_like(num_sampled)
        if batch.num_draft_tokens:
            first_B = torch.from_numpy(batch.cu_num_logits_np[: batch.num_reqs + 1]).long()
            width_B = first_B.diff().to(canvases.device)
            whole_D = (width_B == size).nonzero()[:, 0]
            first_D = first_B.to(canvases.device)[whole_D]
            sampled[whole_D], num_new_D = canvases.advance(place_B[whole_D], logits, first_D)
            num_sampled[whole_D] = num_new_D
            num_rejected[whole_D] = (num_new_D == 0).long() * size
            self.draft_tokens_RT[place_B[whole_D], :size] = canvases.slots(place_B[whole_D])
            # the context ends inside this block: no token of it is known, and these masks are the last
            cut_B = (width_B > 0) & (width_B < size)
            num_sampled = torch.where(cut_B, width_B, num_sampled)
            prefilled_D = (width_B == 0).nonzero()[:, 0]
        else:
            prefilled_D = torch.arange(batch.num_reqs, device=canvases.device)
        num_rejected[prefilled_D] = canvases.take_back(place_B[prefilled_D])
        return SamplerOutput(
            sampled_token_ids=sampled.int(),
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled.int(),
            num_rejected=num_rejected.int(),
        )


def block_queries(num_tokens: Iterable[int], size: int, grid: GridKind) -> tuple[list[int], list[int]]:
    """Every block of every request is a query of the attention: its request, and where it ends.

    A request's tokens are a whole prompt or a block; on the response grid a prompt's first block is short.
    """
    rows, ends, first = [], [], 0
    for row, count in enumerate(num_tokens):
        short = count % size if grid == "response" else 0
        found = [*range(first + (short or size), first + count, size), first + count]
        rows += [row] * len(found)
        ends += found
        first += count
    return rows, ends


def slot_queries(num_tokens: Iterable[int], num_clean: Iterable[int]) -> tuple[list[int], list[int]]:
    """`preserve`: every clean slot is a query, and the noised slots after them are one."""
    rows, ends, first = [], [], 0
    for row, (count, clean) in enumerate(zip(num_tokens, num_clean, strict=True)):
        found = [*range(first + 1, first + clean + 1), *([first + count] if clean < count else [])]
        rows += [row] * len(found)
        ends += found
        first += count
    return rows, ends


@functools.cache
def state_class() -> type:
    """vLLM's model state, made here because vLLM is optional."""
    from vllm.model_executor.layers.linear import LinearBase
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
            if spec.format == "preserve":
                named = model.named_modules()
                self.gate = SlotGate({name: m for name, m in named if isinstance(m, LinearBase)})

        def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
            self.draft_tokens_RT = sampler.req_states.draft_tokens
            return Sampler(self.canvases, self.draft_tokens_RT), None

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            extra = new_req_data.sampling_params.extra_args or {}
            seed = extra.get("opdlm_seed", zlib.crc32(new_req_data.req_id.encode()))
            row = extra.get("opdlm_row")
            self.canvases.start(req_index, list(new_req_data.prefill_token_ids), seed, row)
            place_1 = torch.tensor([req_index], device=self.device)
            self.draft_tokens_RT[place_1, : self.canvases.spec.block_size] = self.canvases.slots(place_1)

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
            spec, num_tokens = self.canvases.spec, input_batch.num_scheduled_tokens
            if spec.format == "preserve":
                num_clean = self.begin_canvases(input_batch)
                rows, ends = slot_queries(num_tokens, num_clean)
            else:
                rows, ends = block_queries(num_tokens, spec.block_size, spec.grid)
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

        def begin_canvases(self, batch: Any) -> list[int]:
            """`preserve`: how many slots of each request are clean; the gate opens for the others.

            Writes the canvases' ids: to vLLM a first canvas may look like the rest of a prompt.
            """
            counts = torch.as_tensor(batch.num_scheduled_tokens).long()
            first_B = counts.cumsum(0) - counts
            width_B = torch.from_numpy(batch.cu_num_logits_np[: batch.num_reqs + 1]).diff()
            num_clean_B = counts.clone()
            is_whole_B = width_B == self.canvases.spec.block_size
            place_D = batch.idx_mapping[: batch.num_reqs].long()[is_whole_B.to(self.device)]
            num_clean_B[is_whole_B] = self.canvases.num_clean(place_D).cpu()
            offset_T = torch.arange(self.canvases.spec.block_size)
            column_DT = first_B[is_whole_B, None] + offset_T
            batch.input_ids[column_DT.to(self.device)] = self.canvases.slots(place_D).to(
                batch.input_ids.dtype
            )
            is_noised_DT = offset_T >= num_clean_B[is_whole_B, None]
            self.gate.noised_N = column_DT[is_noised_DT].to(self.device)
            return num_clean_B.tolist()

    return BlockDiffusionState


@functools.cache
def model_class(architecture: str, base_name: str, module: str) -> type:
    """vLLM's class of a family, with our state."""
    base: Any = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), base_name)
    return type(architecture, (base,), {"get_model_state_cls": staticmethod(state_class)})


@functools.cache
def config_class() -> type:
    """How vLLM must run these models, whatever its command line says."""
    from vllm.config.diffusion import DiffusionConfig
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class BlockDiffusionConfig(VerifyAndUpdateConfig):
        """A prompt is prefilled in one forward, as chunks would part blocks; cached prefixes of one prompt
        are not another's where blocks start elsewhere.
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
    """Called by vLLM when it starts, in each of its processes, whichever model it runs."""
    import vllm

    if vllm.__version__.partition("+")[0] != VERSION:
        logging.getLogger("vllm").warning(
            "opdlm's block-diffusion models need vllm==%s, and this is %s: they are not registered.",
            VERSION,
            vllm.__version__,
        )
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for module, (architecture, base_name) in FAMILIES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, model_class(architecture, base_name, module))
            MODELS_CONFIG_MAP[architecture] = config_class()
