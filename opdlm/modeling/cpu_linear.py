"""Linear layers on CPUs, faster than torch multiplies there.

Few rows go to a kernel of our own (`skinny_gemm.py`), where no gradient is needed. Bfloat16 on a CPU without
its instructions is multiplied in float32, which is several times faster there: with each product the weight
is converted, and only the conversion of one weight is in memory at a time. With `OPDLM_ONEDNN=1` in the
environment, large float32 products go to oneDNN instead of MKL: torch's MKL has AVX-512 kernels for Intel
processors only, oneDNN for every processor, and on an AMD EPYC of 2024 a large product takes half the time
(docs/lab/cpu.md). All of these differ from torch's own results in the last bits; other products are torch's.

Shape suffixes: I in, O out, N rows.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from opdlm.modeling.skinny_gemm import is_skinny, skinny_product

ONEDNN = os.environ.get("OPDLM_ONEDNN") == "1" and torch.backends.mkldnn.is_available()
LARGE = 2**18
"""Numbers in a weight from which oneDNN is faster even for one row: 512 x 512, measured."""
SMALL = 2**22
"""Multiplications up to which a product with a smaller weight stays with MKL. In a loop of equal calls oneDNN
is faster from 2^20. Decoding changes the number of rows with every call, where oneDNN has a higher overhead.
"""
LOW_PRECISIONS = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
"""And torch's own question to oneDNN whether the CPU has instructions for it."""
PLAIN = (Tensor, nn.Parameter)
"""Not quantised, sharded or traced."""


def cpu_multiplies(dtype: str) -> bool:
    """Whether this CPU has instructions for matrix products in this precision. Without them torch takes 5 to
    9 times as long for 16 rows or more as in float32 (docs/lab/cpu.md). True where torch cannot say.
    """
    if dtype not in LOW_PRECISIONS or not torch.backends.mkldnn.is_available():
        return True
    return bool(getattr(torch.ops.mkldnn, LOW_PRECISIONS[dtype])())


@cache
def upcasts() -> bool:
    """Whether products in bfloat16 are computed in float32, because this CPU has no instructions for them."""
    return not cpu_multiplies("bfloat16")


def linear(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear`, by the fastest way of this CPU."""
    if not is_plain(inputs, weight_OI) or (inputs.dtype == torch.bfloat16 and not upcasts()):
        return F.linear(inputs, weight_OI, bias_O)
    needs_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (inputs, weight_OI, bias_O)
    )
    if not needs_gradient and is_skinny(inputs, weight_OI):
        return skinny_product(inputs, weight_OI, bias_O)
    if inputs.dtype == torch.float32:
        is_small = weight_OI.numel() < LARGE and inputs.numel() * weight_OI.shape[0] <= SMALL
        if is_small or not ONEDNN:
            return F.linear(inputs, weight_OI, bias_O)
    if needs_gradient:
        output: Tensor = Linear.apply(inputs, weight_OI, bias_O)
        return output
    return product(inputs, weight_OI, bias_O)


def is_plain(inputs: Tensor, weight_OI: Tensor) -> bool:
    """Whether these are ordinary tensors on the CPU in a precision that is handled here."""
    return (
        inputs.device.type == weight_OI.device.type == "cpu"
        and inputs.numel() > 0
        and type(inputs) in PLAIN
        and type(weight_OI) in PLAIN
        and inputs.dtype == weight_OI.dtype
        and inputs.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_autocast_enabled("cpu")
    )


def product(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """inputs @ weight^T + bias: bfloat16 in float32, float32 by oneDNN."""
    if inputs.dtype == torch.bfloat16:
        bias = None if bias_O is None else bias_O.float()
        return F.linear(inputs.float(), weight_OI.float(), bias).to(inputs.dtype)
    return onednn_product(inputs, weight_OI, bias_O)


def onednn_product(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """By oneDNN: the operator of `torch.compile` on CPUs."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight_OI, bias_O, "none", [], "")
    return output


def traced_linear(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`linear` for a compiled forward, where no choice may depend on the number of rows."""
    is_float32 = weight_OI.dtype == torch.float32 and inputs.device.type == "cpu"
    if ONEDNN and weight_OI.numel() >= LARGE and is_float32:
        return onednn_product(inputs, weight_OI, bias_O)
    return F.linear(inputs, weight_OI, bias_O)


class Linear(torch.autograd.Function):
    """`product` with its gradients, which are products as well."""

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


class CpuLinear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return traced_linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


def use_faster_linear(model: nn.Module) -> None:
    """Make every plain linear layer a `CpuLinear`, in place. Weights, names and saved files stay the same."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = CpuLinear
