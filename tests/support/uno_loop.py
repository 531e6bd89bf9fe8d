"""How SGLang drafts with an exported adapter, on plain transformers and PEFT: two forwards a cycle.

Shapes: N rows of the same length L, W drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

import opdlm
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.decode_state import DecodeState, Request
from opdlm.decoding.draft_policy import DraftPlan, DraftPolicy, ForwardCost
from opdlm.decoding.lossless import lossless_step
from opdlm.modeling.kv_cache import DecodeCache


def distribution(logits_V: Tensor, temperature: float) -> Tensor:
    """At temperature 0 all of it on the arg-max."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(-1), logits_V.shape[-1]).double()
    return (logits_V.double() / temperature).softmax(-1)


@torch.no_grad()
def uno_cycle(
    model: PeftModel, text_NL: Tensor, noise_NW: Tensor, temperature: float, rng: torch.Generator
) -> list[list[int]]:
    """For each row: the root, the drafts that rejection by p/q accepts, and one more token of the base."""
    with model.disable_adapter():  # row 0 of the draft forward, and the prefix that is in its cache
        clean = model(input_ids=text_NL, use_cache=True)
    root_N1 = torch.multinomial(distribution(clean.logits[:, -1], temperature), 1, generator=rng)
    noised = model(input_ids=noise_NW, past_key_values=clean.past_key_values)
    q_NWV = distribution(noised.logits, temperature)
    draft_NW = torch.stack([torch.multinomial(q_WV, 1, generator=rng)[:, 0] for q_WV in q_NWV])
    with model.disable_adapter():
        verified = model(input_ids=torch.cat([text_NL, root_N1, draft_NW], 1)).logits
    p_NKV = distribution(verified[:, text_NL.shape[1] :], temperature)
    written = []
    for root, drafts, q_WV, p_KV in zip(root_N1[:, 0].tolist(), draft_NW.tolist(), q_NWV, p_NKV, strict=True):
        tokens = [root]
        for draft, q_V, p_V in zip(drafts, q_WV, p_KV, strict=False):
            if float(torch.rand((), generator=rng)) * float(q_V[draft]) >= float(p_V[draft]):
                tokens.append(int(torch.multinomial((p_V - q_V).clamp_min(0), 1, generator=rng)))
                break
            tokens.append(draft)
        else:
            tokens.append(int(torch.multinomial(p_KV[-1], 1, generator=rng)))
        written.append(tokens)
    return written


def uno_loop(
    model: PeftModel, prompt: Sequence[int], noise_at: Callable[[int], list[int]], length: int
) -> tuple[list[int], list[int]]:
    """Greedy decoding as the engines do it: the response, and the accepted drafts of every cycle. `noise_at`:
    the ids drawn for a draft from a position on.
    """
    text, accepted, rng = list(prompt), list[int](), torch.Generator()
    while len(text) - len(prompt) < length:
        (tokens,) = uno_cycle(model, torch.tensor([text]), torch.tensor([noise_at(len(text))]), 0.0, rng)
        text += tokens
        accepted.append(len(tokens) - 2)
    return text[len(prompt) :], accepted


class TwoForwards(DraftPolicy):
    """The schedule of the engines: draft without verifying, then verify without drafting."""

    def plan(self, state: DecodeState, *, is_closed: bool = False) -> list[DraftPlan]:
        (number,) = state.num_draft_B.tolist()
        return [DraftPlan(number, () if number else (0,), self.draft_length)]


def our_loop(folder: Path, prompt: Sequence[int], seed: int, length: int) -> tuple[list[int], list[int]]:
    """Lossless decoding in that schedule, in float32: the response, and the accepted drafts of every second
    forward.
    """
    model, _ = opdlm.load(folder, "float32")
    size = model.spec.block_size
    config = DecodeConfig(mode="lossless", max_new_tokens=length, prompt_lookup_num_tokens=0)
    most = len(prompt) + length + 2 * size
    state = DecodeState.start([Request(0, prompt, seed, config)], most, model.spec.mask_token_id, size - 1)
    cache, policy = DecodeCache(1, most + size**2, model.device), TwoForwards(size - 1, ForwardCost.linear(0))
    accepted = []
    while int(state.final_B[0]) - len(prompt) < length or int(state.num_draft_B[0]):
        before = int(state.final_B[0]) or len(prompt)
        with torch.inference_mode():
            lossless_step(model, state, cache, config, policy)
        if not int(state.num_draft_B[0]):
            accepted.append(int(state.final_B[0]) - before - 1)
    return state.tokens_BL[0, len(prompt) : int(state.final_B[0])].tolist(), accepted
