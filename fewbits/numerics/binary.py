"""Weights of one bit: the sign, times one scale a row, with a gradient that goes straight through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.numerics.ranges import largest_scale


class _Binarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return torch.where(x < 0, -1.0, 1.0).to(x.dtype) * largest_scale(x, "binary")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= ctx.limit), None


def binarize(x: Tensor, limit: float = 1.0) -> Tensor:
    """sign(x) * mean(|x|) over each row of x [..., K]: shape and dtype of x, sign(0) is +1.

    Forward as in XNOR-Net (Rastegari et al. 2016). Backward passes the gradient where |x| <= limit and stops it beyond,
    where the sign will not change soon (Courbariaux et al. 2016, equation 4); it does not flow through the scale.

    >>> binarize(torch.tensor([[1.0, -3.0]]))
    tensor([[ 2., -2.]])
    """
    return _Binarize.apply(x, limit)  # type: ignore[no-any-return, no-untyped-call]
