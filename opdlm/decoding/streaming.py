"""What `opdlm generate` adds to decoding: gaps, stop strings, a response shown while it is written."""

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
UNRESOLVED = "·"


def encode_gaps(
    tokenizer: PreTrainedTokenizerBase, text: str, mask_token_id: int, default_length: int
) -> list[int]:
    """Plain text, without a chat template, whose `<gap>` and `<gap:12>` become so many mask tokens."""
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
    """A response ends where its text first holds one of the strings; they are no part of it."""

    tokenizer: PreTrainedTokenizerBase
    strings: tuple[str, ...] = ()

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def find_end(self, ids: Sequence[int]) -> int | None:
        """The fewest tokens whose text holds a stop string."""
        if not self._is_in(self.text(ids)):
            return None
        return next(n for n in range(1, len(ids) + 1) if self._is_in(self.text(ids[:n])))

    def _is_in(self, text: str) -> bool:
        return any(string in text for string in self.strings)

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: min([text.find(string) for string in self.strings if string in text], default=None)]

    def settled(self, text: str) -> str:
        """The beginning that more tokens cannot change: no half of a stop string or of a character."""
        text = self.cut(text).rstrip("\ufffd")
        halves = (string[:n] for string in self.strings for n in range(1, len(string)))
        return text[: len(text) - max((len(half) for half in halves if text.endswith(half)), default=0)]


class StablePrefix:
    """The part of a response that no later step can change, step by step."""

    def __init__(self, stops: StopStrings, spec: DiffusionSpec, grid: Grid, shown: range) -> None:
        """`shown`: the positions of the response, at most."""
        self.stops, self.spec, self.grid, self.shown = stops, spec, grid, shown
        self.frontier = shown.start

    def after_step(self, tokens: Sequence[int]) -> tuple[str, Sequence[int]]:
        """The settled text, and the tokens after it up to the end of what is begun (masks among them). A veto
        can take back what only the last step made known.
        """
        mask_id = self.spec.mask_token_id
        frontier = tokens.index(mask_id)
        num_stable, self.frontier = min(frontier, self.frontier), frontier
        last_known = max(i for i, token in enumerate(tokens) if token != mask_id)
        end_of_block = self.grid.block_start(frontier, self.shown.start) + self.grid.block_size
        stop = (i for i in self.shown if tokens[i] in self.spec.stop_token_ids)
        end = next(stop, min(self.shown.stop, max(last_known + 1, end_of_block)))
        settled = self.stops.text(tokens[self.shown.start : min(num_stable, end)])
        return self.stops.settled(settled), tokens[num_stable:end]

    def whole(self, rollout: Rollout) -> str:
        """The text of the finished response."""
        ids = rollout.prompt_ids + rollout.text_ids
        return self.stops.cut(self.stops.text(ids[self.shown.start :]))


class Stream(AbstractContextManager["Stream"]):
    """Writes the response to one prompt as it comes: text, as soon as no later step can change it.

    On a terminal also what is revealed beyond it, dim, with a dot for every position that is still open.
    """

    def __init__(self, stable_prefix: StablePrefix, console: Console) -> None:
        self.stable_prefix, self.console, self.written = stable_prefix, console, 0
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._context: AbstractContextManager[Any] = self.live or nullcontext()

    def __enter__(self) -> Stream:
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def on_step(self, index_B: Tensor, tokens_BL: Tensor, revealed_BL: Tensor) -> None:
        """After every step of a decoding of one prompt."""
        settled, rest = self.stable_prefix.after_step(tokens_BL[0].tolist())
        mask_id, text = self.stable_prefix.spec.mask_token_id, self.stable_prefix.stops.text
        self._show(settled, "".join(UNRESOLVED if i == mask_id else text([i]) for i in rest))

    def finish(self, rollout: Rollout) -> None:
        """The rest, and the end of the line."""
        end = "" if self.live else "\n"  # rich ends the line that it leaves
        self._show(self.stable_prefix.whole(rollout) + end, "")

    def _show(self, text: str, beyond: str) -> None:
        end = text.rfind("\n") + 1 if self.live else len(text)
        if end > self.written:  # whole lines stay; what follows them is drawn again
            fresh = text[self.written : end]
            if self.live:
                self.console.print(Text(fresh.removesuffix("\n")), soft_wrap=True)
            else:
                self.console.file.write(fresh)
                self.console.file.flush()
            self.written = end
        if self.live:
            self.live.update(Text.assemble(text[self.written :], (beyond, "dim")), refresh=True)
