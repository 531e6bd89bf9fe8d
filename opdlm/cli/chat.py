"""`opdlm chat`: a conversation in the terminal, every response shown while it is unmasked."""

from __future__ import annotations

import argparse

from rich.console import Console

from opdlm.checkpoints.load import check_fits
from opdlm.cli.verbs import check_decoding, decode_config, load_decoder, stream
from opdlm.data.prompts import encode_prompt
from opdlm.decoding.streaming import StopStrings
from opdlm.errors import OpdlmError
from opdlm.seeds import seed_of


def chat(options: argparse.Namespace) -> int:
    """One line at a time; /new forgets what was said, Ctrl-D ends, Ctrl-C stops a response."""
    check_decoding(options)
    model, tokenizer = load_decoder(options.folder, options.mode, options.dtype)
    config = decode_config(options, model.spec)
    console, stops = Console(highlight=False), StopStrings(tokenizer)
    console.print("[dim]/new starts over, Ctrl-D ends[/dim]")
    start = [{"role": "system", "content": options.system}] if options.system else []
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
        try:
            ids = encode_prompt(tokenizer, asked)
            check_fits(model, [ids], config.max_new_tokens, "--max-new-tokens")
        except OpdlmError as error:  # the conversation goes on without this line
            console.print(f"{error} /new starts over.", markup=False)
            continue
        try:
            rollout = stream(model, ids, config, seed_of(options.seed, turn), stops)
        except KeyboardInterrupt:
            console.print("[dim]stopped; the line is forgotten[/dim]")
            continue
        messages, turn = [*asked, {"role": "assistant", "content": stops.text(rollout.text_ids)}], turn + 1
