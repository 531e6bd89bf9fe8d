"""Attention queries in vLLM: how the slots of a forward are grouped so that each sees what it may.

A query is a run of slots of one request. Where `causal`, a slot of it sees what comes before it, itself
included, and else the whole query; what lies before the query is visible to all. A query may end later than
its slots: then all of them see the slots in between, too, which lets a single slot see a group that goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from opdlm.modeling.slots import GridKind

Queries = tuple[list[int], list[int], list[int]]
"""Requests, ends of the queries' slots, and ends of what they see; both ends count the slots of a forward."""


def block_queries(num_tokens: Iterable[int], size: int, grid: GridKind) -> Queries:
    """Every block of a request is one query.

    The tokens of a request are a whole prompt or one block; on the response grid the first block of a prompt
    is short.
    """
    rows, ends, first = [], [], 0
    for row, count in enumerate(num_tokens):
        short = count % size if grid == "response" else 0
        block_ends = [*range(first + (short or size), first + count, size), first + count]
        rows += [row] * len(block_ends)
        ends += block_ends
        first += count
    return rows, ends, ends


def slot_queries(num_tokens: Iterable[int], num_noised: Iterable[int]) -> Queries:
    """`preserve`, causal queries: the clean slots of a request are one, and every noised slot after them is
    one that sees all noised slots.
    """
    rows, ends, seen, last = list[int](), list[int](), list[int](), 0
    for row, (count, noised) in enumerate(zip(num_tokens, num_noised, strict=True)):
        last += int(count)
        first_noised = last - int(noised)
        clean_end = [first_noised] if noised < count else []
        query_ends = [*clean_end, *range(first_noised + 1, last + 1)]
        rows += [row] * len(query_ends)
        ends += query_ends
        seen += [*clean_end, *[last] * int(noised)]
    return rows, ends, seen


def query_metadata(batch: Any, queries: Queries, *, causal: bool, **options: Any) -> dict[str, Any]:
    """The attention metadata of a forward by layer; `options` are those of vLLM's `build_attn_metadata` that
    do not depend on the queries.
    """
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

    rows, ends, seen = queries
    device = batch.seq_lens.device
    first_N = torch.tensor([0, *ends], dtype=torch.int32)
    request_ends = torch.from_numpy(batch.query_start_loc_np)[1:]
    unseen_N = (request_ends[rows] - torch.tensor(seen)).to(device)
    row_N = torch.tensor(rows, device=device)
    options["block_tables"] = [table[row_N] for table in options["block_tables"]]
    return build_attn_metadata(
        num_reqs=len(row_N),
        num_tokens=batch.num_tokens,
        query_start_loc_gpu=first_N.to(device),
        query_start_loc_cpu=first_N,
        max_query_len=int(first_N.diff().max()),
        seq_lens=(batch.seq_lens[row_N] - unseen_N).to(torch.int32),
        causal=causal,
        **options,
    )
