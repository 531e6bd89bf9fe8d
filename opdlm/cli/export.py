"""`opdlm export`: a folder as inference engines read it. `opdlm import`: an adapter of theirs as a folder.
`opdlm merge`: the adapter added to the weights. `opdlm push`: a folder on the Hugging Face Hub.
`opdlm verify`: whether the files of a folder are as they were written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import opdlm
from opdlm.cli.flags import (
    Parser,
    Verbs,
    add_decode_flags,
    add_dtype,
    add_trust,
    add_verb,
    given_decode,
    one_mode_config,
)
from opdlm.decoding.decode_config import READ_BY, Mode
from opdlm.errors import ConfigError

SERVED_MODES: tuple[Mode, ...] = ("static", "threshold", "left_to_right")
FIXED_BY_REQUESTS = ("max_new_tokens", "batch_size", "logprobs")
OF_OTHER_MODES = (
    "ar_accept_threshold",
    *(name for name, modes in READ_BY.items() if not {*modes} & {*SERVED_MODES}),
)

EXPORT_EXAMPLES = """  opdlm export runs/sdar/model runs/sdar/vllm
  opdlm export runs/qwen3/model runs/qwen3/sdar --to sdar
  opdlm export runs/draft/model runs/draft/uno --to uno
  opdlm export runs/sdar/model runs/sdar/vllm --confidence-threshold 0.8 --temperature 0.7 --top-p 0.95"""
IMPORT_EXAMPLES = """  hf download s-sahoo/uno-qwen3-8B --include 'adapter/*' --local-dir uno
  opdlm import Qwen/Qwen3-8B uno/adapter runs/uno"""
MERGE_EXAMPLES = """  opdlm merge runs/sdar/model runs/sdar/merged      # a run with lora.merge=false
  opdlm merge runs/tiny/model runs/tiny/copy --full-copy"""

PUSH_EXAMPLES = """  hf auth login
  opdlm push runs/mine/model ada/smollm2-diffusion
  opdlm convert ./my-model data.path=prompts.jsonl --push-to-hub ada/my-diffusion"""


def add_export(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "export",
        run_export,
        add_export_flags,
        summary="a converted checkpoint as vLLM, SGLang and LMDeploy read it",
        description="Write the converted folder DIR to OUT. --to vllm: `vllm serve OUT` finds this "
        "package's plugin where both are installed. A preserve model decodes losslessly; how the tokens of "
        "an sdar model are chosen is fixed here, as vLLM refuses temperature and seed in requests for "
        "diffusion models. --to sdar: as SGLang and LMDeploy load SDAR "
        "checkpoints (Qwen3, absolute grid). --to uno (preserve): the adapter, with which SGLang and a "
        "proposal for vLLM draft losslessly; it needs format.noise=uniform and "
        "format.draft_attention=causal.",
        examples=EXPORT_EXAMPLES,
    )


def add_export_flags(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("out", metavar="OUT")
    add_trust(parser)
    parser.add_argument("--to", choices=("vllm", "sdar", "uno"), default="vllm", help="default: vllm")
    add_decode_flags(parser, leave_out=(*FIXED_BY_REQUESTS, *OF_OTHER_MODES), modes=SERVED_MODES)


def add_import(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "import",
        run_import,
        add_import_flags,
        summary="a published adapter in the layout of Uno as a converted checkpoint",
        description="Write the checkpoint BASE and the LoRA folder ADAPTER, trained as Uno trains, to OUT, "
        "which generate, bench and eval read.",
        examples=IMPORT_EXAMPLES,
    )


def add_import_flags(parser: Parser) -> None:
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("adapter", metavar="ADAPTER")
    parser.add_argument("out", metavar="OUT")
    text = "the longest draft and the token before it (default: 8)"
    parser.add_argument("--block-size", type=int, default=8, metavar="N", help=text)
    add_dtype(parser)


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


def add_push(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "push",
        run_push,
        add_push_flags,
        summary="publish a result folder on the Hugging Face Hub",
        description="Make the model repository USER/NAME a copy of the result folder DIR. It is created "
        "where there is none, and files that DIR lacks are deleted from it. `opdlm chat USER/NAME` loads it "
        "back. The token is that of `hf auth login`, or $HF_TOKEN.",
        examples=PUSH_EXAMPLES,
    )


def add_push_flags(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("name", metavar="USER/NAME")
    parser.add_argument("--private", action="store_true", help="create a repository that only you can read")


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
    if options.to != "vllm" and given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} has no effect with --to {options.to}, whose engines decide how "
            "tokens are chosen: leave it out."
        )
    config = one_mode_config(options) if given else None
    out = opdlm.export(options.folder, options.out, to=options.to, config=config)
    match options.to:
        case "sdar":
            command = sdar_commands(options.folder, out)
        case "uno":
            command = uno_commands(options.folder, out)
        case _:
            command = f"vllm serve {out}"
    print(f"exported checkpoint: {out}\nserve it: {command}")
    return 0


def uno_commands(folder: str, out: Path) -> str:
    """How SGLang, and vLLM with the proposed change, serve the folder with the exported adapter."""
    from opdlm.checkpoints.load import read_spec
    from opdlm.checkpoints.uno import LORA_RANKS

    spec, rank = read_spec(folder), json.loads((out / "adapter_config.json").read_text())["r"]
    speculative = {
        "method": "uno",
        "uno_lora_path": str(out),
        "uno_mask_token_id": spec.noise_vocab_size,  # the bound of the noise
        "num_speculative_tokens": spec.block_size,
    }
    return (
        f"python -m sglang.launch_server --model-path {folder} --attention-backend fa3 "
        f"--speculative-algorithm UNO --uno-lora-path {out} --speculative-num-draft-tokens {spec.block_size}"
        f"\nor, with vLLM pull request 55947: VLLM_USE_V2_MODEL_RUNNER=1 vllm serve {folder} --enable-lora "
        f"--max-lora-rank {next(size for size in LORA_RANKS if size >= rank)} --max-loras 2 "
        f"--async-scheduling --speculative-config '{json.dumps(speculative)}'"
    )


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


def run_import(options: argparse.Namespace) -> int:
    out = opdlm.import_adapter(
        options.base, options.adapter, options.out, block_size=options.block_size, dtype=options.dtype
    )
    print(f"converted checkpoint: {out}\nnext: opdlm bench {out} --prompts FILE.jsonl --modes ar lossless")
    return 0


def run_merge(options: argparse.Namespace) -> int:
    out = opdlm.merge(options.folder, options.out, full_copy=options.full_copy)
    print(f"merged checkpoint: {out}")
    return 0


def run_push(options: argparse.Namespace) -> int:
    print(f"published: {opdlm.push(options.folder, options.name, private=options.private)}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    found = opdlm.verify(options.folder)
    for folder, damage in found.items():
        print(f"{folder}: {'; '.join(damage) or 'intact'}")
    return 2 if any(found.values()) else 0
