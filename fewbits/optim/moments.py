"""Moments: the running averages of an optimizer. They never inherit a 16-bit format from the parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.errors import FewbitsError, nearest
from fewbits.numerics.update import wide_dtype

MOMENT_KINDS = ("fp32",)
LATER_KINDS = ("bf16", "int8", "fp8", "int4")


def check_kind(kind: str) -> str:
    """`kind` itself, or FewbitsError."""
    if kind in LATER_KINDS:
        raise FewbitsError(f"moments={kind!r} is not in this version; use fp32.")
    if kind not in MOMENT_KINDS:
        raise FewbitsError(f"moments={kind!r} is unknown; use fp32.{nearest(str(kind), MOMENT_KINDS)}")
    return kind


def make(parameter: Tensor) -> Tensor:
    """Zeros like the parameter (its placement and strides carry), fp32; fp64 for an fp64 parameter."""
    return torch.zeros_like(parameter, dtype=wide_dtype(parameter.dtype), requires_grad=False)
