"""The embedding look-up whose weight gradient is summed in fp32.

torch's CPU kernel adds 16-bit rows in 16 bits: the gradient of 5,000 ones comes out as 256.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.numerics.wide import widen


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        wide = widen(grad)
        total = wide.new_zeros(ctx.weight_shape)
        total.index_add_(0, ids.flatten(), wide.reshape(-1, ctx.weight_shape[1]))
        return None, total.to(ctx.weight_dtype)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [V, D] for integer `ids` [...]: [..., D], with the gradient of `weight` summed in fp32."""
    return _Embedding.apply(ids, weight)  # type: ignore[no-any-return, no-untyped-call]
