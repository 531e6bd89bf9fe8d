"""What changes with the step, against arithmetic by hand; and runs with all of it that resume bit for bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_checkpoints import failing_after_a_save, tiny_overrides, write_checkpoint, write_data
from tiny_models import make_lm, make_prompts, make_rollout

from opdlm.checkpoints.load import read_spec
from opdlm.cli.main import main
from opdlm.config.rules import load_config
from opdlm.config.schedules import (
    block_size_at,
    first_reused_step,
    last_change,
    num_updates_of,
    selection_at,
)
from opdlm.config.sections import Config, scheduled
from opdlm.decoding.rollout import NEVER, Prompt, Rollout
from opdlm.distill import trainer as trainer
from opdlm.objectives.masking import MaskRates, draw_masks
from opdlm.objectives.states import BlockTable, select_masks
from opdlm.training import loop as loop
from opdlm.training.ema import use_average
from opdlm.training.metrics import MetricsLog

BLOCKS = "format.block_growth=[[0,2],[1,4],[3,8]]"
TINY = (
    *(
        "train.num_steps=4",
        "train.save_every=2",
        "rollout.prompts_per_step=4",
        "rollout.decode.max_new_tokens=8",
    ),
    *("train.rows_per_update=2", "train.micro_batch_rows=2", "optimizer.learning_rate=1e-2"),
)


def config_with(*overrides: str) -> Config:
    return load_config(None, ["train.num_steps=8", "rollout.prompts_per_step=8", *overrides])


def test_a_schedule_holds_each_value_until_the_next_one_begins() -> None:
    pairs = [(0, "a"), (2, "b"), (3, "c")]
    assert [scheduled(pairs, step, "unused") for step in range(5)] == ["a", "a", "b", "c", "c"]
    assert scheduled([], 7, "only") == "only"


def test_losses_are_compared_from_the_last_change_on() -> None:
    config = config_with("loss.divergence_schedule=[[0,jsd],[5,forward_kl]]", "rollout.warm_start_steps=2")
    assert [last_change(config, step) for step in range(8)] == [0, 0, 2, 2, 2, 5, 5, 5]
    ramp = config_with("masking.ramp_steps=3", "loss.objective=off_policy")
    assert [last_change(ramp, step) for step in range(5)] == [0, 1, 2, 3, 3]


def test_blocks_grow_at_the_steps_that_the_schedule_names() -> None:
    config = config_with(BLOCKS, "format.block_size=8")
    assert [block_size_at(config.format, step) for step in range(8)] == [2, 4, 4, 8, 8, 8, 8, 8]
    assert block_size_at(config_with("format.block_size=4").format, 5) == 4


def test_teacher_responses_and_baselines_are_masked_at_random_whatever_the_schedule() -> None:
    overrides = ["states.selection_schedule=[[0,random_mask],[2,one_per_block],[4,all]]"]
    names = ["random_mask"] * 2 + ["one_per_block"] * 2 + ["all"] * 4
    assert [selection_at(config_with(*overrides), step) for step in range(8)] == names
    warm = config_with(*overrides, "rollout.warm_start_steps=3")
    assert [selection_at(warm, step) for step in range(8)] == ["random_mask"] * 3 + names[3:]
    for objective in ("opd_random", "off_policy", "sft"):
        assert selection_at(config_with(*overrides, f"loss.objective={objective}"), 6) == "random_mask"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.3, 0.5), (0.7, 1.0)])
def test_masked_counts_follow_a_rate_drawn_from_the_range(low: float, high: float) -> None:
    """P(n masked of 4) = mean over t in the range of Binomial(4, t); no masked moves to one masked."""
    can_mask_BNT = torch.ones(300, 200, 4, dtype=torch.bool)
    rng, rates = torch.Generator().manual_seed(0), MaskRates(windows=((low, high),))
    masked_BNT = draw_masks(can_mask_BNT, rates, rng, at_least_one=True).is_masked
    observed = torch.bincount(masked_BNT.sum(-1).flatten(), minlength=5) / (300 * 200)
    rates = [low + (high - low) * (i + 0.5) / 2000 for i in range(2000)]
    expected = [
        sum(math.comb(4, n) * t**n * (1 - t) ** (4 - n) for t in rates) / len(rates) for n in range(5)
    ]
    expected = [0.0, expected[0] + expected[1], *expected[2:]]
    torch.testing.assert_close(observed, torch.tensor(expected), atol=0.01, rtol=0)


def test_complementary_states_use_the_range_and_still_mask_every_token_once() -> None:
    steps_BNT = torch.zeros(50, 40, 8, dtype=torch.long)
    yes_BNT = torch.ones_like(steps_BNT, dtype=torch.bool)
    table = BlockTable(steps_BNT, steps_BNT, steps_BNT, yes_BNT, yes_BNT)
    rng, rates = torch.Generator().manual_seed(0), MaskRates(windows=((0.9, 1.0),))
    masks_BCNT = select_masks(table, "complementary", rng, rates)
    assert (masks_BCNT.sum(1) == 1).all()
    assert 0.93 < masks_BCNT[:, 0].float().mean() < 0.97


def test_a_pool_holds_rollouts_that_are_fresh_enough_and_of_one_kind() -> None:
    """Brute force: every pair of steps, against the three rules in words."""
    config = config_with(BLOCKS, "format.block_size=8", "train.max_staleness=2", "rollout.warm_start_steps=5")
    sizes, authors = [2, 4, 4, 8, 8, 8, 8, 8], ["teacher"] * 5 + ["student"] * 3
    for step in range(8):
        oldest = first_reused_step(config, step)
        reused = [
            made
            for made in range(step + 1)
            if step - made <= 2 and sizes[made] == sizes[step] and authors[made] == authors[step]
        ]
        assert list(range(oldest, step + 1)) == reused, step
    assert [first_reused_step(config_with(), step) for step in range(4)] == [0, 1, 2, 3]
    pools = [1, 1, 2, 1, 2, 1, 2, 3]
    assert num_updates_of(config_with(*["train.rows_per_update=4"])) == 8 * 2
    assert num_updates_of(replace(config, train=replace(config.train, rows_per_update=4))) == sum(pools) * 2


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_planned_updates_are_those_that_a_run_makes(epochs: int) -> None:
    """A pool of two steps is not a multiple of the rows of an update."""
    config = config_with("train.num_steps=10", "train.rows_per_update=8", "train.max_staleness=1")
    config = replace(
        config,
        rollout=replace(config.rollout, prompts_per_step=12),
        train=replace(config.train, epochs_per_rollout=epochs),
    )
    rng = torch.Generator().manual_seed(0)
    made = [list(trainer.update_order(12 * (1 + (step > 0)), config, rng)) for step in range(10)]
    assert num_updates_of(config) == sum(map(len, made)) == 29 * epochs


def test_a_rollout_survives_json() -> None:
    rollout = replace(make_rollout(3, 6, "absolute"), unmask_step=(1, 2, 3, NEVER, 5))
    assert Rollout.from_dict(json.loads(json.dumps(rollout.to_dict()))) == rollout


def start(folder: Path, *overrides: str) -> trainer.Run:
    """A run over a random model, without a checkpoint on disk."""
    config = load_config(None, [*TINY, f"output_dir={folder}", *overrides])
    prompts = [Prompt(ids=ids, index=i) for i, ids in enumerate(make_prompts([3, 5, 4, 6]))]
    folder.mkdir(exist_ok=True)
    return trainer.start_run(make_lm("lora", block_size=config.format.block_size), prompts, config)


def test_rollouts_and_states_follow_the_growing_block(tmp_path: Path) -> None:
    run = start(tmp_path, BLOCKS, "format.block_size=8", "train.max_staleness=3")
    for step, size in enumerate([2, 4, 4, 8]):
        metrics = trainer.train_step(run, step)
        assert metrics["block_size"] == size
        for rollout in run.pool[step]:
            end = len(rollout.prompt_ids) + len(rollout.response_ids)
            assert end % size == 0 or rollout.num_response == 8
    assert list(run.pool) == [3]  # rollouts of shorter blocks are not used again


def test_a_step_trains_on_every_rollout_of_its_pool_once_per_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tmp_path, "train.max_staleness=1", "train.epochs_per_rollout=2")
    trained: list[tuple[int, ...]] = []
    update = trainer.update

    def record(run: trainer.Run, rollouts: Any, chosen: list[int], *rest: Any) -> loop.UpdateSums:
        trained.extend(rollouts[i].response_ids for i in chosen)
        return update(run, rollouts, chosen, *rest)

    monkeypatch.setattr(trainer, "update", record)
    for step in range(3):
        trained.clear()
        trainer.train_step(run, step)
        pool = [r.response_ids for made in range(max(0, step - 1), step + 1) for r in run.pool[made]]
        assert sorted(trained) == sorted(pool * 2)
    assert run.num_updates == (1 + 2 + 2) * 2 * 2


def test_the_average_is_the_recursion_written_out(tmp_path: Path) -> None:
    run = start(tmp_path, "train.ema_decay=0.5")
    name = next(name for name in run.average if "lora_B" in name)
    weight = dict(run.model.named_parameters())[name]
    expected, history = weight.detach().double().clone(), []
    step_function = run.optimizer.step

    def step_and_record(*args: Any) -> None:
        step_function(*args)
        history.append(weight.detach().double().clone())

    run.optimizer.step = step_and_record  # type: ignore[method-assign]
    for step in range(3):
        trainer.train_step(run, step)
    for n, value in enumerate(history, 1):
        decay = min(0.5, n / (n + 9))
        expected = decay * expected + (1 - decay) * value
    assert len(history) == 6
    torch.testing.assert_close(run.average[name].double(), expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(run.average[name], weight)
    use_average(run.average, run.model)
    assert torch.equal(run.average[name], weight)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("curricula")
    write_checkpoint(root / "llama")
    write_data(root)
    return root


def command(root: Path, output: Path, *overrides: str) -> list[str]:
    settings = tiny_overrides(root / "llama", root, output)[1:]
    return ["convert", str(root / "llama"), *settings, *TINY, *overrides]


EVERYTHING = (
    *("format.block_growth=[[0,2],[3,4]]", "format.block_size=4", "train.max_staleness=2"),
    *("train.ema_decay=0.9", "states.selection_schedule=[[0,random_mask],[1,one_per_block]]"),
    *("states.selection=one_per_block", "masking.ramp_steps=3"),
)


def test_a_run_with_every_curriculum_resumes_bit_for_bit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 of the resumed run trains on rollouts of steps 0 and 1, which only the checkpoint has."""
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert main(command(place, whole, *EVERYTHING)) == 0
    with failing_after_a_save(monkeypatch):
        assert main(command(place, output, *EVERYTHING)) == 2
    pool = json.loads((output / "checkpoint-2" / "progress.json").read_text())["pool"]
    assert {made: len(rollouts) for made, rollouts in pool.items()} == {"0": 4, "1": 4}
    assert main(command(place, output, *EVERYTHING)) == 0
    for name in ("trainable", "optimizer", "average"):
        file = f"checkpoint-4/{name}.safetensors"
        assert (output / file).read_bytes() == (whole / file).read_bytes(), name
    for name in ("adapter/adapter_model.safetensors", "mask_embedding.safetensors"):
        assert (output / "model" / name).read_bytes() == (whole / "model" / name).read_bytes(), name
    assert read_spec(output / "model").block_size == 4
    averaged = load_file(output / "checkpoint-4/average.safetensors")["mask_embedding"]
    last = load_file(output / "checkpoint-4/trainable.safetensors")["mask_embedding"]
    written = load_file(output / "model/mask_embedding.safetensors")["mask_embedding"]
    assert torch.equal(written, averaged) and not torch.equal(written, last)


def test_a_finished_run_that_continues_writes_the_same_average(place: Path, tmp_path: Path) -> None:
    arguments = command(place, tmp_path / "run", "train.ema_decay=0.9", "train.num_steps=1")
    adapter = tmp_path / "run" / "model" / "adapter" / "adapter_model.safetensors"
    assert main(arguments) == 0
    before = adapter.read_bytes()
    assert main(arguments) == 0
    assert adapter.read_bytes() == before


def test_without_the_options_nothing_of_them_is_saved(tmp_path: Path) -> None:
    run = start(tmp_path, "train.num_steps=1")
    with MetricsLog(tmp_path, Console(quiet=True)) as log:
        trainer.train(run.model, run.source.prompts.prompts, run.config, log)
    assert not (tmp_path / "checkpoint-1" / "average.safetensors").exists()
    assert json.loads((tmp_path / "checkpoint-1" / "progress.json").read_text())["pool"] == {}
