"""`opdlm bench`: decoding speed against the autoregressive model."""

from __future__ import annotations

import argparse

import opdlm
from opdlm.cli.flags import (
    MODES,
    Parser,
    Verbs,
    add_compile,
    add_decode_flags,
    add_trust,
    add_verb,
    decode_config,
)

EXAMPLES = """  opdlm bench runs/tiny/model
  opdlm bench runs/tiny/model --batch-sizes 1 8 --modes ar lossless --limit 40 --out report"""


def add_bench(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "bench",
        run,
        add_bench_flags,
        summary="decoding speed of a converted checkpoint",
        description="Measure tokens per second and per forward of every decoding mode, and of vLLM where it "
        "is installed, against transformers.generate on the AR model of the same folder and against the "
        "fastest AR decoding measured: greedy, the same prompts, interleaved. At batch size 1 also prompt "
        "lookup of transformers. Close other programs first.",
        examples=EXAMPLES,
    )


def add_bench_flags(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR")
    add_trust(parser)
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSONL with `prompt` (default: eval.path of the run, else its held-back prompts)",
    )
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=[1, 8, 64],
        metavar="N",
        help="rows decoded at once, one after the other (default: 1 8 64)",
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=(), help="default: all that the format has"
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=64,
        metavar="N",
        help="prompts, evenly spaced over the file (default: 64)",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="how often everything is timed (default: 3)"
    )
    parser.add_argument(
        "--vllm",
        choices=("auto", "always", "never"),
        default="auto",
        help="the AR model in vLLM too; auto: where it is installed (default: auto)",
    )
    parser.add_argument(
        "--assistant",
        metavar="MODEL",
        help="assisted generation of transformers with this small model too; needs the same tokenizer",
    )
    add_compile(parser, "every mode with torch.compile too")
    parser.add_argument("--out", metavar="FOLDER", help="write bench.json, bench.png, acceptance.png here")
    sampling = ("temperature", "top_k", "top_p", "logprobs", "draft_sampling")
    add_decode_flags(parser, leave_out=("mode", "batch_size", *sampling), max_new_tokens=128)


def run(options: argparse.Namespace) -> int:
    opdlm.bench(
        options.folder,
        decode_config(options),
        prompts=options.prompts,
        modes=options.modes,
        batch_sizes=options.batch_sizes,
        limit=options.limit,
        repeats=options.repeats,
        compile=options.compile,
        vllm=options.vllm,
        assistant=options.assistant,
        out=options.out,
    )
    return 0
