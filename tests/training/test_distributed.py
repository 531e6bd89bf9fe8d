"""One run on one process, on two with DDP, FSDP2 or ZeRO: the same losses, the same checkpoints.

`lora` and `sdar` are conversions, `next` is `lora` with asynchronous rollouts, `text` is a training on given
text: dual, and distilled.
The two are real gloo processes, started once by `torchrun`; this file is also their program. A step's five
rows are uneven on purpose: three rows, hence two micro-batches, on one rank; two rows and one on the other.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch
from rich.console import Console
from tiny_checkpoints import tiny_overrides, write_checkpoint, write_data
from tiny_models import make_lm, make_prompts, make_rollout, qwen3

from opdlm.cli import main as cli
from opdlm.config.sections import (
    Config,
    LossSection,
    OptimizerSection,
    RolloutDecode,
    RolloutSection,
    StatesSection,
    TrainSection,
)
from opdlm.config.text import ObjectiveSection, TextConfig, TextSection, TextTrainSection
from opdlm.data.documents import Document, PackedDataset
from opdlm.decoding.rollout import Prompt, Rollout
from opdlm.decoding.unmasking import choose_tokens, noise_keys
from opdlm.distill.rollouts import generate_rollouts
from opdlm.distill.trainer import Run, start_run, train_step, update
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.modeling.draft_head import DraftHead
from opdlm.seeds import seed_of
from opdlm.text import trainer as text_trainer
from opdlm.text.trainer import TextRun
from opdlm.training import deepspeed as zero
from opdlm.training.checkpoint import trainable_weights
from opdlm.training.deepspeed import ZeroOptimizer
from opdlm.training.devices import leave_ranks
from opdlm.training.loop import resume, save
from opdlm.training.metrics import MetricsLog

KINDS = ("lora", "sdar")
FAST = ("lora-ddp", "lora-fsdp", "sdar-fsdp", "draft-ddp", "next-ddp", "text-ddp", "text-fsdp")
SLOW = ("draft-fsdp", "sdar-ddp")
ZERO = ("lora-zero2", "lora-zero3", "sdar-zero2", "sdar-zero3")
MODES = {"ddp": {}, "fsdp": {"ACCELERATE_USE_FSDP": "true"}} | {
    f"zero{stage}": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    for stage in "23"
}
"""Environment variables that `accelerate launch` sets."""
with_deepspeed = (
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs opdlm[deepspeed]"),
)
CASES = [
    *FAST,
    *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW),
    *(pytest.param(case, marks=with_deepspeed) for case in ZERO),
]
COMPARED = ("loss", "divergence", "grad_norm", "rollout_tokens", "loss_tokens", "stop_rate", "learning_rate")
COMPARED_TEXT = ("loss", "ar_loss", "md_bound", "grad_norm", "tokens", "epoch", "learning_rate")
PROMPTS = [Prompt(ids=ids, index=i) for i, ids in enumerate(make_prompts([3, 8, 1, 5, 6, 2, 9]))]
Metrics = dict[str, float]


def make_model(kind: str) -> DiffusionLM:
    """`sdar` trains everything and has its embedding as its head; `lora` shares one set of weights.
    33 numbers cannot be split into two equal parts.
    """
    model = make_lm(
        "sdar" if kind == "sdar" else "lora", base=qwen3(tie_word_embeddings=kind == "sdar", hidden_size=33)
    )
    if kind == "draft":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.draft_head = DraftHead(33, 5)
    return model


def start_text(output: Path, rows_per_update: int = 5) -> TextRun:
    config = TextConfig(
        output_dir=str(output),
        data=TextSection(sequence_length=9),
        objective=ObjectiveSection(name="dual", ar_share=0.5, distill_weight=0.4),
        optimizer=OptimizerSection(learning_rate=1e-3),
        train=TextTrainSection(rows_per_update=rows_per_update, micro_batch_rows=2, num_steps=4),
    )
    texts = [Document(ids, num_prompt=2) for ids in make_prompts([9, 7, 14, 5, 8, 12])]
    return text_trainer.start_run(make_model("sdar"), PackedDataset(texts, config.data, seed=0), config)


def start(kind: str, output: Path) -> Run | TextRun:
    if kind == "text":
        return start_text(output)
    config = Config(
        output_dir=str(output),
        rollout=RolloutSection(
            prompts_per_step=5,
            decode=RolloutDecode(batch_size=2, max_new_tokens=6),
            asynchronous=kind == "next",
        ),
        states=StatesSection(selection="all" if kind == "draft" else "one_per_block"),
        loss=LossSection(
            objective="draft" if kind == "draft" else "opd",
            normalization="row" if kind == "sdar" else "token",
        ),
        optimizer=OptimizerSection(learning_rate=1e-3),
        train=TrainSection(rows_per_update=5, micro_batch_rows=2, num_steps=4, gradient_checkpointing=True),
    )
    return start_run(make_model(kind), PROMPTS, config)


def steps(run: Run | TextRun, numbers: range) -> list[Metrics]:
    if isinstance(run, TextRun):
        found = [text_trainer.train_step(run, step) for step in numbers]
        return [{key: value for key, value in one.items() if key in COMPARED_TEXT} for one in found]
    conversions = [train_step(run, step) for step in numbers]
    return [{key: one[key] for key in COMPARED} for one in conversions]


def uneven_updates(run: Run | TextRun) -> list[Metrics]:
    """Updates in which a rank has no row at all, then no supervised slot (`lora` drafts no single token)."""
    if isinstance(run, TextRun):
        return steps(start_text(Path(run.config.output_dir), rows_per_update=1), range(2))
    rollouts = [make_rollout(4, 1, "absolute", stop=True), make_rollout(5, 12, "absolute")]
    sums = [update(run, rollouts, chosen, "all") for chosen in ([1], [0, 1], [0, 1])]
    return [{"loss": s.loss, "grad_norm": s.grad_norm, "positions": s.positions} for s in sums]


def run_all(kind: str, output: Path) -> dict[str, list[Metrics]]:
    """Four steps with a checkpoint after the second, and the uneven updates."""
    run = start(kind, output)
    losses = steps(run, range(2))
    save(run, 2)
    losses += steps(run, range(2, 4))
    return {"steps": losses, "uneven": uneven_updates(start(kind, output / "unused"))}


def continued(kind: str, output: Path) -> list[Metrics]:
    """The last two steps, from the checkpoint after the second."""
    run = start(kind, output)
    assert resume(run, MetricsLog(output, Console(quiet=True))) == 2
    return steps(run, range(2, 4))


def shares_held(run: Run | TextRun) -> tuple[float, float]:
    """Parts of the trained weights and of their moments that are in this process between updates."""
    weights = trainable_weights(run.model).values()
    total = sum(getattr(p, "ds_numel", p.numel()) for p in weights)
    if isinstance(run.optimizer, ZeroOptimizer):
        states = run.optimizer.moments
        held = sum(p.numel() + (p.ds_tensor.numel() if hasattr(p, "ds_id") else 0) for p in weights)
    else:
        states = run.optimizer.state
        held = sum(getattr(p, "_local_tensor", p).numel() for p in weights)
    moments = [state["exp_avg"] for state in states.values()]
    return held / total, sum(getattr(m, "_local_tensor", m).numel() for m in moments) / total


def main(root: Path, cases: list[str]) -> None:
    """The program of each of the two processes."""
    results: dict[str, Any] = {}
    for case in cases:
        kind, mode = case.split("-")
        for variables in MODES.values():
            for name in variables:
                os.environ.pop(name, None)
        os.environ.update(MODES[mode])
        found = run_all(kind, root / case)
        resumed = continued(kind, root / f"{kind}-one")
        fresh = start(kind, root / "unused")
        steps(fresh, range(1))
        results[case] = found | {
            "continued": resumed,
            "shares_held": shares_held(fresh),
            "num_processes": fresh.accelerator.num_processes,
        }
    if os.environ["RANK"] == "0":
        (root / "results.json").write_text(json.dumps(results))
    leave_ranks(fresh.accelerator)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, dict[str, list[Metrics]]]:
    """The run on one process."""
    return {kind: run_all(kind, root / f"{kind}-one") for kind in (*KINDS, "draft", "next", "text")}


@pytest.fixture(scope="module")
def together(root: Path, alone: Any) -> Callable[[str], dict[str, Any]]:
    """The runs on two processes, which also continue those of one; started when a test needs one."""
    results: dict[str, Any] = {}

    def run(case: str) -> dict[str, Any]:
        if case not in results:
            torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
            group = next(cases for cases in (FAST, SLOW, ZERO) if case in cases)
            launch([__file__, str(root), *group], *torchrun)
            results.update(json.loads((root / "results.json").read_text()))
        return results[case]

    return run


def assert_same(found: list[Metrics], expected: list[Metrics]) -> None:
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        assert left == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case: str, alone: Any, together: Any) -> None:
    expected = alone[case.partition("-")[0]]["steps"]
    assert together(case)["num_processes"] == 2
    assert_same(together(case)["steps"], expected)
    losses = [step["loss"] for step in expected]
    assert min(losses) > 0.01 and len(set(losses)) == 4


@pytest.mark.parametrize("case", CASES)
def test_a_rank_may_have_no_rows_or_nothing_supervised(case: str, alone: Any, together: Any) -> None:
    assert_same(together(case)["uneven"], alone[case.partition("-")[0]]["uneven"])


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_on_two_processes_continues_on_one(
    case: str, root: Path, alone: Any, together: Any
) -> None:
    together(case)
    assert_same(continued(case.partition("-")[0], root / case), alone[case.partition("-")[0]]["steps"][2:])


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_on_one_process_continues_on_two(case: str, alone: Any, together: Any) -> None:
    assert_same(together(case)["continued"], alone[case.partition("-")[0]]["steps"][2:])


@pytest.mark.parametrize("case", CASES)
def test_a_process_holds_its_share_of_weights_and_moments(case: str, together: Any) -> None:
    shares = {"ddp": [1, 1], "fsdp": [0.5, 0.5], "zero2": [1, 0.5], "zero3": [0.5, 0.5]}
    assert together(case)["shares_held"] == pytest.approx(shares[case.partition("-")[2]], abs=0.02)


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("1", [], "must be 2 or 3"),
        ("2", ["optimizer.name=adamw8bit"], "optimizer.name (adamw8bit)"),
        ("2", ["lora.enabled=false", "model.dtype=bfloat16"], "weights of two dtypes"),
        ("3", ["train.ema_decay=0.9"], "train.ema_decay needs whole weights"),
        ("2", ["rollout.asynchronous=true"], "launch with recipes/accelerate/ddp.yaml"),
    ],
)
def test_settings_that_zero_cannot_run_are_refused_before_loading(
    stage: str,
    settings: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    monkeypatch.setattr(zero, "find_spec", lambda name: True)
    assert cli.main(["convert", "tiny", *settings]) == 2
    assert message in capsys.readouterr().err


def test_a_zero_launch_without_deepspeed_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    assert cli.main(["convert", "tiny"]) == 2
    assert "pip install 'opdlm[deepspeed]'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_depends_on_its_index_and_not_on_its_neighbours(kind: str) -> None:
    model = make_model(kind)
    section = RolloutSection(decode=RolloutDecode(max_new_tokens=9, confidence_threshold=0.3))

    def roll_out(indices: range) -> list[Rollout]:
        prompts = [PROMPTS[i] for i in indices]
        return generate_rollouts(model, prompts, section, step=1, seed=0, indices=indices)

    whole = roll_out(range(6))
    assert [*roll_out(range(0, 6, 2)), *roll_out(range(1, 6, 2))] == whole[::2] + whole[1::2]
    same_prompt = [PROMPTS[0]] * 4
    drawn = generate_rollouts(model, same_prompt, section, step=1, seed=0)
    assert len({rollout.response_ids for rollout in drawn}) > 1


def test_draws_with_a_seed_per_row_follow_the_distribution() -> None:
    probs_V = torch.tensor([0.5, 0.0, 0.2, 0.3])
    seed_M = torch.tensor([seed_of(0, 1, i // 10) for i in range(30_000)])
    key_M = noise_keys(seed_M, torch.arange(30_000) % 10, 0)
    ids_M = choose_tokens(
        probs_V.log().expand(30_000, 4), torch.tensor([[1.0, 0, 1]]).expand(30_000, 3), key_M
    )
    frequency_V = torch.bincount(ids_M, minlength=4) / 30_000
    torch.testing.assert_close(frequency_V, probs_V, atol=0.01, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", ["ddp", "fsdp2", *(pytest.param(m, marks=with_deepspeed) for m in ("zero2", "zero3"))]
)
def test_the_recipe_runs_under_accelerate_launch(mode: str, tmp_path: Path) -> None:
    """The launch files that are shipped; without a GPU the same ranks meet over gloo."""
    write_checkpoint(tmp_path / "llama")
    write_data(tmp_path)
    settings = tiny_overrides(tmp_path / "llama", tmp_path, tmp_path / mode)
    command = [
        "opdlm",
        "convert",
        *settings[0].split("=")[1:],
        *settings[1:],
        f"eval.path={tmp_path / 'eval.jsonl'}",
        *("eval.every=1", "eval.patience=2", "eval.decode.ar_accept_threshold=0", "train.ema_decay=0.9"),
    ]
    file = f"--config_file=recipes/accelerate/{mode}.yaml"
    port = "--main_process_port=0"
    done = launch(command, "accelerate.commands.launch", file, port, "--num_processes=2", "-m")
    assert done.stdout.count("converted checkpoint:") == 1
    folder = tmp_path / mode
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    report = json.loads((folder / "model" / "retention.json").read_text())
    for mode in report["student"]:  # measured on two ranks during training, on one at its end
        assert rows[-1][f"tokens_per_forward_{mode['name']}"] == pytest.approx(mode["tokens_per_forward"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
