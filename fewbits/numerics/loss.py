"""Linear head and cross entropy in pieces of rows: the logits of the whole batch never exist at once.

The gradients are formed in the forward pass, piece by piece, while the logits of the piece are at hand, so the head is
multiplied three times and not four. That needs the factor by which the sum of losses will be multiplied (loss scale over
the number of targets): dividing afterwards would let 16-bit gradients overflow or underflow first. `gradient_factor`
announces it; whatever arrives in the backward pass is applied relative to it, so a caller that announces nothing gets
right gradients too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fewbits.numerics.matmul import onednn_bf16, operand
from fewbits.numerics.wide import wide_dtype, widen

IGNORE = -100  # label of a position that is no target: torch's convention

_FACTOR: ContextVar[Tensor | None] = ContextVar("gradient_factor", default=None)

# Bytes of fp32 logits in one piece: on a CPU about what the last cache level holds, on a GPU enough rows to fill it.
_PIECE_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}


@contextmanager
def gradient_factor(factor: Tensor) -> Iterator[None]:
    """Within, the sum returned by `linear_cross_entropy` is going to be multiplied by `factor` (0-d) before backward."""
    token = _FACTOR.set(factor)
    try:
        yield
    finally:
        _FACTOR.reset(token)


def piece_rows(rows: int, vocabulary: int, device_type: str) -> int:
    """Rows in one piece: bounded by memory, and at most a quarter of the batch unless that is fewer than 64 rows.

    >>> piece_rows(2048, 4096, "cpu")
    512
    """
    by_memory = _PIECE_BYTES.get(device_type, 64 << 20) // (4 * vocabulary)
    return max(1, min(max(64, by_memory // 64 * 64), max(64, -(-rows // 4))))


def softmax_gradient(logits_NV: Tensor, labels_N: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of every row and the gradient of `factor * sum(losses)` with respect to the logits, both in fp32 or wider."""
    real_N = labels_N != IGNORE
    index_N1 = torch.where(real_N, labels_N, 0).unsqueeze(1)  # any other negative label is an error, as in torch
    log_p_NV = torch.log_softmax(logits_NV, 1)
    losses_N = torch.where(real_N, -log_p_NV.gather(1, index_N1).squeeze(1), 0.0)
    weight_N1 = torch.where(real_N, factor, 0.0).unsqueeze(1)
    if torch.compiler.is_compiling():  # one loop; a scatter would be a second kernel
        target_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device).unsqueeze(0) == index_N1
        return losses_N, (log_p_NV.exp() - target_NV.to(logits_NV.dtype)) * weight_N1
    gradient_NV = log_p_NV.exp_().scatter_add_(1, index_N1, torch.full_like(index_N1, -1, dtype=logits_NV.dtype))
    return losses_N, gradient_NV.mul_(weight_N1)


class _Product:
    """How this head multiplies: fp32 results from 16-bit operands, since the weight gradient is a sum over tokens and may
    not be rounded to 16 bits between pieces.

    On CUDA a 16-bit matmul hands out its fp32 accumulator. On a CPU the operands are widened; where the CPU multiplies bf16
    natively, oneDNN is allowed to narrow them again inside, which is exact for what came from bf16.
    """

    def __init__(self, weight_VD: Tensor, tf32: bool, narrow_inside: bool):
        self.native = weight_VD.is_cuda and weight_VD.dtype in (torch.float16, torch.bfloat16)
        self.tf32 = tf32
        self.narrow_inside = narrow_inside and weight_VD.dtype == torch.bfloat16 and not weight_VD.is_cuda
        self.weight_VD = weight_VD if self.native else operand(weight_VD, tf32)

    def enter(self, x: Tensor) -> Tensor:
        return x if self.native else operand(x, self.tf32)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        with onednn_bf16(self.narrow_inside):
            return torch.mm(a, b, out_dtype=torch.float32) if self.native else a @ b

    def to_hidden(self, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """gradient @ weight in the dtype of the hidden states."""
        return gradient @ self.weight_VD if self.native else self(gradient, self.weight_VD).to(dtype)

    def add_(self, total: Tensor, gradient: Tensor, entering: Tensor) -> None:
        """total += gradient.T @ entering, in fp32."""
        if self.native:
            total += self(gradient.t(), entering)
        else:
            with onednn_bf16(self.narrow_inside):
                total.addmm_(gradient.t(), entering)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        factor: Tensor,
        rows: int,
        product: _Product,
        pieces: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        wide = wide_dtype(hidden_ND.dtype)
        losses_N = hidden_ND.new_empty(labels_N.shape, dtype=wide)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide)
        for start in range(0, labels_N.shape[0], rows):
            piece = slice(start, start + rows)
            entering = product.enter(hidden_ND[piece])
            losses_N[piece], gradient = pieces(product(entering, product.weight_VD.t()), labels_N[piece], factor)
            # Rounded to the format of the working gradients, then widened again where the product is emulated.
            gradient = product.enter(gradient.to(hidden_ND.dtype))
            grad_hidden_ND[piece] = product.to_hidden(gradient, hidden_ND.dtype)
            product.add_(grad_weight_VD, gradient, entering)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), factor)
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        grad_hidden_ND, grad_weight_VD, factor = ctx.saved_tensors
        ratio = grad / factor  # exactly 1 when the announced factor is what arrives
        grad_hidden_ND = (widen(grad_hidden_ND) * ratio).to(grad_hidden_ND.dtype)
        return grad_hidden_ND, (widen(grad_weight_VD) * ratio).to(grad_weight_VD.dtype), None, None, None, None, None


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    tf32: bool = False,
    narrow_inside: bool = False,
    pieces: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = softmax_gradient,
) -> Tensor:
    """Sum over real targets of the cross entropy of `hidden @ weight.T`, 0-d, in nats, fp32 (fp64 for fp64).

    Shapes: hidden [N, D] and weight [V, D] of one dtype, labels [N] int64 with -100 ignored. The softmax runs in fp32 on
    fp32 logits; the gradient of the weight is accumulated in fp32 over all pieces and rounded once.

    Args:
        tf32: round the operands to tf32 first (for a CPU; a GPU does it itself).
        narrow_inside: this CPU multiplies bf16 natively.
        pieces: `softmax_gradient`, or a compiled twin of it.
    """
    rows = piece_rows(labels_N.shape[0], weight_VD.shape[0], hidden_ND.device.type)
    product = _Product(weight_VD, tf32, narrow_inside)
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        announced, wide = _FACTOR.get(), wide_dtype(hidden_ND.dtype)
        factor = torch.ones((), dtype=wide, device=hidden_ND.device) if announced is None else announced.to(wide)
        return _LinearCrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]
            hidden_ND, weight_VD, labels_N, factor, rows, product, pieces
        )
    losses = []
    for start in range(0, labels_N.shape[0], rows):
        piece = slice(start, start + rows)
        logits_NV = product(product.enter(hidden_ND[piece]), product.weight_VD.t())
        losses.append(
            torch.nn.functional.cross_entropy(logits_NV, labels_N[piece], ignore_index=IGNORE, reduction="none")
        )
    return torch.cat(losses).sum()
