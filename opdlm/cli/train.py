"""`opdlm train`: training on given text."""

from __future__ import annotations

import argparse

import opdlm
from opdlm.cli.flags import Parser, Verbs, add_settings, add_verb, publish, read_settings

DESCRIPTION = """Train on given text: autoregressive, masked diffusion, block diffusion, or both at once.

TARGET is a recipe file, the name of a bundled recipe of this verb, or a checkpoint folder or hub id
(then give data.path). The result is a checkpoint for `opdlm convert`, `generate` and `eval`."""
EXAMPLES = """  opdlm train byte data.path=mine.jsonl output_dir=runs/byte
  opdlm train bundled:byte model.from_scratch=true data.path=mine.jsonl --objective.name autoregressive
  opdlm train runs/text/model data.path=mine.jsonl objective.name=dual objective.prediction=next_position \\
      objective.ar_share=0.75 eval.path=held_out.jsonl output_dir=runs/dual
  opdlm train bundled:teacher data.path=answers.jsonl data.packing=whole masking.windows=[[0.5,1]]"""


def add_train(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "train",
        run,
        add_train_flags,
        summary="train on text, by likelihood or diffusion",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )


def add_train_flags(parser: Parser) -> None:
    add_settings(parser)


def run(options: argparse.Namespace) -> int:
    from opdlm.api import main_console, train_settings
    from opdlm.config.text import TextConfig

    config = read_settings("train", options, TextConfig, train_settings)
    if config is None:
        return 0
    console = main_console()
    folder = opdlm.train(config, console=console)
    console.out(f"\ntrained checkpoint: {folder}")
    publish(folder, options, console)
    return 0
