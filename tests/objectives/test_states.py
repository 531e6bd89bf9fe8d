"""Visibility of slots against plain loops, the states that are trained, and the positions they supervise."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_models import BLOCK, GRIDS, MASK, STOP, V, make_rollout
from torch import Tensor

from opdlm.decoding.rollout import NEVER, Rollout
from opdlm.modeling.diffusion_lm import DiffusionSpec
from opdlm.modeling.slots import CLEAN, FAR, Format, Grid, GridKind, Slots, join_slots, make_slots, visible
from opdlm.objectives.states import Selection, StateBatch, block_table, select_masks, select_states

FORMATS: tuple[Format, ...] = ("preserve", "sdar")
SELECTIONS: tuple[Selection, ...] = ("one_per_block", "all", "complementary", "random_mask")
LENGTHS = [(p, r) for p in range(1, 9) for r in (1, 5, 7)]


def make_spec(fmt: Format, grid: GridKind) -> DiffusionSpec:
    return DiffusionSpec(
        format=fmt,
        block_size=BLOCK,
        grid=grid,
        mask_token_id=MASK,
        stop_token_ids=(STOP,),
        banned_token_ids=(MASK,),
    )


def make_rollouts(grid: GridKind) -> list[Rollout]:
    return [make_rollout(p, r, grid, stop=r != 5) for p, r in LENGTHS]


def select(
    rollouts: Sequence[Rollout], spec: DiffusionSpec, selection: Selection, seed: int = 0
) -> StateBatch:
    return select_states(rollouts, spec, selection, torch.Generator().manual_seed(seed))


def block_of(position: int, num_prompt: int, grid: GridKind) -> int:
    origin = num_prompt % BLOCK if grid == "response" else 0
    return (position - origin) // BLOCK


def group_positions(batch: StateBatch, row: int) -> dict[int, dict[int, int]]:
    """Group -> {position: token} of one row's noised slots."""
    groups: dict[int, dict[int, int]] = {}
    columns = zip(
        batch.slots.group_BS[row].tolist(),
        batch.slots.positions_BS[row].tolist(),
        batch.slots.ids_BS[row].tolist(),
        strict=True,
    )
    for group, position, token in columns:
        if group > 0:
            groups.setdefault(group, {})[position] = token
    return groups


def targets_of(batch: StateBatch, row: int) -> dict[int, list[int]]:
    """Group -> supervised positions."""
    targets: dict[int, list[int]] = {}
    columns = zip(batch.slots.group_BS[row].tolist(), batch.target_BS[row].tolist(), strict=True)
    for group, target in columns:
        if target >= 0:
            targets.setdefault(group, []).append(target)
    return targets


@pytest.mark.parametrize("kind", GRIDS)
def test_blocks_tile_every_row_and_the_response_grid_starts_with_the_response(kind: GridKind) -> None:
    grid = Grid(block_size=BLOCK, kind=kind)
    for num_prompt in range(1, 10):
        starts = [grid.block_start(i, num_prompt) for i in range(24)]
        assert starts == [
            block_of(i, num_prompt, kind) * BLOCK + (num_prompt % BLOCK if kind == "response" else 0)
            for i in range(24)
        ]
        assert grid.block_start(torch.arange(24), torch.tensor(num_prompt)).tolist() == starts
        assert kind == "absolute" or starts[num_prompt] == num_prompt


def sees(
    q: int,
    k: int,
    *,
    fmt: Format,
    grid: GridKind,
    num_prompt: int,
    num_text: int,
    num_clean: int,
    position: list[int],
    group: list[int],
    anchor: dict[int, int],
) -> bool:
    """Expected visibility in one row: num_clean clean columns, of which num_text are text, then noised ones
    (docs/concepts.md, "Slots and masks").
    """
    if (q < num_clean and q >= num_text) or (q >= num_clean and group[q] <= 0):
        return q == k  # padding
    if k >= num_clean:
        return q >= num_clean and group[q] == group[k]
    if k >= num_text:
        return False
    block_k, block_q = (block_of(position[i], num_prompt, grid) for i in (k, q))
    if q < num_clean:
        return k <= q if fmt == "preserve" else block_k <= block_q
    return k <= anchor[group[q]] if fmt == "preserve" else block_k < block_q


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_visibility_equals_plain_loops(fmt: Format, grid: GridKind) -> None:
    """A noised slot of `preserve` sees clean text up to the token before its state's first masked one."""
    spec, rollouts = make_spec(fmt, grid), make_rollouts(grid)
    batch = select(rollouts, spec, "all")
    slots = join_slots(batch.text, batch.slots) if fmt == "preserve" else batch.slots
    seen_BSS, width = visible(slots, slots), slots.ids_BS.shape[1]
    num_clean = int((slots.group_BS == CLEAN).any(0).sum())
    for row, rollout in enumerate(rollouts):
        layout = {
            "fmt": fmt,
            "grid": grid,
            "num_prompt": len(rollout.prompt_ids),
            "num_text": int((slots.group_BS[row] == CLEAN).sum()),
            "num_clean": num_clean,
            "position": slots.positions_BS[row].tolist(),
            "group": slots.group_BS[row].tolist(),
            "anchor": {
                group: min(p for p, token in state.items() if token == MASK) - 1
                for group, state in group_positions(batch, row).items()
            },
        }
        assert seen_BSS[row].tolist() == [[sees(q, k, **layout) for k in range(width)] for q in range(width)]


def test_a_window_keeps_the_nearest_positions_only() -> None:
    spec, rollouts = make_spec("sdar", "absolute"), [make_rollout(9, 7, "absolute")]
    slots = select(rollouts, spec, "all").slots
    distance_BSS = slots.positions_BS[:, :, None] - slots.positions_BS[:, None, :]
    expected_BSS = visible(slots, slots) & (distance_BSS < 5)
    assert torch.equal(visible(slots, slots, window=5), expected_BSS)
    assert not torch.equal(expected_BSS, visible(slots, slots))


def test_joined_padding_sees_only_itself_and_is_seen_by_nothing_else() -> None:
    def padded(seed: int) -> Slots:
        x_BS = torch.arange(10).view(2, 5) + seed
        return make_slots(x_BS, x_BS, x_BS, torch.zeros_like(x_BS), torch.arange(5).expand(2, 5) < 3)

    slots = join_slots(padded(0), padded(3))
    is_padding_S = torch.tensor([False] * 3 + [True] * 2).repeat(2)
    seen_BSS = visible(slots, slots)
    assert torch.equal(seen_BSS[:, is_padding_S], torch.eye(10).bool()[is_padding_S].expand(2, -1, -1))
    assert not seen_BSS[:, ~is_padding_S][:, :, is_padding_S].any()
    assert (slots.key_columns_BS[:, is_padding_S] == FAR).all()


def realised(rollout: Rollout, grid: GridKind) -> dict[int, list[set[int]]]:
    """Block -> the sets of masked positions before each denoising step, first to last."""
    num_prompt, blocks = len(rollout.prompt_ids), {}
    for i, step in enumerate(rollout.unmask_step):
        blocks.setdefault(block_of(num_prompt + i, num_prompt, grid), {})[num_prompt + i] = step
    return {
        block: [{p for p, s in steps.items() if s >= v} for v in sorted(set(steps.values()) - {NEVER})]
        for block, steps in blocks.items()
    }


def chosen_masks(
    rollouts: Sequence[Rollout], grid: GridKind, selection: Selection, seed: int = 0
) -> list[list[tuple[int, set[int]]]]:
    """Per rollout: (block, masked positions) of every state that masks something."""
    table = block_table(rollouts, make_spec("sdar", grid))
    masked_BCNT = select_masks(table, selection, torch.Generator().manual_seed(seed))
    found: list[list[tuple[int, set[int]]]] = [[] for _ in rollouts]
    for row, copy, number in masked_BCNT.any(-1).nonzero().tolist():
        masked = table.positions_BNT[row, number][masked_BCNT[row, copy, number]].tolist()
        num_prompt = len(rollouts[row].prompt_ids)
        found[row].append((block_of(masked[0], num_prompt, grid), set(masked)))
    return found


@pytest.mark.parametrize("grid", GRIDS)
def test_all_takes_every_state_of_the_trajectory_and_no_other(grid: GridKind) -> None:
    rollouts = make_rollouts(grid)
    for rollout, states in zip(rollouts, chosen_masks(rollouts, grid, "all"), strict=True):
        expected = [(block, masked) for block, sets in realised(rollout, grid).items() for masked in sets]
        assert sorted(states, key=repr) == sorted(expected, key=repr)


@pytest.mark.parametrize("grid", GRIDS)
def test_one_per_block_picks_one_state_of_each_block_and_over_many_draws_all_of_them(grid: GridKind) -> None:
    rollouts = make_rollouts(grid)
    picked: list[set[str]] = [set() for _ in rollouts]
    for seed in range(30):
        for row, states in enumerate(chosen_masks(rollouts, grid, "one_per_block", seed)):
            expected = realised(rollouts[row], grid)
            assert [block for block, _ in states] == sorted(expected)
            assert all(masked in expected[block] for block, masked in states)
            picked[row] |= {repr((block, sorted(masked))) for block, masked in states}
    num_realised = sum(len(sets) for rollout in rollouts for sets in realised(rollout, grid).values())
    assert sum(map(len, picked)) == num_realised


@pytest.mark.parametrize("grid", GRIDS)
def test_complementary_copies_mask_each_position_exactly_once(grid: GridKind) -> None:
    rollouts = make_rollouts(grid)
    for rollout, states in zip(rollouts, chosen_masks(rollouts, grid, "complementary"), strict=True):
        masked = sorted(position for _, positions in states for position in positions)
        first = len(rollout.prompt_ids)
        assert masked == list(range(first, first + len(rollout.response_ids)))


def test_complementary_sdar_rows_supervise_each_response_token_exactly_once() -> None:
    rollouts = make_rollouts("absolute")
    batch = select(rollouts, make_spec("sdar", "absolute"), "complementary")
    for row, rollout in enumerate(rollouts):
        first = len(rollout.prompt_ids)
        supervised = sorted(batch.target_BS[row][batch.is_supervised_BS[row]].tolist())
        assert supervised == list(range(first, first + rollout.num_response))


@pytest.mark.parametrize("grid", GRIDS)
def test_random_mask_masks_something_in_every_block_and_never_the_prompt(grid: GridKind) -> None:
    rollouts = make_rollouts(grid)
    sizes = set()
    for seed in range(10):
        for rollout, states in zip(rollouts, chosen_masks(rollouts, grid, "random_mask", seed), strict=True):
            assert [block for block, _ in states] == sorted(realised(rollout, grid))
            assert min(position for _, masked in states for position in masked) >= len(rollout.prompt_ids)
            sizes |= {len(masked) for _, masked in states}
    assert sizes == {1, 2, 3, 4}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_supervision_ends_with_the_stop_token_and_never_touches_the_prompt(
    fmt: Format, grid: GridKind, selection: Selection
) -> None:
    """sdar: every masked response position. preserve: all of them but the state's first masked one."""
    rollouts, spec = make_rollouts(grid), make_spec(fmt, grid)
    batch = select(rollouts, spec, selection, seed=4)
    num_stops = 0
    for row, rollout in enumerate(rollouts):
        first, end = len(rollout.prompt_ids), len(rollout.prompt_ids) + rollout.num_response
        tokens = rollout.prompt_ids + rollout.response_ids
        groups, targets = group_positions(batch, row), targets_of(batch, row)
        assert groups.keys() == targets.keys()  # a state without loss costs no slots
        for group, slots in groups.items():
            masked = {p for p, token in slots.items() if token == MASK}
            assert all(token == tokens[p] for p, token in slots.items() if p not in masked)
            assert all(first <= target < end for target in targets[group])
            if fmt == "sdar":
                assert len(slots) == BLOCK
                assert targets[group] == sorted(p for p in masked if p < end)
            else:
                block_end = (
                    min(slots) + BLOCK - 1 - (min(slots) - (first if grid == "response" else 0)) % BLOCK
                )
                assert sorted(slots) == list(range(min(masked), block_end))
                known = set(targets[group]) - {block_end}
                assert known == {p for p in masked if min(masked) < p < end}
            num_stops += rollout.finish_reason == "stop" and end - 1 in targets[group]
    assert num_stops > 0


def test_the_slot_of_a_target_is_its_own_in_sdar_and_the_one_before_in_preserve() -> None:
    for fmt, shift in (("sdar", 0), ("preserve", 1)):
        batch = select(make_rollouts("absolute"), make_spec(fmt, "absolute"), "all")
        supervised_BS: Tensor = batch.is_supervised_BS
        distance_M = (batch.target_BS - batch.slots.positions_BS)[supervised_BS]
        assert distance_M.unique().tolist() == [shift]


@pytest.mark.parametrize("fmt", FORMATS)
def test_masked_fraction_is_the_share_of_the_blocks_response_that_is_masked(fmt: Format) -> None:
    rollouts = make_rollouts("absolute")
    batch = select(rollouts, make_spec(fmt, "absolute"), "all")
    table = block_table(rollouts, make_spec(fmt, "absolute"))
    masks = select_masks(table, "all", torch.Generator())
    num_blocks = masks.shape[2]
    for row, column in batch.is_supervised_BS.nonzero().tolist():
        copy, number = divmod(int(batch.slots.group_BS[row, column]) - 1, num_blocks)
        response_T = table.is_response_BNT[row, number]
        share = (masks[row, copy, number] & response_T).sum() / response_T.sum()
        assert batch.masked_fraction_BS[row, column].item() == pytest.approx(share.item())


def test_a_row_s_clean_text_ends_with_its_stop_token() -> None:
    rollouts = make_rollouts("absolute")
    batch = select(rollouts, make_spec("preserve", "absolute"), "all")
    for row, rollout in enumerate(rollouts):
        is_text_L = batch.text.group_BS[row] == CLEAN
        assert tuple(batch.text.ids_BS[row, is_text_L].tolist()) == rollout.prompt_ids + rollout.text_ids
    assert batch.text.ids_BS.max() < V - 1
