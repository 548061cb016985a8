"""Quantization: a matrix becomes codes in a few bits and scales, value = code * scale.

Codes are held in the format's torch dtype, or in the narrowest torch dtype that holds each of its values exactly (fp4
and fp6 in float8_e4m3fn, int4 and binary in int8): one element a code, not packed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.numerics.rounding import cast
from fewbits.numerics.scaling import Granularity, block_amax, block_mean, inverse, inverse_power, scale_of, times

POWERS = ("power-of-two", "delayed", "unit")  # kinds of scale that are powers of two
Key = int | Tensor
"""Key of the random bits of stochastic rounding: an int, or a 0-d int64 tensor on the device."""


@cache
def carrier(format: Format) -> torch.dtype:
    """The narrowest torch dtype, one element a code, that holds every value of `format` exactly."""
    if format.dtype is not None:
        return format.dtype
    if format.kind in ("int", "binary"):
        return next(dtype for dtype, bits in ((torch.int8, 8), (torch.int32, 32)) if format.bits <= bits)
    for name in ("fp8_e4m3", "fp8_e5m2", "bf16", "fp16", "fp32"):
        wider = Format.parse(name)
        if (
            format.mantissa_bits <= wider.mantissa_bits
            and format.max <= wider.max
            and format.smallest_subnormal >= wider.smallest_subnormal
        ):
            assert wider.dtype is not None
            return wider.dtype
    return torch.float64


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor in few bits.

    codes: shape of the tensor, dtype `carrier(format)`. scale: fp32, one for every block of the tensor seen as a matrix
    (leading axes are rows): [grid rows, grid columns]. format, granularity: what codes and scales mean; scales: how the
    scales were made (`quantize`).
    """

    codes: Tensor
    scale: Tensor
    format: Format
    granularity: Granularity
    scales: str = "exact"

    @property
    def exact_in_bf16(self) -> bool:
        """Whether every code * scale is a bf16 number: up to 8 significant bits together (a scale in e4m3 has 4)."""
        bits = {"power-of-two": 0, "delayed": 0, "unit": 0, "two-level": 4}.get(self.scales)
        return bits is not None and 1 + self.format.mantissa_bits + bits <= 8

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code * scale in `dtype`, computed in fp32 and rounded once; shape of codes."""
        return decode(_matrix(self.codes), self.scale, self.granularity, dtype, self.scales).view(self.codes.shape)

    def transposed(self) -> Quantized:
        """The transposed matrix, sharing codes and scales."""
        return Quantized(self.codes.t(), self.scale.t(), self.format, self.granularity.transposed(), self.scales)


class Both(NamedTuple):
    """A matrix [R, C] and its transpose [C, R] in the same codes, and the sums of its columns in fp32 [C] where they were
    asked for and had on the way."""

    matrix: Quantized
    transpose: Quantized
    sums: Tensor | None = None

    @staticmethod
    def of(matrix: Quantized, codes_t: Tensor | None = None, sums: Tensor | None = None) -> Both:
        """A matrix with its transpose, whose codes are `codes_t` [C, R], or a view of the matrix's own."""
        turned = matrix.transposed()
        return Both(matrix, turned if codes_t is None else replace(turned, codes=codes_t), sums)

    def under(self, scale: Tensor) -> Both:
        """The same codes with another scale."""
        return Both(replace(self.matrix, scale=scale), replace(self.transpose, scale=scale.t()), self.sums)


def quantize(
    x: Tensor,
    format: str | Format,
    granularity: str | Granularity = "tensor",
    rounding: str = "nearest-even",
    seed: Key = 0,
    scales: str = "",
) -> Quantized:
    """`x` in few bits: a scale for every block from its largest magnitude, then codes of x / scale.

    Binary takes the mean magnitude instead, the scale of the smallest squared error (Rastegari et al. 2016, equation 6).

    Args:
        x: any float dtype, any shape; axes before the last are rows.
        format: of at most 8 bits for anything useful; every format works.
        granularity: tensor, row, group:128, block(RxC); blocks at the edge may be cut.
        rounding: nearest-even, nearest-away, toward-zero or stochastic (keyed by `seed`).
        scales: "power-of-two" (default for floats: unscaling is exact), "exact" (amax / max, default for integers) or
            "two-level" (e4m3 under a power of two, NVFP4), or "full-range" (integers, all codes; tensor or row).

    A block that holds a NaN or an infinity gets the scale NaN: it is not hidden. Raises FewbitsError for names that do
    not exist and for tensors that hold no floats.

    >>> quantize(torch.tensor([[0.5, -3.0, 100.0]]), "int8", "row").codes
    tensor([[  1,  -4, 127]], dtype=torch.int8)
    """
    fmt, shared = Format.parse(format), Granularity.parse(granularity)
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise FewbitsError(f"A {x.dtype} tensor cannot be quantized; give fp64, fp32, bf16 or fp16.")
    matrix = _matrix(x.detach())
    kind = scales or default_scales(fmt)
    size = block_mean(matrix, shared) if fmt.kind == "binary" else block_amax(matrix, shared)
    scale = scale_of(size, fmt, kind)
    codes = encode(matrix, scale, fmt, shared, rounding, seed, kind)
    return Quantized(codes.view(x.shape), scale, fmt, shared, kind)


def default_scales(format: Format) -> str:
    """Powers of two for floats, exact scales for integers (half their range would lie idle otherwise)."""
    return "power-of-two" if format.kind == "float" else "exact"


def encode(
    x: Tensor,
    scale: Tensor,
    format: Format,
    granularity: Granularity,
    rounding: str = "nearest-even",
    seed: Key = 0,
    scales: str = "exact",
) -> Tensor:
    """Codes of a matrix under given scales: round(x * inv_scale), saturating; dtype `carrier(format)`, strides of x.

    The product is formed in fp32 and rounded once to fp32. `scales` only tells what is known about `scale`: a product of
    bf16 and a power of two is exact in bf16 too, which saves an eager CPU the fp32 copy of x. NaN stays NaN in formats
    that have one; everywhere a scale that is NaN marks its block. "power-of-two" promises that the scales come from the
    largest magnitudes of x, so that nothing saturates. "full-range" divides by the scale, as the engines do
    that take such scales, and uses the code -max - 1 too.
    """
    if scales == "full-range":
        steps = (x.float() / scale).nan_to_num(nan=0.0).round()
        return steps.clamp(-format.max - 1, format.max).to(carrier(format))
    short = scales in POWERS and x.dtype == torch.bfloat16 and _eager_cpu(x)
    inv_scale = inverse_power(scale) if scales in POWERS and x.device.type != "cpu" else inverse(scale)
    x = x if short else x.float()
    scaled = times(x, inv_scale.to(x.dtype), granularity)
    if format.kind == "int":  # symmetric: the code -max - 1 is not used
        scaled = scaled.clamp_(-format.max, format.max)
    dtype = carrier(format)
    if rounding == "nearest-even" and format.kind == "float" and dtype == format.dtype and dtype.itemsize == 1:
        if scales != "power-of-two":  # nothing lies beyond those; torch 2.11 turns what is beyond e4m3 into NaN
            scaled = scaled.clamp_(-format.max, format.max)
        return scaled.to(dtype)
    if rounding == "nearest-even" and format.kind == "int":
        return scaled.round_().nan_to_num_(nan=0.0).to(dtype)
    values = cast(scaled, format, rounding, seed=seed)
    return (values if dtype.is_floating_point else values.nan_to_num(nan=0.0)).to(dtype)


def encode_both(parts: Sequence[Tensor], scale: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of matrices side by side under one scale, a power of two, and what their matmuls want beside them.

    parts: [R, C_i] of one dtype, a matrix [R, C]; scale: fp32 [1, 1]; format: fp8. Returns codes [R, C] and [C, R], each row
    by row, in which an infinity is NaN, because saturating must not hide it; the sums of the columns in fp32, [C], and the
    largest magnitude, fp32 [1, 1].
    """
    x = torch.cat(tuple(parts), 1)
    codes = encode(x.where(x.isfinite(), math.nan), scale, format, Granularity(), scales="delayed")
    return codes, codes.t().contiguous(), x.float().sum(0), block_amax(x, Granularity())


def decode(
    codes: Tensor,
    scale: Tensor,
    granularity: Granularity,
    dtype: torch.dtype = torch.float32,
    scales: str = "exact",
) -> Tensor:
    """code * scale of a matrix in `dtype`: shape and strides of codes; formed in fp32, rounded once.

    Exact in bf16 where code and scale have at most 8 significant bits together: every float recipe here. `scales` as in
    `encode`.
    """
    if scales in (*POWERS, "two-level") and dtype == torch.bfloat16 and codes.dtype.itemsize == 1 and _eager_cpu(codes):
        return times(*_narrow(codes, scale), granularity)
    return times(codes.float(), scale, granularity).to(dtype)


# fp8 dtype -> how far its exponent and mantissa move to the places of bf16's, which bits are then its own, and what makes
# up for the difference of the biases
_PLACES = {torch.float8_e4m3fn: (4, -0x7810, 2.0**120), torch.float8_e5m2: (5, -0x7020, 2.0**112)}


def _narrow(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Two bf16 factors of code * scale, exact, for finite one-byte codes under powers of two (or e4m3 numbers times one).

    By bits, because torch's eager conversion on a CPU takes seven times as long; and the bias goes with the scale where
    that is one number and the product stays in range, which saves a pass.
    """
    narrow = scale.to(torch.bfloat16)
    if codes.dtype not in _PLACES:
        return codes.to(torch.bfloat16), narrow
    shift, mask, bias = _PLACES[codes.dtype]
    values = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(shift).bitwise_and_(mask).view(torch.bfloat16)
    if scale.numel() == 1 and type(scale) is Tensor and 2.0**-100 < float(scale) < 2.0**7:
        return values, narrow * bias
    return values.mul_(bias), narrow


def _eager_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _matrix(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
