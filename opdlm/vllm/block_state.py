"""The blocks that requests denoise in vLLM: their tokens, and the slots that predict them.

On the absolute grid the last P mod b tokens of a prompt lie in the block in which the response starts. They
are prefilled with the rest of the prompt and then rolled back, so that the first block contains them. Of that
block only the tokens of the response are new text.

In `preserve`, slot i - 1 predicts token i. A block is computed at the b slots before its tokens, and one more
token of the prompt is rolled back. The slots of a block up to its first masked token are clean.

Proposals, random draws and remasking come from `decoding.unmasking`, so that rollouts equal those of our
decoder. This module does not import vLLM.

Shape suffixes: R rows of vLLM's request table, T tokens of a block, D requests that decode now, V vocabulary,
M masked tokens, N positions with logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.unmasking import (
    REMASKING,
    choose_revealed,
    noise_keys,
    num_to_reveal,
    propose_tokens,
    sampling_of,
)
from opdlm.modeling.diffusion_lm import DiffusionSpec


class BlockStates:
    """The block that each request denoises, and the trajectories of committed blocks."""

    def __init__(
        self, spec: DiffusionSpec, decode: DecodeConfig, max_requests: int, device: torch.device
    ) -> None:
        self.spec, self.decode, self.device = spec, decode, device
        self.shift = 1 if spec.format == "preserve" else 0
        size = (max_requests, spec.block_size)
        self.ids_RT = torch.full(size, spec.mask_token_id, device=device)
        self.step_RT = torch.zeros(size, dtype=torch.long, device=device)
        zeros_R = torch.zeros(max_requests, dtype=torch.long, device=device)
        self.start_R, self.seed_R = zeros_R, zeros_R.clone()
        self.num_known_R, self.num_rolled_back_R = zeros_R.clone(), zeros_R.clone()
        self.before_R = zeros_R.clone()
        self.block_step_R, self.num_steps_R = zeros_R.clone(), zeros_R.clone()
        self.row_of: dict[int, int | None] = {}
        self.committed: dict[int, list[tuple[int, int]]] = {}

    def start(self, place: int, ids: list[int], seed: int, row: int | None) -> None:
        """A request takes the table row `place`.

        ids: its prompt, followed by its previous output if vLLM restarts it after a preemption. row: index
        under which its trajectory is recorded; None records nothing.
        """
        size = self.spec.block_size
        num_known = len(ids) % size if self.spec.grid == "absolute" else 0
        known = torch.tensor(ids[len(ids) - num_known :], dtype=torch.long, device=self.device)
        self.ids_RT[place] = self.spec.mask_token_id
        self.ids_RT[place, :num_known] = known
        self.step_RT[place] = 0
        self.start_R[place], self.seed_R[place] = len(ids) - num_known, seed
        self.num_known_R[place], self.num_rolled_back_R[place] = num_known, num_known + self.shift
        self.before_R[place] = ids[len(ids) - num_known - 1]
        self.block_step_R[place], self.num_steps_R[place] = 0, 0
        self.row_of[place] = row
        if row is not None:
            self.committed.setdefault(row, [])

    def slots(self, place_D: Tensor) -> Tensor:
        """Token ids `[D, T]` of the slots that predict the blocks' tokens."""
        if not self.shift:
            return self.ids_RT[place_D]
        return torch.cat([self.before_R[place_D, None], self.ids_RT[place_D, :-1]], 1)

    def num_clean(self, place_D: Tensor) -> Tensor:
        """`preserve`: how many of these slots are clean `[D]`, from the left."""
        masked_DT = self.ids_RT[place_D] == self.spec.mask_token_id
        size = self.spec.block_size
        return torch.where(masked_DT.any(1), masked_DT.long().argmax(1) + 1, size)

    def roll_back(self, place_D: Tensor) -> Tensor:
        """How many prefilled prompt tokens the first blocks compute again `[D]`; 0 at the next call."""
        num_D = self.num_rolled_back_R[place_D]
        self.num_rolled_back_R[place_D] = 0
        return num_D

    def advance(self, place_D: Tensor, logits_NV: Tensor, first_D: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the requests at `place_D`, whose logits start at rows `first_D`.

        Returns token ids `[D, T]`, and how many of them, from the left, are new text `[D]`: 0 while the block
        contains masks.
        """
        ids_DT, mask_id, size = self.ids_RT[place_D], self.spec.mask_token_id, self.spec.block_size
        offset_T = torch.arange(size, device=self.device)
        masked_DT = ids_DT == mask_id
        done_D = ~masked_DT.any(1)
        num_known_D = self.num_known_R[place_D]
        self.record(place_D[done_D])
        new_DT = ids_DT.gather(1, (offset_T + num_known_D[:, None]) % size)

        self.num_steps_R[place_D] += (~done_D).long()
        position_DT = self.start_R[place_D, None] + offset_T
        ids_DT = self.reveal(place_D, ids_DT, masked_DT, position_DT, logits_NV, first_D)
        complete_D = ~(ids_DT == mask_id).any(1)
        self.block_step_R[place_D] = torch.where(complete_D, 0, self.block_step_R[place_D] + 1)
        self.before_R[place_D] = torch.where(done_D, ids_DT[:, -1], self.before_R[place_D])
        self.start_R[place_D] += done_D.long() * size
        self.num_known_R[place_D] = torch.where(done_D, 0, num_known_D)
        self.ids_RT[place_D] = ids_DT.masked_fill(done_D[:, None], mask_id)
        return new_DT, done_D.long() * (size - num_known_D)

    def record(self, place_D: Tensor) -> None:
        """Append committed blocks, without tokens of the prompt, to the trajectories of their requests."""
        for place in place_D.tolist():
            row, num_known = self.row_of[place], int(self.num_known_R[place])
            if row is not None:
                pairs = zip(self.ids_RT[place].tolist(), self.step_RT[place].tolist(), strict=True)
                self.committed[row] += list(pairs)[num_known:]

    def reveal(
        self,
        place_D: Tensor,
        ids_DT: Tensor,
        masked_DT: Tensor,
        position_DT: Tensor,
        logits_NV: Tensor,
        first_D: Tensor,
    ) -> Tensor:
        """The blocks after one denoising step; blocks without masks are unchanged."""
        row_M, offset_M = masked_DT.nonzero(as_tuple=True)
        logits_MV = logits_NV[first_D[row_M] + offset_M].float()
        banned = [token for token in self.spec.banned_token_ids if token < logits_MV.shape[1]]
        logits_MV[:, banned] = -torch.inf
        step_D = self.num_steps_R[place_D]
        key_M = noise_keys(self.seed_R[place_D][row_M], position_DT[row_M, offset_M], step_D[row_M])
        decode, size = self.decode, ids_DT.shape[1]
        sampling_M3 = torch.tensor(sampling_of(decode), dtype=torch.float64).expand(len(key_M), 3)
        ids_M, confidence_M = propose_tokens(logits_MV, sampling_M3, key_M)
        confidence_DT = torch.zeros(masked_DT.shape, device=self.device)
        confidence_DT[row_M, offset_M] = confidence_M
        num_D = num_to_reveal(self.block_step_R[place_D], size, min(decode.denoising_steps or size, size))
        remasking = REMASKING[decode.mode]
        revealed_DT = choose_revealed(confidence_DT, masked_DT, num_D, remasking, decode.confidence_threshold)
        proposed_DT = ids_DT.index_put((row_M, offset_M), ids_M)
        self.step_RT[place_D] = torch.where(revealed_DT, step_D[:, None], self.step_RT[place_D])
        return torch.where(revealed_DT, proposed_DT, ids_DT)
