"""The draft head: it tells each token of a draft which tokens come before it.

One forward computes all masks of a draft at once, so no mask knows what the others become, nor which token
the AR model gives before the draft. The head reads these tokens one after the other and corrects the hidden
state of each mask before the LM head. A draft token counts only if all before it are accepted, so training
may read the text itself in their place. Decoding is lossless with any head. Related: Hydra's draft heads,
which read the tokens before them too (arXiv 2402.05109).

This file is part of the remote code of converted checkpoints (`export.REMOTE_FILES`): it imports only torch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DraftHead(nn.Module):
    """Corrections of hidden states: none before training."""

    def __init__(self, hidden_size: int, width: int) -> None:
        """`width`: of the state that remembers tokens, and of the layer that joins it to a hidden state."""
        super().__init__()
        self.read = nn.GRUCell(hidden_size, width)
        self.from_hidden = nn.Linear(hidden_size, width)
        self.from_state = nn.Linear(width, width, bias=False)
        self.correction = nn.Linear(width, hidden_size, bias=False)
        nn.init.zeros_(self.correction.weight)

    @classmethod
    def of(cls, weights: dict[str, Tensor]) -> DraftHead:
        """A head with these weights, as `state_dict` returns them."""
        head = cls(*weights["correction.weight"].shape)
        head.load_state_dict(weights)
        return head

    def advance(self, embedded_AH: Tensor, state_AW: Tensor | None = None) -> Tensor:
        """The state `[A, W]` after one more token, given its embedding; None: it is the first."""
        return self.read(unit_scale(embedded_AH), state_AW)

    def forward(self, hidden_NH: Tensor, state_NW: Tensor) -> Tensor:
        """The hidden state of each mask, corrected by the state after the token before its prediction."""
        joined_NW = F.silu(self.from_hidden(unit_scale(hidden_NH)) + self.from_state(state_NW))
        scale_N1 = hidden_NH.float().square().mean(-1, keepdim=True).sqrt()
        return hidden_NH + (scale_N1 * self.correction(joined_NW)).to(hidden_NH.dtype)


def unit_scale(hidden: Tensor) -> Tensor:
    """Divided by its root mean square, in float32."""
    return F.rms_norm(hidden.float(), hidden.shape[-1:])
