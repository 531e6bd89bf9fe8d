"""Products by oneDNN: the same values and gradients up to rounding, and only where they are enabled."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from opdlm.modeling import cpu_linear as cpu_linear
from opdlm.modeling.cpu_linear import (
    SMALL,
    CpuLinear,
    Linear,
    linear,
    product,
    upcasts,
    use_faster_linear,
)

SHAPES = [((1, 8), 4), ((300, 64), 96), ((2, 5, 32), 48), ((7,), 3), ((3, 1, 4, 16), 8)]


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with OPDLM_ONEDNN=1."""
    monkeypatch.setattr(cpu_linear, "ONEDNN", True)


def tensors(shape: tuple[int, ...], num_out: int, *, bias: bool) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    sizes = [shape, (num_out, shape[-1]), *([(num_out,)] if bias else [])]
    return [torch.randn(size, generator=rng).requires_grad_() for size in sizes]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("shape", "num_out"), SHAPES)
def test_value_and_gradients_are_those_of_float64(shape: tuple[int, ...], num_out: int, bias: bool) -> None:
    leaves = tensors(shape, num_out, bias=bias)
    inputs, weight, *rest = leaves
    output = Linear.apply(inputs, weight, rest[0] if rest else None)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(output, leaves, direction)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted_output = F.linear(*exact)
    wanted = torch.autograd.grad(wanted_output, exact, direction.double())
    torch.testing.assert_close(output.double(), wanted_output, rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=2e-5)


def test_transposed_tensors_are_read_as_they_are() -> None:
    inputs, weight = torch.randn(40, 64).T, torch.randn(40, 24).T
    torch.testing.assert_close(product(inputs, weight), inputs @ weight.T)


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_only_the_gradients_asked_for_are_computed(needed: int) -> None:
    leaves = [x.requires_grad_(i == needed) for i, x in enumerate(tensors((9, 8), 4, bias=True))]
    Linear.apply(*leaves).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [i == needed for i in range(3)]


@pytest.mark.usefixtures("faster")
def test_a_checkpointed_layer_has_the_same_gradients() -> None:
    layer = nn.Sequential(nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 256))
    use_faster_linear(layer)
    inputs = torch.randn(64, 256)

    def gradients(*, again: bool) -> list[Tensor]:
        layer.zero_grad()
        output = checkpoint(layer, inputs, use_reentrant=False) if again else layer(inputs)
        output.square().sum().backward()
        return [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]

    for found, wanted in zip(gradients(again=True), gradients(again=False), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32])
def test_other_dtypes_small_products_and_autocast_stay_as_they_are(dtype: torch.dtype) -> None:
    num_rows = 8 if dtype == torch.float32 else 2 * SMALL // 128**2
    inputs, weight = torch.randn(num_rows, 128, dtype=dtype), torch.randn(128, 128, dtype=dtype)
    assert torch.equal(linear(inputs, weight), F.linear(inputs, weight))
    assert linear(inputs[:0], weight).shape == (0, 128)
    assert linear(torch.randn(0, 512), torch.randn(512, 512)).shape == (0, 512)
    with torch.autocast("cpu", torch.bfloat16):
        large = torch.randn(2 * SMALL // 128**2, 128)
        assert linear(large, weight.float()).dtype == torch.bfloat16


@pytest.mark.usefixtures("faster")
def test_a_large_product_goes_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list[int]()
    monkeypatch.setattr(cpu_linear, "product", lambda x, *_: sizes.append(len(x)) or product(x, *_))
    weight = torch.randn(128, 128)
    for num_rows in (SMALL // 128**2, SMALL // 128**2 + 1):
        with torch.no_grad():
            linear(torch.randn(num_rows, 128), weight)
    assert sizes == [SMALL // 128**2 + 1]


@pytest.mark.usefixtures("faster")
def test_layers_are_exchanged_in_place_and_keep_their_weights() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4), nn.LayerNorm(4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_faster_linear(model)
    assert [type(module) for module in model] == [CpuLinear, Special, nn.LayerNorm]
    assert type(copy.deepcopy(model)[0]) is CpuLinear
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("faster")
def test_traced_tensors_stay_with_torch() -> None:
    with FakeTensorMode():
        assert linear(torch.empty(512, 128), torch.empty(128, 128)).shape == (512, 128)


def test_the_environment_variable_decides() -> None:
    code = "from opdlm.modeling import cpu_linear; print(cpu_linear.ONEDNN)"
    environment = {name: value for name, value in os.environ.items() if name != "OPDLM_ONEDNN"}
    for setting, enabled in (({}, False), ({"OPDLM_ONEDNN": "0"}, False), ({"OPDLM_ONEDNN": "1"}, True)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | setting,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == str(enabled and torch.backends.mkldnn.is_available())


def test_disabled_it_changes_no_bit_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "ONEDNN", False)
    layer, inputs = nn.Linear(512, 640), torch.randn(300, 512)
    wanted = layer(inputs)
    use_faster_linear(layer)
    assert torch.equal(layer(inputs), wanted)


@pytest.fixture(params=[True, False], ids=["upcast", "bfloat16"])
def upcast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """On a CPU without instructions for bfloat16, and on one with them."""
    monkeypatch.setattr(cpu_linear, "upcasts", lambda: request.param)
    return bool(request.param)


def test_bfloat16_has_the_value_and_gradients_of_float64_up_to_its_rounding(upcast: bool) -> None:
    leaves = [x.detach().bfloat16().requires_grad_() for x in tensors((300, 64), 96, bias=True)]
    output = linear(*leaves)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = [output, *torch.autograd.grad(output, leaves, direction)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted_output = F.linear(*exact)
    wanted = [wanted_output, *torch.autograd.grad(wanted_output, exact, direction.double())]
    for value, reference in zip(found, wanted, strict=True):
        assert value.dtype == torch.bfloat16
        one_rounding = torch.finfo(torch.bfloat16).eps / 2 if upcast else 0.02
        torch.testing.assert_close(value.double(), reference, rtol=1.01 * one_rounding, atol=1e-3)


def test_between_passes_only_the_bfloat16_weight_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "upcasts", lambda: True)
    weight, inputs = torch.randn(64, 64).bfloat16(), torch.randn(300, 64).bfloat16().requires_grad_()
    kept = list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear(inputs, weight).sum().backward()
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}


def test_this_cpu_is_asked() -> None:
    flags = cpu_flags()
    if not flags:
        pytest.skip("this system does not list the instructions of its CPU")
    assert upcasts() == (not flags & {"avx512bw", "avx512_bf16", "amx_bf16"})


def cpu_flags() -> set[str]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":")[1].split()}
