"""Products of few rows by the compiled kernel, against float64, and what happens without a compiler."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from opdlm.modeling import cpu_linear, skinny_gemm
from opdlm.modeling.cpu_linear import linear, use_faster_linear
from opdlm.modeling.skinny_gemm import MOST_ROWS, SMALLEST_WEIGHT, is_skinny, kernel, skinny_product, why_not

SHAPES = [(512, 512), (401, 250), (1, 100_003), (100_003, 1), (257, 577)]
"""Numbers of outputs and inputs; some are no multiples of a tile or of a vector."""
needs_kernel = pytest.mark.skipif(kernel() is None, reason=f"no kernel here: {why_not()}")


def tensors(num_out: int, num_in: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(num_out)
    sizes = ((MOST_ROWS, num_in), (num_out, num_in), (num_out,))
    inputs, weight, bias = (torch.randn(size, generator=rng).to(dtype) for size in sizes)
    return inputs, weight, bias


@needs_kernel
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_it_is_the_product_and_no_row_depends_on_the_others(
    num_out: int, num_in: int, dtype: torch.dtype, threads: int
) -> None:
    inputs, weight, bias = tensors(num_out, num_in, dtype)
    exact = inputs.double() @ weight.double().T + bias.double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = torch.cat([skinny_product(row[None], weight, bias) for row in inputs])
        together = [skinny_product(inputs[:n], weight, bias) for n in range(1, MOST_ROWS + 1)]
    finally:
        torch.set_num_threads(before)
    scale = num_in**0.5 * torch.finfo(dtype).eps
    torch.testing.assert_close(alone.double(), exact, rtol=torch.finfo(dtype).eps, atol=64 * scale)
    for n, found in enumerate(together, start=1):
        assert found.dtype == dtype and torch.equal(found, alone[:n])


@needs_kernel
def test_the_last_inputs_of_a_row_are_no_others() -> None:
    """A weight whose next row holds nothing that is finite is read to its end and no further."""
    storage = torch.full((402, 250), torch.nan)
    storage[:401] = 1.0
    inputs = torch.cat([torch.ones(1, 250), torch.full((1, 250), torch.inf)])[:1]
    assert torch.equal(skinny_product(inputs, storage[:401]), torch.full((1, 401), 250.0))


@needs_kernel
def test_other_shapes_of_inputs() -> None:
    inputs, weight, bias = tensors(512, 512, torch.float32)
    wanted = skinny_product(inputs, weight, bias)
    assert torch.equal(skinny_product(inputs.view(2, 8, 512), weight, bias), wanted.view(2, 8, 512))
    assert torch.equal(skinny_product(inputs[3], weight, bias), wanted[3])
    every_other = torch.stack([inputs, inputs], 2).flatten(1)[:, ::2]
    assert not every_other.is_contiguous()
    assert torch.equal(skinny_product(every_other, weight, bias), wanted)


@needs_kernel
def test_few_rows_without_a_gradient_and_large_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()
    original = cpu_linear.skinny_product
    monkeypatch.setattr(
        cpu_linear, "skinny_product", lambda x, *rest: calls.append(len(x)) or original(x, *rest)
    )
    inputs, weight, bias = tensors(512, 512, torch.float32)
    many = torch.randn(MOST_ROWS + 1, 512)
    for rows in (inputs, many):
        linear(rows, weight, bias)
    assert calls == [MOST_ROWS]
    linear(inputs.clone().requires_grad_(), weight).sum().backward()
    linear(inputs, weight.clone().requires_grad_()).sum().backward()
    assert calls == [MOST_ROWS]
    with torch.no_grad():
        linear(inputs, weight.clone().requires_grad_())
    assert calls == [MOST_ROWS] * 2
    small = torch.randn(SMALLEST_WEIGHT // 512, 512)[:-1]
    assert not is_skinny(inputs, small) and not is_skinny(inputs, weight.T)
    assert not is_skinny(inputs.double(), weight.double()) and not is_skinny(inputs[:0], weight)


@needs_kernel
def test_a_layer_of_a_model_uses_it() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.SiLU())
    inputs = torch.randn(3, 512)
    wanted = torch.nn.functional.silu(skinny_product(inputs, model[0].weight, model[0].bias))
    use_faster_linear(model)
    with torch.no_grad():
        assert torch.equal(model(inputs), wanted)


def run_python(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.strip()


WHY = (
    "import torch; from opdlm.modeling.skinny_gemm import kernel, why_not; print(kernel() is None, why_not())"
)
PRODUCT = """
import torch
from opdlm.modeling.cpu_linear import linear
x, w = torch.randn(3, 512), torch.randn(512, 512)
print(torch.equal(linear(x, w), torch.nn.functional.linear(x, w)))
"""


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OPDLM_SKINNY_GEMM": "0"}, "OPDLM_SKINNY_GEMM=0"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler (CXX or c++)"),
        ({"CXX": "false"}, "false failed"),
    ],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel is for Linux")
def test_without_it_torch_multiplies_and_the_reason_is_told(
    variables: dict[str, str], words: str, tmp_path: Path
) -> None:
    variables = variables | {"XDG_CACHE_HOME": str(tmp_path)}
    said = run_python(WHY, **variables)
    assert said.startswith("True") and words in said
    assert run_python(PRODUCT, **variables) == "True"
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = run_python(WHY, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert said.startswith("True ") and len(said) > len("True ")


@needs_kernel
def test_it_is_compiled_once_into_a_private_folder(tmp_path: Path) -> None:
    for compiler in ("c++", "env c++"):
        assert run_python(WHY, XDG_CACHE_HOME=str(tmp_path), CXX=compiler) == "False"
        files = list((tmp_path / "opdlm").iterdir())
        assert [path.suffix for path in files] == [".so"]
    assert stat.S_IMODE((tmp_path / "opdlm").stat().st_mode) == 0o700
    assert skinny_gemm.compiled().name == files[0].name
