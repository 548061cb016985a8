"""The loss head: hidden states to a sum of losses without the logits of the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.formats import Format
from fewbits.kernels.dispatch import emulated, fused, logits_format, loss_execution
from fewbits.kernels.loss import DeviceHead
from fewbits.numerics.loss import IGNORE, Pieces, linear_cross_entropy, softmax_gradient


def loss_sum(
    hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, tf32: bool, pieces: Pieces | None, logits: str = "auto"
) -> Tensor:
    """Sum of the cross entropies in nats over the labels that are not -100, 0-d, fp32 or fp64.

    pieces: a compiled `softmax_gradient`, which runs where no kernel does. logits: as `Precision.logits`.
    """
    hidden_ND, labels_N = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), labels_BT.reshape(-1)
    device = hidden_BTD.device
    asked = Format.parse(logits_format(logits, weight_VD.dtype, device).value).container
    if device.type == "cuda" and hidden_ND.dtype == weight_VD.dtype:  # a head kept in another format is widened
        kernel = loss_execution(device).value == "kernel" and asked.itemsize < 8 and not torch.compiler.is_compiling()
        if kernel:
            _check(labels_N, weight_VD.shape[0])
        return linear_cross_entropy(hidden_ND, weight_VD, labels_N, twin=DeviceHead(asked, kernel, pieces))
    twin = fused(hidden_ND) if asked == torch.float32 else None
    return linear_cross_entropy(
        hidden_ND,
        weight_VD,
        labels_N,
        tf32=tf32,
        native_bf16=weight_VD.dtype == torch.bfloat16 and device.type == "cpu" and not emulated("bf16", "cpu"),
        logits=asked,
        pieces=pieces or (softmax_gradient if twin is None else twin.softmax_gradient),
    )


def _check(labels_N: Tensor, vocabulary: int) -> None:
    """A label that is no token is an error on the device, as it is where torch looks labels up; the kernel would say NaN."""
    token = (labels_N >= 0) & (labels_N < vocabulary)
    torch._assert_async(
        (token | (labels_N == IGNORE)).all(), f"a label is neither a token below {vocabulary} nor {IGNORE}"
    )


def compiled_pieces() -> Pieces:
    """`softmax_gradient` fused by the compiler: it reads the logits of a piece instead of materializing five of them."""
    return torch.compile(softmax_gradient, dynamic=False)
