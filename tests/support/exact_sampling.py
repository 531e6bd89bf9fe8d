"""Whether samples follow the AR model: every response and its probability, and the chi-square test.

Shapes: V vocabulary, C outcomes.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from opdlm.decoding.decode_config import DecodeConfig


def filtered(probs: list[float], config: DecodeConfig) -> list[float]:
    """The probabilities after top_k and top_p, from plain numbers."""
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])[: config.top_k]
    kept, mass, total = list[int](), 0.0, sum(probs[token] for token in ranked)
    for token in ranked:
        if mass < (1.0 if config.top_p is None else config.top_p) * total:
            kept.append(token)
        mass += probs[token]
    total = sum(probs[token] for token in kept)
    return [share / total if token in kept else 0.0 for token, share in enumerate(probs)]


def exact_probabilities(
    base: PreTrainedModel, prompt: tuple[int, ...], config: DecodeConfig
) -> dict[tuple[int, ...], float]:
    """Every response of up to `max_new_tokens` tokens and its probability under the AR model, [MASK] banned,
    at the temperature of `config` and with its filters.
    """
    stop, mask = base.config.vocab_size - 2, base.config.vocab_size - 1
    found, frontier = {}, {(): 1.0}
    for _ in range(config.max_new_tokens):
        longer = {}
        for ids, probability in frontier.items():
            with torch.no_grad():
                logits_V = base(torch.tensor([prompt + ids])).logits[0, -1]
            logits_V[mask] = -torch.inf
            probs = (logits_V.double() / config.temperature).softmax(-1).tolist()
            for token, share in enumerate(filtered(probs, config)[:mask]):
                target = found if token == stop else longer
                target[(*ids, token)] = probability * share
        frontier = longer
    return found | frontier


def chi_square_p_value(samples: list[tuple[int, ...]], probabilities: dict[tuple[int, ...], float]) -> float:
    """Outcomes expected fewer than 8 times are pooled into one."""
    expected = {ids: len(samples) * p for ids, p in probabilities.items() if len(samples) * p >= 8}
    counts = dict.fromkeys(expected, 0)
    for sample in samples:
        if sample in counts:
            counts[sample] += 1
    expected_C = torch.tensor(
        [*expected.values(), len(samples) - sum(expected.values())], dtype=torch.float64
    )
    counts_C = torch.tensor([*counts.values(), len(samples) - sum(counts.values())], dtype=torch.float64)
    statistic = ((counts_C - expected_C) ** 2 / expected_C).sum()
    return float(torch.special.gammaincc(torch.tensor(len(expected) / 2.0).double(), statistic / 2))
