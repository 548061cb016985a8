"""The loss head: hidden states to a sum of losses without the logits of the whole batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fewbits.formats import Format
from fewbits.kernels.dispatch import emulated, fused, logits_format, loss_execution
from fewbits.kernels.head import fp8_gradients
from fewbits.kernels.loss import DeviceHead
from fewbits.numerics.loss import IGNORE, Gradients, Pieces, linear_cross_entropy, softmax_gradient


def loss_sum(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    tf32: bool,
    pieces: Pieces | None,
    logits: str = "auto",
    head: str = "working",
) -> Tensor:
    """Sum of the cross entropies in nats over the labels that are not -100, 0-d, fp32 or fp64.

    pieces: a compiled `softmax_gradient`, which runs where no kernel does. logits, head: as those of a `Precision`.
    """
    hidden_ND, labels_N = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), labels_BT.reshape(-1)
    device = hidden_BTD.device
    asked = Format.parse(logits_format(logits, weight_VD.dtype, device).value).container
    alike = hidden_ND.dtype == weight_VD.dtype  # a head kept in another format is widened
    kernel = device.type == "cuda" and alike and loss_execution(device).value == "kernel" and asked.itemsize < 8
    kernel = kernel and not torch.compiler.is_compiling()
    gradients: Gradients | None = None
    if head == "fp8":
        gradients = partial(fp8_gradients, logits=asked, kernel=kernel)
    if device.type == "cuda" and alike:
        if kernel:
            _check(labels_N, weight_VD.shape[0])
        twin = DeviceHead(asked, kernel, pieces)
        return linear_cross_entropy(hidden_ND, weight_VD, labels_N, twin=twin, gradients=gradients)
    fused_twin = fused(hidden_ND) if asked == torch.float32 else None
    return linear_cross_entropy(
        hidden_ND,
        weight_VD,
        labels_N,
        tf32=tf32,
        native_bf16=weight_VD.dtype == torch.bfloat16 and device.type == "cpu" and not emulated("bf16", "cpu"),
        logits=asked,
        pieces=pieces or (softmax_gradient if fused_twin is None else fused_twin.softmax_gradient),
        gradients=gradients,
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
