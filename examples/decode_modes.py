"""Decode one prompt in every mode of a converted checkpoint and count the forwards.

python examples/decode_modes.py runs/tiny/model "add 47 38"
"""

import sys

import opdlm


def main(folder: str, text: str) -> None:
    model, tokenizer = opdlm.load(folder)
    configs = [
        opdlm.DecodeConfig(mode="ar", max_new_tokens=80),
        opdlm.DecodeConfig(mode="static", max_new_tokens=80),
        opdlm.DecodeConfig(mode="threshold", max_new_tokens=80),
    ]
    if model.spec.format == "preserve":  # the AR weights are there to verify drafts
        configs.append(opdlm.DecodeConfig(mode="lossless", max_new_tokens=80))
    for config in configs:
        (rollout,) = opdlm.generate(model, [text], config, tokenizer=tokenizer)
        print(f"{config.mode:10} {rollout.num_forwards:3} forwards  {rollout.text}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
