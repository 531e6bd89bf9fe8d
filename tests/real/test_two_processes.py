"""A pretrained checkpoint trained by one process and by two with FSDP2: the same losses, the same weights.

The two are started as docs/many_devices.md says, with gloo on the CPU. A run that stops on two continues on
one. Float32, and the smallest model of the folder that OPDLM_REAL names.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pretrained import MODELS, QUESTIONS
from processes import launch
from safetensors.torch import load_file

from opdlm.training.checkpoint import find_checkpoints

SETTINGS = [
    *("model.dtype=float32", "train.num_steps=3", "train.rows_per_update=4", "loss.objective=opd"),
    *("rollout.prompts_per_step=4", "rollout.decode.max_new_tokens=16", "eval.held_back=0"),
]
KINDS = {
    "preserve": [],
    "sdar": ["format.name=sdar", "lora.enabled=false"],
}
"""What trains: an adapter beside the model, or every weight, which two processes hold in halves."""
TWO = (
    *("accelerate.commands.launch", "--config_file=recipes/accelerate/fsdp2.yaml", "--num_processes=2"),
    *("--main_process_port=0", "-m"),
)
pytestmark = pytest.mark.real


@pytest.fixture(scope="module", params=KINDS)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders: of one process, of two, and of two that stopped after a step and one that went on."""
    if not MODELS:
        pytest.skip("OPDLM_REAL names no folder with checkpoints")
    smallest = min(MODELS, key=lambda path: sum(file.stat().st_size for file in path.iterdir()))
    root = tmp_path_factory.mktemp(request.param)
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    command = ["opdlm", "convert", str(smallest), f"data.path={prompts}", *SETTINGS, *KINDS[request.param]]
    folders = {name: root / name for name in ("one", "two", "stopped")}
    launch([*command, f"output_dir={folders['one']}"])
    launch([*command, f"output_dir={folders['two']}"], *TWO)
    stopped = [*command, f"output_dir={folders['stopped']}"]
    launch([*stopped, "train.time_limit=1s"], *TWO, check=False)
    assert [path.name for path in find_checkpoints(folders["stopped"])] == ["checkpoint-1"]
    launch(stopped)
    return folders


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """The trained weights after the last step."""
    return load_file(find_checkpoints(run)[-1] / "trainable.safetensors")


@pytest.mark.parametrize("other", ["two", "stopped"])
def test_two_processes_train_a_real_model_as_one(runs: dict[str, Path], other: str) -> None:
    """The losses and, relative to their norm, the weights are equal to 1e-5. AdamW divides a gradient by its
    size, so rounding of one near 0 moves its weight by a part of the learning rate: few single weights may
    differ by more than 1e-5, and none by a twentieth of the rate.
    """
    expected, found = metrics_of(runs["one"]), metrics_of(runs[other])
    losses = [step["loss"] for step in expected]
    assert len(losses) == len(set(losses)) == 3 and min(losses) > 0.01
    assert [step["loss"] for step in found] == pytest.approx(losses, abs=1e-5)
    wanted, weights = weights_of(runs["one"]), weights_of(runs[other])
    assert wanted.keys() == weights.keys()
    gaps = torch.cat([(weights[name] - weight).abs().flatten() for name, weight in wanted.items()])
    norm = torch.cat([weight.flatten() for weight in wanted.values()]).norm()
    print(f"largest difference {gaps.max():.1e}, of the norm {gaps.norm() / norm:.1e}")
    assert gaps.norm() < 1e-5 * norm
    assert gaps.max() < 0.05 * expected[0]["learning_rate"]
    assert gaps.gt(1e-5).float().mean() < 1e-4
