"""The mask of a packed forward against a brute-force reading of the rule, slot by slot."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny_models import CPU

from opdlm.modeling.kv_cache import DecodeCache, Packed
from opdlm.modeling.slots import CAUSAL

LENGTH = 14
"""Positions of the buffer that a forward reads."""


@dataclass(frozen=True)
class Slot:
    row: int
    position: int
    visible_until: int
    group: int


def random_slots(seed: int, num_rows: int) -> list[Slot]:
    """Clean slots, then noised ones in up to three groups, some of them causal; some rows have none of a
    kind.
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    clean, noised = list[Slot](), list[Slot]()
    for row in range(num_rows):
        first = draw(0, 6)
        clean += [
            Slot(row, place, min(place + draw(0, 3), LENGTH - 1), 0)
            for place in range(first, first + draw(0, 5))
        ]
        for group in range(1, draw(1, 5)):
            anchor, group = draw(3, 9), group + CAUSAL * draw(0, 2)
            noised += [Slot(row, anchor + 1 + i, anchor, group) for i in range(draw(1, 4))]
    return [*clean, *noised] or [Slot(0, 0, 0, 0)]


def brute_force(slots: list[Slot], window: int | None) -> list[list[bool]]:
    """For each slot: the positions of the buffer that it sees, then the noised slots of its row, which are
    stored behind them in their order.
    """
    most = max(sum(s.group > 0 and s.row == row for s in slots) for row in {s.row for s in slots})
    seen = []
    for query in slots:
        mine = [key for key in slots if key.group > 0 and key.row == query.row]
        buffer = [position <= query.visible_until for position in range(LENGTH)]
        group = [
            key.group == query.group and (query.group < 2**20 or key.position <= query.position)
            for key in mine
        ]
        if window is not None:
            buffer = [ok and query.position - place < window for place, ok in enumerate(buffer)]
            group = [
                ok and query.position - key.position < window for key, ok in zip(mine, group, strict=True)
            ]
        seen.append([*buffer, *group, *[False] * (most - len(mine))])
    return seen


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("seed", range(6))
def test_the_mask_of_a_decoding_step_is_the_visibility_rule(
    seed: int, num_rows: int, window: int | None
) -> None:
    slots = random_slots(seed, num_rows)
    columns = [torch.tensor([getattr(s, name) for s in slots]) for name in Slot.__annotations__]
    row_N, position_N, visible_until_N, group_N = columns
    num_clean = sum(s.group == 0 for s in slots)
    cache = DecodeCache(num_rows, 2 * LENGTH, CPU)
    cache.begin(
        Packed(num_clean, row_N, torch.zeros_like(row_N), position_N, visible_until_N, group_N),
        num_rows,
        LENGTH,
    )
    mask_NK = cache.mask(window, torch.float32)[0, 0]
    assert (mask_NK == 0).tolist() == brute_force(slots, window)
    assert ((mask_NK == 0) | (mask_NK == torch.finfo(torch.float32).min)).all()
