"""Float32 linear layers by oneDNN instead of MKL, on CPUs: off unless `OPDLM_ONEDNN=1` is in the environment.

torch multiplies float32 matrices by MKL, whose AVX-512 kernels run on Intel processors only. oneDNN, in the
same build of torch, has AVX-512 kernels for every processor: on an AMD EPYC of 2024 a large product takes
half the time, forward and backward (docs/lab/cpu.md). With the variable set, linear layers and the LM head
multiply by oneDNN. Small products, other dtypes and products under autocast stay as they are. The results
differ from MKL's in the last bits.

Shape suffixes: I in, O out, N rows.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ENABLED = os.environ.get("OPDLM_ONEDNN") == "1" and torch.backends.mkldnn.is_available()
LARGE = 2**18
"""Numbers in a weight from which oneDNN is faster even for one row: 512 x 512, measured."""
SMALL = 2**22
"""Multiplications up to which a product with a smaller weight stays with MKL. In a loop of equal calls oneDNN
is faster from 2^20. Decoding changes the number of rows with every call, where oneDNN has a higher overhead.
"""
PLAIN = (Tensor, nn.Parameter)
"""Not quantised, sharded or traced."""


def linear(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear`, by oneDNN where it is enabled and faster."""
    is_small = weight_OI.numel() < LARGE and inputs.numel() * weight_OI.shape[0] <= SMALL
    if is_small or not can_multiply(inputs, weight_OI):
        return F.linear(inputs, weight_OI, bias_O)
    if torch.is_grad_enabled():
        output: Tensor = Linear.apply(inputs, weight_OI, bias_O)
        return output
    return product(inputs, weight_OI, bias_O)


def can_multiply(inputs: Tensor, weight_OI: Tensor) -> bool:
    """Whether oneDNN is enabled and takes these tensors."""
    return (
        ENABLED
        and inputs.numel() > 0
        and type(inputs) in PLAIN
        and type(weight_OI) in PLAIN
        and inputs.dtype == weight_OI.dtype == torch.float32
        and inputs.device.type == weight_OI.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


def product(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """inputs @ weight^T + bias by oneDNN: the operator of `torch.compile` on CPUs."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight_OI, bias_O, "none", [], "")
    return output


def traced_linear(inputs: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`linear` for a compiled forward, where no choice may depend on the number of rows."""
    if weight_OI.numel() >= LARGE and weight_OI.dtype == torch.float32 and inputs.device.type == "cpu":
        return product(inputs, weight_OI, bias_O)
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
    """Make every plain linear layer a `CpuLinear`, in place, if oneDNN is enabled. Weights, names and saved
    files stay the same.
    """
    if ENABLED:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = CpuLinear
