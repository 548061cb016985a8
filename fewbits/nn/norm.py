"""Norm modules: fp32 statistics, fp32 sums of weight gradients, whatever the storage format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.kernels.dispatch import fused, norm_execution
from fewbits.kernels.norm import norm_backward, why_not
from fewbits.nn.linear import unheard
from fewbits.numerics.norm import layer_norm, rms_norm, statistics
from fewbits.numerics.wide import wide_dtype, widen


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis with fp32 inside; other shapes and weightless norms keep torch's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape and dtype."""
        if len(self.normalized_shape) != 1 or self.weight is None:
            return super().forward(x)
        twin = fused(x)
        arguments = (x, self.weight, self.bias, self.eps)
        return layer_norm(*arguments) if twin is None else twin.layer_norm(*arguments)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last axis with fp32 inside; other shapes and weightless norms keep torch's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape and dtype."""
        if len(self.normalized_shape) != 1 or self.weight is None:
            return super().forward(x)
        # torch's default eps is that of the input's format; the statistics here are fp32 or wider
        eps = torch.finfo(wide_dtype(x.dtype)).eps if self.eps is None else self.eps
        twin = fused(x)
        return rms_norm(x, self.weight, eps) if twin is None else twin.rms_norm(x, self.weight, eps)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        centered: bool,
        twice: bool,
    ) -> tuple[Tensor, ...]:
        total = x + branch
        mean, rstd = statistics(total, eps, centered)
        normal = (widen(total) if mean is None else widen(total) - mean) * rstd * widen(weight)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.biased = bias is not None
        y = (normal if bias is None else normal + widen(bias)).to(total.dtype)
        return (total, y, y.view_as(y)) if twice else (total, y)

    @staticmethod
    def backward(ctx: Any, along: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, mean, rstd = ctx.saved_tensors
        grad_total, by_weight, by_bias = norm_backward(grads, along, total, weight, mean, rstd)
        return grad_total, grad_total, by_weight, by_bias if ctx.biased else None, None, None, None


def add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool, twice: bool
) -> tuple[Tensor, ...]:
    """x + branch, and the layer norm of that, or the root-mean-square norm where it is not centered: for a compiler, which
    makes the forward pass one kernel and calls kernels/norm.py for the backward pass. twice: the norm for each of two who
    read it, so that their gradients are added up where they are read."""
    return _AddNorm.apply(x, branch, weight, bias, eps, centered, twice)  # type: ignore[no-any-return, no-untyped-call]


def joined(norm: LayerNorm | RMSNorm, x: Tensor, branch: Tensor, twice: bool = False) -> tuple[Tensor, ...]:
    """x + branch, and the norm of that, twice for two who read it."""
    together = (
        torch.compiler.is_compiling()
        and type(norm) in (LayerNorm, RMSNorm)  # a norm may have been replaced by another
        and norm.weight is not None
        and len(norm.normalized_shape) == 1
        and norm_execution(x.device).value == "kernel"
        and x.dtype == branch.dtype == norm.weight.dtype
        and unheard(norm)
        and not why_not(x)
    )
    if not together or norm.eps is None:
        total = x + branch
        y = norm(total)
        return (total, y, y) if twice else (total, y)
    return add_norm(x, branch, norm.weight, getattr(norm, "bias", None), norm.eps, isinstance(norm, LayerNorm), twice)
