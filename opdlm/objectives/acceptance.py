"""How often the tokens of a draft are accepted, by their place in it, as the updates of a run measure it.

At temperature 1 speculative sampling accepts a draft token with probability sum_v min(p_v, q_v), which is
1 - TV(p, q) (arXiv 2211.17192), and a token counts only if all before it were accepted. Here every place is
measured on known text, so the tokens before it count as accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from opdlm.objectives.losses import LossOutput
from opdlm.objectives.states import StateBatch

DECAY = 0.9
"""Of earlier updates, in the running mean."""


class Acceptance:
    """Running means `[block_size - 1]`; the places of a draft count from 0."""

    def __init__(self, draft_length: int) -> None:
        self.accepted, self.offered = [0.0] * draft_length, [0.0] * draft_length

    def add(self, sums: list[float]) -> None:
        """Sums of one update: the acceptance at each place, then how often each was measured."""
        both = [DECAY * old + new for old, new in zip([*self.accepted, *self.offered], sums, strict=True)]
        self.accepted, self.offered = both[: len(self.accepted)], both[len(self.accepted) :]

    def shares(self) -> list[float]:
        """Probability of each place; 1 where nothing was measured."""
        return [a / n if n else 1.0 for a, n in zip(self.accepted, self.offered, strict=True)]

    def reach(self) -> list[float]:
        """Probability that all tokens before each place are accepted."""
        return list(accumulate(self.shares()[:-1], mul, initial=1.0))

    def weights(self) -> Tensor:
        """`reach` with mean 1, so that it does not change the size of a loss."""
        reach = torch.tensor(self.reach())
        return reach / reach.mean()

    def metrics(self) -> dict[str, float]:
        """The share of each place, and the tokens per forward that follow from them at temperature 1."""
        shares, reach = self.shares(), self.reach()
        expected = 1 + sum(map(mul, shares, reach))
        places = {f"draft_acceptance_{place}": share for place, share in enumerate(shares, 1)}
        return {"expected_tokens_per_forward": expected, **places}


def places_of(states: StateBatch) -> Tensor:
    """The place in its draft of each supervised slot `[M]`. The first token of a draft follows one that the
    AR model predicts in the same forward.
    """
    is_supervised_BS = states.is_supervised_BS
    return (states.target_BS - states.slots.visible_until_BS)[is_supervised_BS] - 2


@dataclass(slots=True)
class PlaceSums:
    """Sum and count of the acceptance at each place `[draft_length]`, over the micro-batches of an update."""

    accepted_D: Tensor
    offered_D: Tensor

    @classmethod
    def of_length(cls, draft_length: int) -> PlaceSums:
        return cls(torch.zeros(draft_length), torch.zeros(draft_length))

    def observe(self, states: StateBatch, output: LossOutput) -> None:
        assert output.acceptance_M is not None
        place_M, acceptance_M = places_of(states).cpu(), output.acceptance_M.float().cpu()
        self.accepted_D.index_add_(0, place_M, acceptance_M)
        self.offered_D.index_add_(0, place_M, torch.ones_like(acceptance_M))
