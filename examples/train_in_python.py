"""The stages of a conversion by hand: a student, a few training steps, what one step looks like from inside.

python examples/train_in_python.py runs/by_hand
"""

import sys
from pathlib import Path

from rich.console import Console

from opdlm.config.rules import load_config
from opdlm.decoding.decode_state import DecodeStats
from opdlm.distill.pipeline import load_inputs
from opdlm.distill.rollouts import generate_rollouts
from opdlm.distill.trainer import train
from opdlm.objectives.states import select_states
from opdlm.seeds import generator_for
from opdlm.training.metrics import MetricsLog
from opdlm.training.run_folder import prepare_output


def main(output_dir: str) -> None:
    recipe = Path(__file__).parent.parent / "recipes" / "tiny.yaml"
    config = load_config(
        recipe, [f"output_dir={output_dir}", "train.num_steps=3", "rollout.prompts_per_step=32"]
    )
    inputs = load_inputs(config)
    student, tokenizer = inputs.student, inputs.tokenizer

    rollouts = generate_rollouts(student, inputs.prompts[:4], config.rollout, step=1, seed=0)
    for rollout in rollouts:
        print(repr(tokenizer.decode(list(rollout.text_ids))), "revealed in steps", rollout.unmask_step)
    print(f"{DecodeStats.of(rollouts).tokens_per_forward:.2f} tokens per forward before training")

    states = select_states(rollouts, student.spec, "all", generator_for(0), student.device)
    print("supervised slots of the first rollout:", int(states.is_supervised_BS[0].sum()))

    prepare_output(config)
    with MetricsLog(Path(config.output_dir), Console()) as log:
        run = train(student, inputs.prompts, config, log)
    print("rollout tokens seen:", int(run.totals["rollout_tokens"]))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/by_hand")
