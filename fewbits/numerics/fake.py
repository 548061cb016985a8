"""Fake quantization: values as codes and scales would give them back, with a gradient that passes straight through.

value           code * scale
d value / d x   1 inside the range, 0 outside (Bengio et al. 2013); binary: 1 where |x| <= 1 (Courbariaux et al. 2016)
d value / d scale   code - x / scale inside, code outside, times 1 / sqrt(N * max) (LSQ, Esser et al. 2020, equations 3
                and 4), with N elements under one scale; binary: code, since its value is sign(x) * scale
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.numerics.quantize import Quantized, decode, encode, quantize
from fewbits.numerics.rounding import cast
from fewbits.numerics.scaling import Granularity, blocks, inverse, times

CLIP = 1.0
"""Beyond this |x| the sign of a weight gets no gradient: it would not change soon."""
_SLACK = 1.0 + 2.0**-22  # x * inv_scale is rounded twice: the largest element under its own scale stays inside


def fake_quantize(
    x: Tensor,
    format: str | Format = "int8",
    granularity: str | Granularity = "row",
    scale: Tensor | float | None = None,
    scales: str = "",
) -> Tensor:
    """`x` rounded to what its codes stand for: shape and dtype of x, code * scale formed in fp32 and rounded once.

    Args:
        x: fp64, fp32, bf16 or fp16, any shape; axes before the last are rows.
        format: any format of `quantize`; binary is sign(x) times the mean magnitude (XNOR-Net), sign(0) is +1.
        granularity: tensor, row, group:128, block(RxC).
        scale: None takes it from x as `quantize` does: then nothing lies outside, and no gradient flows through it. Else
            positive, one number or one for each block, [grid rows, grid columns] or as many in a row; if it requires a
            gradient it gets LSQ's.
        scales: how it is taken from x, as in `quantize`.

    Raises FewbitsError for names that do not exist, tensors that hold no floats, and scales of another number.

    >>> w = torch.tensor([[0.2, -0.9, 3.0]], requires_grad=True)
    >>> y = fake_quantize(w, "int4", scale=0.25)
    >>> y.sum().backward()
    >>> y.detach(), w.grad
    (tensor([[ 0.2500, -1.0000,  1.7500]]), tensor([[1., 1., 0.]]))
    """
    fmt, shared = Format.parse(format), Granularity.parse(granularity)
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise FewbitsError(f"A {x.dtype} tensor cannot be fake-quantized; give fp64, fp32, bf16 or fp16.")
    if scale is None:
        q = quantize(x, fmt, shared, scales=scales)
        return _FakeQuantize.apply(x, None, q.codes, q.scale, fmt, shared)  # type: ignore[no-any-return, no-untyped-call]
    given = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    matrix = _matrix(x.detach())
    grid = shared.grid(matrix.shape)
    if given.numel() not in (1, grid[0] * grid[1]):
        raise FewbitsError(
            f"{given.numel()} scales do not fit {tuple(x.shape)} with granularity {shared}; give one, or {grid[0]} x {grid[1]}."
        )
    spread = given.expand(grid) if given.numel() == 1 else given.reshape(grid)
    codes = encode(matrix, spread.detach(), fmt, shared).view(x.shape)
    return _FakeQuantize.apply(x, spread, codes, spread.detach(), fmt, shared)  # type: ignore[no-any-return, no-untyped-call]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        given: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        format: Format,
        granularity: Granularity,
    ) -> Tensor:
        ctx.save_for_backward(x, codes, scale)
        ctx.format, ctx.granularity, ctx.fixed = format, granularity, given is not None
        return Quantized(codes, scale, format, granularity).dequantize(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, codes, scale = ctx.saved_tensors
        grad_x = grad_scale = None
        matrix, grads = _matrix(x), _matrix(grad)
        if ctx.needs_input_grad[0]:
            limits = scale if ctx.fixed else None
            grad_x = straight_through(grads, matrix, limits, ctx.format, ctx.granularity).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_scale = scale_gradient(grads, matrix, _matrix(codes), scale, ctx.format, ctx.granularity)
        return grad_x, grad_scale, None, None, None, None


def straight_through(grad: Tensor, x: Tensor, scale: Tensor | None, format: Format, granularity: Granularity) -> Tensor:
    """The gradient of x [R, C] from that of its rounded values, in the dtype of `grad`: the same inside, 0 outside.

    scale: fp32 [grid rows, grid columns]; None where it was taken from x, so that nothing lies outside.
    """
    if format.kind == "binary":
        return grad * (x.abs() <= CLIP)
    return grad if scale is None else grad * _inside(x, scale, format, granularity)


def scale_gradient(
    grad: Tensor, x: Tensor, codes: Tensor, scale: Tensor, format: Format, granularity: Granularity
) -> Tensor:
    """LSQ's gradient of the scales, fp32 [grid rows, grid columns], from that of the rounded values [R, C]; see above."""
    slope = codes.float()
    if format.kind != "binary":
        steps = times(x.float(), inverse(scale), granularity)
        slope = torch.where(_inside(x, scale, format, granularity), slope - steps, slope)
    ones = torch.ones((), device=x.device).expand(x.shape)
    count = blocks(ones, granularity).sum(dim=(1, 3))
    total = blocks(grad.float() * slope, granularity).sum(dim=(1, 3))
    return total / (count * format.max).sqrt()


def _inside(x: Tensor, scale: Tensor, format: Format, granularity: Granularity) -> Tensor:
    return times(x.float(), inverse(scale), granularity).abs() <= format.max * _SLACK


def stored_weight(
    weight: Tensor, format: Format, granularity: Granularity, scales: str, scale: Tensor | None = None
) -> Quantized:
    """A weight [O, K] as a quantized checkpoint holds it: the scale is rounded to the dtype of the weight, in which it is
    stored, before the codes are made.

    scales: "exact" or "power-of-two", how the scale is taken from the weight; with a `scale`, fp32 [O, G], it is used.
    """
    weight = weight.detach()
    if scale is None:
        kind = scales
        wanted = quantize(weight, format, granularity, scales=scales).scale
    else:
        kind, wanted = "exact", scale.detach()
    # by `cast`, on the bits: compilers drop a conversion to 16 bits and back
    stored = cast(wanted, Format.parse(weight.dtype)).clamp(min=torch.finfo(weight.dtype).tiny)
    codes = encode(weight, stored, format, granularity, scales=kind)
    return Quantized(codes, stored, format, granularity, kind)


def values(q: Quantized, dtype: torch.dtype) -> Tensor:
    """A matrix as its codes give it back, in `dtype`: code * scale formed in fp32, rounded once."""
    return decode(q.codes, q.scale, q.granularity, dtype, q.scales)


def _matrix(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
