"""Products by oneDNN: the same values and gradients up to rounding, and only where they are enabled."""

import copy
import os
import subprocess
import sys

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
    use_faster_linear,
)

SHAPES = [((1, 8), 4), ((300, 64), 96), ((2, 5, 32), 48), ((7,), 3), ((3, 1, 4, 16), 8)]


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with OPDLM_ONEDNN=1."""
    monkeypatch.setattr(cpu_linear, "ENABLED", True)


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
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
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
    code = "from opdlm.modeling import cpu_linear; print(cpu_linear.ENABLED)"
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


def test_disabled_it_changes_no_layer_and_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "ENABLED", False)
    layer, inputs = nn.Linear(512, 640), torch.randn(300, 512)
    use_faster_linear(layer)
    assert type(layer) is nn.Linear
    assert torch.equal(linear(inputs, layer.weight, layer.bias), F.linear(inputs, layer.weight, layer.bias))
