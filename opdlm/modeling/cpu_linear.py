"""Linear layers in float32 on CPUs where oneDNN multiplies faster than MKL, which torch calls.

MKL, in every x86 build of torch, knows AVX-512 on Intel only. oneDNN, in the same build, has it everywhere:
on an AMD EPYC of 2024 a product takes half the time, forward and backward (docs/lab/cpu.md). Small products
stay with MKL, whose calls cost less; so does everything on other processors, in other dtypes and under
autocast.

With few rows, as in a decoding step, most of a product's time goes into bringing the weights into oneDNN's
layout. `packed_weights` keeps copies in that layout as long as a decode runs.

Shape suffixes: I in, O out.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LARGE = 2**18
"""Numbers in a weight from which oneDNN is faster even for one row, and packing pays: 512 x 512, measured."""
SMALL = 2**22
"""Multiplications up to which a product with a smaller weight is MKL's. In a loop of equal calls oneDNN wins
from 2^20; where the number of rows changes with every call, as in decoding, its look-ups cost more.
"""
FIRST_PACKED = 24
"""Calls after which the first layer is packed, on trial: on most machines packing pays by then."""
SAVED = 0.4
"""Share of a call's time that packed weights save: measured, 2 to 8 rows."""
PLAIN = (Tensor, nn.Parameter)
"""Not quantised, sharded or traced."""
CPU_INFO = Path("/proc/cpuinfo")
MEMORY_INFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


@cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and is not Intel's."""
    known = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return known and "AVX512" in torch.backends.cpu.get_cpu_capability() and not is_intel()


def is_intel() -> bool:
    vendor = CPU_INFO.read_text(errors="replace") if CPU_INFO.is_file() else platform.processor()
    return "GenuineIntel" in vendor


def linear(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear`, by the faster library."""
    is_small = weight_OI.numel() < LARGE and inputs.numel() * weight_OI.shape[0] <= SMALL
    if is_small or not can_multiply(inputs, weight_OI):
        return F.linear(inputs, weight_OI, bias_O)
    if torch.is_grad_enabled():
        output: Tensor = Linear.apply(inputs, weight_OI, bias_O)
        return output
    return product(inputs, weight_OI, bias_O)


def can_multiply(inputs: Tensor, weight_OI: Tensor) -> bool:
    """Whether oneDNN takes these, and is the faster one."""
    return (
        onednn_is_faster()
        and inputs.numel() > 0
        and type(inputs) in PLAIN
        and type(weight_OI) in PLAIN
        and inputs.dtype == weight_OI.dtype == torch.float32
        and inputs.device.type == weight_OI.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


def product(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """inputs @ weight^T + bias by oneDNN: what `torch.compile` makes of linear layers on CPU."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight_OI, bias_O, "none", [], "")
    return output


def traced_linear(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`linear` for a compiled forward, where nothing may depend on the number of rows."""
    if weight_OI.numel() >= LARGE and weight_OI.dtype == torch.float32 and inputs.device.type == "cpu":
        return product(inputs, weight_OI, bias_O)
    return F.linear(inputs, weight_OI, bias_O)


class Linear(torch.autograd.Function):
    """`product` with its two gradients, which are products as well."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight_OI)
        return product(inputs, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight_OI = ctx.saved_tensors
        grad_NO, inputs_NI = grad.reshape(-1, grad.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad, weight_OI.t()) if needs_inputs else None,
            product(grad_NO.t(), inputs_NI.t()) if needs_weight else None,
            grad_NO.sum(0) if needs_bias else None,
        )


class Packing:
    """When layers are packed: after as many calls as would have paid for it, going by the last one packed.
    Where fresh memory is slow (some virtual machines), that is late.
    """

    def __init__(self) -> None:
        self.num_calls = float(FIRST_PACKED)

    def pack(self, layer: CpuLinear, inputs: Tensor) -> Tensor:
        """The layer's weight in oneDNN's layout."""
        started = time.perf_counter()
        product(inputs, layer.weight, layer.bias)
        middle = time.perf_counter()
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
        self.num_calls = (time.perf_counter() - middle) / (SAVED * (middle - started))
        return packed


class CpuLinear(nn.Linear):
    """`nn.Linear` through `linear`, or by packed weights while `packed_weights` is open: the same bits."""

    packing: Packing | None = None
    packed: Tensor | None = None
    num_calls = 0

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return traced_linear(input, self.weight, self.bias)
        packing, packed = self.packing, self.packed
        if (
            packing is None
            or input.numel() <= self.in_features  # a single row: computed in another order, little to gain
            or torch.is_grad_enabled()
            or not can_multiply(input, self.weight)
        ):
            return linear(input, self.weight, self.bias)
        if packed is None:
            self.num_calls += 1
            if self.num_calls <= packing.num_calls:
                return linear(input, self.weight, self.bias)
            packed = self.packed = packing.pack(self, input)
        return product(input, packed, self.bias)


def use_faster_linear(model: nn.Module) -> None:
    """Every plain linear layer, in place; weights, names and what is saved stay as they are."""
    if onednn_is_faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = CpuLinear


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Around inference that changes no weight: large layers that are called again and again multiply by
    copies in oneDNN's layout, dropped at the end. Nothing is copied where memory is short.
    """
    layers = [
        m
        for m in model.modules()
        if isinstance(m, CpuLinear) and m.weight.numel() >= LARGE and can_multiply(m.weight, m.weight)
    ]
    num_bytes = sum(weight.nbytes for weight in {layer.weight for layer in layers})
    if not layers or num_bytes > free_memory() // 2:
        yield
        return
    packing = Packing()
    for layer in layers:
        layer.packing, layer.num_calls = packing, 0
    try:
        yield
    finally:
        for layer in layers:
            layer.packing = layer.packed = None


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its control group if that has less; 0
    where no Linux says so.
    """
    if not MEMORY_INFO.is_file():
        return 0
    fields = dict(line.split(":") for line in MEMORY_INFO.read_text().splitlines())
    available = int(fields["MemAvailable"].removesuffix("kB")) * 1024
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text) - int(used.read_text()))
    return available
