"""What a rounding did to a tensor: underflow, saturation, error, and where the exponents lie.

Tensors in, 0-d fp64 tensors on their device out: nothing here waits for a device. Every sum is in fp64, where squares of
the smallest and the largest fp32 values neither vanish nor overflow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.numerics.wide import widen


class ExponentHistogram(NamedTuple):
    """How many elements lie in each binade. counts[i] belongs to 2**(lowest + i) <= |x| < 2**(lowest + i + 1)."""

    lowest: int
    counts: Tensor  # int64 [B]; what lies below or above all binades is in the first and the last
    zeros: Tensor  # int64, 0-d
    not_finite: Tensor  # int64, 0-d: infinities and NaN


def underflow(x: Tensor, rounded: Tensor) -> Tensor:
    """The share of nonzero elements of x that are zero in `rounded`: 0..1, fp64; 0 where x has none.

    x, rounded: same shape, any float dtypes. Raises FewbitsError for different shapes.
    """
    _same_shape(x, rounded)
    nonzero = x != 0
    lost = (nonzero & (rounded == 0)).sum()
    return lost.double() / nonzero.sum().clamp(min=1).double()


def saturation(x: Tensor, format: str | torch.dtype | Format, scale: float | Tensor = 1.0) -> Tensor:
    """The share of elements with x / scale beyond the largest or below the lowest number of a format: 0..1, fp64.

    x: any shape and float dtype. scale: a number or a tensor that broadcasts to x (value = code * scale). An infinity is
    beyond, a NaN is not. An empty x has 0. Raises FewbitsError for an unknown format.
    """
    fmt = Format.parse(format)
    lowest = fmt.min if fmt.signed else -fmt.max  # a scale format has no sign: what counts is the magnitude
    scaled = widen(x.detach()) / scale
    beyond = (scaled > fmt.max) | (scaled < lowest)
    return beyond.sum().double() / max(x.numel(), 1)


def sqnr(reference: Tensor, approximation: Tensor) -> Tensor:
    """Signal to quantization noise ratio in dB, fp64: 10 log10(sum(reference**2) / sum((reference - approximation)**2)).

    Same shape, any float dtypes. Infinity where both are equal. Raises FewbitsError for different shapes.

    >>> sqnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])).item()
    20.0
    """
    return -20.0 * torch.log10(relative_error(reference, approximation))


def relative_error(reference: Tensor, approximation: Tensor) -> Tensor:
    """The 2-norm of reference - approximation over that of reference, fp64. 0 where both are equal, infinity where only
    the reference is zero.

    Same shape, any float dtypes. Raises FewbitsError for different shapes.
    """
    _same_shape(reference, approximation)
    wide = torch.promote_types(reference.dtype, approximation.dtype)
    wide = torch.float64 if wide == torch.float64 else torch.float32
    noise = _norm(reference.detach().to(wide) - approximation.detach().to(wide))
    return torch.where(noise == 0, 0.0, noise / _norm(reference))


def cosine(reference: Tensor, approximation: Tensor) -> Tensor:
    """The cosine of the angle between two tensors as vectors: -1..1, fp64. 1 where both are zero, 0 where one is.

    Same shape, any float dtypes. Raises FewbitsError for different shapes.
    """
    _same_shape(reference, approximation)
    a, b = reference.detach().double().flatten(), approximation.detach().double().flatten()
    norms = _norm(a), _norm(b)
    # unit vectors first: the product of two norms may leave even fp64
    unit = [
        vector / norm.clamp(min=torch.finfo(torch.float64).tiny) for vector, norm in zip((a, b), norms, strict=True)
    ]
    angle = torch.dot(*unit).clamp(-1.0, 1.0)
    return torch.where((norms[0] == 0) & (norms[1] == 0), 1.0, angle)


def exponent_histogram(x: Tensor, lowest: int = -149, highest: int = 127) -> ExponentHistogram:
    """How many elements of x lie in each binade 2**lowest .. 2**(highest + 1); the default is every binade of fp32.

    x: any shape and float dtype. Compare it before and after a rounding: what a format loses moves from the counts to
    `zeros`. Raises FewbitsError when lowest > highest.
    """
    if lowest > highest:
        raise FewbitsError(f"Binades from 2**{lowest} to 2**{highest} are none; give lowest <= highest.")
    wide = widen(x.detach()).flatten()
    finite, zero = wide.isfinite(), wide == 0
    inside = finite & ~zero
    exponent = torch.frexp(wide).exponent.long() - 1  # of what is not inside: anything, and it counts 0
    counts = torch.zeros(highest - lowest + 1, dtype=torch.int64, device=x.device)
    # not bincount, which waits for the device to learn the largest index
    counts.scatter_add_(0, exponent.clamp(lowest, highest) - lowest, inside.long())
    return ExponentHistogram(lowest, counts, zero.sum(), (~finite).sum())


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.detach(), dtype=torch.float64)
    return norm


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise FewbitsError(
            f"Tensors of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared element by element."
        )
