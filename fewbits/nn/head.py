"""The loss head: hidden states to a sum of losses without the logits of the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewbits.kernels.dispatch import emulated, fused
from fewbits.numerics.loss import linear_cross_entropy, softmax_gradient

Pieces = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def loss_sum(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, tf32: bool, pieces: Pieces | None) -> Tensor:
    """Sum of the cross entropies in nats over the labels that are not -100, 0-d, fp32 or fp64."""
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    twin = fused(hidden_ND)
    on_cpu = hidden_BTD.device.type == "cpu"
    return linear_cross_entropy(
        hidden_ND,
        weight_VD,
        labels_BT.reshape(-1),
        tf32=tf32 and on_cpu,
        native_bf16=on_cpu and weight_VD.dtype == torch.bfloat16 and not emulated("bf16", "cpu"),
        pieces=pieces or (softmax_gradient if twin is None else twin.softmax_gradient),
    )


def compiled_pieces() -> Pieces:
    """`softmax_gradient` fused by the compiler: it reads the logits of a piece instead of materializing five of them."""
    return torch.compile(softmax_gradient, dynamic=False)
