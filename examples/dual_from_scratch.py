"""Train a small model of bytes from scratch, autoregressive and masked at once, and score text in both ways.

python examples/dual_from_scratch.py text.jsonl held_out.jsonl runs/bytes
"""

import json
import sys

import opdlm


def main(text: str, held_out: str, output_dir: str, *settings: str) -> None:
    overrides = [f"eval.path={held_out}", "objective.ar_share=0.5", "train.num_steps=300", *settings]
    folder = opdlm.train("byte", data=text, output_dir=output_dir, overrides=overrides)
    results = json.loads((folder / "all_results.json").read_text())
    print(f"autoregressive: {results['heldout_ar_nll']:.3f} nats per byte of held-out text")
    print(f"masked: at most {results['heldout_md_bound']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
