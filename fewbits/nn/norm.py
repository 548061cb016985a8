"""Norm modules: fp32 statistics, fp32 sums of weight gradients, whatever the storage format."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewbits.kernels.dispatch import fused
from fewbits.numerics.norm import layer_norm, rms_norm
from fewbits.numerics.wide import wide_dtype


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis with fp32 inside; other shapes and weightless norms keep torch's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape and dtype."""
        if len(self.normalized_shape) != 1 or self.weight is None:
            return super().forward(x)
        twin = fused(x)
        arguments = (x, self.weight, self.bias, self.eps)
        return layer_norm(*arguments) if twin is None else twin.layer_norm(*arguments)


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over the last axis with fp32 inside; other shapes and weightless norms keep torch's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape and dtype."""
        if len(self.normalized_shape) != 1 or self.weight is None:
            return super().forward(x)
        # torch's default eps is that of the input's format; the statistics here are fp32 or wider
        eps = torch.finfo(wide_dtype(x.dtype)).eps if self.eps is None else self.eps
        twin = fused(x)
        return rms_norm(x, self.weight, eps) if twin is None else twin.rms_norm(x, self.weight, eps)
