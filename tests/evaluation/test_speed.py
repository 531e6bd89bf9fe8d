"""Decoding speed: ratios to the AR decoders, `bench` and its picture."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from opdlm.decoding.rollout import Rollout
from opdlm.evaluation import speed
from opdlm.evaluation.bench import acceptance_by_place, write_speed
from opdlm.evaluation.speed import Speed, time_decoders
from opdlm.reporting.tables import print_table, speed_table


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Speed]:
    """Three decoders of ten tokens on a clock: 4, 2 and 1 seconds, in the second repeat twice as long, and
    long in the call that is not timed.
    """
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    calls: list[str] = []

    def decoder(name: str, seconds: float) -> speed.Decoder:
        def decode(prompts: speed.Prompts) -> tuple[speed.Responses, float | None]:
            assert len(prompts) == (2 if name in calls else 1)
            now[0] += seconds * (50, 1, 2)[calls.count(name)]
            calls.append(name)
            return [tuple(range(10))], 1.0

        return decode

    decoders = {name: decoder(name, s) for name, s in (("transformers.generate", 4), ("ar", 2))}
    decoders["lossless"] = decoder("lossless", 1)
    console = Console(file=io.StringIO(), width=80)
    rows = time_decoders(decoders, [[1], [2]], batch_size=1, repeats=2, console=console)
    shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert shown[0] == "time decoding, batch 1 0/9"
    assert shown[-1].startswith("time decoding, batch 1 9/9  lossless ")
    return rows


def test_speed_is_told_against_generate_and_against_the_fastest_ar_decoding(rows: list[Speed]) -> None:
    assert [row.speedup for row in rows] == [1.0, 2.0, 4.0]
    assert [row.over_fastest_ar for row in rows] == [0.5, 1.0, 2.0]
    assert [row.tokens_per_second for row in rows] == [1.875, 3.75, 7.5]


def test_the_table_has_both_ratios_and_fits_a_terminal(rows: list[Speed]) -> None:
    values = [json.loads(json.dumps({name: getattr(row, name) for name in Speed.__slots__})) for row in rows]
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    print_table(speed_table(values), console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "4.00" in shown and "2.00" in shown and "transformers.generate" in shown
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())


def test_bars_are_ratios_from_zero(
    rows: list[Speed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.extend(figure.axes)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    write_speed(rows, [], tmp_path, {"prompts": 1})
    (axis,) = drawn
    assert axis.get_yscale() == "linear" and axis.get_ylim()[0] == 0
    assert [bar.get_height() for bar in axis.patches] == [0.5, 1.0, 2.0]
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][2]["over_fastest_ar"] == 2.0


def test_acceptance_counts_a_place_where_all_before_it_were_accepted() -> None:
    def rollout(*steps: int) -> Rollout:
        ids = tuple(range(len(steps)))
        return Rollout(
            prompt_ids=(1,),
            response_ids=ids,
            unmask_step=steps,
            num_response=len(ids),
            finish_reason="length",
        )

    # drafts of 3 tokens, accepted: 3 and 1; 0 and 2. The first forward verifies none, the last is cut.
    rollouts = [rollout(1, 2, 2, 2, 2, 3, 3, 4), rollout(1, 2, 3, 3, 3, 4, 4)]
    assert acceptance_by_place(rollouts, 3) == [3 / 4, 2 / 3, 1 / 2]
    assert acceptance_by_place([rollout(1)], 3) == [0.0, 0.0, 0.0]


def test_a_batch_size_without_speculative_decoding_has_no_bar(rows: list[Speed], tmp_path: Path) -> None:
    lookup = replace(rows[1], name="prompt lookup")
    larger = [replace(row, batch_size=8) for row in rows]
    write_speed([*rows, lookup, *larger], [0.5, 0.25], tmp_path, {})
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["acceptance"] == [0.5, 0.25]
    assert all((tmp_path / name).stat().st_size for name in ("bench.png", "acceptance.png"))
