"""Draw the attention masks of docs/concepts.md with `modeling.slots.visible`.

Training rows come from `select_states`. Decoding steps come from `generate` with a tiny random model; the
slots that it passes to `packed_hidden` are recorded and drawn.

    python benchmarks/mask_pictures.py          writes docs/masks/*.png
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import ListedColormap
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config, Qwen3ForCausalLM

from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Rollout
from opdlm.modeling.attention import keys_with_cache
from opdlm.modeling.diffusion_lm import DiffusionLM, DiffusionSpec
from opdlm.modeling.kv_cache import DecodeCache, Packed
from opdlm.modeling.slots import CLEAN, Format, GridKind, Slots, join_slots, make_slots, visible
from opdlm.objectives.states import Selection, select_states
from opdlm.reporting.plots import new_figure

FOLDER = Path(__file__).parent.parent / "docs" / "masks"
VOCABULARY, BLOCK_SIZE = 32, 4
COLOURS = ListedColormap(["#ffffff", "#4c78a8", "#f58518", "#e8e8e8"])
UNSEEN, SEEN_CLEAN, SEEN_GROUP, PADDING = range(4)


def make_spec(fmt: Format, grid: GridKind = "absolute", *, adapter: bool = False) -> DiffusionSpec:
    return DiffusionSpec(
        format=fmt,
        block_size=BLOCK_SIZE,
        grid=grid,
        mask_token_id=VOCABULARY - 1,
        stop_token_ids=(VOCABULARY - 2,),
        banned_token_ids=(VOCABULARY - 1,),
        adapter=adapter,
    )


def make_rollout(num_prompt: int, num_response: int) -> Rollout:
    """Two tokens are revealed per step; in each group of four, odd offsets come first."""
    tokens = tuple(range(1, num_prompt + num_response + 1))
    steps = tuple(1 + i // 4 * 2 + (i % 2 == 0) for i in range(num_response))
    return Rollout(
        prompt_ids=tokens[:num_prompt],
        response_ids=tokens[num_prompt:],
        unmask_step=steps,
        num_response=num_response,
        finish_reason="length",
    )


def training_row(
    fmt: Format, prompts: tuple[int, ...], grid: GridKind = "absolute", selection: Selection = "one_per_block"
) -> Slots:
    """Clean slots, then noised ones; in `preserve` the two halves are separate forward passes."""
    spec = make_spec(fmt, grid)
    rollouts = [make_rollout(num_prompt, 16 - num_prompt) for num_prompt in prompts]
    rng = torch.Generator().manual_seed(3)
    states = select_states(rollouts, spec, selection, rng)
    return join_slots(states.text, states.slots) if fmt == "preserve" else states.slots


class Recorder(DiffusionLM):
    """Records the queries and keys of every decoding step."""

    steps: list[tuple[Slots, Slots]]

    def packed_hidden(self, packed: Packed, num_rows: int, cache: DecodeCache) -> tuple[torch.Tensor, int]:
        result = super().packed_hidden(packed, num_rows, cache)
        of_row = [packed.row_N == row for row in range(num_rows)]
        fields = (packed.ids_N, packed.positions_N, packed.visible_until_N, packed.group_N, packed.row_N >= 0)
        slots = make_slots(*(pad_sequence([x[keep] for keep in of_row], batch_first=True) for x in fields))
        self.steps.append((slots, keys_with_cache(slots, int(slots.visible_until_BS.max()) + 1)))
        return result


def decoding_step(mode: Any, step: int, prompts: list[tuple[int, ...]]) -> tuple[Slots, Slots]:
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = Recorder(Qwen3ForCausalLM(shape).eval(), make_spec("preserve"))
    model.spec = replace(model.spec, adapter=True)  # shared weights: one forward per step
    model.steps = []
    config = DecodeConfig(mode=mode, max_new_tokens=8, forward_overhead=1e9)  # keep every draft
    generate(model, prompts, config)
    return model.steps[step]


def kinds(queries: Slots, keys: Slots, window: int | None, row: int) -> torch.Tensor:
    """The colour index of each query and key `[Q, K]`."""
    seen_QK = visible(queries, keys, window)[row]
    is_clean_K = keys.group_BS[row] == CLEAN
    picture_QK = torch.where(seen_QK, torch.where(is_clean_K, SEEN_CLEAN, SEEN_GROUP), UNSEEN)
    picture_QK[:, keys.group_BS[row] < CLEAN] = PADDING
    picture_QK[queries.group_BS[row] < CLEAN] = PADDING
    return picture_QK


def labels(slots: Slots, row: int) -> list[str]:
    """Tick labels: the position, plus the group letter of a noised slot; empty for padding."""
    pairs = zip(slots.positions_BS[row].tolist(), slots.group_BS[row].tolist(), strict=True)
    return [
        "" if group < CLEAN else str(position) if group == CLEAN else f"{position}{chr(96 + group)}"
        for position, group in pairs
    ]


def draw(name: str, queries: Slots, keys: Slots | None = None, window: int | None = None) -> None:
    """Write NAME.png with one panel per row of the batch."""
    keys = queries if keys is None else keys
    (num_rows, num_queries), num_keys = queries.ids_BS.shape, keys.ids_BS.shape[1]
    figure, axes = new_figure(num_rows, num_rows * (1 + 0.21 * num_keys), 1 + 0.21 * num_queries)
    for row, axis in enumerate(axes[0]):
        axis.imshow(kinds(queries, keys, window, row), cmap=COLOURS, vmin=0, vmax=3)
        axis.set_xticks(range(num_keys), labels(keys, row), fontsize=7, rotation=90)
        axis.set_yticks(range(num_queries), labels(queries, row), fontsize=7)
        axis.set_xticks([i - 0.5 for i in range(num_keys)], minor=True)
        axis.set_yticks([i - 0.5 for i in range(num_queries)], minor=True)
        axis.grid(which="minor", color="#cccccc", linewidth=0.5)
        axis.tick_params(which="both", length=0)
        axis.set_xlabel("keys")
        axis.set_ylabel("queries")
    figure.savefig(FOLDER / f"{name}.png", dpi=80)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    draw("preserve", training_row("preserve", (4,)))
    draw("preserve_all_states", training_row("preserve", (8,), selection="all"))
    draw("sdar", training_row("sdar", (4,)))
    draw("ragged", training_row("preserve", (2, 7)))
    draw("window", training_row("preserve", (4,)), window=6)
    draw("grid_absolute", training_row("sdar", (6,)))
    draw("grid_response", training_row("sdar", (6,), "response"))
    draw("denoise", *decoding_step("static", 2, [(1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11, 12)]))
    draw("lossless", *decoding_step("lossless", 1, [(1, 2, 3, 4, 5)]))


if __name__ == "__main__":
    main()
