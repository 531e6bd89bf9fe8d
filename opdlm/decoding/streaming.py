"""Text around decoding: prompts with gaps, stop strings, and responses that are shown while they are decoded.

Not part of the remote code of result folders: it needs a tokenizer and rich.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opdlm.decoding.rollout import Rollout
from opdlm.errors import ConfigError
from opdlm.modeling.diffusion_lm import DiffusionSpec
from opdlm.modeling.slots import Grid

GAP = re.compile(r"<gap(?::(\d+))?>")
UNKNOWN = "·"
"""Shown at a position that is still [MASK]."""


def encode_gaps(
    tokenizer: PreTrainedTokenizerBase, text: str, mask_token_id: int, default_length: int
) -> list[int]:
    """Token ids of plain text, without a chat template, in which `<gap:12>` stands for 12 mask tokens and
    `<gap>` for `default_length`. ConfigError for a text without a gap or with one that cannot be filled.
    """
    before, *rest = GAP.split(text)
    if not rest:
        raise ConfigError("PROMPT has no gap to fill: write <gap> or <gap:12> in it, or leave out --infill.")
    ids = list(tokenizer(before)["input_ids"])
    if not ids:
        raise ConfigError(
            "PROMPT starts with a gap, and the model needs a token to start from: put text first."
        )
    for length, after in zip(rest[::2], rest[1::2], strict=True):
        if length is not None and int(length) < 1:
            raise ConfigError(f"PROMPT has a gap of {length} tokens: give it at least 1.")
        ids += [mask_token_id] * (default_length if length is None else int(length))
        ids += tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
    return ids


@dataclass(frozen=True, slots=True)
class StopStrings:
    """A response ends before the first stop string in its text, and with the first of these token ids."""

    tokenizer: PreTrainedTokenizerBase
    strings: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def find_end(self, ids: Sequence[int]) -> int | None:
        """The smallest number of tokens that end with a stop token or whose text contains a stop string; None
        if there is none.
        """
        end = next((n for n, token in enumerate(ids, 1) if token in self.token_ids), None)
        if not self.strings or not self._is_in(self.text(ids[:end])):
            return end
        return next(n for n in range(1, len(ids) + 1) if self._is_in(self.text(ids[:n])))

    def _is_in(self, text: str) -> bool:
        return any(string in text for string in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: min([text.find(string) for string in self.strings if string in text], default=None)]

    def stable(self, text: str) -> str:
        """The part of the text that further tokens cannot change: without an incomplete character and without
        the beginning of a stop string at its end.
        """
        text = self.cut(text).rstrip("\ufffd")
        starts = (string[:n] for string in self.strings for n in range(1, len(string)))
        return text[: len(text) - max((len(start) for start in starts if text.endswith(start)), default=0)]


class StablePrefix:
    """The part of one response that no later step can change, after each step."""

    def __init__(self, stops: StopStrings, spec: DiffusionSpec, grid: Grid, shown: range) -> None:
        """`shown`: the positions that the response may fill."""
        self.stops, self.spec, self.grid, self.shown = stops, spec, grid, shown
        self.stop_token_ids = {*spec.stop_token_ids, *stops.token_ids}
        self.frontier = shown.start

    def after_step(self, tokens: Sequence[int], num_final: int | None = None) -> tuple[str, Sequence[int]]:
        """The stable text, and the token ids after it up to the end of the current block, masks included.

        `num_final`: how many tokens no later step can change. Without it a token is stable one step after it
        becomes known, because the AR model may reject the tokens that the last step revealed.
        """
        mask_id = self.spec.mask_token_id
        frontier = tokens.index(mask_id)
        num_stable = min(frontier, self.frontier) if num_final is None else num_final
        self.frontier = frontier
        last_known = max(i for i, token in enumerate(tokens) if token != mask_id)
        end_of_block = self.grid.block_start(frontier, self.shown.start) + self.grid.block_size
        stop = (i for i in self.shown if tokens[i] in self.stop_token_ids)
        end = next(stop, min(self.shown.stop, max(last_known + 1, end_of_block)))
        known = self.stops.text(tokens[self.shown.start : min(num_stable, end)])
        return self.stops.stable(known), tokens[num_stable:end]

    def whole(self, ids: Sequence[int]) -> str:
        """The text of the complete response with these token ids."""
        if ids[-1:] and ids[-1] in self.stops.token_ids:
            ids = ids[:-1]
        return self.stops.cut(self.stops.text(ids))


class ResponseView(AbstractContextManager["ResponseView"]):
    """Writes the response to one prompt during decoding, each part as soon as no later step can change it.

    A terminal also shows the revealed tokens after that part, dim, with a dot for every unknown position.
    """

    def __init__(self, stable_prefix: StablePrefix, console: Console) -> None:
        self.stable_prefix, self.console, self.written = stable_prefix, console, 0
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._context: AbstractContextManager[Any] = self.live or nullcontext()

    def __enter__(self) -> ResponseView:
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def on_step(self, index_B: Tensor, tokens_BL: Tensor, revealed_BL: Tensor) -> None:
        """Show the state after one step; the `on_step` of `generate` for a single prompt."""
        stable, rest = self.stable_prefix.after_step(tokens_BL[0].tolist())
        mask_id, text = self.stable_prefix.spec.mask_token_id, self.stable_prefix.stops.text
        self._show(stable, "".join(UNKNOWN if i == mask_id else text([i]) for i in rest))

    def finish(self, rollout: Rollout) -> None:
        """Write the rest of the complete response and end the line."""
        end = "" if self.live else "\n"  # rich ends its last line itself
        ids = (rollout.prompt_ids + rollout.text_ids)[self.stable_prefix.shown.start :]
        self._show(self.stable_prefix.whole(ids) + end, "")

    def _show(self, text: str, beyond: str) -> None:
        end = text.rfind("\n") + 1 if self.live else len(text)
        if end > self.written:  # whole lines are printed once; the last line is drawn again
            fresh = text[self.written : end]
            if self.live:
                self.console.print(Text(fresh.removesuffix("\n")), soft_wrap=True)
            else:
                self.console.file.write(fresh)
                self.console.file.flush()
            self.written = end
        if self.live:
            self.live.update(Text.assemble(text[self.written :], (beyond, "dim")), refresh=True)
