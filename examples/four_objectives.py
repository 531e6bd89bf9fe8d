"""Compare four objectives after equally many steps: states that the student visits, random states of its
text, of the teacher's text, and that text without the teacher's distributions.

python examples/four_objectives.py runs/objectives

A comparison that decides needs seeds and equal time: docs/studies.md.
"""

import json
import sys

import opdlm

OBJECTIVES = ("opd", "opd_random", "off_policy", "sft")


def main(output_dir: str, *settings: str) -> None:
    print(f"{'objective':12} lossless, tokens per forward   static, share of the teacher's accuracy")
    for objective in OBJECTIVES:
        overrides = [f"loss.objective={objective}", "train.num_steps=20", *settings]
        folder = opdlm.convert("tiny", output_dir=f"{output_dir}/{objective}", overrides=overrides)
        report = json.loads((folder / "retention.json").read_text())
        modes = {mode["name"]: mode for mode in report["student"]}
        speed = modes["lossless"]["tokens_per_forward"]
        kept = modes.get("static, alone", modes["static"])["retention"]
        print(f"{objective:12} {speed:28.2f}   {kept:39.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
