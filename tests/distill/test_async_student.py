"""Rollouts generated while a step trains: by weights one step old, whatever the clock says; what is shared.

The reference is a loop without threads, where a model of its own generates with the weights of earlier steps.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny_models import KINDS, make_lm, make_prompts
from torch import Tensor, nn

from opdlm.config.rules import load_config
from opdlm.config.schedules import block_size_at, is_from_teacher, selection_at
from opdlm.config.sections import Config
from opdlm.decoding import generate as generate_room
from opdlm.decoding.rollout import Prompt, Rollout
from opdlm.distill import rollouts as rollout
from opdlm.distill import trainer as trainer
from opdlm.distill.async_student import AsyncStudent
from opdlm.distill.rollouts import generate_rollouts
from opdlm.modeling.diffusion_lm import DiffusionLM
from opdlm.objectives.masking import rates_at
from opdlm.seeds import generator_for
from opdlm.training import loop as loop

NUM_STEPS = 4
PROMPTS = [Prompt(ids=ids, index=i) for i, ids in enumerate(make_prompts([3, 5, 4, 6, 7]))]
TINY = (
    *(f"train.num_steps={NUM_STEPS}", "rollout.prompts_per_step=4", "rollout.decode.max_new_tokens=8"),
    *("train.rows_per_update=2", "train.micro_batch_rows=2", "optimizer.learning_rate=1e-2"),
    *("rollout.decode.temperature=1.0", "rollout.decode.batch_size=3", "train.save_every=100"),
)
CURRICULA = (
    *("format.block_growth=[[0,2],[2,4]]", "rollout.warm_start_steps=2", "rollout.start_new_tokens=4"),
    *("rollout.ramp_steps=3", "states.selection=one_per_block", "masking.ramp_steps=3"),
)
CASES = {
    "plain": (),
    "curricula": CURRICULA,
    "average, two passes, recomputed": (
        *("train.ema_decay=0.9", "train.epochs_per_rollout=2", "train.gradient_checkpointing=true"),
        *("states.selection=one_per_block", "rollout.decode.mode=static", "rollout.decode.denoising_steps=2"),
    ),
    "teacher": ("loss.objective=sft",),
    "dropout": ("lora.dropout=0.5",),
}


def start(kind: str, folder: Path, *overrides: str, asynchronous: bool = True) -> trainer.Run:
    settings = [*TINY, f"output_dir={folder}", f"format.name={'sdar' if kind == 'sdar' else 'preserve'}"]
    settings += [f"lora.enabled={kind == 'lora'}".lower(), f"rollout.asynchronous={asynchronous}".lower()]
    config = load_config(None, [*settings, *overrides])
    model = make_lm(kind)
    for layer in [m for m in model.modules() if isinstance(m, LoraLayer)]:
        layer.lora_dropout["default"] = nn.Dropout(config.lora.dropout)
    return trainer.start_run(model, PROMPTS, config)


def train(run: trainer.Run) -> list[float]:
    return [trainer.train_step(run, step)["loss"] for step in range(run.config.train.num_steps)]


def in_thread() -> bool:
    return threading.current_thread().name.startswith("rollouts")


def weights_of(model: DiffusionLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def simple_loop(kind: str, folder: Path, *overrides: str) -> tuple[list[float], trainer.Run]:
    """Step n trains on what the weights of the step before it started with would write; step 0 on its own."""
    run, writer, history, losses = start(kind, folder, *overrides), make_lm(kind), [], []
    config: Config = run.config
    for step in range(NUM_STEPS):
        history.append(weights_of(run.model))
        writer.load_state_dict(history[max(0, step - 1)])
        for model in (writer, run.model):
            model.spec = replace(model.spec, block_size=block_size_at(config.format, step))
        rollouts = generate_rollouts(
            writer,
            run.source.prompts.at(step),
            config.rollout,
            step=step + 1,
            seed=config.train.seed,
            from_teacher=is_from_teacher(config, step),
        )
        rng, found = generator_for(config.train.seed, step + 1, 10**6), []
        for _ in range(config.train.epochs_per_rollout):
            order = torch.randperm(len(rollouts), generator=rng).tolist()
            for chosen in (order[:2], order[2:]):
                selection, rates = selection_at(config, step), rates_at(config.masking, step)
                found.append(trainer.update(run, rollouts, chosen, selection, rates).loss)
        losses.append(sum(found) / len(found))
    return losses, run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_those_of_a_loop_without_threads(kind: str, case: str, tmp_path: Path) -> None:
    run = start(kind, tmp_path, *CASES[case])
    losses, reference = simple_loop(kind, tmp_path, *CASES[case])
    assert train(run) == losses
    expected = reference.model.state_dict()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in run.average.items():
        assert torch.equal(tensor, reference.average[name]), name
    synchronous = train(start(kind, tmp_path, *CASES[case], asynchronous=False))
    assert (synchronous == losses) == (case == "teacher")  # whose weights no step changes


@pytest.mark.parametrize("slow", ["rollouts", "updates"])
def test_the_faster_side_waits_and_no_result_changes(
    slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One side does not go on before the other is done, and then sleeps."""
    expected = train(start("lora", tmp_path))
    done, generate, update, updates = threading.Event(), rollout.generate, trainer.update, []

    def generate_in_turn(*args: Any) -> Any:
        if in_thread() and slow == "rollouts":
            assert done.wait(60)
            time.sleep(0.4)
        found = generate(*args)
        if in_thread() and slow == "updates":
            done.set()
        return found

    def update_in_turn(*args: Any) -> Any:
        updates.append(args)
        if slow == "updates" and len(updates) <= 2 * (NUM_STEPS - 1):
            assert done.wait(60)
            time.sleep(0.4)
        found = update(*args)
        if slow == "rollouts" and len(updates) % 2 == 0:
            done.set()
        return found

    monkeypatch.setattr(rollout, "generate", generate_in_turn)
    monkeypatch.setattr(trainer, "update", update_in_turn)
    run, found = start("lora", tmp_path), []
    for step in range(NUM_STEPS):
        done.clear()
        found.append(trainer.train_step(run, step))
    assert [metrics["loss"] for metrics in found] == expected
    waited = [metrics["rollout_wait_seconds"] for metrics in found]
    if slow == "rollouts":
        assert min(waited[:-1]) > 0.2
    else:
        assert max(waited[1:]) < 0.4
    assert waited[-1] < 0.4  # nothing is left to generate
    for metrics in found:
        share = metrics["rollout_wait_seconds"] / metrics["seconds"]
        assert metrics["rollout_share_of_time"] == pytest.approx(share)


def test_both_sides_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the other inside a step: one after the other they would wait forever."""
    updating, generating = threading.Event(), threading.Event()
    update, places, generate = trainer.update, [], rollout.generate

    def meet_update(*args: Any) -> Any:
        updating.set()
        assert generating.wait(60)
        return update(*args)

    def meet_generate(*args: Any) -> Any:
        places.append(in_thread())
        if in_thread():
            generating.set()
            assert updating.wait(60)
        return generate(*args)

    monkeypatch.setattr(trainer, "update", meet_update)
    monkeypatch.setattr(rollout, "generate", meet_generate)
    trainer.train_step(start("lora", tmp_path), 0)
    assert places == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_holds_twice_what_is_trained_and_nothing_else(kind: str, tmp_path: Path) -> None:
    run = start(kind, tmp_path)
    trainer.train_step(run, 0)
    copy = run.source.async_student
    assert copy is not None
    own = {name: tensor.data_ptr() for name, tensor in copy.model.state_dict().items()}
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    for name, tensor in run.model.state_dict().items():
        assert (own[name] == tensor.data_ptr()) == (name not in trained), name
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    trainer.train_step(run, 1)
    for name, parameter in copy.model.named_parameters():
        assert torch.equal(parameter, before[name]), name  # what step 1 started with
        assert parameter.data_ptr() == own[name], name
        assert not parameter.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_decodes_as_the_student_and_neither_switches_the_other(kind: str) -> None:
    model = make_lm(kind)
    twin = AsyncStudent(model).model
    config = rollout.DecodeConfig(max_new_tokens=9, batch_size=2)
    ids = [prompt.ids for prompt in PROMPTS]
    expected = generate_room.generate(model, ids, config, range(5))
    assert generate_room.generate(twin, ids, config, range(5)) == expected
    with torch.no_grad():
        for p in [p for p in model.parameters() if p.requires_grad]:
            p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    with torch.no_grad(), model.gate.after(0), model.adapter_off():
        assert twin.gate.num_clean is None
        assert generate_room.generate(twin, ids, config, range(5)) == expected
    assert generate_room.generate(model, ids, config, range(5)) != expected


def test_decoding_leaves_the_global_generator_alone() -> None:
    model, before = make_lm("copy"), torch.get_rng_state()
    section = load_config(None, ["rollout.decode.top_p=0.9", "rollout.decode.max_new_tokens=9"]).rollout
    for from_teacher in (False, True):
        generate_rollouts(model, PROMPTS, section, step=1, seed=0, from_teacher=from_teacher)
    assert torch.equal(torch.get_rng_state(), before)


class Broken(Exception):
    pass


def test_what_goes_wrong_in_the_thread_stops_training_at_the_next_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, updates, error = rollout.generate, [], Broken("in the thread")

    def break_in_thread(*args: Any) -> Any:
        if in_thread():
            raise error
        return generate(*args)

    def slow_update(*args: Any) -> loop.UpdateSums:
        updates.append(args)
        time.sleep(0.3)
        return loop.UpdateSums()

    monkeypatch.setattr(rollout, "generate", break_in_thread)
    monkeypatch.setattr(trainer, "update", slow_update)
    with pytest.raises(Broken) as raised:
        trainer.train_step(start("lora", tmp_path, "train.epochs_per_rollout=3"), 0)
    assert raised.value is error
    assert len(updates) == 1


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_what_goes_wrong_in_training_stops_the_thread(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, stop_after = [], threading.Event()
    denoise_step = generate_room.denoise_step

    def slow_step(*args: Any) -> None:
        if in_thread():
            steps.append(args)
            stop_after.set()
            time.sleep(0.1)
        denoise_step(*args)

    def fail(*_: Any) -> None:
        assert stop_after.wait(60)
        raise error

    monkeypatch.setattr(generate_room, "denoise_step", slow_step)
    monkeypatch.setattr(trainer, "update", fail)
    with pytest.raises(error):
        trainer.train_step(start("lora", tmp_path, "rollout.decode.max_new_tokens=64"), 0)
    assert len(steps) < 8  # of 16 at least
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollouts")]


def test_a_checkpoint_holds_the_rollouts_of_the_next_step(tmp_path: Path) -> None:
    run = start("lora", tmp_path, "train.max_staleness=1")
    for step in range(2):
        trainer.train_step(run, step)
    saved = {made: [Rollout.from_dict(r) for r in found] for made, found in run.progress(2)["pool"].items()}
    assert saved == {1: run.pool[1], 2: run.pool[2]}
    trainer.train_step(run, 2)
    assert sorted(run.pool) == [1, 2, 3]
    trainer.train_step(run, 3)
    assert sorted(run.progress(4)["pool"]) == [3]
