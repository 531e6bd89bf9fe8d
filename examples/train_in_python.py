"""Convert the bundled teacher from Python, look at what the student writes, and measure what it kept.

python examples/train_in_python.py runs/by_hand
"""

import sys

import opdlm


def main(output_dir: str, num_steps: int = 3) -> None:
    config = opdlm.load_config(
        None,
        [
            "model.path=bundled:teacher",
            "data.path=bundled:prompts.jsonl",
            "rollout.prompts_per_step=32",
            "rollout.decode.max_new_tokens=80",
            f"train.num_steps={num_steps}",
            f"output_dir={output_dir}",
        ],
    )
    folder = opdlm.convert(config)

    model, tokenizer = opdlm.load(folder)
    prompts = ["add 47 38", "reverse stone"]
    rollouts = opdlm.generate(model, prompts, tokenizer=tokenizer, mode="threshold", max_new_tokens=40)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        print(f"{prompt}: {rollout.text!r}, revealed in steps {rollout.unmask_step[: rollout.num_response]}")

    report = opdlm.evaluate(folder, data="bundled:eval.jsonl", modes=["lossless"], limit=1)
    for mode in report["student"]:
        print(
            f"{mode['name']}: retention {mode['retention']:.2f}, {mode['tokens_per_forward']:.2f} per forward"
        )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/by_hand")
