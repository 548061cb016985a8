"""Moments: the running averages of an optimizer. They never inherit a 16-bit format from the parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.numerics.wide import wide_dtype


def make(parameter: Tensor) -> Tensor:
    """Zeros like the parameter (its placement and strides carry), fp32; fp64 for an fp64 parameter."""
    return torch.zeros_like(parameter, dtype=wide_dtype(parameter.dtype), requires_grad=False)
