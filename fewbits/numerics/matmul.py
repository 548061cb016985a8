"""The three matmuls of a linear layer, defined for hardware that cannot multiply the format itself.

    output      = x      @ weight.T      [N, K] x [O, K] -> [N, O]
    grad_input  = grad   @ weight        [N, O] x [O, K] -> [N, K]
    grad_weight = grad.T @ x             [N, O] x [N, K] -> [O, K]

Every product of two fp16 or two bf16 numbers is exact in fp32, so rounding the operands to the format and multiplying
them in fp32 gives what a matrix unit with an fp32 accumulator gives, up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.numerics.rounding import cast
from fewbits.numerics.wide import widen


def operand(x: Tensor, tf32: bool) -> Tensor:
    """`x` as it enters an fp32 multiplication: 16 bits are widened; fp32 is rounded to tf32 where that is asked for.

    Ties go away from zero, as the conversion instruction of the hardware does it (PTX `cvt.rna.tf32.f32`).
    """
    return cast(x, "tf32", rounding="nearest-away") if tf32 else widen(x)


@contextmanager
def onednn_bf16(active: bool) -> Iterator[None]:
    """Within, when `active`, oneDNN multiplies fp32 CPU tensors as bf16 with fp32 sums and fp32 results.

    Exact for tensors that hold bf16 values: the way to an fp32 result from bf16 operands, which torch's CPU matmul lacks.
    """
    if not active:
        yield
        return
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


class _EmulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tf32: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tf32, ctx.bias_dtype = tf32, None if bias is None else bias.dtype
        wide_bias = None if bias is None else widen(bias)
        y = torch.nn.functional.linear(operand(x, tf32), operand(weight, tf32), wide_bias)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_ND = grad.reshape(-1, grad.shape[-1])
        wide_ND = operand(grad_ND, ctx.tf32)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (wide_ND @ operand(weight, ctx.tf32)).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (wide_ND.t() @ operand(x.reshape(-1, x.shape[-1]), ctx.tf32)).to(weight.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = widen(grad_ND).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def emulated_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, tf32: bool = False) -> Tensor:
    """`x @ weight.T + bias` with operands in their 16-bit format (or tf32) and fp32 products and sums.

    Shapes: x [..., K], weight [O, K], bias [O] or None; the result is [..., O] in the dtype of `x`. What is kept for
    the backward are the stored tensors, not their fp32 copies.
    """
    return _EmulatedLinear.apply(x, weight, bias, tf32)  # type: ignore[no-any-return, no-untyped-call]


def scaled_int8_matmul(
    left_MK: Tensor,
    right_NK: Tensor,
    row_scale_M: Tensor,
    column_scale_N: Tensor,
    bias_N: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """left @ right.T in integers, times both scales, plus the bias, each in fp32, then rounded to `dtype`: [M, N].

    left, right: int8; scales: fp32.
    """
    total_MN = (left_MK.double() @ right_NK.double().t()).float()  # of integers below 2^53, so exact up to here
    y_MN = total_MN * row_scale_M.view(-1, 1) * column_scale_N
    return (y_MN if bias_N is None else y_MN + bias_N.float()).to(dtype)


_CHUNK = 32  # products that an fp8 instruction of Hopper sums before it adds them to the accumulator (k of wgmma)


def modelled_matmul(left: Tensor, right: Tensor, accumulator: str = "fp32") -> Tensor:
    """left [M, K] @ right [N, K].T as hardware with that accumulator would sum it, K from the first to the last: fp32.

    accumulator:
        "fp32": products and sums in fp32.
        "fp16", "bf16": every product is rounded to the format, and so is the sum after every addition, to nearest even:
            the half-precision product of tutorials.
        "14bit": 32 products are summed exactly (in fp32), and what they make of the accumulator is cut toward zero to 14
            significant bits, as Hopper's fp8 tensor cores do it (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
        Any of them with "/128": after every 128 products the accumulator is added to an fp32 sum and starts from zero.

    left and right hold the values that are multiplied, in any float dtype. Raises FewbitsError for another accumulator.
    """
    kind, _, every = accumulator.partition("/")
    if kind not in ("fp32", "fp16", "bf16", "14bit") or every not in ("", "128"):
        raise FewbitsError(
            f"There is no accumulator '{accumulator}'. Use fp32, fp16, bf16, 14bit, or fp16/128 and so on."
        )
    left, right = left.float(), right.float()
    if kind == "fp32":
        return left @ right.t()
    total = left.new_zeros(left.shape[0], right.shape[0])
    for start in range(0, left.shape[1], int(every or left.shape[1])):
        stop = min(left.shape[1], start + int(every or left.shape[1]))
        total += _narrow_sum(left[:, start:stop], right[:, start:stop], kind)
    return total


def _narrow_sum(left: Tensor, right: Tensor, kind: str) -> Tensor:
    total = left.new_zeros(left.shape[0], right.shape[0])
    if kind == "14bit":
        for k in range(0, left.shape[1], _CHUNK):
            total = cast(total + left[:, k : k + _CHUNK] @ right[:, k : k + _CHUNK].t(), "e8m13", "toward-zero")
        return total
    for k in range(left.shape[1]):
        product = cast(torch.outer(left[:, k], right[:, k]), kind, overflow="inf")
        total = cast(total + product, kind, overflow="inf")
    return total
