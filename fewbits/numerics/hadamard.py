"""The random Hadamard transform: spreads an outlier over its group before it is rounded, and leaves products as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.numerics.random import random_bits

GROUP = 16


def random_hadamard(x: Tensor, key: int | Tensor) -> Tensor:
    """A matrix [R, C] with every 16 columns multiplied by diag(s) H / 4, fp32 [R, C] (C rounded up to 16, with zeros).

    H is the 16 x 16 Hadamard matrix of Sylvester and s are random signs drawn from `key`, the same for every group. The
    transform is orthogonal, so the product of two operands that went through it along their contraction is unchanged up to
    rounding (Tseng et al. 2024, arXiv 2402.04396, and NVIDIA's NVFP4 recipe, 2509.25149).
    """
    shape = x.shape[0], -(-x.shape[1] // GROUP) * GROUP
    x = x.float().contiguous()
    if x.shape[1] % GROUP:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP))
    signs = (random_bits(key, (GROUP,), x.device) >= 0).float() * 2 - 1
    y = (x.view(x.shape[0], -1, GROUP) * signs).view(x.shape[0], -1, 2, 2, 2, 2)
    for axis in (2, 3, 4, 5):
        low, high = y.unbind(axis)
        y = torch.stack((low + high, low - high), axis)
    return y.reshape(shape) * 0.25
