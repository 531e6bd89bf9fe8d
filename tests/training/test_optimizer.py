"""Optimisers: bfloat16 keeps small updates, 8-bit moments, continuing bit for bit, recomputed layers."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import failing_after_a_save, tiny_overrides, write_checkpoint, write_data
from tiny_models import qwen3
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from opdlm.cli.main import main
from opdlm.config.sections import OptimizerSection
from opdlm.training.activation_checkpointing import checkpoint_layers
from opdlm.training.checkpoint import load_checkpoint, save_checkpoint
from opdlm.training.optimizer import MasterWeights, make_optimizer, make_scheduler

NAMES = [
    "adamw",
    pytest.param(
        "adamw8bit",
        marks=pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is optional"),
    ),
]
RATE = 1e-4


class Weights(nn.Module):
    """One matrix per dtype; 8-bit moments need at least 4096 numbers."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        values = torch.randn(64, 80, generator=torch.Generator().manual_seed(0))
        self.matrices = nn.ParameterList([values.to(dtype) for dtype in dtypes])


def gradients(step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(64, 80, generator=torch.Generator().manual_seed(step + 1)).to(dtype)


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for parameter in model.parameters():
            parameter.grad = gradients(step, parameter.dtype)
        optimizer.param_groups[0]["lr"] = RATE * (1 + step)
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: nn.Module, name: str = "adamw") -> torch.optim.Optimizer:
    return make_optimizer(list(model.parameters()), OptimizerSection(name=name, learning_rate=RATE))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_weights_follow_their_float32_twin(name: str) -> None:
    """Thirty updates of 1e-5 to weights near 1: one alone is lost in rounding, their sum is not."""
    section = OptimizerSection(name=name, learning_rate=1e-5)  # type: ignore[arg-type]
    weights = {
        dtype: nn.Parameter(torch.full((64, 80), 1.5, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    }
    for weight in weights.values():
        optimizer = make_optimizer([weight], section)
        for _ in range(600):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    moved = 1.5 - weights[torch.float32].detach()
    assert (moved > 5e-3).all()
    torch.testing.assert_close(weights[torch.bfloat16].detach(), weights[torch.float32].detach().bfloat16())
    lost = nn.Parameter(torch.full((64, 80), 1.5, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([lost], lr=1e-5, weight_decay=0.0)
    for _ in range(600):
        lost.grad = torch.ones_like(lost)
        plain.step()
    assert (lost == 1.5).all()  # what happens without a master copy


def test_the_masters_are_adamw_on_float32_weights() -> None:
    """Mixed precisions in one optimiser; float32 weights are their own masters, with no copy made."""
    model = Weights(torch.bfloat16, torch.float32)
    twin = Weights(torch.bfloat16, torch.float32).float()
    reference = torch.optim.AdamW(twin.parameters(), lr=RATE, weight_decay=0.0, foreach=False)
    optimizer = optimizer_of(model)
    assert isinstance(optimizer, MasterWeights)
    for step in range(3):
        run_steps(model, optimizer, range(step, step + 1))
        for parameter in twin.parameters():
            parameter.grad = gradients(
                step, torch.bfloat16 if parameter is twin.matrices[0] else torch.float32
            ).float()
        reference.param_groups[0]["lr"] = RATE * (1 + step)
        reference.step()
    for master, expected in zip(optimizer.masters, twin.parameters(), strict=True):
        torch.testing.assert_close(master, expected.detach(), rtol=1e-6, atol=1e-7)
    assert optimizer.masters[1].data_ptr() == model.matrices[1].data_ptr()
    assert torch.equal(model.matrices[0], optimizer.masters[0].bfloat16())


def test_float32_and_float64_weights_need_no_masters() -> None:
    for dtype in (torch.float32, torch.float64):
        assert isinstance(optimizer_of(Weights(dtype)), torch.optim.AdamW)


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_continues_bit_for_bit(
    name: str, dtypes: tuple[torch.dtype, ...], tmp_path: Path
) -> None:
    whole = Weights(*dtypes)
    run_steps(whole, optimizer_of(whole, name), range(6))
    first = Weights(*dtypes)
    optimizer = optimizer_of(first, name)
    run_steps(first, optimizer, range(3))
    save_checkpoint(tmp_path, 3, first, optimizer, {}, keep=1, best_step=0, average={})
    second = Weights(*dtypes)
    optimizer = optimizer_of(second, name)
    assert load_checkpoint(tmp_path / "checkpoint-3", second, optimizer)["step"] == 3
    run_steps(second, optimizer, range(3, 6))
    for left, right in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_fused_optimiser_is_the_plain_one() -> None:
    left, right = Weights(torch.float32), Weights(torch.float32)
    optimizer = optimizer_of(left)
    assert optimizer.defaults["fused"]
    run_steps(left, optimizer, range(5))
    plain = torch.optim.AdamW(right.parameters(), lr=RATE, weight_decay=0.0, foreach=False, fused=False)
    run_steps(right, plain, range(5))
    torch.testing.assert_close(left.matrices[0], right.matrices[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("warmup", "total", "ratio"), [(0, 7, 0.1), (3, 20, 0.0), (5, 5, 1 / 3), (4, 2, 1.0)]
)
def test_the_learning_rate_warms_up_and_falls_as_a_cosine_bit_for_bit(
    warmup: int, total: int, ratio: float
) -> None:
    section = OptimizerSection(learning_rate=3e-4, warmup_steps=warmup, min_learning_rate_ratio=ratio)

    def expected(update: int) -> float:
        if update < warmup:
            return section.learning_rate * (update / warmup)
        cosine = math.cos(math.pi * ((update - warmup) / max(1, total - warmup)))
        return section.learning_rate * (ratio + (1 - ratio) * 0.5 * (1 + cosine))

    def rates(num_done: int) -> list[float]:
        """Of the updates after `num_done`, by a new scheduler on an optimiser that has had one."""
        optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], section)
        make_scheduler(optimizer, section, total)
        scheduler = make_scheduler(optimizer, section, total, num_done)
        found = []
        for _ in range(num_done, total):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    wanted = [expected(update) for update in range(total)]
    assert rates(0) == wanted
    assert rates(total // 2) == wanted[total // 2 :]


def test_only_every_nth_layer_is_recomputed() -> None:
    model = qwen3(num_hidden_layers=5, layer_types=["full_attention"] * 5)
    checkpoint_layers(model, 2)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert [layer.gradient_checkpointing for layer in layers] == [True, False, True, False, True]
    assert [layer.training for layer in layers] == [True, False, True, False, True]


@pytest.mark.parametrize("overrides", [("lora.enabled=false",), ("lora.dropout=0.3",)])
def test_a_bfloat16_run_that_stops_and_continues_is_the_run_that_did_not(
    overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full training keeps its float32 masters and dropout its draws; adapters are float32 throughout."""
    write_checkpoint(tmp_path / "teacher")
    write_data(tmp_path)

    def run(name: str) -> int:
        settings = tiny_overrides(tmp_path / "teacher", tmp_path, tmp_path / name)[1:]
        fixed = ("model.dtype=bfloat16", "optimizer.learning_rate=1e-4", "train.save_every=1")
        return main(["convert", str(tmp_path / "teacher"), *settings, *fixed, *overrides])

    assert run("whole") == 0
    with failing_after_a_save(monkeypatch):
        assert run("parts") == 2
    assert run("parts") == 0
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        whole, parts = (
            (tmp_path / run_name / "checkpoint-2" / name).read_bytes() for run_name in ("whole", "parts")
        )
        assert whole == parts
    trained = load_file(tmp_path / "whole" / "checkpoint-2" / "trainable.safetensors")
    is_full = overrides == ("lora.enabled=false",)
    expected = {torch.bfloat16, torch.float32} if is_full else {torch.float32}  # the mask embedding too
    assert {weight.dtype for weight in trained.values()} == expected
    moments = load_file(tmp_path / "whole" / "checkpoint-2" / "optimizer.safetensors")
    assert {value.dtype for value in moments.values()} == {torch.float32}
    assert is_full == any(key.endswith(".master") for key in moments)
