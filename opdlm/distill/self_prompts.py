"""Conversion prompts that the model samples itself, instead of or in addition to a file.

Given only the start of a user turn, a chat model continues with a typical request (Magpie, arXiv 2406.08464).
Duplicates are kept, so the prompts follow the model's own distribution of requests. They are stored as text
in a JSONL file of the run folder, from which a resumed run reads the same prompts.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from opdlm.config.sections import Config, DataSection
from opdlm.data.chat_template import render, with_date
from opdlm.data.messages import conversation_of
from opdlm.data.prompts import load_prompts
from opdlm.data.rows import NO_TEXT
from opdlm.decoding.decode_config import DecodeConfig
from opdlm.decoding.generate import generate
from opdlm.decoding.rollout import Prompt, digest_of
from opdlm.errors import DataError
from opdlm.files import write_atomic
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.seeds import generator_for
from opdlm.training.metrics import PhaseProgress, complete_rows
from opdlm.training.run_folder import PARTIAL_PROMPTS_FILE, SELF_PROMPTS_FILE

PLACEHOLDER = "PLACEHOLDER"
DRAWS_PER_PROMPT = 20
"""Samples per requested prompt, after which the search is given up."""


def user_turn(tokenizer: PreTrainedTokenizerBase, section: DataSection) -> tuple[list[int], int]:
    """Token ids up to the start of the user's text, and the special token that ends it.

    DataError if the tokenizer has no chat template, or the turn does not end with a special token.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "data.self_prompts needs a chat template, and this tokenizer has none: set data.path."
        )
    conversation = conversation_of("data.self_prompts", {"prompt": PLACEHOLDER}, section.system_prompt)
    text = render(with_date(tokenizer, section.date), conversation)
    before, _, after = text.partition(PLACEHOLDER)
    start = tokenizer(before, add_special_tokens=False)["input_ids"]
    end = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    if not start or not end or end[0] not in tokenizer.added_tokens_decoder:
        raise DataError(
            "data.self_prompts needs a chat template that ends the user's turn with a special token; this "
            f"one writes {after[:20]!r}: set data.path."
        )
    return list(start), int(end[0])


def self_prompts(
    model: DiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    folder: Path,
    excluded: Collection[str],
    console: Console | None = None,
) -> list[Prompt]:
    """`data.self_prompts` prompts, read from `folder`, or sampled from the teacher and saved there.

    `excluded`: texts that must not occur (the evaluation prompts).
    """
    path = folder / SELF_PROMPTS_FILE
    if not path.is_file():
        partial = folder / PARTIAL_PROMPTS_FILE
        texts = write_prompts(model, tokenizer, config, excluded, partial, console)
        lines = (json.dumps({"prompt": text}, ensure_ascii=False) for text in texts)
        write_atomic(path, "".join(f"{line}\n" for line in lines))
        partial.unlink()
    section = replace(config.data, path=str(path), prompt_column="", limit=None)
    return load_prompts(section, tokenizer, model.spec.mask_token_id)


def write_prompts(
    model: DiffusionLM,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    excluded: Collection[str],
    partial: Path,
    console: Console | None = None,
) -> list[str]:
    """Sample user turns at temperature 1 until enough have ended with the end-of-turn token; duplicates stay.

    Every batch is appended to `partial`, from which an interrupted run continues. DataError if too few end.
    """
    start, end = user_turn(tokenizer, config.data)
    wanted, rows = config.data.self_prompts, config.rollout.decode.batch_size
    decoder = model.teacher_decoder(stop_token_ids=(end,))
    decoding = DecodeConfig(
        mode="ar",
        max_new_tokens=max(1, config.data.max_prompt_tokens - len(start)),
        batch_size=rows,
        temperature=1.0,
    )
    settings = [start, [end, rows, decoding.max_new_tokens, config.train.seed]]
    drawn_by = digest_of([*settings, *(list(text.encode()) for text in sorted(excluded))])
    kept = [row for row in complete_rows(partial) if row["drawn_by"] == drawn_by]
    write_atomic(partial, "".join(json.dumps(row) + "\n" for row in kept))  # without a line cut off by a kill
    found = [text for row in kept for text in row["prompts"]]
    with PhaseProgress("prompts that the model writes", wanted, console) as progress:
        progress.skip(min(wanted, len(found)))
        for number in range(len(kept), -(-wanted * DRAWS_PER_PROMPT // rows)):
            if len(found) >= wanted:
                return found[:wanted]
            rng = generator_for(config.train.seed, 0, number, device=model.device)
            rollouts = generate(decoder, [start] * rows, decoding, rng, progress.on_step)
            batch = []
            for rollout in rollouts:
                text = str(tokenizer.decode(list(rollout.text_ids[:-1]))).strip()
                is_usable = text and text not in excluded and not NO_TEXT.search(text)
                if rollout.finish_reason == "stop" and is_usable:
                    batch.append(text)
            with partial.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"drawn_by": drawn_by, "prompts": batch}) + "\n")
            found += batch
            progress.advance(len(batch))
    if len(found) >= wanted:
        return found[:wanted]
    raise DataError(
        f"data.self_prompts ({wanted}): the model ended only {len(found)} prompts in "
        f"{wanted * DRAWS_PER_PROMPT} attempts. Ask for fewer, or set data.path."
    )
