"""Four ways to round a weight to a format, each ending in values on the format's grid and their scales.

nearest   the scale reaches the largest weight, every weight goes to the nearest value
mse       the scale that makes the squared error smallest, which may clip the largest weights
gptq      the same scales; columns are rounded one after the other, and the error of each is made up for by those that
          follow, as the inputs of the layer are correlated (Frantar et al. 2023)
awq       input channels that carry large activations are scaled up first, which is undone in the layer before
          (Lin et al. 2024); then as mse, with each input weighed by its mean square

O output rows, K input columns, G groups along a row; the error of a layer is tr(D H D^T), with D the difference of the
weights and H the mean of x x^T over the inputs x of the layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.numerics.affine import group_width, grouped
from fewbits.numerics.ranges import largest_scale, least_squares_scale
from fewbits.numerics.rounding import cast

METHODS = ("nearest", "mse", "gptq", "awq")
CALIBRATED = ("gptq", "awq")
DAMPING = 0.01  # of the mean of H's diagonal, added to it: Frantar et al. 2023, section 3.3
COLUMNS_AT_ONCE = 128  # rounded before the rest of the matrix is updated
ALPHAS = [step / 20 for step in range(20)]  # exponents that awq tries


class Rounded(NamedTuple):
    """A weight as `values * scale`: values [O, K] fp32 on the grid of the format, scale [O, G] in the stored dtype."""

    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """The weight [O, K] that this stands for, fp32, before it is rounded to the dtype of the scale."""
        return (_groups(self.values, self.scale) * self.scale.float().unsqueeze(-1)).flatten(1)


def scales(
    weight_OK: Tensor,
    format: Format,
    granularity: str,
    dtype: torch.dtype,
    search: bool,
    importance_K: Tensor | None = None,
) -> Tensor:
    """The scales [O, G] of a weight, in `dtype` already: codes are made for the scale that will be read.

    search: the smallest squared error, weighed by importance_K; else what reaches the largest weight (the mean
    magnitude for binary, which is the smallest error)."""
    groups = grouped(weight_OK, granularity)
    if search and format.kind != "binary":
        weighed = None if importance_K is None else grouped(importance_K.unsqueeze(0), granularity)
        found = least_squares_scale(groups, format, weighed)
    else:
        found = largest_scale(groups, format)
    return found.squeeze(-1).to(dtype).clamp(min=torch.finfo(dtype).tiny)


def round_weight(weight_OK: Tensor, scale_OG: Tensor, format: Format) -> Rounded:
    """Every weight to the nearest value of the grid under these scales."""
    steps = _groups(weight_OK.float(), scale_OG) / scale_OG.float().unsqueeze(-1)
    return Rounded(cast(steps, format).flatten(1), scale_OG)


def _groups(x_OK: Tensor, scale_OG: Tensor) -> Tensor:
    """x as [O, G, K / G]."""
    return x_OK.reshape(*scale_OG.shape, -1)


def gptq(
    weight_OK: Tensor,
    hessian_KK: Tensor,
    format: Format,
    granularity: str,
    dtype: torch.dtype,
    act_order: bool = True,
    damping: float = DAMPING,
) -> Rounded:
    """A weight rounded column by column with error feedback; hessian_KK is the mean of x x^T.

    act_order: columns with the largest inputs first, all scales taken from the weight before (the order is not stored);
    else from left to right, the scales of a group taken when it is reached.

    Raises FewbitsError for a Hessian that is not finite.
    """
    K = weight_OK.shape[1]
    inverse_KK, order = _inverse_factor(hessian_KK, act_order, damping)
    width = group_width(granularity, K)
    scale_OG = scales(weight_OK, format, granularity, dtype, search=True)
    left, columns = weight_OK.float()[:, order].clone(), order.tolist()
    values = torch.empty_like(left)
    at_once = width if COLUMNS_AT_ONCE < width < K else COLUMNS_AT_ONCE - COLUMNS_AT_ONCE % min(width, COLUMNS_AT_ONCE)
    for start in range(0, K, at_once):
        stop = min(start + at_once, K)
        errors = torch.empty_like(left[:, start:stop])
        for j in range(start, stop):
            group = columns[j] // width
            if not act_order and j % width == 0 and width < K:
                scale_OG[:, group] = scales(left[:, j : j + width], format, "row", dtype, search=True)[:, 0]
            scale = scale_OG[:, group].float()
            values[:, j] = cast(left[:, j] / scale, format)
            errors[:, j - start] = (left[:, j] - values[:, j] * scale) / inverse_KK[j, j]
            left[:, j:stop] -= errors[:, j - start, None] * inverse_KK[j, j:stop]
        left[:, stop:] -= errors @ inverse_KK[start:stop, stop:]
    back = torch.empty_like(values)
    back[:, order] = values
    return Rounded(back, scale_OG)


def _inverse_factor(hessian_KK: Tensor, act_order: bool, damping: float) -> tuple[Tensor, Tensor]:
    """(U, order): U upper triangular in fp32 with U^T U the inverse of the damped Hessian, in the order of columns."""
    H = hessian_KK.double()
    if not bool(torch.isfinite(H).all()):
        raise FewbitsError(
            "The inputs of a layer are not finite on the calibration text. Check the checkpoint, or use mse."
        )
    diagonal = H.diagonal()
    order = torch.argsort(diagonal, descending=True) if act_order else torch.arange(len(H), device=H.device)
    damped = H[order][:, order]
    damped.diagonal().add_(damping * float(diagonal.mean()) or 1.0)  # an input that is always 0: plain rounding
    lower = torch.linalg.cholesky(damped)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float(), order


def awq_channels(
    weights: list[Tensor], hessian_KK: Tensor, magnitude_K: Tensor, format: Format, granularity: str, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """(s [K], alpha): what the columns of weights [O, K] that share an input are multiplied by before they are rounded.

    s = magnitude^alpha over the geometric mean of its extremes, with the alpha in 0 .. 0.95 of the smallest error
    (Lin et al. 2024, equations 4 and 5); alpha 0 is s = 1. magnitude_K is the mean of |x|.
    """
    best, found, chosen = torch.inf, torch.ones_like(magnitude_K), 0.0
    for alpha in ALPHAS:
        s = magnitude_K.clamp(min=1e-4).pow(alpha)
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for weight in weights:
            scaled = weight * s
            rounded = round_weight(scaled, scales(scaled, format, granularity, dtype, search=False), format)
            error += float(output_error(rounded.dequantize() / s - weight, hessian_KK))
        if error < best:
            best, found, chosen = error, s, alpha
    return found, chosen


def output_error(difference_OK: Tensor, hessian_KK: Tensor) -> Tensor:
    """tr(D H D^T), 0-d: the mean squared error of the layer's output, summed over its rows."""
    return ((difference_OK @ hessian_KK) * difference_OK).sum()
