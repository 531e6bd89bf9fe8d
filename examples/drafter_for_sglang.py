"""Train a drafter for a model and write it as SGLang reads it; prints the command that serves both.

python examples/drafter_for_sglang.py MODEL prompts.jsonl runs/draft
"""

import json
import sys

import opdlm

AS_SGLANG_DRAFTS = ("loss.objective=draft", "format.noise=uniform", "format.draft_attention=causal")


def main(model: str, prompts: str, output_dir: str, *settings: str) -> None:
    folder = opdlm.convert(
        model, data=prompts, output_dir=output_dir, overrides=[*AS_SGLANG_DRAFTS, *settings]
    )
    report = json.loads((folder / "retention.json").read_text())  # on prompts that were held back
    speed = next(mode["tokens_per_forward"] for mode in report["student"] if mode["name"] == "lossless")
    adapter = opdlm.export(folder, f"{output_dir}/uno", to="uno")
    block_size = report["settings"]["config"]["format"]["block_size"]
    print(f"{speed:.2f} tokens per forward")
    print(
        f"python -m sglang.launch_server --model-path {model} --attention-backend fa3 "
        f"--speculative-algorithm UNO --uno-lora-path {adapter} --speculative-num-draft-tokens {block_size}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
