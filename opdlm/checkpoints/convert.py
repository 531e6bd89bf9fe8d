"""Turn an autoregressive checkpoint into a diffusion student: mask token, format, trained weights, `probe`.

`probe` runs the family's own code on tiny inputs and checks what block diffusion requires: the model uses the
mask and positions that it is given, cached keys give the states of the full pass, and the LM head is a linear
map of the hidden states. A family that fails is refused with the reason, so there is no list of families.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlm.checkpoints.folders import is_converted
from opdlm.checkpoints.load import (
    assemble,
    copy_of,
    load,
    load_causal_lm,
    load_tokenizer,
    set_embedding_row,
    vocabulary_rows,
)
from opdlm.config.sections import Config, FormatSection, RunConfig, resolve_path
from opdlm.errors import DataError
from opdlm.modeling.attention import layer_kinds
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec, head_logits
from opdlm.modeling.kv_cache import SlotCache
from opdlm.modeling.slots import clean_slots

PROBE_TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of states, relative to their size: above rounding, far below the effect of a wrong mask.
A checkpoint whose own cached pass rounds more gets three times that.
"""
PROBE_TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps for 12 hours in the sun."
PROBE_LENGTH = 16
"""Tokens of the text that the probe reads. Ids that no training has seen would amplify rounding."""


def make_student(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> DiffusionLM:
    """The student at step 0, determined by `train.seed`. `model` becomes its base; with `sdar` the tokenizer
    gains [MASK].

    DataError if model, tokenizer and settings do not fit together.
    """
    with torch.random.fork_rng(devices=[]):  # PEFT and new embedding rows draw from the global generator
        torch.manual_seed(config.train.seed)
        student = build_student(model, tokenizer, config)
    student.attention = config.model.attention
    return student


def build_student(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> DiffusionLM:
    """`make_student` without a seed."""
    if config.format.name == "preserve":
        mask_token_id = outside_mask_id(model, tokenizer, config.format)
    else:
        mask_token_id = add_mask_token(model, tokenizer, config.format)
    spec = make_spec(model, tokenizer, config, mask_token_id)
    probe(model, spec, tokenizer)
    initial = initial_mask_embedding(model, spec, config.format.mask_init, config.train.seed)
    model.requires_grad_(not config.lora.enabled)
    if config.lora.enabled:
        student = assemble(model, spec, lora=config.lora, mask_embedding=initial)
        assert isinstance(student, DiffusionLM)
        return student
    teacher = copy_of(model)
    if spec.format == "sdar":
        set_embedding_row(model, mask_token_id, initial)
        return assemble(model, spec, lora=None, teacher=teacher)
    return assemble(model, spec, lora=None, teacher=teacher, mask_embedding=initial)


def outside_mask_id(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: FormatSection
) -> int:
    """An id for [MASK] that changes neither model nor tokenizer: `format.mask_token` if that token exists,
    else the first id above the tokenizer's. Its embedding is stored apart (`MASK_EMBEDDING_FILE`).
    """
    vocabulary = checked_vocabulary(model, tokenizer)
    return vocabulary.get(section.mask_token, max(vocabulary.values()) + 1)


def checked_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Token -> id. DataError if the tokenizer does not belong to the model."""
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= vocabulary_rows(model):
        raise DataError(
            f"the tokenizer has ids up to {max(vocabulary.values())}, but the model's embedding has only "
            f"{vocabulary_rows(model)} rows: they do not belong together. Use the checkpoint's own tokenizer."
        )
    return vocabulary


def add_mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: FormatSection) -> int:
    """The id of [MASK] in model and tokenizer: `format.mask_token` if the token exists, else the first unused
    row of the embedding, else a new row. DataError if the tokenizer does not belong to the model.
    """
    vocabulary = checked_vocabulary(model, tokenizer)
    if section.mask_token in vocabulary:
        return vocabulary[section.mask_token]
    tokenizer.add_special_tokens({"mask_token": section.mask_token})
    mask_token_id = tokenizer.get_vocab()[section.mask_token]
    if mask_token_id in vocabulary.values():
        raise DataError(
            f"the tokenizer gave {section.mask_token} the id {mask_token_id}, which another token has: ids "
            "have gaps. Set format.mask_token to a token that exists and is never used."
        )
    if mask_token_id >= vocabulary_rows(model):
        model.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    return mask_token_id


def make_spec(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig, mask_token_id: int
) -> DiffusionSpec:
    """The `block_diffusion` entry of the student's config.json. DataError without a stop token."""
    used = set(tokenizer.get_vocab().values())
    unused = [i for i in range(vocabulary_rows(model)) if i not in used]
    stops = stop_token_ids(model, tokenizer)
    if not stops:
        raise DataError(
            "the checkpoint has no stop token. Set eos_token_id in its config.json or generation_config.json "
            "to the id that ends a response."
        )
    return DiffusionSpec(
        format=config.format.name,
        block_size=config.format.block_size,
        grid=config.format.grid,
        mask_token_id=mask_token_id,
        stop_token_ids=stops,
        banned_token_ids=tuple(sorted({*unused, mask_token_id})),
        adapter=config.lora.enabled and (config.format.name == "preserve" or not config.lora.merge),
    )


def plain_decoder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> DiffusionLM:
    """An unconverted checkpoint for `generate` in mode `ar`, restricted to its own tokens."""
    mask_token_id = vocabulary_rows(model)  # masked positions need an id, which no forward reads
    spec = make_spec(model, tokenizer, Config(), mask_token_id)
    own_mask = {tokenizer.mask_token_id} - {None}  # the [MASK] of `opdlm train`
    banned = tuple(sorted({*spec.banned_token_ids, *own_mask} - {mask_token_id}))
    spec = replace(spec, block_size=1, banned_token_ids=banned, adapter=False)
    probe(model, spec, tokenizer)
    return DiffusionLM(model, spec).eval().requires_grad_(False)


def load_decoder(
    path: str, dtype: str = "auto", device: str | None = None
) -> tuple[DiffusionLM, PreTrainedTokenizerBase]:
    """A converted folder, or any other checkpoint as the AR model that it is, and its tokenizer.

    device: None is this process's GPU, or the CPU where there is none.
    """
    path, device = resolve_path(path), device or str(PartialState().device)
    if is_converted(path):
        return load(path, dtype, device)
    tokenizer = load_tokenizer(path)
    return plain_decoder(load_causal_lm(path, dtype), tokenizer).to(device), tokenizer


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a response, from the generation config, the config and the tokenizer, sorted."""
    found: set[int] = set()
    for value in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return tuple(sorted(i for i in found if i < vocabulary_rows(model)))


def initial_mask_embedding(model: PreTrainedModel, spec: DiffusionSpec, kind: str, seed: int) -> Tensor:
    """The initial mask embedding `[H]`, float32, scaled like the output of the embedding layer."""
    ids = [i for i in range(vocabulary_rows(model)) if i not in spec.banned_token_ids]
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        if kind == "stop":
            return embedding(torch.tensor(spec.stop_token_ids[:1], device=model.device))[0].float().clone()
        used_VH = embedding(torch.tensor(ids, device=model.device))
        mean_H = used_VH.float().mean(0)
        if kind == "zero":
            mean_H = torch.zeros_like(mean_H)
        if kind == "noise":
            noise_H = torch.randn(mean_H.shape, generator=torch.Generator().manual_seed(seed))
            mean_H = mean_H + noise_H.to(mean_H.device) * used_VH.float().std(0)
        return mean_H


@torch.no_grad()
def probe(model: PreTrainedModel, spec: DiffusionSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the model supports block diffusion; DataError with the reason and what was measured."""
    family = model.config.model_type
    try:
        failure = find_failure(model, spec, probe_ids(spec, tokenizer).to(model.device))
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, AssertionError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{family} models cannot be converted: they do not accept our masks and positions ({text})."
        ) from error
    if failure:
        raise DataError(f"{family} models cannot be converted: {failure}.")


def probe_ids(spec: DiffusionSpec, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Ids `[1, L]` of ordinary text, none banned; of all tokens where the tokenizer knows no text."""
    ids = [i for i in tokenizer(PROBE_TEXT)["input_ids"] if i not in spec.banned_token_ids]
    if len(set(ids)) < 2:
        ids = sorted({*tokenizer.get_vocab().values()} - {*spec.banned_token_ids})
    return torch.tensor(ids).repeat(PROBE_LENGTH)[:PROBE_LENGTH][None]


def find_failure(model: PreTrainedModel, spec: DiffusionSpec, ids_BL: Tensor) -> str | None:
    """The first required property that fails, in words; None if all hold."""
    others = sorted({*layer_kinds(model.config)} - {"full_attention", "sliding_attention"})
    if others:
        return f"its {', '.join(others)} layers accept no attention mask"
    plain = model(input_ids=ids_BL, use_cache=False)
    own = own_rounding(model, ids_BL, plain.logits)
    limit = max(PROBE_TOLERANCE[model.dtype], 3 * own)

    def by(gap: float) -> str:
        return f"by {gap:.2g} of their size (allowed: {limit:.2g}; its own cached pass differs by {own:.2g})"

    wrapped = DiffusionLM(model, spec)
    lengths_B = torch.tensor([ids_BL.shape[1]], device=model.device)
    causal = clean_slots(ids_BL, lengths_B, lengths_B, spec.block_grid, "preserve")
    hidden_BLH = wrapped.student_hidden(causal)
    gap = distance(head_logits(model, hidden_BLH), plain.logits)
    if gap > limit:
        return (
            f"its logits under our causal mask differ from its own {by(gap)}, or its head is more than a "
            "linear map"
        )

    later_BL = ids_BL.clone()
    later_BL[0, 8] = ids_BL[0, 9] if ids_BL[0, 9] != ids_BL[0, 8] else ids_BL[0, 0]
    later = clean_slots(later_BL, lengths_B, lengths_B, spec.block_grid, "preserve")
    gap = distance(wrapped.student_hidden(later)[:, :8], hidden_BLH[:, :8])
    if gap > limit:
        return (
            f"a later token changes earlier states {by(gap)} although the mask is causal (not a plain "
            "attention model)"
        )
    open_ended = replace(causal, visible_until_BS=torch.full_like(ids_BL, ids_BL.shape[1] - 1))
    if torch.equal(wrapped.student_hidden(open_ended), hidden_BLH):
        return "it ignores a mask that lets earlier tokens see later ones"

    cache = SlotCache(*ids_BL.shape)
    wrapped.student_hidden(causal.only(causal.positions_BS < 6), cache)
    cached_BLH = wrapped.student_hidden(causal.only(causal.positions_BS >= 6), cache)
    gap = distance(cached_BLH[:, 6:], hidden_BLH[:, 6:])
    if gap > limit:
        return f"states computed with the key-value cache differ from the full pass {by(gap)}"
    return None


def own_rounding(model: PreTrainedModel, ids_BL: Tensor, logits_BLV: Tensor) -> float:
    """`distance` of the model's own cached pass from its own full pass; 0 where it has no cache."""
    first = model(input_ids=ids_BL[:, :6], use_cache=True)
    cache = getattr(first, "past_key_values", None)
    if cache is None:
        return 0.0
    rest = model(input_ids=ids_BL[:, 6:], past_key_values=cache, use_cache=True)
    return distance(rest.logits, logits_BLV[:, 6:])


def distance(left: Tensor, right: Tensor) -> float:
    """Largest Euclidean distance of two vectors of `[B, L, H]`, relative to the length of the right one."""
    left, right = left.float(), right.float()
    lengths = right.norm(dim=-1)
    return float(((left - right).norm(dim=-1) / lengths.clamp_min(1e-3 * float(lengths.max()) + 1e-12)).max())
