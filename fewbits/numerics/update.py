"""What an optimizer does to a weight, as pieces: split masters, ties-away rounding, and the update rules.

All arithmetic here is fp32 (fp64 for fp64 weights). The rules are written in single operations (add, subtract,
multiply, divide, square root; no lerp, addcmul or addcdiv, whose vectorized body may fuse what its scalar tail does
not), so an element has one result however its tensor is cut, grouped or sharded. Every master kind shares these same
lines, which is why the split and the fp32 master agree bit for bit. A compiler on CUDA may fuse a multiplication into
an addition, the same way for every kind; eager and compiled results differ in the last places (torch's own CPU square
root is off by up to one unit in the last place, a compiled one is exact).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.numerics.rounding import round_to

BF16_QUIET_NAN = 0x7FC0


def split_master(exact: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16 working weight, int16 remainder), of the same shape, without loss.

    working = nearest, ties away from zero, on the bits: (bits + 0x8000) >> 16; remainder = bits - (working << 16),
    which fits a signed 16-bit integer exactly because a tie goes up. Values that round beyond the largest bf16 become
    inf in the working weight only. Every NaN becomes the quiet NaN with remainder 0: CUDA's own NaN, 0x7FFFFFFF,
    would carry into the sign, and one whose payload lies in the low bits would look like inf.
    """
    working, remainder = torch.empty_like(exact, dtype=torch.bfloat16), torch.empty_like(exact, dtype=torch.int16)
    split_into(exact, working, remainder)
    return working, remainder


def split_into(exact: Tensor, working: Tensor, remainder: Tensor) -> None:
    """`split_master` into existing tensors, bf16 and int16."""
    top, bits = _top(exact), exact.view(torch.int32)
    if _may_hold_nan(exact):
        nan = exact != exact
        top, bits = top.masked_fill(nan, BF16_QUIET_NAN), bits.masked_fill(nan, 0)
    working.view(torch.int16).copy_(top)
    remainder.copy_(bits)  # the cast keeps the low 16 bits, read as signed: bits - (top << 16) for every bits


def _top(exact: Tensor) -> Tensor:
    """The bits of fp32 numbers rounded to bf16, ties away from zero, as int32; those of NaN are not sound."""
    return (exact.view(torch.int32) + 0x8000).bitwise_right_shift_(16)


def _may_hold_nan(exact: Tensor) -> bool:
    """In eager CPU code one sum, which no NaN escapes, saves the passes that replace NaN; compiled, they are free."""
    return torch.compiler.is_compiling() or exact.device.type != "cpu" or bool(exact.sum().isnan())


def join_master(working: Tensor, remainder: Tensor) -> Tensor:
    """(bf16, int16) -> the fp32 master that `split_master` took apart, bit for bit (NaN stays NaN)."""
    if working.device.type == "cpu" and not torch.compiler.is_compiling():
        return working.float().view(torch.int32).add_(remainder).view(torch.float32)  # widening is that shift
    top = working.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return top.add_(remainder).view(torch.float32)


def round_away(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 or fp64 -> `dtype`, to nearest, ties away from zero, overflow to inf, subnormals kept.

    bf16 and fp16 come from fp32; for `dtype` = that of `exact` the tensor itself is returned.
    """
    if dtype == exact.dtype:
        return exact
    if dtype == torch.bfloat16:
        top = _top(exact)
        if _may_hold_nan(exact):
            top.masked_fill_(exact != exact, BF16_QUIET_NAN)
        return top.to(torch.int16).view(dtype)
    return round_to(exact, dtype, "nearest-away")


def adamw_(weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], scalars: Tensor) -> None:
    """One AdamW update in place, decoupled decay first (Loshchilov & Hutter 2019, in the order torch.optim.AdamW uses).

    weight, gradient, moments = (exp_avg, exp_avg_sq): one shape, one dtype, fp32 or fp64; `gradient` is consumed.
    scalars, 1-D of that dtype: 1 - lr * weight_decay, weight_decay, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^n), eps,
    lr / (1 - beta1^n), for the n-th update.
    """
    values = scalars.unbind()
    weight.mul_(values[0])
    _adam_(weight, gradient, moments, values)


def adam_(weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], scalars: Tensor) -> None:
    """One Adam update in place, with L2 decay in the gradient (Kingma & Ba 2015).

    As `adamw_`, but of the first two scalars the second is used.
    """
    values = scalars.unbind()
    gradient.add_(weight * values[1])
    _adam_(weight, gradient, moments, values)


def _adam_(weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    exp_avg, exp_avg_sq = moments
    _, _, keep1, beta2, keep2, correction2, eps, rate = values
    exp_avg.add_((gradient - exp_avg).mul_(keep1))
    exp_avg_sq.mul_(beta2).add_((gradient * keep2).mul_(gradient))
    denominator = exp_avg_sq.sqrt().div_(correction2).add_(eps)
    weight.sub_((exp_avg * rate).div_(denominator))


def sgd_(weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], scalars: Tensor) -> None:
    """One step of SGD in place, decay in the gradient, momentum as torch.optim.SGD has it with dampening 0.

    moments = (momentum_buffer,), or () without momentum; scalars, 1-D: lr, weight_decay, momentum. `gradient` is
    consumed.
    """
    lr, decay, momentum = scalars.unbind()
    gradient.add_(weight * decay)
    for buffer in moments:
        gradient = buffer.mul_(momentum).add_(gradient)
    weight.sub_(gradient * lr)
