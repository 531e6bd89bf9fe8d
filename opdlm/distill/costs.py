"""Parameters, memory and FLOPs of a conversion, from `config.json` alone.


The model is built on the meta device, so its parameters are counted, not guessed. Every row is taken at its
caps (longest prompt, longest response), so memory, FLOPs and tokens are what a run needs at most. With a =
bytes of an activation, H hidden, A heads * head size, I feed-forward width (all experts of a mixture), V
vocabulary, Q queries and K keys of a micro-batch's student pass, per layer:
    kept for backward       Q * (2 * (4 + 2 a) H + 3 a A + 4 a I) + 2 a A * K       norms, attention, MLP
    a 2-byte base + LoRA    + Q * 4 * (5 H + A + I)                 PEFT's float32 copies of what it adapts
    kept if checkpointed    Q * a * H
    at work, one layer      the first line once more, or the chunks of the loss if they are larger
    FLOPs                   2 * weights * Q + 4 A * Q * K; backward 2x that (LoRA 1x), checkpointed + 1x
It does not know the kernels' own buffers or the allocator's slack: `tests/config/test_recipes.py` measures how
far off it is on one step. Kernels with a dense mask compute all Q * K pairs, so they are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opdlm.checkpoints.load import add_lora, first_line, input_embedding
from opdlm.config.schedules import (
    block_size_at,
    first_reused_step,
    is_from_teacher,
    selection_at,
)
from opdlm.config.sections import Config, resolve_path
from opdlm.distill.rollouts import length_cap
from opdlm.errors import DataError
from opdlm.objectives.losses import default_chunk_size, num_temporaries
from opdlm.objectives.targets import needs_teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a model: counts of parameters, widths, bytes."""

    family: str
    total: int
    trained: int
    weight_bytes: int
    """Student, and the teacher where it is a copy."""
    trained_bytes: int
    body: int
    """Parameters without embedding and head."""
    layers: int
    hidden: int
    heads: int
    """Heads * head size."""
    kv_heads: int
    inner: int
    vocabulary: int
    context: int
    """Positions the model knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training row at the caps of a step."""

    prompt: int
    response: int
    block_size: int
    denoising_steps: int
    noised: float
    """Noised slots of all its states."""
    supervised: float

    @property
    def length(self) -> int:
        return self.prompt + self.response


def meta_model(config: Config) -> Any:
    """The architecture without weights."""
    path = resolve_path(config.model.path)
    trust = config.model.trust_remote_code
    try:
        architecture = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                architecture, dtype=getattr(torch, config.model.dtype), trust_remote_code=trust
            )
    except OSError as error:
        raise DataError(
            f"model.path ({path}) is no folder with a config.json, and neither cache nor hub has one: "
            "fetch it where there is a network (hf download ORG/NAME config.json), or give a folder."
        ) from error
    except (ValueError, KeyError) as error:
        raise DataError(f"model.path ({path}) is no causal language model: {first_line(error)}") from error


def measure_sizes(config: Config) -> Sizes:
    model = meta_model(config)
    text = model.config.get_text_config()
    total = sum(p.numel() for p in model.parameters())
    weight_bytes = sum(p.nbytes for p in model.parameters())
    table, head = input_embedding(model).weight, model.get_output_embeddings().weight
    ends = {id(weight): weight.numel() for weight in (table, head)}  # one where they are tied
    if config.lora.enabled:
        model.requires_grad_(False)
        with torch.device("meta"):
            changed = [p for p in add_lora(model, config.lora).parameters() if p.requires_grad]
        weight_bytes += sum(p.nbytes for p in changed)
    else:
        changed = list(model.parameters())
        weight_bytes *= 2
    trained, trained_bytes = sum(p.numel() for p in changed), sum(p.nbytes for p in changed)
    if config.lora.enabled or config.format.name == "preserve":  # the mask embedding
        trained += text.hidden_size
        trained_bytes += text.hidden_size * table.element_size()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Sizes(
        family=model.config.model_type,
        total=total,
        trained=trained,
        weight_bytes=weight_bytes,
        trained_bytes=trained_bytes,
        body=total - sum(ends.values()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads * head_size,
        kv_heads=kv_heads * head_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=table.shape[0],
        context=getattr(text, "max_position_embeddings", None) or 10**9,
    )


def response_cap(config: Config, step: int) -> int:
    return length_cap(config.rollout, step + 1, block_size_at(config.format, step))


def longest_row(config: Config, sizes: Sizes, step: int) -> Row:
    """The row of step `step` at its caps; slots and supervised positions in the mean over random orders."""
    size, response = block_size_at(config.format, step), response_cap(config, step)
    steps = config.rollout.decode.denoising_steps or size
    states = {"one_per_block": 1, "random_mask": 1, "complementary": 2, "all": steps}
    num_states = states[selection_at(config, step)]
    counts = [slots_of_state(config, size, size * k / steps) for k in range(1, steps + 1)]
    noised, supervised = (num_states * sum(column) / steps / size for column in zip(*counts, strict=True))
    return Row(
        prompt=min(config.data.max_prompt_tokens, sizes.context - response - 2 * size),
        response=response,
        block_size=size,
        denoising_steps=steps,
        noised=noised * response,
        supervised=supervised * response,
    )


def slots_of_state(config: Config, size: int, masked: float) -> tuple[float, float]:
    """(slots, supervised ones) of a block with so many masked positions. `preserve` starts at the first of
    them, in the mean (size - masked) / (masked + 1), and the teacher predicts that one.
    """
    if config.format.name == "sdar":
        return size, masked
    if masked <= 1:
        return 0.0, 0.0
    return size - 1 - (size - masked) / (masked + 1), masked - 1


def student_pass(config: Config, row: Row) -> tuple[float, float]:
    """(queries, keys) of one row: `sdar` computes its clean half, `preserve` reads the teacher's."""
    keys = row.length + row.noised
    return (keys if config.format.name == "sdar" else row.noised), keys


def element_bytes(config: Config) -> int:
    is_half = config.model.dtype == "bfloat16" or config.train.mixed_precision == "bf16"
    return 2 if is_half else 4


def weight_element(config: Config) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4


def fixed_memory(config: Config, sizes: Sizes) -> dict[str, float]:
    """What stays for the whole run, in bytes."""
    kept = {"weights": float(sizes.weight_bytes), "AdamW moments": 2.0 * sizes.trained_bytes}
    if config.rollout.asynchronous:
        kept["copy that generates"] = float(sizes.trained_bytes)
    if config.rollout.engine == "vllm":
        kept["weights in vLLM"] = float(weight_element(config) * sizes.total)
    return kept | ({} if config.train.ema_decay is None else {"weight average": 4.0 * sizes.trained})


def rollout_memory(config: Config, sizes: Sizes, row: Row) -> dict[str, float]:
    """The key-value cache and the working layer of decoding, bytes; none where rollouts come from a file."""
    if config.rollout.path:
        return {}
    rows, a = min(config.rollout.decode.batch_size, config.rollout.prompts_per_step), weight_element(config)
    tokens = rows * (row.length + 2 * row.block_size + 1)
    prefill = rows * row.prompt * (3 * sizes.inner + 4 * sizes.hidden) * a
    layer = 2 * tokens * (sizes.heads + sizes.kv_heads) * a  # cache ++ current, repeated for every head
    logits = 3 * 4 * rows * row.block_size * sizes.vocabulary
    return {
        "rollout: cache": 2.0 * tokens * sizes.layers * sizes.kv_heads * a,
        "rollout: one layer and logits": float(max(prefill, layer, logits)),
    }


def training_memory(config: Config, sizes: Sizes, row: Row) -> dict[str, float]:
    """What training adds, bytes. Gradients accumulate over micro-batches, so they coexist with all of it."""
    rows, a = config.train.micro_batch_rows, weight_element(config)
    teacher = rows * row.length * sizes.hidden * a
    if config.format.name == "preserve":
        teacher += 2 * rows * row.length * sizes.layers * sizes.kv_heads * a
    found = {
        "gradients": float(sizes.trained_bytes),
        "teacher states and cache": float(teacher),
        "activations": kept_bytes(config, sizes, row, config.train.gradient_checkpointing),
        "layer at work or loss chunks": working_bytes(config, sizes, row),
    }
    if config.train.mixed_precision == "bf16" and config.model.dtype == "float32":
        found["bf16 copies of the weights"] = 2.0 * sizes.total
    return found


def layer_bytes(config: Config, sizes: Sizes, row: Row) -> float:
    """What one layer of the student keeps for its backward, for a micro-batch."""
    a, (queries, keys) = element_bytes(config), student_pass(config, row)
    width = 2 * (4 + 2 * a) * sizes.hidden + 3 * a * sizes.heads + 4 * a * sizes.inner
    if config.lora.enabled and config.model.dtype == "bfloat16":
        width += 4 * (5 * sizes.hidden + sizes.heads + sizes.inner)
    return config.train.micro_batch_rows * (queries * width + 2 * a * sizes.heads * keys)


def kept_bytes(config: Config, sizes: Sizes, row: Row, is_checkpointed: bool) -> float:
    """What the student's forward keeps for its backward: layers or their inputs, and the mask."""
    a, (queries, keys) = element_bytes(config), student_pass(config, row)
    masks = config.train.micro_batch_rows * queries * keys * (1 + a)
    if is_checkpointed:
        return sizes.layers * config.train.micro_batch_rows * queries * a * sizes.hidden + masks
    return sizes.layers * layer_bytes(config, sizes, row) + masks


def working_bytes(config: Config, sizes: Sizes, row: Row) -> float:
    """The chunks of the loss, then one layer with the gradients of its widest part: the larger of the two."""
    supervised = config.train.micro_batch_rows * row.supervised
    num_alive = num_temporaries(config.loss.divergence, config.loss.reverse_weight)
    trains_head = not config.lora.enabled
    chunk = default_chunk_size(
        sizes.vocabulary, sizes.hidden, num_alive, trains_head=trains_head, device="cuda"
    )
    loss = 4 * (num_alive * min(chunk, supervised) * sizes.vocabulary + 3 * supervised * sizes.hidden)
    head = 4 * sizes.vocabulary * sizes.hidden * trains_head  # its gradient, in float32
    queries, _ = student_pass(config, row)
    widest = element_bytes(config) * (sizes.hidden + 2 * sizes.inner)
    layer = layer_bytes(config, sizes, row) + config.train.micro_batch_rows * queries * widest
    return head + max(loss, layer)


def step_flops(config: Config, sizes: Sizes, step: int) -> dict[str, float]:
    """Floating-point operations of one step, by purpose."""
    row, head = longest_row(config, sizes, step), sizes.vocabulary * sizes.hidden
    num_trained = step - first_reused_step(config, step) + 1
    updates = config.rollout.prompts_per_step * num_trained * config.train.epochs_per_rollout
    queries, keys = student_pass(config, row)
    forward = pass_flops(sizes, queries, keys)
    passes = 1 + (1 if config.lora.enabled else 2) + config.train.gradient_checkpointing
    is_taught = needs_teacher(config.loss, config.format.name)
    head_passes = (config.loss.objective != "sft") + (2 if config.lora.enabled else 3)  # teacher, student
    return {
        "rollout": config.rollout.prompts_per_step * rollout_flops(config, sizes, row, step),
        "teacher": updates * is_taught * pass_flops(sizes, row.length, row.length),
        "student": updates * forward * passes,
        "heads": updates * row.supervised * 2 * head * head_passes,
    }


def pass_flops(sizes: Sizes, queries: float, keys: float) -> float:
    """One forward pass without the head."""
    return 2 * sizes.body * queries + 4 * sizes.heads * sizes.layers * queries * keys


def rollout_flops(config: Config, sizes: Sizes, row: Row, step: int) -> float:
    """One response: prefill, then D forwards per block and one slot per token that commits it."""
    if config.rollout.path:
        return 0.0
    head = 2 * sizes.vocabulary * sizes.hidden
    prefill = pass_flops(sizes, row.prompt, row.prompt)
    keys = row.prompt + row.response / 2
    if is_from_teacher(config, step):
        return prefill + pass_flops(sizes, row.response, keys) + head * row.response
    slots = row.response * (row.denoising_steps + 1)
    return prefill + pass_flops(sizes, slots, keys) + head * row.response * row.denoising_steps
