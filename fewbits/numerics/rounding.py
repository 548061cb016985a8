"""Rounding to a format: the definition that every kernel is held against.

The same input gives the same output on a CPU and on a GPU, eager and compiled: what decides is integer arithmetic on
the bits, which no compiler reorders or keeps wide, and exact products with powers of two. Eager code may add and
subtract a number instead (`_nearest_even`), which is as exact as long as nobody simplifies it.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from fewbits.errors import FewbitsError, nearest
from fewbits.formats import Format
from fewbits.numerics.random import random_bits

Rounding = Literal["nearest-even", "nearest-away", "toward-zero", "stochastic"]
Overflow = Literal["saturate", "inf"]

# working dtype: (integer dtype of the same width, mantissa bits, smallest normal exponent, bits of infinity)
_FIELDS = {
    torch.float32: (torch.int32, 23, -126, 0x7F800000),
    torch.float64: (torch.int64, 52, -1022, 0x7FF0000000000000),
}
_PIECE = 1 << 17  # elements whose temporaries a CPU keeps in its cache: whole tensors of them cost twice the time


def cast(
    x: Tensor,
    format: str | torch.dtype | Format,
    rounding: str = "nearest-even",
    overflow: str = "saturate",
    seed: int | Tensor = 0,
) -> Tensor:
    """The values of x on the grid of a format: shape, dtype and device of x kept, exact, one rounding only.

    x: any shape, fp64, fp32, bf16 or fp16. A result beyond the dtype of x (fp16 has no 65,536) counts as overflow.
    rounding: "nearest-even", "nearest-away" (ties away from zero), "toward-zero" or "stochastic": up with a probability
        of the distance to the lower neighbour in ulps, so that the mean is x. A random fraction of an ulp, the 32 bits
        that `random_bits(seed, x.shape)` gives the element, is added to |x|, and the sum is cut toward zero.
    overflow: what becomes of a finite value that rounds beyond the largest number. "saturate": that number. "inf":
        infinity, or NaN in a format without infinities, or that number in a format with neither. Toward zero nothing
        overflows (IEEE 754, 4.3.2).
    seed: the key of stochastic rounding, an int or a 0-d int64 tensor on the device of x; see `random.mix_key`.
    An infinity stays infinity where the format has one; elsewhere it overflows. NaN stays NaN, zeros keep their sign.
    A scale format (e8m0) has neither zero nor sign: both become NaN, and small values become its smallest power.
    No gradient flows through: what a rounding passes back is the caller's decision.

    Raises FewbitsError for an unknown format, rounding or overflow, and for a tensor that holds no floats.

    >>> cast(torch.tensor([1.00390625, 70000.0, -1e-9]), "fp16")
    tensor([1.0039e+00, 6.5504e+04, -0.0000e+00])
    >>> cast(torch.full((8,), 0.25), "int4", rounding="stochastic", seed=1)
    tensor([0., 0., 0., 0., 0., 0., 1., 1.])
    """
    fmt = Format.parse(format)
    _check(x, rounding, overflow)
    x = x.detach()
    stochastic = rounding == "stochastic"
    if not _is_eager_on_cpu(x):
        random = random_bits(seed, x.shape, x.device) if stochastic else None
        return _cast(x, fmt, rounding, overflow, random)
    if not stochastic and _within_range(x, fmt):
        return _round_bits(x.view(torch.int32), 23 - fmt.mantissa_bits, rounding, fmt).view(torch.float32)
    x, flat, out, flat_out = _in_memory_order(x, logical=stochastic)
    for at in range(0, x.numel(), _PIECE):
        piece = flat[at : at + _PIECE]
        random = random_bits(seed, piece.shape, x.device, start=at) if stochastic else None
        flat_out[at : at + _PIECE] = _cast(piece, fmt, rounding, overflow, random)
    return out


def round_to(
    x: Tensor, format: str | torch.dtype | Format, rounding: str = "nearest-away", seed: int | Tensor = 0
) -> Tensor:
    """x as a tensor of the torch dtype of a format, rounded once; beyond the range it becomes infinity, as in torch.

    This makes a working weight from a master: with ties away from zero, the distance from the rounded value to x fits a
    signed 16-bit remainder in units of the last place of fp32. (A tie that rounds to even leaves +32768 behind.)

    x: any shape, fp32 or fp64. rounding and seed: as in `cast`. Raises FewbitsError where the format has no torch dtype
    or an argument is unknown.

    >>> round_to(torch.tensor([1.00390625, -1.01171875]), "bf16").float()
    tensor([ 1.0078, -1.0156])
    """
    fmt = Format.parse(format)
    if fmt.dtype is None or fmt.dtype.itemsize < 2:
        raise FewbitsError(f"{fmt.name} has no torch dtype to hold weights; bf16, fp16, fp32 and fp64 do.")
    _check(x, rounding, "inf")
    x = x.detach()
    direct = x.dtype == torch.float32 and rounding.startswith("nearest") and not torch.compiler.is_compiling()
    if not direct:
        return cast(x, fmt, rounding, "inf", seed).to(fmt.dtype)
    if rounding == "nearest-away" and fmt.mantissa_bits < 22:
        # A lowest bit set on the way makes a tie lie above the halfway point and moves nothing else past one, so that
        # torch's nearest-even conversion rounds it away in a tenth of the time that the integer arithmetic takes
        sticky = (x.view(torch.int32) | 1).view(torch.float32)
        x = torch.where(x.isinf(), x, sticky)
    return x.to(fmt.dtype)


def _in_memory_order(x: Tensor, logical: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, its elements as one row in the order of memory, an empty result like x, and that one's row.

    logical: the order must be that of the indices, so x is copied where memory has another one.
    """
    out = torch.empty_like(x)
    if not x.is_contiguous() and (logical or out.stride() != x.stride()):  # other strides: x has gaps or overlaps
        x = x.contiguous()
        out = torch.empty_like(x)
    row = (x.numel(),), (1,)
    return x, x.as_strided(*row), out, out.as_strided(*row)


def _check(x: Tensor, rounding: str, overflow: str) -> None:
    for what, value, options in (
        ("rounding", rounding, get_args(Rounding)),
        ("overflow", overflow, get_args(Overflow)),
    ):
        if value not in options:
            raise FewbitsError(f"There is no {what} '{value}'.{nearest(value, options)} Use {' or '.join(options)}.")
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise FewbitsError(f"A {x.dtype} tensor cannot be rounded; convert it to fp64, fp32, bf16 or fp16 first.")


def _cast(x: Tensor, fmt: Format, rounding: str, overflow: str, random: Tensor | None) -> Tensor:
    """`cast` in one pass over x. random: int32 of the shape of x for stochastic rounding."""
    if rounding == "nearest-even" and _has_short_way(x, fmt) and not torch.compiler.is_compiling():
        return _nearest_even(x, fmt, overflow)
    if fmt.kind == "binary":
        return torch.where(x.isnan(), x, torch.where(_is_negative(x, random), -1.0, 1.0).to(x.dtype))
    wide = x if x.dtype in _FIELDS else x.float()
    if fmt.kind == "int" and rounding == "nearest-even":
        return wide.round().clamp(fmt.min, fmt.max).to(x.dtype)
    if fmt.kind == "int":
        limit = torch.where(wide < 0, -fmt.min, fmt.max).to(wide.dtype)
        magnitude = _to_integer(wide.abs(), rounding, random)
        return torch.copysign(torch.minimum(magnitude, limit), wide).to(x.dtype)
    if fmt.min_exponent < -126:  # such subnormals are finer than those of fp32
        wide = wide.double()
    magnitude = _round_magnitude(wide.abs(), fmt, rounding, random)
    if not fmt.signed:
        magnitude = torch.where(wide > 0, magnitude.clamp(min=fmt.smallest_normal), math.nan)
    magnitude = _limit(magnitude, wide, fmt, x.dtype, "saturate" if rounding == "toward-zero" else overflow)
    return torch.copysign(torch.where(wide.isnan(), wide, magnitude), wide).to(x.dtype)


def _within_range(x: Tensor, fmt: Format) -> bool:
    """Whether rounding x is only rounding its bits: fp32 on a CPU, its exponents, no NaN, nothing beyond the range.

    Asking reads x once; what it saves is most passes of the general path: 0.5 ns an element instead of 23.
    """
    same_exponents = fmt.exponent_bits == 8 and fmt.bias == 127 and fmt.signed and 0 < fmt.mantissa_bits < 23
    return same_exponents and x.dtype == torch.float32 and x.numel() > 0 and _lies_within(x, fmt.max)


def _is_eager_on_cpu(x: Tensor) -> bool:
    """Whether reading x costs no wait, and its memory is plain."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)


def _lies_within(x: Tensor, largest: float) -> bool:
    """Whether all of x lies in -largest..largest, which no NaN does. Waits for the device."""
    low, high = torch.aminmax(x)  # NaN if there is one, and then the comparison fails
    return bool(-largest <= low.item() and high.item() <= largest)


def _has_short_way(x: Tensor, fmt: Format) -> bool:
    """Whether `_nearest_even` rounds x: a float format whose ulps are normal in fp32, and 2**23 ulps of its top finite."""
    signed_float = fmt.kind == "float" and fmt.signed and fmt.mantissa_bits <= 21 and x.dtype != torch.float64
    return signed_float and fmt.min_exponent >= -126 and fmt.max_exponent + 25 - fmt.mantissa_bits <= 127


def _nearest_even(x: Tensor, fmt: Format, overflow: str) -> Tensor:
    """x (fp32, bf16 or fp16) rounded by adding and subtracting a number M, element by element, whose ulp in fp32 is the
    format's there: 1.5 ns an element on one core.

    With 2**e the binade of |x|, at least the lowest of normal numbers, M = 1.5 * 2**(e + 23 - mantissa_bits): x + M stays
    in the binade of M and is rounded to nearest, and even where x is. Eager code only: a compiler may simplify x + M - M.
    """
    largest = _largest_in_both(fmt, Format.parse(x.dtype))
    beyond = largest if overflow == "saturate" or fmt.specials == "none" else 2.0 ** (fmt.max_exponent + 1)
    wide = x.float()
    ordinary = _is_eager_on_cpu(x) and _lies_within(wide, largest)  # saves two passes, three with infinities
    if not ordinary:
        wide = wide.clamp(-beyond, beyond)
    lowest, highest = ((exponent + 127) << 23 for exponent in (fmt.min_exponent, fmt.max_exponent + 1))
    bits = (wide.view(torch.int32) & 0x7F800000).clamp_(lowest, highest)
    magic = bits.add_(((23 - fmt.mantissa_bits) << 23) + (1 << 22)).view(torch.float32)
    rounded = (wide + magic).sub_(magic)
    if ordinary:
        pass
    elif beyond > largest:
        rounded = torch.where(rounded.abs() > largest, math.inf if fmt.has_infinity else math.nan, rounded)
    elif fmt.has_infinity:
        rounded = torch.where(x.isinf(), x, rounded)
    return rounded.copysign_(x).to(x.dtype)


def _round_bits(bits: Tensor, shift: int, rounding: str, fmt: Format, random: Tensor | None = None) -> Tensor:
    """Bit patterns of floats with the lowest `shift` bits rounded away. A sign bit above stays as it is, and a carry
    moves into the exponent, as it should."""
    if random is not None:
        bits = bits + _leading(random, shift, bits.dtype)
    elif rounding == "nearest-even" and fmt.mantissa_bits:
        bits = ((bits >> shift) & 1).add_(bits).add_((1 << (shift - 1)) - 1)
    elif rounding != "toward-zero":  # without mantissa bits the last one is the implied 1: a tie to even goes up
        bits = bits + (1 << (shift - 1))
    return bits & -(1 << shift)


def _leading(random: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The leading `count` bits of 32-bit words as numbers in 0..2**count - 1; zeros follow when count > 32."""
    if count <= 32 and dtype == torch.int32:
        return (random >> (32 - count)) & ((1 << count) - 1)
    words = random.long() & 0xFFFFFFFF
    return (words >> (32 - count) if count <= 32 else words << (count - 32)).to(dtype)


def _round_magnitude(magnitude: Tensor, fmt: Format, rounding: str, random: Tensor | None) -> Tensor:
    """magnitude (fp32 or fp64, >= 0) rounded as if the format had no largest number; may become infinity."""
    integer, mantissa_bits, min_exponent, infinity = _FIELDS[magnitude.dtype]
    shift = mantissa_bits - fmt.mantissa_bits
    rounded = magnitude
    if shift > 0:
        bits = magnitude.view(integer).clamp(max=infinity)  # a NaN would overflow into the sign
        rounded = _round_bits(bits, shift, rounding, fmt, random).view(magnitude.dtype)
    if fmt.min_exponent <= min_exponent:  # its subnormals are those of the working dtype, cut to fewer bits
        return rounded
    ulp = fmt.smallest_subnormal
    subnormal = _to_integer(magnitude * (1.0 / ulp), rounding, random) * ulp
    return torch.where(magnitude < fmt.smallest_normal, subnormal, rounded)


def _to_integer(magnitude: Tensor, rounding: str, random: Tensor | None = None) -> Tensor:
    """magnitude >= 0 rounded to an integer. Adding 0.5 would itself round: 0.49999997 + 0.5 is 1 in fp32."""
    if rounding == "nearest-even":
        return magnitude.round()
    whole = magnitude.trunc()
    if rounding == "toward-zero":
        return whole
    fraction = magnitude - whole
    if random is None:
        return torch.where(fraction >= 0.5, whole + 1.0, whole)
    carries = (fraction * 2.0**32).long() + (random.long() & 0xFFFFFFFF) >= 2**32
    return torch.where(carries, whole + 1.0, whole)


def _is_negative(x: Tensor, random: Tensor | None) -> Tensor:
    """Whether the code of x in the binary format is that of -1. At random: with the probability (1 - x) / 2 of
    Courbariaux et al. 2015 (BinaryConnect), which keeps the mean for x in -1..1."""
    if random is None:
        return x < 0
    share = ((x.double().clamp(-1.0, 1.0) + 1.0) * 2.0**31).long()
    return share + (random.long() & 0xFFFFFFFF) < 2**32


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
