"""The decode loop at its simplest, to check the engine against: one row, no cache kept, no batch.

Every step prefills the whole text again on the *training* path (`SlotCache`, no gate, no packing): clean
slots by the teacher, then the block's slots by the student. Tokens come from plain Python lists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.unmasking import choose_tokens, noise_keys, sampling_of
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.kv_cache import SlotCache
from opdlm.modeling.slots import Slots, clean_slots, make_slots


def clean_part(model: DiffusionLM, tokens: Sequence[int], num_prompt: int) -> Slots:
    length = torch.tensor([len(tokens)])
    return clean_slots(
        torch.tensor([tokens]), length, torch.tensor([num_prompt]), model.spec.block_grid, model.spec.format
    )


@torch.no_grad()
def predict_ar(model: DiffusionLM, tokens: Sequence[int]) -> Tensor:
    """The AR model's logits `[V]` of the token after `tokens`."""
    with model.teacher_weights() as teacher:
        logits_V = teacher(torch.tensor([list(tokens)]), use_cache=False).logits[0, -1].float()
    logits_V[list(model.spec.banned_token_ids)] = -torch.inf
    return logits_V


@torch.no_grad()
def predict_block(
    model: DiffusionLM, tokens: Sequence[int], start: int, num_prompt: int
) -> dict[int, Tensor]:
    """Logits of every masked position of the block that `tokens` ends with."""
    spec = model.spec
    masked = [i for i in range(start, len(tokens)) if tokens[i] == spec.mask_token_id]
    is_preserve = spec.format == "preserve"
    known = masked[0] if is_preserve else start
    first, last = (known, len(tokens) - 1) if is_preserve else (start, len(tokens))
    cache = SlotCache(1, len(tokens) + 1)
    if known:
        fill = model.teacher_hidden if is_preserve else model.student_hidden
        fill(clean_part(model, tokens[:known], num_prompt), cache)
    found = {masked[0]: predict_ar(model, tokens[:known])} if is_preserve else {}
    if last > first:
        position_1S = torch.arange(first, last)[None]
        ids_1S = torch.tensor([tokens[first:last]])
        visible_until_1S = torch.full_like(ids_1S, known - 1)
        noised = make_slots(
            ids_1S, position_1S, visible_until_1S, torch.ones_like(ids_1S), torch.ones_like(ids_1S).bool()
        )
        logits_SV = model.logits(model.student_hidden(noised, cache)[0])
        for place in masked:
            slot = place - is_preserve
            if slot >= first:
                found[place] = logits_SV[slot - first]
    return found


def pick(logits_V: Tensor, seed: int, position: int, step: int, config: DecodeConfig) -> int:
    key_1 = noise_keys(torch.tensor([seed]), torch.tensor([position]), step)
    return int(choose_tokens(logits_V[None], torch.tensor([sampling_of(config)]), key_1))


def simple_ar(model: DiffusionLM, prompt: Sequence[int], config: DecodeConfig, seed: int) -> tuple[int, ...]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + config.max_new_tokens:
        tokens.append(pick(predict_ar(model, tokens), seed, len(tokens), 0, config))
        if tokens[-1] in model.spec.stop_token_ids:
            break
    return tuple(tokens[len(prompt) :])


def simple_denoise(
    model: DiffusionLM, prompt: Sequence[int], config: DecodeConfig, seed: int
) -> tuple[int, ...]:
    """Static, threshold (without rejections), entropy and left-to-right decoding of one prompt."""
    spec, num_prompt, tokens, step = model.spec, len(prompt), list(prompt), 0
    while True:
        start = spec.block_grid.block_start(len(tokens), num_prompt)
        tokens += [spec.mask_token_id] * (start + spec.block_size - len(tokens))
        for block_step in range(spec.block_size):
            logits = predict_block(model, tokens, start, num_prompt)
            step += 1
            ids = {i: pick(row_V, seed, i, step, config) for i, row_V in logits.items()}
            chosen = choose_places(logits, ids, block_step, spec.block_size, config)
            for place in chosen:
                tokens[place] = ids[place]
            end = finished_at(tokens, num_prompt, spec.mask_token_id, spec.stop_token_ids, config)
            if end is not None:
                return tuple(tokens[num_prompt:end])
            if spec.mask_token_id not in tokens:
                break


def finished_at(
    tokens: list[int], num_prompt: int, mask_id: int, stops: Sequence[int], config: DecodeConfig
) -> int | None:
    """Where the response ends, if its known prefix says so."""
    known = tokens.index(mask_id) if mask_id in tokens else len(tokens)
    for place in range(num_prompt, min(known, num_prompt + config.max_new_tokens)):
        if tokens[place] in stops or place + 1 == num_prompt + config.max_new_tokens:
            return place + 1
    return None


def choose_places(
    logits: dict[int, Tensor], ids: dict[int, int], block_step: int, block_size: int, config: DecodeConfig
) -> list[int]:
    """The positions that this step reveals."""
    places = sorted(logits)
    probs = {i: logits[i].softmax(-1) for i in places}
    confidence = {i: float(probs[i][ids[i]]) for i in places}
    steps = config.denoising_steps or block_size
    count = block_size // steps + (block_step < block_size % steps)
    ranked = sorted(places, key=lambda i: -confidence[i])
    if config.mode == "left_to_right":
        return places[:count]
    if config.mode == "threshold":
        return sorted({*ranked[:count], *(i for i in places if confidence[i] > config.confidence_threshold)})
    if config.mode == "static":
        return ranked[:count]
    entropy = {i: float(torch.distributions.Categorical(probs=probs[i]).entropy()) for i in places}
    chosen, total = [], 0.0
    for i in sorted(places, key=lambda i: entropy[i]):
        if total > config.entropy_bound:  # what lies below the largest
            break
        chosen.append(i)
        total += entropy[i]
    return chosen
