"""`opdlm export`: a folder as inference engines read it. `opdlm merge`: the adapter added to the weights.
`opdlm verify`: whether the files of a folder are as they were written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import opdlm
from opdlm.cli.flags import Parser, Verbs, add_decode_flags, add_trust, add_verb, decode_config, given_decode
from opdlm.decoding.decode_config import Mode
from opdlm.errors import ConfigError

SERVED_MODES: tuple[Mode, ...] = ("static", "threshold", "left_to_right")
FIXED_BY_REQUESTS = ("max_new_tokens", "batch_size", "logprobs")
OF_OTHER_MODES = ("entropy_bound", "ar_accept_threshold", "forward_overhead")

EXPORT_EXAMPLES = """  opdlm export runs/sdar/model runs/sdar/vllm
  opdlm export runs/qwen3/model runs/qwen3/sdar --to sdar
  opdlm export runs/sdar/model runs/sdar/vllm --confidence-threshold 0.8 --temperature 0.7 --top-p 0.95"""
MERGE_EXAMPLES = """  opdlm merge runs/sdar/model runs/sdar/merged      # a run with lora.merge=false
  opdlm merge runs/tiny/model runs/tiny/copy --full-copy"""


def add_export(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "export",
        run_export,
        add_export_flags,
        summary="an sdar checkpoint as vLLM, SGLang and LMDeploy read it",
        description="Write the converted sdar folder DIR to OUT. --to vllm: `vllm serve OUT` finds this "
        "package's plugin where both are installed; how tokens are chosen is fixed here, as vLLM refuses "
        "temperature and seed in requests for diffusion models. --to sdar: as SGLang and LMDeploy load SDAR "
        "checkpoints (Qwen3, absolute grid).",
        examples=EXPORT_EXAMPLES,
    )


def add_export_flags(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("out", metavar="OUT")
    add_trust(parser)
    parser.add_argument("--to", choices=("vllm", "sdar"), default="vllm", help="default: vllm")
    add_decode_flags(parser, leave_out=(*FIXED_BY_REQUESTS, *OF_OTHER_MODES), modes=SERVED_MODES)


def add_merge(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "merge",
        run_merge,
        add_merge_flags,
        summary="add the adapter of a converted checkpoint to its weights",
        description="Write the converted folder DIR to OUT with its LoRA adapter added to the weights. A "
        "preserve adapter acts on noised slots only and cannot be part of an AR model: --full-copy writes a "
        "second set of weights for those slots beside the untouched AR weights.",
        examples=MERGE_EXAMPLES,
    )


def add_merge_flags(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("out", metavar="OUT")
    add_trust(parser)
    parser.add_argument(
        "--full-copy", action="store_true", help="preserve: a merged student beside the AR weights"
    )


def add_verify(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "verify",
        run_verify,
        add_verify_flags,
        summary="whether the files of a run or a model are as they were written",
        description="Compare every file of DIR, or of the checkpoints and the model in a run DIR, with the "
        "size and SHA-256 in its manifest.json. The exit code is 2 if one differs.",
        examples="  opdlm verify runs/tiny\n  opdlm verify runs/tiny/model",
    )


def add_verify_flags(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR")


def run_export(options: argparse.Namespace) -> int:
    given = list(given_decode(options))
    if options.to == "sdar" and given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} has no effect with --to sdar, whose engines decide how "
            "tokens are chosen: leave it out."
        )
    config = decode_config(options) if options.to == "vllm" else None
    out = opdlm.export(options.folder, options.out, to=options.to, config=config)
    command = f"vllm serve {out}" if options.to == "vllm" else sdar_commands(options.folder, out)
    print(f"exported checkpoint: {out}\nserve it: {command}")
    return 0


def sdar_commands(folder: str, out: Path) -> str:
    """How LMDeploy, and SGLang where it knows the block size, serve the export."""
    from opdlm.checkpoints.load import read_spec

    size = read_spec(folder).block_size
    command = f"lmdeploy serve api_server {out} --trust-remote-code --dllm-block-length {size}"
    if size == 4:  # the one that SGLang knows
        command += (
            f", or python -m sglang.launch_server --model-path {out} --trust-remote-code "
            "--dllm-algorithm LowConfidence"
        )
    return command


def run_merge(options: argparse.Namespace) -> int:
    out = opdlm.merge(options.folder, options.out, full_copy=options.full_copy)
    print(f"merged checkpoint: {out}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    found = opdlm.verify(options.folder)
    for folder, damage in found.items():
        print(f"{folder}: {'; '.join(damage) or 'intact'}")
    return 2 if any(found.values()) else 0
