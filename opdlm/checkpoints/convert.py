"""Turn an autoregressive checkpoint into a diffusion student: mask token, format, trained weights, `probe`.

`probe` runs the family's own code on tiny inputs and checks what block diffusion requires: the model uses the
mask and positions that it is given, cached keys give the states of the full pass, a row does not depend on
the rows beside it, and the LM head is a linear map of the hidden states. A family that fails is refused with
the reason, so there is no list of families (docs/families.md: what it says of some).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdlm.checkpoints.folders import is_converted
from opdlm.checkpoints.load import (
    assemble,
    context_length,
    copy_of,
    input_embedding,
    is_quantized,
    load,
    load_causal_lm,
    load_tokenizer,
    one_line,
    read_spec,
    set_embedding_row,
    vocabulary_rows,
)
from opdlm.checkpoints.lora import check_mergeable
from opdlm.config.sections import Config, FormatSection, RunConfig, resolve_path
from opdlm.errors import DataError
from opdlm.limits import limited_code
from opdlm.modeling.attention import UnsupportedModel, layer_kinds
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec, head_logits
from opdlm.modeling.draft_head import DraftHead
from opdlm.modeling.kv_cache import SlotCache
from opdlm.modeling.slots import clean_slots, make_slots

PROBE_TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of states, relative to their size: above rounding, far below the effect of a wrong mask.
A checkpoint whose own cached pass rounds more gets three times that.
"""
PROBE_TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps for 12 hours in the sun."
PROBE_LENGTH = 16
"""Tokens of the text that the probe reads. Ids that no training has seen would amplify rounding."""
FARTHEST = 2**20
"""Largest position that the probe tries, where the context allows it."""
OWN_ATTENTION = "its attention is not called through transformers' attention interface, so no mask can be set"
log = logging.getLogger(__name__)


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
    check_trainable(model, config)
    num_rows = vocabulary_rows(model)
    if config.format.name == "preserve":
        mask_token_id = outside_mask_id(tokenizer, config.format)
    else:
        mask_token_id = add_mask_token(model, tokenizer, config.format)
    spec = make_spec(model, tokenizer, config, mask_token_id, num_rows)
    probe(model, spec, tokenizer)
    initial = None
    if spec.noise_vocab_size is None:
        initial = initial_mask_embedding(model, spec, config.format.mask_init, config.train.seed)
    width, hidden_size = config.format.draft_head, input_embedding(model).weight.shape[1]
    head = DraftHead(hidden_size, width).to(model.device) if width else None
    model.requires_grad_(not config.lora.enabled)
    if config.lora.enabled:
        student = assemble(model, spec, lora=config.lora, mask_embedding=initial, draft_head=head)
        assert isinstance(student, DiffusionLM)
        return student
    teacher = copy_of(model)
    if spec.format == "sdar":
        assert initial is not None
        set_embedding_row(model, mask_token_id, initial)
        return assemble(model, spec, lora=None, teacher=teacher)
    return assemble(model, spec, lora=None, teacher=teacher, mask_embedding=initial, draft_head=head)


def check_trainable(model: PreTrainedModel, config: Config) -> None:
    """DataError for weights that cannot be trained as the settings ask, or that no AR model has."""
    if is_converted(config.model.path):
        if read_spec(config.model.path).format == "sdar":
            raise DataError(
                f"model.path ({config.model.path}) is a converted sdar folder: its weights predict masked "
                "tokens, and cannot teach as an AR model. Give the checkpoint that it was made from."
            )
        log.warning(
            f"{config.model.path} is a converted folder: this run starts anew from its AR model, and uses "
            "nothing that was learnt before"
        )
    if is_quantized(model) and not config.lora.enabled:
        raise DataError(
            f"model.path ({config.model.path}) holds quantised weights, which cannot be trained: set "
            "lora.enabled=true, or give the checkpoint in full precision."
        )
    if config.format.name == "sdar" and config.lora.enabled and config.lora.merge:
        check_mergeable(model)


def outside_mask_id(tokenizer: PreTrainedTokenizerBase, section: FormatSection) -> int:
    """An id for [MASK] that changes neither model nor tokenizer: `format.mask_token` if that token exists,
    else the first id above the tokenizer's. Its embedding is stored apart (`MASK_EMBEDDING_FILE`).
    """
    vocabulary = tokenizer.get_vocab()
    return vocabulary.get(section.mask_token, max(vocabulary.values()) + 1)


def add_mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, section: FormatSection) -> int:
    """The id of [MASK] in model and tokenizer: `format.mask_token` if the token exists, else the first unused
    row of the embedding, else a new row. DataError if the new token has the id of another.
    """
    vocabulary = tokenizer.get_vocab()
    if vocabulary.get(section.mask_token, vocabulary_rows(model)) < vocabulary_rows(model):
        return vocabulary[section.mask_token]
    tokenizer.add_special_tokens({"mask_token": section.mask_token})
    mask_token_id = tokenizer.get_vocab()[section.mask_token]
    if mask_token_id in {i for token, i in vocabulary.items() if token != section.mask_token}:
        raise DataError(
            f"the tokenizer gave {section.mask_token} the id {mask_token_id}, which another token has: ids "
            "have gaps. Set format.mask_token to a token that exists and is never used."
        )
    if mask_token_id >= vocabulary_rows(model):
        model.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    return mask_token_id


def make_spec(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    mask_token_id: int,
    num_rows: int | None = None,
) -> DiffusionSpec:
    """The `block_diffusion` entry of the student's config.json. `num_rows`: rows of the embedding before
    [MASK] was added. DataError without a stop token, or if [MASK] is one.
    """
    vocabulary = model.config.get_text_config().vocab_size  # from which engines draw noise
    used = {i for i in tokenizer.get_vocab().values() if num_rows is None or i < num_rows}
    unused = [i for i in range(vocabulary_rows(model)) if i not in used]
    stops = stop_token_ids(model, tokenizer)
    if mask_token_id in stops:
        raise DataError(
            f"format.mask_token ({config.format.mask_token}) has the id {mask_token_id}, which ends a "
            "response. Name a token that is never used, or leave format.mask_token out."
        )
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
        noise_vocab_size=vocabulary if config.format.noise == "uniform" else None,
        draft_attention=config.format.draft_attention,
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
    """The ids that end a response, sorted: from the generation config, the config, the tokenizer, and the
    token by which the chat template ends a turn.
    """
    found: set[int] = set()
    text_eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    for value in (model.generation_config.eos_token_id, text_eos, tokenizer.eos_token_id):
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    end = end_of_turn(tokenizer)
    if end is not None and end not in found:
        token = tokenizer.convert_ids_to_tokens(end)
        log.warning(
            f"the chat template ends a turn with {token} (id {end}), which is not among the stop ids "
            f"({', '.join(map(str, sorted(found))) or 'none'}): it is added"
        )
        found.add(end)
    return tuple(sorted(i for i in found if i < vocabulary_rows(model)))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token that the chat template puts after an assistant's message; None without one."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE_TEXT}]
    try:
        with limited_code():
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # no template, or one for other conversations; it may raise anything
        return None
    _, found, end = text.rpartition(PROBE_TEXT)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(end, add_special_tokens=False)["input_ids"] if found else []
    return next((i for i in ids if i in special), None)


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
    try:
        failure = known_obstacle(model) or find_failure(
            model, spec, probe_ids(spec, tokenizer).to(model.device)
        )
    except UnsupportedModel as error:
        failure = str(error)
    except (LookupError, ValueError, TypeError, RuntimeError, AttributeError, AssertionError) as error:
        failure = f"they do not accept our masks and positions ({one_line(error)})"
        if not model._supports_attention_backend:
            failure = OWN_ATTENTION
    if failure:
        raise DataError(f"{model.config.model_type} models cannot be converted: {failure}.")


def known_obstacle(model: PreTrainedModel) -> str | None:
    """What the model's class or config says against block diffusion; None if nothing."""
    if getattr(model, "_is_stateful", False):
        return "it has recurrent layers, whose state no mask can divide and no draft can be taken out of"
    builds = any(name.startswith("build_") and "alibi" in name for name in dir(model.get_decoder()))
    if builds or getattr(model.config, "alibi", False):
        return "its positions are added to the scores (ALiBi), which our attention does not compute"
    others = sorted({*layer_kinds(model.config)} - {"full_attention", "sliding_attention"})
    if others:
        return f"its {', '.join(others)} layers are neither full nor sliding attention"
    if model._supports_attention_backend and not model._can_set_attn_implementation():
        return f"transformers cannot read the source of {type(model).__name__}: define it in a file"
    return None


def probe_ids(spec: DiffusionSpec, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Ids `[1, L]` of ordinary text, none banned; of all tokens where the tokenizer knows no text."""
    ids = [i for i in tokenizer(PROBE_TEXT)["input_ids"] if i not in spec.banned_token_ids]
    if len(set(ids)) < 2:
        ids = sorted({*tokenizer.get_vocab().values()} - {*spec.banned_token_ids})
    return torch.tensor(ids).repeat(PROBE_LENGTH)[:PROBE_LENGTH][None]


def find_failure(model: PreTrainedModel, spec: DiffusionSpec, ids_BL: Tensor) -> str | None:
    """The first required property that fails, in words; None if all hold. May raise UnsupportedModel."""
    plain_BLV = model(input_ids=ids_BL, use_cache=False).logits
    own = own_rounding(model, ids_BL, plain_BLV)
    limit = max(PROBE_TOLERANCE[model.dtype], 3 * own)
    for failure, left, right in comparisons(model, spec, ids_BL, plain_BLV):
        gap = distance(left, right)
        if gap > limit:
            return (
                f"{failure} by {gap:.2g} of their size (allowed: {limit:.2g}; its own cached pass differs by "
                f"{own:.2g})"
            )
    return None


def comparisons(
    model: PreTrainedModel, spec: DiffusionSpec, ids_BL: Tensor, plain_BLV: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pairs of tensors that must be equal, each with the sentence for the case that they are not."""
    later_BL = ids_BL.clone()
    later_BL[0, 8] = ids_BL[0, 9] if ids_BL[0, 9] != ids_BL[0, 8] else ids_BL[0, 0]
    moved_BLV = model(input_ids=later_BL, use_cache=False).logits
    yield "it is not causal: a later token changes its earlier logits", moved_BLV[:, :8], plain_BLV[:, :8]
    decoder, embedded_BLH = model.get_decoder(), model.get_input_embeddings()(ids_BL)
    own_BLH = decoder(input_ids=ids_BL, use_cache=False).last_hidden_state
    yield "its head is more than a linear map: its logits differ", head_logits(model, own_BLH), plain_BLV
    from_embedded_BLH = decoder(inputs_embeds=embedded_BLH, use_cache=False).last_hidden_state
    yield "it changes what its embedding layer gives: its states differ", from_embedded_BLH, own_BLH

    wrapped = DiffusionLM(model, spec)
    lengths_B = torch.tensor([ids_BL.shape[1]], device=model.device)
    causal = clean_slots(ids_BL, lengths_B, lengths_B, spec.block_grid, "preserve")
    hidden_BLH = wrapped.student_hidden(causal)
    failure = "its logits under our causal mask differ from its own"
    if not model._supports_attention_backend:
        failure = f"{OWN_ATTENTION}: {failure}"
    yield failure, head_logits(model, hidden_BLH), plain_BLV
    later = clean_slots(later_BL, lengths_B, lengths_B, spec.block_grid, "preserve")
    failure = "although our mask is causal, a later token changes earlier states"
    yield failure, wrapped.student_hidden(later)[:, :8], hidden_BLH[:, :8]
    open_ended = replace(causal, visible_until_BS=torch.full_like(ids_BL, ids_BL.shape[1] - 1))
    if torch.equal(wrapped.student_hidden(open_ended), hidden_BLH):
        raise UnsupportedModel("it ignores a mask that lets earlier tokens see later ones")

    cache = SlotCache(*ids_BL.shape)
    wrapped.student_hidden(causal.only(causal.positions_BS < 6), cache)
    cached_BLH = wrapped.student_hidden(causal.only(causal.positions_BS >= 6), cache)
    failure = "states computed with the key-value cache differ from the full pass"
    yield failure, cached_BLH[:, 6:], hidden_BLH[:, 6:]

    positions_2L = causal.positions_BS.repeat(2, 1)
    positions_2L[1] += int(min(context_length(model.config), FARTHEST)) - ids_BL.shape[1]
    clean_2L = torch.zeros_like(positions_2L)
    beside = make_slots(ids_BL.repeat(2, 1), positions_2L, positions_2L, clean_2L, clean_2L == 0)
    failure = "a row at later positions changes the states of the row beside it"
    yield failure, wrapped.student_hidden(beside)[:1], hidden_BLH


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
