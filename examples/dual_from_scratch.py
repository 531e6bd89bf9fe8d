"""Train a small model of bytes from scratch, autoregressive and masked at once, and score text in both ways.

python examples/dual_from_scratch.py text.jsonl held_out.jsonl runs/bytes
"""

import sys

import opdlm
from opdlm.cli.main import main as run


def main(text: str, held_out: str, output_dir: str, *settings: str) -> None:
    overrides = ["objective.ar_share=0.5", "train.num_steps=300", *settings]
    folder = opdlm.train("byte", data=text, output_dir=output_dir, overrides=overrides)
    run(["eval", str(folder), "--text", held_out, "--metrics", "ar_nll,md_bound"])


if __name__ == "__main__":
    main(*sys.argv[1:])
