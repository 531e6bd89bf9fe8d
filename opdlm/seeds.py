"""Random seeds that are functions of names (the run's seed, a stream, a step, an index), so that no draw
depends on what was drawn before it.
"""

from __future__ import annotations

from enum import IntEnum

import torch


class Stream(IntEnum):
    """What a draw of a training run is for. Each number is part of a seed: changing one changes every run.

    Rollouts belong to no stream: their seeds are (seed, step, index of the prompt).
    """

    STATES = 1 * 10**6
    """Denoising states of one rollout: (seed, STATES + update, index of the rollout)."""
    UPDATE_ORDER = 1 * 10**6
    """Order of a step's rollouts in its updates: (seed, step, UPDATE_ORDER). As the third number it is no
    index of a prompt and does not meet STATES.
    """
    DROPOUT = 2 * 10**6
    """Dropout of one update on one rank: (seed, DROPOUT + update, rank)."""
    UNIQUE_TOKENS = 3 * 10**6
    """Which documents `data.unique_tokens` keeps: (seed, UNIQUE_TOKENS)."""
    DOCUMENT_ORDER = 4 * 10**6
    """Order of the documents in one epoch: (seed, DOCUMENT_ORDER, epoch)."""
    MASKS = 5 * 10**6
    """Masks of one update of text training: (seed, MASKS, step), for blocks also the index of the row."""
    TOKEN_ORDER = 6 * 10**6
    """The order of tokens that `objective.token_order` draws once for a run: (seed, TOKEN_ORDER)."""


def seed_of(*numbers: int) -> int:
    """A seed in [0, 2^63 - 1) that depends on all of the numbers, on their order, and on nothing else."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return seed


def generator_for(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator with the seed `seed_of(*numbers)`."""
    return torch.Generator(device=device).manual_seed(seed_of(*numbers))
