"""Which range of values a quantized tensor covers: clip little and round coarsely, or clip more and round finely.

Every function works along the last dimension and keeps it with length 1, so that the answer broadcasts against x; see
`fewbits.numerics.affine.grouped` for rows and groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.numerics.affine import affine_decode, affine_encode, affine_parameters
from fewbits.numerics.rounding import cast
from fewbits.numerics.scaling import quotient


def min_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """(lowest, highest) of x [..., N], each [..., 1] in the dtype of x: nothing is clipped. N is at least 1."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    return low, high


def percentile(x: Tensor, fraction: float = 0.999) -> tuple[Tensor, Tensor]:
    """The interval that holds `fraction` of x [..., N], as much cut off at each end; [..., 1] each, values of x.

    Raises FewbitsError for a fraction outside (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise FewbitsError(f"fraction={fraction} of the values cannot be covered; give one in (0, 1], such as 0.999.")
    ordered = x.sort(dim=-1).values
    cut = int((1.0 - fraction) / 2.0 * x.shape[-1])
    return ordered[..., cut : cut + 1], ordered[..., x.shape[-1] - 1 - cut : x.shape[-1] - cut]


def least_squares(
    x: Tensor, format: str | Format, symmetric: bool = True, signed: bool = True, steps: int = 60, least: float = 0.4
) -> tuple[Tensor, Tensor]:
    """The range of an integer format with the smallest mean squared error over x [..., N]: [..., 1] each.

    The range of `min_max` is shrunk in `steps` equal steps down to the part `least` of it; the best is taken.
    """
    low, high = min_max(x)
    best, found = torch.full_like(low, torch.inf), (low, high)
    for step in range(steps):
        part = 1.0 - (1.0 - least) * step / steps
        scale, zero_point = affine_parameters(low * part, high * part, format, symmetric, signed)
        back = affine_decode(affine_encode(x, scale, zero_point, format, signed), scale, zero_point)
        error = (back - x).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        found = torch.where(better, low * part, found[0]), torch.where(better, high * part, found[1])
    return found


def largest_scale(x: Tensor, format: str | Format) -> Tensor:
    """The scale with which a symmetric format just reaches the largest |x|; for binary mean(|x|). [..., 1], never 0.

    mean(|x|) is the scale of the smallest squared error for signs (Rastegari et al. 2016, XNOR-Net, equation 6).
    """
    fmt = Format.parse(format)
    magnitude = x.abs()
    binary = fmt.kind == "binary"
    scale = magnitude.mean(-1, keepdim=True) if binary else quotient(magnitude.amax(-1, keepdim=True), fmt.max)
    return torch.where(scale > 0, scale, 1.0)


def least_squares_scale(
    x: Tensor, format: str | Format, importance: Tensor | None = None, steps: int = 60, least: float = 0.4
) -> Tensor:
    """The scale of any symmetric format (integers, fp8, fp4) with the smallest squared error over x [..., N]: [..., 1].

    importance: weighs the squared errors, broadcast against x; None weighs all alike. The scale that reaches the
    largest |x| is shrunk in `steps` equal steps down to the part `least` of it; the best is taken.
    """
    whole = largest_scale(x, format)
    best, found = torch.full_like(whole, torch.inf), whole
    for step in range(steps):
        scale = whole * (1.0 - (1.0 - least) * step / steps)
        error = (cast(x / scale, format) * scale - x).square()
        error = (error if importance is None else error * importance).sum(-1, keepdim=True)
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, scale, found)
    return found


class MovingAverage:
    """The range of a stream of tensors as an exponential moving average of the ranges of each (Jacob et al. 2018).

    The first tensor sets it. `update` is for training, where the range must not jump with every batch.
    """

    def __init__(self, momentum: float = 0.99):
        """momentum: the part that stays at each update, in [0, 1). Raises FewbitsError for another."""
        if not 0.0 <= momentum < 1.0:
            raise FewbitsError(f"momentum={momentum} is no part of what stays; give one in [0, 1), such as 0.99.")
        self.momentum = momentum
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The average after x [..., N], any shape that stays the same: (low, high) of [..., 1]."""
        low, high = min_max(x.detach())
        if self.low is not None and self.high is not None:
            low, high = torch.lerp(low, self.low, self.momentum), torch.lerp(high, self.high, self.momentum)
        self.low, self.high = low, high
        return low, high
