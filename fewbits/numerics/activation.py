"""GELU in the tanh approximation (Hendrycks and Gimpel 2016), in the form that a CPU evaluates fast.

    0.5 x (1 + tanh(u)) = x s,  s = sigmoid(z),  z = 2u = x (k + c x^2),  k = 2 sqrt(2 / pi),  c = 0.044715 k
    its derivative      = s + x z' s (1 - s),    z' = k + 3 c x^2,  so  x z' = 3 z - 2 k x

torch's CPU kernels take four times as long for a tanh as for a sigmoid, and take it again in the backward pass. Here the
derivative is formed in the forward pass while its parts are at hand, and kept in place of the input.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_K = 2 * math.sqrt(2 / math.pi)
_C = 0.044715 * _K
_FAR = 30.0  # beyond it s is 0 or 1 to the last bit, and x^3 would overflow
_PIECE = 524288  # elements; a larger piece leaves the caches of a CPU, a smaller one spends its time between the calls


def _piece(x: Tensor, y: Tensor, slope: Tensor, room: Tensor) -> None:
    """Writes gelu(x) into `y` and its derivative into `slope`, 1-D tensors of a 16-bit dtype; room: fp32 [3, as many]."""
    near, z, s = room
    near.copy_(x).clamp_(-_FAR, _FAR)
    torch.addcmul(near.new_tensor(_K), near, near, value=_C, out=z).mul_(near)
    torch.sigmoid(z, out=s)
    z.sub_(near, alpha=2 * _K / 3)  # a third of x z'
    torch.ops.aten.sigmoid_backward(z, s, grad_input=near)
    slope.copy_(near.mul_(3).add_(s))
    y.copy_(near.copy_(x).mul_(s))


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y, slope = torch.empty_like(x), torch.empty_like(x)
        room = torch.empty(3, min(_PIECE, x.numel()))
        for start in range(0, x.numel(), _PIECE):
            flat_x, flat_y, flat_slope = (tensor.view(-1)[start : start + _PIECE] for tensor in (x, y, slope))
            _piece(flat_x, flat_y, flat_slope, room[:, : flat_x.numel()])
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        slope: Tensor = ctx.saved_tensors[0]
        return grad * slope


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh approximation, computed in fp32 (fp64 for fp64) and stored in the dtype of `x`; any shape.

    For 16-bit tensors on a CPU, in eager code, the derivative is rounded to their format as it is kept. Elsewhere torch's
    kernel runs.
    """
    if x.device.type != "cpu" or x.dtype.itemsize != 2 or torch.compiler.is_compiling():
        return torch.nn.functional.gelu(x, approximate="tanh")
    return _Gelu.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def gelu_wide(x: Tensor) -> Tensor:
    """`gelu` by the formula above in fp32, rounded once to the dtype of `x`: what kernels/activation.py is held to."""
    wide = x.float()
    return (wide * torch.sigmoid(_argument(wide))).to(x.dtype)


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `gelu` at `x`, in fp32, rounded once to the dtype of `grad`."""
    wide = x.float()
    z = _argument(wide)
    s = torch.sigmoid(z)
    slope = s + (3 * z - 2 * _K * wide.clamp(-_FAR, _FAR)) * s * (1 - s)
    return (grad.float() * slope).to(grad.dtype)


def _argument(x: Tensor) -> Tensor:
    near = x.clamp(-_FAR, _FAR)
    return near * (_K + _C * near * near)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020) in fp32, rounded once to the dtype of `up`."""
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(up.dtype)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `swiglu` by gate and by up, each in fp32, rounded once to the dtype of `grad`."""
    wide, upstream = gate.float(), grad.float()
    s = torch.sigmoid(wide)
    by_gate = upstream * up.float() * (s * (1 + wide * (1 - s)))
    return by_gate.to(grad.dtype), (upstream * (wide * s)).to(grad.dtype)
