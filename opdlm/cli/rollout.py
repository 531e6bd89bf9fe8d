"""`opdlm rollout`: responses with their trajectories as a Parquet file."""

from __future__ import annotations

import argparse

import opdlm
from opdlm.cli.flags import (
    Parser,
    Verbs,
    add_compile,
    add_decode_flags,
    add_dtype,
    add_overrides,
    add_seed,
    add_verb,
    decode_config,
)

EXAMPLES = """  opdlm rollout runs/tiny/model bundled:prompts.jsonl --limit 640 --out own.parquet
  opdlm rollout bundled:teacher bundled:prompts.jsonl --mode ar --limit 640 --out teacher.parquet
  opdlm convert tiny loss.objective=off_policy rollout.path=teacher.parquet output_dir=runs/off_policy"""


def add_rollout(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "rollout",
        run,
        add_rollout_flags,
        summary="responses with their trajectories as a Parquet file",
        description="Answer every prompt of a file and write token ids, the step that revealed each, texts "
        "and log-probabilities to a Parquet file, which `opdlm convert rollout.path=FILE` trains on. MODEL "
        "is a folder written by `opdlm convert`, or any checkpoint with --mode ar. An interrupted command "
        "continues when it is given again, and the file is the same.",
        examples=EXAMPLES,
    )


def add_rollout_flags(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("source", metavar="PROMPTS", help="JSONL, Parquet or a `datasets` name, as data.path")
    add_overrides(parser, "data.key=value")
    parser.add_argument("--out", metavar="FILE.parquet", required=True)
    parser.add_argument(
        "--engine", choices=("own", "vllm"), default="own", help="vllm: with --mode ar (default: own)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first so many prompts (default: all)")
    add_seed(parser)
    add_dtype(parser)
    add_compile(parser, "decode with torch.compile")
    left_out = ("ar_accept_threshold", "logprobs", "draft_sampling")
    add_decode_flags(parser, leave_out=left_out, temperature=1.0, ar_accept_threshold=0.0)


def run(options: argparse.Namespace) -> int:
    opdlm.rollout(
        options.model,
        options.source,
        options.out,
        decode_config(options),
        engine=options.engine,
        seed=options.seed,
        limit=options.limit,
        dtype=options.dtype,
        compile=options.compile,
        overrides=options.overrides,
    )
    return 0
