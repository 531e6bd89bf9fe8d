"""Decode one prompt in every mode of a converted checkpoint and count the forwards.

python examples/decode_modes.py runs/tiny/model "add 47 38"
"""

import sys

import opdlm
from opdlm.data.prompts import encode_prompt
from opdlm.decoding.decode_config import DecodeConfig, Mode
from opdlm.decoding.generate import generate


def main(folder: str, text: str) -> None:
    model, tokenizer = opdlm.load(folder)
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": text}])
    modes: list[Mode] = ["ar", "static", "threshold"]
    if model.spec.format == "preserve":
        modes.append("lossless")
    for mode in modes:
        (rollout,) = generate(model, [prompt], DecodeConfig(mode=mode, max_new_tokens=80))
        answer = tokenizer.decode(list(rollout.text_ids), skip_special_tokens=True)
        print(f"{mode:10} {rollout.num_forwards:3} forwards  {answer}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
