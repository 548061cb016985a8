"""LayerNorm and RMSNorm whose statistics and weight gradients are fp32 whatever the storage format is.

torch's CPU kernels sum the weight gradient of a 16-bit LayerNorm in 16 bits (off by 60 % at 5,000 rows), so the
backward is written here. Only the 16-bit input and one or two fp32 numbers a row are kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from fewbits.formats import Format
from fewbits.numerics.quantize import encode_both
from fewbits.numerics.wide import widen


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        wide_bias = None if bias is None else widen(bias)
        # With an fp32 weight torch's CPU kernel reads and writes 16 bits and computes in fp32, in one pass.
        y, mean, rstd = torch.native_layer_norm(
            x if x.device.type == "cpu" else widen(x), [x.shape[-1]], widen(weight), wide_bias, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        wide, wide_weight = widen(grad), widen(weight)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            wide,
            widen(x),
            [x.shape[-1]],
            mean,
            rstd,
            wide_weight,
            wide_weight,
            [True, True, ctx.bias_dtype is not None],
        )
        return (
            grad_x.to(x.dtype),
            grad_weight.to(weight.dtype),
            None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
            None,
        )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        _, rstd = statistics(x, eps, False)
        ctx.save_for_backward(x, weight, rstd)
        return normalized(x, weight, None, None, rstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight, _ = norm_backward((grad,), None, x, weight, None, rstd)
        return grad_x, grad_weight, None


def statistics(x: Tensor, eps: float, centered: bool) -> tuple[Tensor | None, Tensor]:
    """Of every row of x [..., D] in fp32, or fp64 for fp64: its mean, for a layer norm, and what a norm multiplies it by, both
    [..., 1]."""
    wide = widen(x)
    if not centered:
        return None, torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    variance, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
    return mean, torch.rsqrt(variance + eps)


def normalized(x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None, rstd: Tensor) -> Tensor:
    """The norm of x [..., D] in its dtype, of the `statistics` of x."""
    normal = (widen(x) if mean is None else widen(x) - mean) * rstd * widen(weight)
    return (normal if bias is None else normal + widen(bias)).to(x.dtype)


def add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x + branch [..., D], its norm, and the `statistics` of the sum."""
    total = x + branch
    mean, rstd = statistics(total, eps, centered)
    return total, normalized(total, weight, bias, mean, rstd), mean, rstd


def add_norm_codes(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    scale: Tensor,
    format: Format,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Of x + branch [R, D] the norm, as fp8 codes under a scale, a power of two, fp32 [1, 1], instead of its values.

    Returns the sum, codes [R, D] and [D, R] of its norm as the dtype of x rounds it, the largest magnitude of that, fp32
    [1, 1], and the `statistics` of the sum.
    """
    total, y, mean, rstd = add_norm(x, branch, weight, bias, eps, centered)
    codes, codes_t, _, amax = encode_both([y], scale, format)
    return total, codes, codes_t, amax, mean, rstd


def norm_backward(
    grads: Sequence[Tensor], along: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of a norm of x [..., D] by x, with `along`, what else arrives at x if anything does, added before it is
    rounded; by weight [D] and, where there is a mean, by bias. grads: what arrives at the norm, in summands. mean, rstd:
    `statistics` of x."""
    wide, normal = reduce(add, map(widen, grads)), (widen(x) if mean is None else widen(x) - mean) * rstd
    scaled = wide * widen(weight)
    back = scaled - normal * (scaled * normal).mean(-1, keepdim=True)
    if mean is not None:
        back = back - scaled.mean(-1, keepdim=True)
    grad_x = back * rstd if along is None else back * rstd + along
    by_weight = (wide * normal).flatten(0, -2).sum(0).to(weight.dtype)
    return grad_x.to(x.dtype), by_weight, None if mean is None else wide.flatten(0, -2).sum(0).to(weight.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalization over the last axis (Ba et al. 2016), computed in fp32, stored in the dtype of `x`.

    Shapes: x [..., D], weight [D], bias [D] or None; the result is like x.
    """
    if torch.compiler.is_compiling():
        wide_bias = None if bias is None else widen(bias)
        return torch.nn.functional.layer_norm(widen(x), [x.shape[-1]], widen(weight), wide_bias, eps).to(x.dtype)
    return _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return, no-untyped-call]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalization over the last axis (Zhang and Sennrich 2019), computed in fp32.

    Shapes: x [..., D], weight [D]; the result is like x.
    """
    if torch.compiler.is_compiling():
        wide = widen(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * widen(weight)).to(x.dtype)
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]
