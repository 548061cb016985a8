"""Norm modules: fp32 statistics, fp32 sums of weight gradients, whatever the storage format."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.kernels import norm as kernel
from fewbits.kernels.dispatch import fused, norm_execution
from fewbits.kernels.layouts import Known
from fewbits.nn.linear import Linear, unheard
from fewbits.nn.lowbit import Codes, activation_format
from fewbits.numerics import norm as definition
from fewbits.numerics.norm import layer_norm, rms_norm
from fewbits.numerics.wide import wide_dtype


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


class _SumAndNorm(torch.autograd.Function):
    """A sum and its norm as results of x, branch, weight and bias. make: gives them, and the `statistics` of the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        _x: Tensor,
        _branch: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        make: Callable[[], tuple[Tensor, Tensor, Tensor | None, Tensor]],
        twice: bool,
    ) -> tuple[Tensor, ...]:
        total, y, mean, rstd = make()
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.biased = bias is not None
        return (total, y, y.view_as(y)) if twice else (total, y)

    @staticmethod
    def backward(ctx: Any, along: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, mean, rstd = ctx.saved_tensors
        grad_total, by_weight, by_bias = kernel.norm_backward(grads, along, total, weight, mean, rstd)
        return grad_total, grad_total, by_weight, by_bias if ctx.biased else None, None, None


def add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool, twice: bool
) -> tuple[Tensor, ...]:
    """x + branch, and the layer norm of that, or the root-mean-square norm where it is not centered: for a compiler, which
    makes the forward pass one kernel and calls kernels/norm.py for the backward pass. twice: the norm for each of two who
    read it, so that their gradients are added up where they are read."""
    make = partial(definition.add_norm, x, branch, weight, bias, eps, centered)
    return _SumAndNorm.apply(x, branch, weight, bias, make, twice)  # type: ignore[no-any-return, no-untyped-call]


def add_norm_codes(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    twice: bool,
    scale: Tensor,
    maximum: Tensor,
    recipe: str,
) -> tuple[Tensor, ...]:
    """`add_norm` whose norm is NaN everywhere: it is not written and only carries gradients, while its codes [N, D] and [D, N]
    come behind it, for a layer of few bits that reads nothing else.

    scale, maximum: what is `Delayed` of that layer; the maximum is raised. recipe: its own, canonical text of one that
    `chains`.
    """
    known, codes = Known(scale, activation_format(recipe), maximum), []

    def make() -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        total, *made, mean, rstd = kernel.add_norm_codes(x, branch, weight, bias, eps, centered, known)
        codes.extend(made)
        return total, total.new_full((), math.nan).expand_as(total), mean, rstd

    results = _SumAndNorm.apply(x, branch, weight, bias, make, twice)  # type: ignore[no-untyped-call]
    return *results, *codes


def joined(
    norm: LayerNorm | RMSNorm, x: Tensor, branch: Tensor, twice: bool = False, reader: Linear | None = None
) -> tuple[Tensor, Sequence[Tensor], Codes | None]:
    """x + branch, the norm of that, twice for two who read it, and its codes, as `add_norm_codes` has them.

    reader: a layer that `takes_codes`, where all who read the norm take the same; None where they read values. There are no
    codes either for a norm that was replaced or that somebody listens to, or where no kernel makes them.
    """
    kernels = (
        type(norm) in (LayerNorm, RMSNorm)  # a norm may have been replaced by another
        and norm.weight is not None
        and len(norm.normalized_shape) == 1
        and norm_execution(x.device).value == "kernel"
        and x.dtype == branch.dtype == norm.weight.dtype
        and unheard(norm)
        and not kernel.why_not(x)
        and norm.eps is not None
    )
    coded = kernels and reader is not None and reader.weight.dtype == x.dtype
    if not coded and not (kernels and torch.compiler.is_compiling()):
        total = x + branch
        y = norm(total)
        return total, (y, y) if twice else (y,), None
    bias, centered = getattr(norm, "bias", None), isinstance(norm, LayerNorm)
    given: tuple[Any, ...] = (x, branch, norm.weight, bias, norm.eps, centered, twice)
    if not coded:
        total, *normals = add_norm(*given)
        return total, normals, None
    assert reader is not None and reader.history is not None
    delayed = reader.history.delayed
    given += (delayed.scale, delayed.maximum, reader.recipe)
    total, *normals, codes, codes_t = add_norm_codes(*given)
    return total, normals, (codes, codes_t)
