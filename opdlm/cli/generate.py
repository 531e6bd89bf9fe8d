"""`opdlm generate`: prompts answered, or their gaps filled. `opdlm chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import io
import json
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import opdlm
from opdlm.cli.flags import (
    Parser,
    Verbs,
    add_decode_flags,
    add_dtype,
    add_seed,
    add_verb,
    given_decode,
    one_mode_config,
    with_flag_names,
)
from opdlm.errors import ConfigError, OpdlmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opdlm.data.messages import Conversation

Messages = list[dict[str, str]]

GENERATE_EXAMPLES = """  opdlm generate runs/tiny/model "add 47 38" --mode lossless
  opdlm generate runs/tiny/model "add 47 38" --stream --stop 5
  opdlm generate runs/tiny/model --prompts-file questions.jsonl --json --logprobs
  opdlm generate runs/tiny/model "3 + <gap:2> = 45" --infill"""
CHAT_EXAMPLES = """  opdlm chat runs/tiny/model --mode lossless
  opdlm chat runs/mine/model --system "Answer briefly." --temperature 0.7"""


def add_generate(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "generate",
        run_generate,
        add_generate_flags,
        summary="answer prompts with a converted checkpoint",
        description="Answer prompts with a folder written by `opdlm convert`, or fill the gaps in them.",
        examples=GENERATE_EXAMPLES,
    )


def add_generate_flags(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts: JSONL or Parquet, as data.path")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end a response before this; repeatable"
    )
    parser.add_argument(
        "--infill",
        action="store_true",
        help="fill <gap> (one block) and <gap:12> in the prompt, taken as plain text",
    )
    parser.add_argument("--stream", action="store_true", help="show each response while it is written")
    parser.add_argument("--json", action="store_true", help="one line of JSON per prompt")
    add_seed(parser)
    add_dtype(parser)
    add_decode_flags(parser)


def add_chat(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "chat",
        run_chat,
        add_chat_flags,
        summary="a conversation in the terminal",
        description="Talk to a folder written by `opdlm convert`: every response is shown while it is "
        "unmasked. A line /new forgets the conversation, Ctrl-C stops a response, Ctrl-D ends.",
        examples=CHAT_EXAMPLES,
    )


def add_chat_flags(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--system", metavar="TEXT", help="said before the conversation")
    add_seed(parser)
    add_dtype(parser)
    add_decode_flags(parser, leave_out=("batch_size", "logprobs"))


def refuse_settings(prompts: Sequence[str]) -> None:
    """ConfigError for a prompt that is a setting of a run, as `opdlm convert` and `eval` take it."""
    from opdlm.config.sections import Config  # imports pydantic, which --help does without

    sections = "|".join(field.name for field in fields(Config))
    for prompt in prompts:
        if re.fullmatch(rf"(?:decode|{sections})(?:\.\w+)+=.*", prompt):
            raise ConfigError(
                f"{prompt} is a setting of a run, and generate would answer it as a prompt: it takes flags, "
                "such as --max-new-tokens 20 (opdlm generate --help). To ask just that, write it into a file "
                "for --prompts-file."
            )


def run_generate(options: argparse.Namespace) -> int:
    if not options.prompts and not options.prompts_file:
        raise ConfigError("generate needs a PROMPT, or --prompts-file FILE. See: opdlm generate --help")
    refuse_settings(options.prompts)
    if options.stream and options.json:
        raise ConfigError("--stream shows text as it comes, and --json whole answers: choose one.")
    config = one_mode_config(options)
    model, tokenizer = opdlm.load(options.folder, options.dtype, mode=config.mode)
    from rich.console import Console

    from opdlm.decoding.decode_state import DecodeStats

    prompts = read_prompts(options)
    rollouts = opdlm.generate(
        model,
        prompts,
        config,
        tokenizer=tokenizer,
        ar_accept_threshold=given_decode(options).get("ar_accept_threshold"),
        seed=options.seed,
        stop=options.stop,
        infill=options.infill,
        stream=Console(highlight=False) if options.stream else None,
    )
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        show(prompt.last_text, rollout, tokenizer, options)
    stats = DecodeStats.of(rollouts)
    print(
        f"{stats.num_tokens} tokens in {stats.num_forwards} forwards, "
        f"{stats.tokens_per_forward:.2f} per forward",
        file=sys.stderr,
    )
    return 0


def read_prompts(options: argparse.Namespace) -> list[Conversation]:
    """Every prompt as a conversation: those of the command line, then those of the file."""
    from opdlm.config.sections import DataSection
    from opdlm.data.messages import conversation_of
    from opdlm.data.prompts import load_rows

    conversations = [conversation_of("PROMPT", {"prompt": text}) for text in options.prompts]
    if options.prompts_file:
        rows = load_rows(DataSection(path=options.prompts_file))
        conversations += [conversation_of(place, row) for place, row in rows]
    return conversations


def show(
    prompt: str, rollout: opdlm.Rollout, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> None:
    """One answer on stdout: text, or a line of JSON; then its tokens with their log-probabilities."""
    if options.json:
        record: dict[str, Any] = {
            "prompt": prompt,
            "response": rollout.text,
            "finish_reason": rollout.finish_reason,
            "token_ids": rollout.text_ids,
            "unmask_step": rollout.unmask_step[: rollout.num_response],
            "num_forwards": rollout.num_forwards,
            "num_steps": rollout.num_steps,
        }
        record |= {"logprobs": rollout.logprobs} if options.logprobs else {}
        print(json.dumps(record, ensure_ascii=False))
        return
    if not options.stream:
        print(rollout.text)
    for token, step, logprob in zip(rollout.text_ids, rollout.unmask_step, rollout.logprobs, strict=False):
        if step:  # 0: the user's own text around a gap
            print(f"{logprob:9.4f}  {tokenizer.decode([token])!r}")


def run_chat(options: argparse.Namespace) -> int:
    """One line at a time; a line that cannot be answered is forgotten."""
    config = one_mode_config(options)
    model, tokenizer = opdlm.load(options.folder, options.dtype, mode=config.mode)
    from rich.console import Console

    from opdlm.seeds import seed_of

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # an undecodable byte is refused with its line
    console = Console(highlight=False)
    console.print("[dim]/new starts over, Ctrl-D ends[/dim]")
    start: Messages = [{"role": "system", "content": options.system}] if options.system else []
    messages, turn = [*start], 0
    while True:
        try:
            text = console.input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return 0
        if text == "/new":
            messages = [*start]
        if text in ("", "/new"):
            continue
        asked = [*messages, {"role": "user", "content": text}]
        seed = seed_of(options.seed, turn)
        try:
            (rollout,) = opdlm.generate(
                model, [asked], config, tokenizer=tokenizer, seed=seed, stream=console
            )
        except OpdlmError as error:
            console.out(f"{with_flag_names(str(error), options)} /new starts over.")
            continue
        except KeyboardInterrupt as stopped:
            if stopped.args not in ((), (signal.SIGINT,)):  # SIGTERM ends the chat
                raise
            console.print("[dim]stopped; the line is forgotten[/dim]")
            continue
        messages, turn = [*asked, {"role": "assistant", "content": rollout.text}], turn + 1
