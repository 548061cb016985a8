"""The format of reductions and updates: fp64 stays fp64, everything narrower is computed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """`x` in the format of reductions; `x` itself where it is in it already."""
    return x.to(wide_dtype(x.dtype))
