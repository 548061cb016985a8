"""Rounding to a format: the definition that every kernel is held against.

The same input gives the same output on a CPU and on a GPU, eager and compiled: what decides is integer arithmetic on
the bits, which no compiler reorders or keeps wide, and exact products with powers of two.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fewbits.errors import FewbitsError, nearest
from fewbits.formats import Format

Rounding = Literal["nearest-even", "nearest-away", "toward-zero"]
Overflow = Literal["saturate", "inf"]

# working dtype: (integer dtype of the same width, mantissa bits, smallest normal exponent, bits of infinity)
_FIELDS = {
    torch.float32: (torch.int32, 23, -126, 0x7F800000),
    torch.float64: (torch.int64, 52, -1022, 0x7FF0000000000000),
}


def cast(
    x: Tensor,
    format: str | torch.dtype | Format,
    rounding: str = "nearest-even",
    overflow: str = "saturate",
) -> Tensor:
    """The values of x on the grid of a format: shape, dtype and device of x kept, exact, one rounding only.

    x: any shape, fp64, fp32, bf16 or fp16. A result beyond the dtype of x (fp16 has no 65,536) counts as overflow.
    rounding: "nearest-even", "nearest-away" (ties away from zero) or "toward-zero".
    overflow: what becomes of a finite value that rounds beyond the largest number. "saturate": that number. "inf":
        infinity, or NaN in a format without infinities, or that number in a format with neither. Toward zero nothing
        overflows (IEEE 754, 4.3.2).
    An infinity stays infinity where the format has one; elsewhere it overflows. NaN stays NaN, zeros keep their sign.
    A scale format (e8m0) has neither zero nor sign: both become NaN, and small values become its smallest power.
    No gradient flows through: what a rounding passes back is the caller's decision.

    Raises FewbitsError for an unknown format, rounding or overflow, and for a tensor that holds no floats.

    >>> cast(torch.tensor([1.00390625, 70000.0, -1e-9]), "fp16")
    tensor([1.0039e+00, 6.5504e+04, -0.0000e+00])
    """
    fmt = Format.parse(format)
    _check(x, rounding, overflow)
    x = x.detach()
    if fmt.mantissa_bits < 23 and _within_range(x, fmt):
        return _round_bits(x.view(torch.int32), 23 - fmt.mantissa_bits, rounding, fmt).view(torch.float32)
    if fmt.kind == "binary":
        return torch.where(x.isnan(), x, torch.where(x < 0, -1.0, 1.0).to(x.dtype))
    wide = x if x.dtype in _FIELDS else x.float()
    if fmt.kind == "int":
        limit = torch.where(wide < 0, -fmt.min, fmt.max).to(wide.dtype)
        magnitude = _to_integer(wide.abs(), rounding)
        return torch.copysign(torch.minimum(magnitude, limit), wide).to(x.dtype)
    if fmt.min_exponent < -126:  # such subnormals are finer than those of fp32
        wide = wide.double()
    magnitude = _round_magnitude(wide.abs(), fmt, rounding)
    if not fmt.signed:
        magnitude = torch.where(wide > 0, magnitude.clamp(min=fmt.smallest_normal), math.nan)
    magnitude = _limit(magnitude, wide, fmt, x.dtype, "saturate" if rounding == "toward-zero" else overflow)
    return torch.copysign(torch.where(wide.isnan(), wide, magnitude), wide).to(x.dtype)


def round_to(x: Tensor, format: str | torch.dtype | Format, rounding: str = "nearest-away") -> Tensor:
    """x as a tensor of the torch dtype of a format, rounded once; beyond the range it becomes infinity, as in torch.

    This makes a working weight from a master: with ties away from zero, the distance from the rounded value to x fits a
    signed 16-bit remainder in units of the last place of fp32. (A tie that rounds to even leaves +32768 behind.)

    x: any shape, fp32 or fp64. Raises FewbitsError where the format has no torch dtype or an argument is unknown.

    >>> round_to(torch.tensor([1.00390625, -1.01171875]), "bf16").float()
    tensor([ 1.0078, -1.0156])
    """
    fmt = Format.parse(format)
    if fmt.dtype is None or fmt.dtype.itemsize < 2:
        raise FewbitsError(f"{fmt.name} has no torch dtype to hold weights; bf16, fp16, fp32 and fp64 do.")
    _check(x, rounding, "inf")
    x = x.detach()
    if x.dtype != torch.float32 or torch.compiler.is_compiling() or rounding == "toward-zero":
        return cast(x, fmt, rounding, "inf").to(fmt.dtype)
    if rounding == "nearest-away" and fmt.mantissa_bits < 22:
        # A lowest bit set on the way makes a tie lie above the halfway point and moves nothing else past one, so that
        # torch's nearest-even conversion rounds it away in a tenth of the time that the integer arithmetic takes
        sticky = (x.view(torch.int32) | 1).view(torch.float32)
        x = torch.where(x.isinf(), x, sticky)
    return x.to(fmt.dtype)


def _check(x: Tensor, rounding: str, overflow: str) -> None:
    for what, value, options in (
        ("rounding", rounding, get_args(Rounding)),
        ("overflow", overflow, get_args(Overflow)),
    ):
        if value not in options:
            raise FewbitsError(f"There is no {what} '{value}'.{nearest(value, options)} Use {' or '.join(options)}.")
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise FewbitsError(f"A {x.dtype} tensor cannot be rounded; convert it to fp64, fp32, bf16 or fp16 first.")


def _within_range(x: Tensor, fmt: Format) -> bool:
    """Whether rounding x is only rounding its bits: fp32 on a CPU, its exponents, no NaN, nothing beyond the range.

    Asking reads x once; what it saves is most passes of the general path: 0.5 ns an element instead of 23.
    """
    same_exponents = fmt.exponent_bits == 8 and fmt.bias == 127 and fmt.signed and fmt.mantissa_bits > 0
    if not same_exponents or x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if x.numel() == 0 or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    low, high = torch.aminmax(x)  # NaN if there is one, and then the comparison fails
    return bool(-fmt.max <= low.item() and high.item() <= fmt.max)


def _round_bits(bits: Tensor, shift: int, rounding: str, fmt: Format) -> Tensor:
    """Bit patterns of floats with the lowest `shift` bits rounded away. A sign bit above stays as it is, and a carry
    moves into the exponent, as it should."""
    if rounding == "nearest-even" and fmt.mantissa_bits:
        bits = ((bits >> shift) & 1).add_(bits).add_((1 << (shift - 1)) - 1)
    elif rounding != "toward-zero":  # without mantissa bits the last one is the implied 1: a tie to even goes up
        bits = bits + (1 << (shift - 1))
    return bits & -(1 << shift)


def _round_magnitude(magnitude: Tensor, fmt: Format, rounding: str) -> Tensor:
    """magnitude (fp32 or fp64, >= 0) rounded as if the format had no largest number; may become infinity."""
    integer, mantissa_bits, min_exponent, infinity = _FIELDS[magnitude.dtype]
    shift = mantissa_bits - fmt.mantissa_bits
    rounded = magnitude
    if shift > 0:
        bits = magnitude.view(integer).clamp(max=infinity)  # a NaN would overflow into the sign
        rounded = _round_bits(bits, shift, rounding, fmt).view(magnitude.dtype)
    if fmt.min_exponent <= min_exponent:  # its subnormals are those of the working dtype, cut to fewer bits
        return rounded
    ulp = fmt.smallest_subnormal
    subnormal = _to_integer(magnitude * (1.0 / ulp), rounding) * ulp
    return torch.where(magnitude < fmt.smallest_normal, subnormal, rounded)


def _to_integer(magnitude: Tensor, rounding: str) -> Tensor:
    """magnitude >= 0 rounded to an integer. Adding 0.5 would itself round: 0.49999997 + 0.5 is 1 in fp32."""
    if rounding == "nearest-even":
        return magnitude.round()
    whole = magnitude.trunc()
    if rounding == "toward-zero":
        return whole
    return torch.where(magnitude - whole >= 0.5, whole + 1.0, whole)


def _limit(magnitude: Tensor, x: Tensor, fmt: Format, dtype: torch.dtype, overflow: str) -> Tensor:
    """magnitude with what lies beyond the largest number of both the format and the dtype of the result replaced."""
    largest = _largest_in_both(fmt, Format.parse(dtype))
    beyond = largest
    if overflow == "inf" and fmt.specials != "none":
        beyond = math.inf if fmt.has_infinity else math.nan
    limited = torch.where(magnitude > largest, beyond, magnitude)
    return torch.where(x.isinf(), math.inf, limited) if fmt.has_infinity else limited


def _largest_in_both(a: Format, b: Format) -> float:
    """The largest number on the grids of both formats."""
    smaller, other = (a, b) if a.max <= b.max else (b, a)
    spacing = 2.0 ** (smaller.max_exponent - min(other.mantissa_bits, smaller.mantissa_bits))
    return math.floor(smaller.max / spacing) * spacing
