"""Products by oneDNN: the same numbers and gradients, and only where they are meant to be."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from opdlm.modeling import cpu_linear as cpu_linear
from opdlm.modeling.cpu_linear import (
    FIRST_PACKED,
    SAVED,
    SMALL,
    CpuLinear,
    Linear,
    Packing,
    linear,
    packed_weights,
    product,
    use_faster_linear,
)

SHAPES = [((1, 8), 4), ((300, 64), 96), ((2, 5, 32), 48), ((7,), 3), ((3, 1, 4, 16), 8)]


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with AVX-512 that is not Intel's."""
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: True)


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


def large_layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 640), nn.Linear(640, 512, bias=False), nn.Linear(512, 64))
    use_faster_linear(model)
    return model


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing costs nothing once it was tried."""
    pack = Packing.pack

    def free(self: Packing, layer: CpuLinear, inputs: Tensor) -> Tensor:
        packed = pack(self, layer, inputs)
        self.num_calls = FIRST_PACKED
        return packed

    monkeypatch.setattr(Packing, "pack", free)


def call_until_packed(model: nn.Module, inputs: Tensor) -> Tensor:
    for _ in range(FIRST_PACKED):
        model(inputs)
    output: Tensor = model(inputs)
    return output


@pytest.mark.usefixtures("faster", "at_once")
@pytest.mark.parametrize("num_rows", [1, 2, 3, 40, 700])
def test_packed_weights_give_the_same_bits(num_rows: int) -> None:
    model, inputs = large_layers(), torch.randn(1, num_rows, 512)
    with torch.no_grad(), packed_weights(model):
        wanted = model(inputs)
        output = call_until_packed(model, inputs)
        large = num_rows > 1  # a single row gains little
        assert [layer.packed is not None for layer in model] == [large, large, False]
    assert torch.equal(output, wanted)


@pytest.mark.usefixtures("faster")
def test_layers_wait_for_as_many_calls_as_pay_for_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(
        [0, 1.0, 1.0 + 80 * SAVED, 0, 1.0, 1.0]
    )  # a product takes 1 s, packing 80 times what it saves
    monkeypatch.setattr(cpu_linear.time, "perf_counter", lambda: next(clock))
    model, inputs = large_layers(), torch.randn(2, 512)
    packed_at = dict[int, int]()
    with torch.no_grad(), packed_weights(model):
        for call in range(1, 120):
            model(inputs)
            for place, layer in enumerate(model):
                if layer.packed is not None:
                    packed_at.setdefault(place, call)
    assert packed_at == {0: FIRST_PACKED + 1, 1: 81}


@pytest.mark.usefixtures("faster", "at_once")
def test_packed_weights_live_as_long_as_the_block_and_follow_no_gradient() -> None:
    model, inputs = large_layers(), torch.randn(2, 512)
    with packed_weights(model):
        for _ in range(FIRST_PACKED + 1):
            model(inputs).sum().backward()
        assert all(layer.packed is None for layer in model)
        with torch.inference_mode():
            old = call_until_packed(model, inputs)
    assert all(layer.packed is layer.packing is None for layer in model)
    with torch.no_grad():
        model[0].weight.mul_(2)
        with packed_weights(model):
            assert not torch.allclose(call_until_packed(model, inputs), old), "the weights of now"


@pytest.mark.usefixtures("faster", "at_once")
def test_nothing_is_packed_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = large_layers(), torch.randn(2, 512)
    num_bytes = sum(layer.weight.nbytes for layer in model[:2])
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(cpu_linear, "CGROUP", tmp_path)
    for limit, is_packed in (("max", True), (2 * num_bytes + 1000, True), (2 * num_bytes + 999, False)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        with torch.no_grad(), packed_weights(model):
            call_until_packed(model, inputs)
            assert (model[0].packed is not None) == is_packed
    monkeypatch.setattr(cpu_linear, "MEMORY_INFO", tmp_path / "none")
    assert cpu_linear.free_memory() == 0


@pytest.mark.usefixtures("faster")
def test_other_dtypes_are_never_packed() -> None:
    with packed_weights(model := large_layers().bfloat16()):
        assert all(layer.packing is None for layer in model)


@pytest.mark.usefixtures("faster", "at_once")
def test_a_failure_drops_the_copies() -> None:
    model = large_layers()
    with pytest.raises(RuntimeError, match="primitive"), torch.no_grad(), packed_weights(model):
        call_until_packed(model, torch.randn(2, 512))
        nn.Sequential.forward(model, torch.randn(2, 5))
    assert all(layer.packed is None for layer in model)


@pytest.mark.usefixtures("faster")
def test_traced_tensors_stay_with_torch() -> None:
    with FakeTensorMode():
        assert linear(torch.empty(512, 128), torch.empty(128, 128)).shape == (512, 128)


def test_intel_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {"amd": "vendor_id\t: AuthenticAMD\n", "intel": "vendor_id\t: GenuineIntel\n"}
    for name, content in text.items():
        (tmp_path / name).write_text(content)
        monkeypatch.setattr(cpu_linear, "CPU_INFO", tmp_path / name)
        assert cpu_linear.is_intel() == (name == "intel")
