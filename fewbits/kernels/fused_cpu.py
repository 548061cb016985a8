"""What a training step does between its matmuls, on a CPU in eager code: fast twins of numerics, one reading each.

fp32 inside whatever the storage format, rounded once; sums are made of parts whose size depends on the shape alone, so
that results do not depend on the number of threads. Functions carry the names of their definitions.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewbits.choice import Choice
from fewbits.kernels import cpp
from fewbits.numerics.loss import IGNORE

_FUNCTIONS = {
    "gelu": "iiplpp", "norm": "iipllppfippp", "norm_backward": "iippllpppippp", "column_sums": "iiplllp",
    "softmax_gradient": "iipllplfpp", "attention_softmax": "iipllllflplp", "attention_softmax_backward": "iippllllflp",
}  # fmt: skip


@cache
def library() -> Choice:
    """Choice(the compiled library or None, why), settled for the life of the process."""
    return cpp.library("fused_cpu", _FUNCTIONS)


def _call(function: str, format: torch.dtype, *arguments: Any) -> int:
    return cpp.call(library().value, function, format, *arguments)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        y, slope = torch.empty_like(x), torch.empty_like(x)
        _call("gelu", x.dtype, x, x.numel(), y, slope)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        slope: Tensor = ctx.saved_tensors[0]
        return grad * slope


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh approximation as numerics/activation.py defines it; the derivative is kept in the dtype of x."""
    return _Gelu.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
        x, D = x.contiguous(), x.shape[-1]
        y, rows = torch.empty_like(x), x.numel() // max(1, D)
        mean, rstd = torch.empty(2, rows)
        wide, wide_bias = weight.float(), None if bias is None else bias.float()
        _call("norm", x.dtype, x, rows, D, wide, wide_bias, eps, centred, y, mean, rstd)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.centred, ctx.bias_dtype = centred, None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        grad, grad_x, wide = grad.contiguous(), torch.empty_like(x), weight.float()
        sums = torch.empty(2, x.shape[-1])
        _call(
            "norm_backward", x.dtype, grad, x, mean.numel(), x.shape[-1], wide, mean, rstd, ctx.centred, grad_x, *sums
        )
        grad_bias = None if ctx.bias_dtype is None else sums[1].to(ctx.bias_dtype)
        return grad_x, sums[0].to(weight.dtype), grad_bias, None, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalization over the last axis, as numerics/norm.py: x [..., D], weight [D], bias [D] or None."""
    return _Norm.apply(x, weight, bias, eps, True)  # type: ignore[no-any-return, no-untyped-call]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalization over the last axis, as numerics/norm.py: x [..., D], weight [D]."""
    return _Norm.apply(x, weight, None, eps, False)  # type: ignore[no-any-return, no-untyped-call]


def column_sums(x: Tensor) -> Tensor:
    """The sums of the columns of a matrix [N, D] of bf16, fp16 or fp32, in fp32: [D]. Rows may lie apart."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape[1])
    _call("column_sums", x.dtype, x, *x.shape, x.stride(0), out)
    return out


def softmax_gradient(
    logits_NV: Tensor, labels_N: Tensor, factor: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Loss of every row in fp32, and the gradient of `factor * sum(losses)` with respect to the logits in `dtype`.

    logits: fp32 [N, V]; labels: int64 [N], -100 is ignored. Raises IndexError for another label that is no token.
    """
    logits_NV, labels_N = logits_NV.contiguous(), labels_N.contiguous()
    (N, V), losses_N = logits_NV.shape, torch.empty(labels_N.shape)
    gradient_NV = torch.empty(N, V, dtype=dtype)
    bad = _call("softmax_gradient", dtype, logits_NV, N, V, labels_N, IGNORE, float(factor), losses_N, gradient_NV)
    if bad:
        raise IndexError(f"label {int(labels_N[bad - 1])} is out of bounds: it is neither {IGNORE} nor below {V}.")
    return losses_N, gradient_NV


def write_softmax(P_bHTT: Tensor, scores: Tensor, rows: slice, scale: float, mask: Tensor | None) -> None:
    """See `Softmax` of numerics/attention.py; P and scores are contiguous, scores fp32."""
    H, T = P_bHTT.shape[1:3]
    allowed = None if mask is None else mask.contiguous()
    _call("attention_softmax", P_bHTT.dtype, scores, *scores.shape, rows.start, scale, T, allowed, H, P_bHTT)


def write_gradient(dS_NTT: Tensor, dP: Tensor, P_NTT: Tensor, rows: slice, scale: float) -> None:
    """See `Softmax` of numerics/attention.py; all are contiguous, dP fp32."""
    _call("attention_softmax_backward", P_NTT.dtype, dP, P_NTT, *dP.shape, rows.start, scale, P_NTT.shape[1], dS_NTT)
