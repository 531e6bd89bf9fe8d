"""The command line: verbs, flags, help, exit codes. What a verb does is in `commands`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, TypeAlias

from opdlm.cli import commands as commands
from opdlm.errors import OpdlmError

CONVERT_HELP = """Turn an autoregressive checkpoint into a block-diffusion model and measure what it kept.

TARGET is a recipe file, the name of a bundled recipe, or a checkpoint
folder or hub id (then give data.path)."""
CONVERT_EXAMPLE = """examples:
  opdlm convert tiny                                        the bundled teacher, minutes on a laptop
  opdlm convert tiny output_dir=runs/b8 format.block_size=8
  opdlm convert preserve_lora --dry-run                     what it would need and write
  opdlm convert ./my-model data.path=prompts.jsonl format.name=sdar lora.enabled=false"""

TRAIN_HELP = """Train on given text: autoregressive, masked diffusion, block diffusion, or both at once.

TARGET is a recipe file, the name of a bundled recipe of this verb, or a
checkpoint folder or hub id (then give data.path). The result is a checkpoint
that `opdlm convert`, `generate` and `eval` take."""
TRAIN_EXAMPLE = """examples:
  opdlm train bundled:byte model.from_scratch=true data.path=mine.jsonl objective.name=autoregressive
  opdlm train runs/text/model data.path=mine.jsonl objective.name=dual objective.prediction=next_position \\
      objective.ar_share=0.75 eval.path=held_out.jsonl output_dir=runs/dual
  opdlm train bundled:teacher data.path=answers.jsonl data.packing=whole masking.windows=[[0.5,1]]"""

MODES = ("static", "threshold", "entropy", "left_to_right", "lossless", "ar")
RESUMED = ("convert", "train", "rollout", "eval", "study")
SAMPLING = ("mode", "temperature", "top_k", "top_p", "threshold", "denoising_steps")
SERVED_MODES = ("static", "threshold", "left_to_right")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 on success, 2 with one sentence on a user's mistake, 130 on Ctrl-C."""
    options = parse(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # libgomp's threads spin for each other; beside a busy core that made decoding 100 times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read when torch is first imported
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except OpdlmError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine
            print(f"opdlm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = " The same command continues from the last checkpoint." if options.verb in RESUMED else ""
        print(f"opdlm: interrupted.{goes_on}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has enough, as in `opdlm recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"opdlm: {error.strerror or error} ({error.filename or 'no file'}).", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes a list before the first flag or after it, not on both sides: collect the rest."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    list_name = "prompts" if "prompts_file" in options else "overrides"
    is_list = list_name in options and not any(a.startswith("-") for a in rest)
    if rest and not (is_list and (list_name == "prompts" or all("=" in a for a in rest))):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        setattr(options, list_name, [*getattr(options, list_name), *rest])
    return options


class Parser(argparse.ArgumentParser):
    """Explains a wrong command line in one line, as every other mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"opdlm: {message}. See: {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="opdlm",
        description="Turn autoregressive language models into diffusion models, and prove what they kept.",
        epilog="try: opdlm convert tiny",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    add_convert(verbs)
    add_train(verbs)
    add_generate(verbs)
    add_chat(verbs)
    add_serve(verbs)
    add_rollout(verbs)
    add_eval(verbs)
    add_report(verbs)
    add_bench(verbs)
    add_merge(verbs)
    add_export(verbs)
    add_study(verbs)
    add_recipes(verbs)
    add_env(verbs)
    return parser


Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_verb(
    verbs: Verbs, name: str, summary: str, description: str, example: str
) -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        help=summary,
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """What every verb that trains takes."""
    parser.add_argument("target", nargs="?", metavar="TARGET")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--list-keys", action="store_true", help="print every setting with its default and meaning"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")


def add_convert(verbs: Verbs) -> None:
    parser = add_verb(verbs, "convert", "checkpoint -> diffusion checkpoint", CONVERT_HELP, CONVERT_EXAMPLE)
    add_settings(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print parameters, memory, FLOPs, tokens and files, and stop"
    )
    parser.set_defaults(run=commands.run_convert)


def add_train(verbs: Verbs) -> None:
    parser = add_verb(verbs, "train", "train on text, by likelihood or diffusion", TRAIN_HELP, TRAIN_EXAMPLE)
    add_settings(parser)
    parser.set_defaults(run=commands.run_train)


def add_generate(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "generate",
        "answer prompts with a converted checkpoint",
        "Answer prompts with a folder written by `opdlm convert`, or fill the gaps in them.",
        'examples:\n  opdlm generate runs/tiny/model "add 47 38" --mode lossless\n'
        '  opdlm generate runs/tiny/model "add 47 38" --stream --stop 5\n'
        "  opdlm generate runs/tiny/model --prompts-file questions.jsonl --json --logprobs\n"
        '  opdlm generate runs/sdar/model "3 + <gap:2> = 45" --infill',
    )
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts: JSONL or Parquet, as data.path")
    add_decoding(parser, temperature=0.0)
    parser.add_argument(
        "--ar-accept-threshold",
        type=float,
        help="preserve: AR floor under revealed tokens, 0 = off (0.1; off with --infill)",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end a response before this; repeatable"
    )
    parser.add_argument(
        "--infill",
        action="store_true",
        help="fill <gap> (one block) and <gap:12> in the prompt, taken as plain text",
    )
    parser.add_argument("--stream", action="store_true", help="show each response while it is written")
    parser.add_argument("--logprobs", action="store_true", help="also the log-probability of every token")
    parser.add_argument("--json", action="store_true", help="one line of JSON per prompt")
    parser.set_defaults(run=commands.run_generate)


def add_decoding(parser: argparse.ArgumentParser, temperature: float) -> None:
    """The flags of everything that decodes."""
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_sampling(parser, temperature, MODES)


def add_sampling(parser: argparse.ArgumentParser, temperature: float, modes: Sequence[str]) -> None:
    """The flags that say how tokens are chosen."""
    parser.add_argument("--mode", choices=modes, default="threshold")
    parser.add_argument(
        "--temperature", type=float, default=temperature, help=f"0 = arg-max ({temperature:g})"
    )
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--threshold", type=float, default=0.9, help="confidence that reveals a token (0.9)")
    parser.add_argument("--denoising-steps", type=int, help="steps per block at most (block size)")


def add_compile(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--compile", action="store_true", help=f"{what}; the first steps wait for it")


def add_chat(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "chat",
        "a conversation in the terminal, unmasked as you look",
        "Talk to a folder written by `opdlm convert`: every response is shown while it is unmasked. A line\n"
        "/new forgets what was said, Ctrl-D ends.",
        "examples:\n  opdlm chat runs/tiny/model --mode lossless\n"
        '  opdlm chat runs/mine/model --system "Answer briefly." --temperature 0.7',
    )
    parser.add_argument("folder", metavar="DIR")
    add_decoding(parser, temperature=0.0)
    parser.add_argument("--system", metavar="TEXT", help="said before the conversation")
    parser.set_defaults(run=commands.run_chat)


def add_serve(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "serve",
        "answer over HTTP as OpenAI's API does",
        "Serve a folder written by `opdlm convert` (--mode ar: any checkpoint) with our own decoder:\n"
        "/v1/chat/completions, /v1/completions, streamed or not. Requests with the same settings share\n"
        "forwards. Flags say what a request does not. Needs pip install 'opdlm[serve]'.",
        "examples:\n  opdlm serve runs/tiny/model --mode lossless\n"
        "  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        '    -d \'{"messages": [{"role": "user", "content": "add 47 38"}]}\'',
    )
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: other machines too (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (8000)")
    parser.add_argument("--name", help="of the model in requests (DIR)")
    parser.add_argument("--api-key", help="wanted from requests; or $OPDLM_API_KEY, which `ps` does not show")
    parser.add_argument("--max-rows", type=int, default=16, help="requests decoded at once (16)")
    parser.add_argument(
        "--max-length", type=int, help="prompt and response together (the context, at most 4096)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="where a request names none (256)")
    add_sampling(parser, temperature=0.0, modes=MODES)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_compile(parser, "decode with torch.compile")
    parser.set_defaults(run=commands.run_serve)


def add_rollout(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "rollout",
        "responses with their trajectories as a Parquet file",
        "Answer every prompt of a file and write token ids, the step that revealed each, texts and\n"
        "log-probabilities to a Parquet file, which `opdlm convert rollout.path=FILE` trains on. MODEL is a\n"
        "folder written by `opdlm convert`, or any checkpoint with --mode ar. An interrupted command\n"
        "continues when it is given again, and the file is the same.",
        "examples:\n  opdlm rollout runs/tiny/model prompts.jsonl --out rollouts.parquet\n"
        "  opdlm rollout bundled:teacher bundled:prompts.jsonl --mode ar --limit 640 --out teacher.parquet\n"
        "  opdlm convert tiny loss.objective=off_policy rollout.path=teacher.parquet",
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("source", metavar="PROMPTS", help="JSONL, Parquet or a `datasets` name, as data.path")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value")
    parser.add_argument("--out", metavar="FILE.parquet", required=True)
    parser.add_argument("--engine", choices=("own", "vllm"), default="own", help="vllm: with --mode ar")
    add_decoding(parser, temperature=1.0)
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="rows decoded at once; four batches are kept at a time (64)",
    )
    parser.add_argument("--limit", type=int, help="the first so many prompts")
    add_compile(parser, "decode with torch.compile")
    parser.set_defaults(run=commands.run_rollout)


def add_eval(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "eval",
        "retention report of converted checkpoints",
        "Measure a converted folder against its teacher: accuracy per skill in each decoding mode, tokens\n"
        "per forward with every forward counted, share of outputs identical to the teacher's. Several\n"
        "folders are measured on the same prompts and compared. eval.key=value changes any other setting.",
        "examples:\n  opdlm eval runs/tiny/model\n"
        "  opdlm eval runs/tiny/model --limit 10 --modes static lossless --out report\n"
        "  opdlm eval runs/tiny/model --temperature 1 --seeds 3 --out sampled\n"
        "  opdlm eval runs/a/model runs/b/model --thresholds 0.5 0.7 0.9 0.99 --out comparison\n"
        "  opdlm eval runs/text/model runs/dual/model --text held_out.jsonl --out likelihood\n"
        "  opdlm eval runs/dual/model --text questions.jsonl --metrics ar_nll,md_bound,options",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument(
        "--teacher", help="the original checkpoint (sdar folders; default: the one in the record)"
    )
    parser.add_argument("--modes", nargs="+", metavar="MODE", help="ar, static, threshold, lossless")
    parser.add_argument("--limit", metavar="N", help="prompts per skill, or with --text rows")
    parser.add_argument(
        "--temperature", metavar="T", help="sample teacher and student; 0 = arg-max (default)"
    )
    parser.add_argument("--seeds", metavar="N", help="with --temperature: mean and spread over so many seeds")
    parser.add_argument(
        "--thresholds", nargs="+", metavar="P", help="draw accuracy against tokens per forward over these"
    )
    parser.add_argument(
        "--out",
        help="write report.html, report.md, retention.json, timing.json, pictures and generations.jsonl "
        "here; a killed run continues",
    )
    parser.add_argument(
        "--tasks", help="names of lm-evaluation-harness tasks instead (pip install opdlm[eval])"
    )
    parser.add_argument("--include-path", help="folder with YAML tasks of your own, with --tasks")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question, with --tasks")
    parser.add_argument("--chat-template", action="store_true", help="ask through it, with --tasks")
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="likelihood of this text instead, or of questions with `prompt`, `options` and the index "
        "`answer`; for any checkpoint",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAMES",
        help="with --text: ar_nll, prefix_nll, md_bound, pll, pll_right1, pll_right2 (tokens masked beside "
        "it), options; by commas (default: what the model was trained for)",
    )
    parser.add_argument("--num-rates", type=int, help="mask rates per row of md_bound, with --text (32)")
    parser.add_argument(
        "--prediction",
        choices=("same_position", "next_position"),
        help="what masked positions predict, with --text and a plain checkpoint that has a mask token",
    )
    parser.set_defaults(run=commands.run_eval, overrides=[])


def add_report(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "report",
        "curves of a run, finished or not",
        "Draw the curves that a run has logged so far, and what was measured, into RUN/report.html.",
        "example:\n  opdlm report runs/tiny",
    )
    parser.add_argument("folder", metavar="RUN")
    parser.set_defaults(run=commands.run_report)


def add_bench(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "bench",
        "decoding speed of a converted checkpoint",
        "Tokens per second and per forward of every decoding mode, and of vLLM where it is installed,\n"
        "against transformers.generate on the AR model of the same folder: greedy, same prompts,\n"
        "interleaved. Close other programs first.",
        "examples:\n  opdlm bench runs/tiny/model\n"
        "  opdlm bench runs/tiny/model --batch-sizes 1 8 --modes ar lossless --limit 40 --out report",
    )
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument(
        "--prompts", metavar="FILE", help="JSONL with `prompt` (default: eval.path of the run)"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all that the format has")
    parser.add_argument("--limit", type=int, default=64, help="prompts, evenly spaced over the file (64)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--vllm",
        choices=("auto", "always", "never"),
        default="auto",
        help="the AR model in vLLM too: where it is installed (auto)",
    )
    add_compile(parser, "every mode with torch.compile too")
    parser.add_argument("--out", help="write bench.json and bench.png here")
    parser.set_defaults(run=commands.run_bench)


def add_merge(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "merge",
        "add the adapter of a converted checkpoint to its weights",
        "Write the converted folder DIR to OUT with its LoRA adapter added to the weights. A preserve\n"
        "adapter acts on noised slots only and cannot be part of an AR model: --full-copy writes a second\n"
        "set of weights for those slots beside the untouched AR weights.",
        "examples:\n  opdlm merge runs/sdar/model runs/sdar/merged      (a run with lora.merge=false)\n"
        "  opdlm merge runs/tiny/model runs/tiny/copy --full-copy",
    )
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument(
        "--full-copy", action="store_true", help="preserve: a merged student beside the AR weights"
    )
    parser.set_defaults(run=commands.run_merge)


def add_export(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "export",
        "an sdar checkpoint as vLLM, SGLang and LMDeploy read it",
        "Write the converted sdar folder DIR to OUT. --to vllm: `vllm serve OUT` finds this package's\n"
        "plugin where both are installed; how tokens are chosen is fixed here, as vLLM refuses temperature\n"
        "and seed in requests for diffusion models. --to sdar: as SGLang and LMDeploy load SDAR\n"
        "checkpoints (Qwen3, absolute grid).",
        "examples:\n  opdlm export runs/sdar/model runs/sdar/vllm\n"
        "  opdlm export runs/qwen3/model runs/qwen3/sdar --to sdar\n"
        "  opdlm export runs/sdar/model runs/sdar/vllm --threshold 0.8 --temperature 0.7 --top-p 0.95",
    )
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--to", choices=("vllm", "sdar"), default="vllm")
    add_sampling(parser, temperature=0.0, modes=SERVED_MODES)
    defaults = {name: parser.get_default(name) for name in SAMPLING}
    parser.set_defaults(run=commands.run_export, defaults=defaults, max_new_tokens=256)  # a request says


def add_study(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "study",
        "a grid of small trainings and what it says about published predictions",
        "Run a study: many small trainings with several seeds, one process per core. table.md, results.json\n"
        "and study.png in DIR say for each prediction whether it holds, by rules on the data. The same\n"
        "command continues after an interruption. NAME is a bundled study or a file of your own; without\n"
        "it the studies are listed.",
        "examples:\n  opdlm study\n  opdlm study parity --out runs/parity\n"
        "  opdlm study mask_window run.train.num_steps=300 seeds=0,1 --out runs/mask_window --processes 1\n"
        "  opdlm study dual_repetition_paper --dry-run",
    )
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", metavar="DIR", help="where everything is written")
    parser.add_argument("--processes", type=int, metavar="N", help="runs at a time (one per core)")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (the study's own)")
    parser.add_argument("--dry-run", action="store_true", help="check every run, list them, and stop")
    parser.set_defaults(run=commands.run_study)


def add_recipes(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "recipes",
        "list bundled recipes, or copy one",
        "List the bundled recipes, or copy one to a file of your own.",
        "examples:\n  opdlm recipes\n  opdlm recipes tiny mine.yaml",
    )
    parser.add_argument("name", nargs="?")
    parser.add_argument("file", nargs="?")
    parser.set_defaults(run=commands.run_recipes)


def add_env(verbs: Verbs) -> None:
    parser = add_verb(verbs, "env", "versions, for bug reports", "Print versions.", "example:\n  opdlm env")
    parser.set_defaults(run=commands.run_env)
