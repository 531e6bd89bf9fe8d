"""Random streams: a run's draws are named by numbers, and the numbers of a released version never change."""

from __future__ import annotations

import ast
from itertools import combinations
from pathlib import Path

import torch

import opdlm
from opdlm.seeds import Stream, generator_for, seed_of

FILES = sorted(Path(opdlm.__file__).parent.rglob("*.py"))


def test_streams_keep_the_numbers_of_earlier_runs() -> None:
    numbers = {name: int(stream) for name, stream in Stream.__members__.items()}
    assert numbers == {
        "STATES": 1_000_000,
        "UPDATE_ORDER": 1_000_000,
        "DROPOUT": 2_000_000,
        "UNIQUE_TOKENS": 3_000_000,
        "DOCUMENT_ORDER": 4_000_000,
        "MASKS": 5_000_000,
        "TOKEN_ORDER": 6_000_000,
    }


def test_a_stream_seeds_as_its_number_does() -> None:
    assert seed_of(7, Stream.MASKS, 3) == seed_of(7, 5 * 10**6, 3) == 13000064000079
    draws = [torch.rand(3, generator=generator_for(7, number + 2, 1)) for number in (Stream.STATES, 10**6)]
    assert torch.equal(*draws)


def test_streams_do_not_meet_within_a_million_updates() -> None:
    for one, other in combinations(sorted({int(stream) for stream in Stream}), 2):
        assert other - one >= 10**6


def test_generators_are_named_by_streams_and_not_by_offsets() -> None:
    calls = [
        f"{path.name}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("generator_for", "seed_of")
        if "10 ** 6" in ast.unparse(node)
    ]
    assert not calls
