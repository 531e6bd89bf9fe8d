"""Parameters, memory and FLOPs of a conversion, from `config.json` alone.

The model is built on the meta device, so its parameters are counted, not estimated. Every row has the maximum
length (longest prompt, longest response), so memory, FLOPs and tokens are upper bounds. With a = bytes of an
activation, H hidden size, A heads * head size, I feed-forward width (all experts of a mixture), V vocabulary,
Q queries and K keys of the student's pass over a micro-batch, per layer:

    kept for backward       Q * (2 * (4 + 2 a) H + 3 a A + 4 a I) + 2 a A * K       norms, attention, MLP
    a 2-byte base + LoRA    + Q * 4 * (5 H + A + I)                 PEFT's float32 copies of the inputs
    kept if checkpointed    Q * a * H
    temporary               the first line once for one layer, or the chunks of the loss if they are larger
    FLOPs                   2 * weights * Q + 4 A * Q * K; backward 2x that (LoRA 1x), checkpointed + 1x

Not counted: the kernels' own buffers and the allocator's fragmentation; `tests/config/test_recipes.py`
measures the error on one step. Kernels with a dense mask compute all Q * K pairs, so all are counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from opdlm.checkpoints.load import (
    add_lora,
    context_length,
    input_embedding,
    one_line,
    read_architecture,
    with_known_dtype,
)
from opdlm.config.schedules import (
    block_size_at,
    first_reused_step,
    is_from_teacher,
    length_cap,
    selection_at,
)
from opdlm.config.sections import Config
from opdlm.decoding.generate import PREFILL_PAIRS
from opdlm.errors import DataError
from opdlm.modeling.draft_head import DraftHead
from opdlm.objectives.losses import default_chunk_size, num_temporaries
from opdlm.objectives.targets import needs_teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Parameter counts, widths and bytes of a model."""

    family: str
    total: int
    """Parameters."""
    trained: int
    """Trained parameters."""
    weight_bytes: int
    """Student, and the teacher if it is a separate copy."""
    trained_bytes: int
    num_body: int
    """Parameters without embedding and head."""
    layers: int
    hidden: int
    query_width: int
    """Heads * head size."""
    key_width: int
    """Key-value heads * head size."""
    feed_forward: int
    vocabulary: int
    context: int
    """Positions of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongestRow:
    """A training row of the maximum length in a step."""

    prompt: int
    response: int
    block_size: int
    denoising_steps: int
    noised: float
    """Noised slots of all states."""
    supervised: float
    """Supervised positions of all states."""

    @property
    def length(self) -> int:
        return self.prompt + self.response


def meta_model(config: Config) -> Any:
    """The model on the meta device, without weights; DataError if `model.path` has no usable config.json."""
    config = with_known_dtype(config)
    trust = config.model.trust_remote_code
    architecture = read_architecture(config.model.path, trust)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                architecture, dtype=getattr(torch, config.model.dtype), trust_remote_code=trust
            )
    except (ValueError, KeyError) as error:
        name = config.model.path
        raise DataError(f"model.path ({name}) is no causal language model: {one_line(error)}") from error


def measure_sizes(config: Config) -> ModelSizes:
    """Sizes of the student, with its adapter if `lora.enabled`."""
    model = meta_model(config)
    text = model.config.get_text_config()
    total = sum(p.numel() for p in model.parameters())
    weight_bytes = sum(p.nbytes for p in model.parameters())
    table, head = input_embedding(model).weight, model.get_output_embeddings().weight
    tables = {id(weight): weight.numel() for weight in (table, head)}  # one entry if they are tied
    if config.lora.enabled:
        model.requires_grad_(False)
        with torch.device("meta"):
            changed = [p for p in add_lora(model, config.lora).parameters() if p.requires_grad]
        weight_bytes += sum(p.nbytes for p in changed)
    else:
        changed = list(model.parameters())
        weight_bytes *= 2
    trained, trained_bytes = sum(p.numel() for p in changed), sum(p.nbytes for p in changed)
    has_own_mask = config.lora.enabled or config.format.name == "preserve"
    if has_own_mask and config.format.noise == "mask":
        trained += text.hidden_size
        trained_bytes += 4 * text.hidden_size
    if config.format.draft_head:
        with torch.device("meta"):
            head_weights = list(DraftHead(text.hidden_size, config.format.draft_head).parameters())
        trained += sum(p.numel() for p in head_weights)
        trained_bytes += sum(p.nbytes for p in head_weights)
        weight_bytes += sum(p.nbytes for p in head_weights)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return ModelSizes(
        family=model.config.model_type,
        total=total,
        trained=trained,
        weight_bytes=weight_bytes,
        trained_bytes=trained_bytes,
        num_body=total - sum(tables.values()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query_width=text.num_attention_heads * head_size,
        key_width=kv_heads * head_size,
        feed_forward=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=table.shape[0],
        context=int(min(context_length(model.config), 10**9)),
    )


def response_cap(config: Config, step: int) -> int:
    """Maximum response tokens in step `step` (0-based)."""
    return length_cap(config.rollout, step + 1, block_size_at(config.format, step))


def longest_row(config: Config, sizes: ModelSizes, step: int) -> LongestRow:
    """The longest row of step `step` (0-based); slots are means over random reveal orders."""
    size, response = block_size_at(config.format, step), response_cap(config, step)
    steps = config.rollout.decode.denoising_steps or size
    states = {"one_per_block": 1, "random_mask": 1, "complementary": 2, "all": steps}
    num_states = states[selection_at(config, step)]
    counts = [slots_of_state(config, size, size * k / steps) for k in range(1, steps + 1)]
    noised, supervised = (num_states * sum(column) / steps / size for column in zip(*counts, strict=True))
    if config.loss.objective == "draft":
        num_drafts = config.states.anchors_per_row or math.ceil(response / size)
        noised = supervised = min(num_drafts, response) * (size - 1) / response
    return LongestRow(
        prompt=min(config.data.max_prompt_tokens, sizes.context - response - 2 * size),
        response=response,
        block_size=size,
        denoising_steps=steps,
        noised=noised * response,
        supervised=supervised * response,
    )


def slots_of_state(config: Config, size: int, masked: float) -> tuple[float, float]:
    """(noised slots, supervised slots) of a block of `size` with `masked` masked positions. In `preserve` the
    noised slots start at the first [MASK], whose mean offset is (size - masked) / (masked + 1); the AR model
    predicts that token.
    """
    if config.format.name == "sdar":
        return size, masked
    if masked <= 1:
        return 0.0, 0.0
    return size - 1 - (size - masked) / (masked + 1), masked - 1


def student_pass(config: Config, row: LongestRow) -> tuple[float, float]:
    """(queries, keys) of one row; only `sdar` computes the clean half in this pass."""
    keys = row.length + row.noised
    return (keys if config.format.name == "sdar" else row.noised), keys


def element_bytes(config: Config) -> int:
    """Bytes of an activation."""
    is_half = weight_element(config) == 2 or config.train.mixed_precision == "bf16"
    return 2 if is_half else 4


def weight_element(config: Config) -> int:
    """Bytes of a weight."""
    assert config.model.dtype != "auto"
    return 4 if config.model.dtype == "float32" else 2


def fixed_memory(config: Config, sizes: ModelSizes) -> dict[str, float]:
    """Memory that is held during the whole run, in bytes."""
    kept = {"weights": float(sizes.weight_bytes)} | optimizer_memory(config, sizes)
    if config.rollout.asynchronous:
        kept["asynchronous student"] = float(sizes.trained_bytes)
    if config.rollout.engine == "vllm":
        kept["weights in vLLM"] = float(weight_element(config) * sizes.total)
    return kept | ({} if config.train.ema_decay is None else {"weight average": 4.0 * sizes.trained})


def optimizer_memory(config: Config, sizes: ModelSizes) -> dict[str, float]:
    """State of the optimiser, in bytes: two moments, and float32 copies of the weights of 2 bytes."""
    moment = 1 if config.optimizer.name == "adamw8bit" else 4
    found = {"AdamW moments": 2.0 * moment * sizes.trained}
    copies = 2.0 * (4 * sizes.trained - sizes.trained_bytes)  # 4 bytes for each weight of 2
    return found | ({"float32 copies of the weights": copies} if copies else {})


def rollout_memory(config: Config, sizes: ModelSizes, row: LongestRow) -> dict[str, float]:
    """Key-value cache, masks and largest layer of decoding, in bytes; empty if rollouts come from a file.

    A mask holds booleans (2 bytes), numbers, and the numbers of each query head that shares keys. Sampling
    holds logits twice and two int64 of its noise (`unmasking.mix_bits`); the logits themselves take three
    float32.
    """
    if config.rollout.path:
        return {}
    rows, a = min(config.rollout.decode.batch_size, config.rollout.prompts_per_step), weight_element(config)
    tokens = rows * (row.length + 2 * row.block_size + 1)
    step = 2 * rows * row.block_size  # slots of a step, of which prompts may be a part
    slots = step + rows * row.prompt
    if rows * row.prompt**2 > PREFILL_PAIRS:
        slots = max(step, PREFILL_PAIRS // row.prompt)
    pairs = max(slots * row.prompt, step * row.length)
    prefill = slots * (3 * sizes.feed_forward + 6 * sizes.hidden + sizes.query_width) * a
    # The keys and values of one layer, repeated for every head, in the cache and concatenated.
    layer = 2 * tokens * (sizes.query_width + sizes.key_width) * a
    logits = rows * row.block_size * sizes.vocabulary * (24 if config.rollout.decode.temperature else 12)
    return {
        "rollout: cache": 2.0 * tokens * sizes.layers * sizes.key_width * a,
        "rollout: masks": pairs * (2.0 + a + a * sizes.query_width / sizes.key_width),
        "rollout: one layer and logits": float(max(prefill, layer, logits)),
    }


def training_memory(config: Config, sizes: ModelSizes, row: LongestRow) -> dict[str, float]:
    """Memory of training, in bytes. Gradients coexist with all other parts, their float32 copies for the
    optimiser with none.
    """
    rows, a = config.train.micro_batch_rows, weight_element(config)
    teacher = rows * row.length * sizes.hidden * a
    if config.format.name == "preserve":
        teacher += 2 * rows * row.length * sizes.layers * sizes.key_width * a
    found = {
        "gradients": float(sizes.trained_bytes),
        "teacher states and cache": float(teacher),
        "activations": kept_bytes(config, sizes, row, config.train.gradient_checkpointing),
        "one layer or loss chunks": working_bytes(config, sizes, row),
    }
    if config.train.mixed_precision == "bf16" and config.model.dtype == "float32":
        found["bf16 copies of the weights"] = 2.0 * sizes.total
    beyond = 4.0 * sizes.trained - sum(found.values())
    return found | ({"float32 gradients beyond these": beyond} if beyond > 0 else {})


def layer_bytes(config: Config, sizes: ModelSizes, row: LongestRow) -> float:
    """Activations of one student layer for its backward, for a micro-batch, in bytes."""
    a, (queries, keys) = element_bytes(config), student_pass(config, row)
    width = 2 * (4 + 2 * a) * sizes.hidden + 3 * a * sizes.query_width + 4 * a * sizes.feed_forward
    if config.lora.enabled and weight_element(config) == 2:
        width += 4 * (5 * sizes.hidden + sizes.query_width + sizes.feed_forward)
    return config.train.micro_batch_rows * (queries * width + 2 * a * sizes.query_width * keys)


def kept_bytes(config: Config, sizes: ModelSizes, row: LongestRow, is_checkpointed: bool) -> float:
    """Activations for the backward, in bytes: those of all layers, or their inputs, and the mask."""
    a, (queries, keys) = element_bytes(config), student_pass(config, row)
    masks = config.train.micro_batch_rows * queries * keys * (1 + a)
    if is_checkpointed:
        return sizes.layers * config.train.micro_batch_rows * queries * a * sizes.hidden + masks
    return sizes.layers * layer_bytes(config, sizes, row) + masks


def working_bytes(config: Config, sizes: ModelSizes, row: LongestRow) -> float:
    """Temporary memory, in bytes: chunks of the loss, or one layer with the gradients of its widest part."""
    supervised = config.train.micro_batch_rows * row.supervised
    num_alive = num_temporaries(
        config.loss.divergence, config.loss.reverse_weight, config.loss.variation_weight
    )
    trains_head = not config.lora.enabled
    chunk = default_chunk_size(
        sizes.vocabulary, sizes.hidden, num_alive, trains_head=trains_head, device="cuda"
    )
    loss = 4 * (num_alive * min(chunk, supervised) * sizes.vocabulary + 3 * supervised * sizes.hidden)
    head = 4 * sizes.vocabulary * sizes.hidden * trains_head  # its gradient, in float32
    queries, _ = student_pass(config, row)
    widest = element_bytes(config) * (sizes.hidden + 2 * sizes.feed_forward)
    layer = layer_bytes(config, sizes, row) + config.train.micro_batch_rows * queries * widest
    return head + max(loss, layer)


def step_flops(config: Config, sizes: ModelSizes, step: int) -> dict[str, float]:
    """Floating-point operations of step `step` (0-based), by purpose."""
    row, head = longest_row(config, sizes, step), sizes.vocabulary * sizes.hidden
    num_trained = step - first_reused_step(config, step) + 1
    updates = config.rollout.prompts_per_step * num_trained * config.train.epochs_per_rollout
    queries, keys = student_pass(config, row)
    forward = pass_flops(sizes, queries, keys)
    passes = 1 + (1 if config.lora.enabled else 2) + config.train.gradient_checkpointing
    uses_teacher = needs_teacher(config.loss, config.format.name)
    head_passes = (config.loss.objective != "sft") + (2 if config.lora.enabled else 3)  # teacher, student
    return {
        "rollout": config.rollout.prompts_per_step * rollout_flops(config, sizes, row, step),
        "teacher": updates * uses_teacher * pass_flops(sizes, row.length, row.length),
        "student": updates * forward * passes,
        "heads": updates * row.supervised * 2 * head * head_passes,
    }


def pass_flops(sizes: ModelSizes, queries: float, keys: float) -> float:
    """FLOPs of one forward pass without the head."""
    return 2 * sizes.num_body * queries + 4 * sizes.query_width * sizes.layers * queries * keys


def rollout_flops(config: Config, sizes: ModelSizes, row: LongestRow, step: int) -> float:
    """FLOPs of one response: prefill, D forwards per block, and one clean slot per token that commits it."""
    if config.rollout.path:
        return 0.0
    head = 2 * sizes.vocabulary * sizes.hidden
    prefill = pass_flops(sizes, row.prompt, row.prompt)
    keys = row.prompt + row.response / 2
    if is_from_teacher(config, step):
        return prefill + pass_flops(sizes, row.response, keys) + head * row.response
    slots = row.response * (row.denoising_steps + 1)
    return prefill + pass_flops(sizes, slots, keys) + head * row.response * row.denoising_steps
