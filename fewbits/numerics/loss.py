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
# Bytes up to which 16-bit gradients of all logits are kept, so that the weight gradient is one native matmul: with them the
# head takes no more memory than with the widened pieces that it does without.
_GRADIENT_BYTES = 16 << 20


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
    weight_N1 = torch.where(real_N, factor, 0.0).unsqueeze(1)
    if torch.compiler.is_compiling():  # one loop; a scatter would be a second kernel
        log_p_NV = torch.log_softmax(logits_NV, 1)
        losses_N = torch.where(real_N, -log_p_NV.gather(1, index_N1).squeeze(1), 0.0)
        target_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device).unsqueeze(0) == index_N1
        return losses_N, (log_p_NV.exp() - target_NV.to(logits_NV.dtype)) * weight_N1
    p_NV = torch.softmax(logits_NV, 1)
    # -log p of the target, by way of the likeliest token, whose p is at least 1 / V: one exponential of every logit, not two
    losses_N = (logits_NV.amax(1) - logits_NV.gather(1, index_N1).squeeze(1)) - p_NV.amax(1).log()
    gradient_NV = p_NV.scatter_add_(1, index_N1, torch.full_like(index_N1, -1, dtype=logits_NV.dtype))
    return torch.where(real_N, losses_N, 0.0), gradient_NV.mul_(weight_N1)


class _Product:
    """How this head multiplies: logits are fp32, and the sum over tokens that is the weight gradient is fp32 until it ends.

    On CUDA a 16-bit matmul hands out its fp32 accumulator. On a CPU operands are widened; where it multiplies bf16 natively,
    oneDNN may narrow them again inside, exact for what came from bf16. There a bf16 matmul, which rounds its fp32 accumulator,
    does for what is rounded in any case: the gradient of the hidden states, and that of the weight in one product.
    """

    def __init__(self, weight_VD: Tensor, tf32: bool, native_bf16: bool):
        self.weight_VD, self.tf32 = weight_VD, tf32
        self.hands_out_fp32 = weight_VD.is_cuda and weight_VD.dtype in (torch.float16, torch.bfloat16)
        self.native_bf16 = native_bf16 and weight_VD.dtype == torch.bfloat16 and not weight_VD.is_cuda
        self.entering_VD = self._enter(weight_VD)

    def _enter(self, x: Tensor) -> Tensor:
        return x if self.hands_out_fp32 else operand(x, self.tf32)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden @ weight.T in fp32 or wider; a CPU writes into `out` where it is given, which then stays in its caches."""
        if self.hands_out_fp32:
            return torch.mm(hidden, self.weight_VD.t(), out_dtype=torch.float32)
        with onednn_bf16(self.native_bf16):
            return torch.mm(self._enter(hidden), self.entering_VD.t(), out=out)

    def to_hidden(self, gradient: Tensor) -> Tensor:
        """gradient @ weight in the dtype of the gradient."""
        if self.hands_out_fp32 or self.native_bf16:
            return gradient @ self.weight_VD
        return (self._enter(gradient) @ self.entering_VD).to(gradient.dtype)

    def add_(self, total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        """total += gradient.T @ hidden, in fp32 or wider."""
        if self.hands_out_fp32:
            total += torch.mm(gradient.t(), hidden, out_dtype=torch.float32)
            return
        with onednn_bf16(self.native_bf16):
            total.addmm_(self._enter(gradient).t(), self._enter(hidden))


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
        N, V, dtype, wide = labels_N.shape[0], weight_VD.shape[0], hidden_ND.dtype, wide_dtype(hidden_ND.dtype)
        losses_N = hidden_ND.new_empty(N, dtype=wide)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        at_once = product.native_bf16 and dtype.itemsize * N * V <= _GRADIENT_BYTES
        gradient_NV = hidden_ND.new_empty(N if at_once else 0, V)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if not at_once else torch.empty(0)
        logits_NV = None if product.hands_out_fp32 else hidden_ND.new_empty(min(rows, N), V, dtype=wide)
        for start in range(0, N, rows):
            piece = slice(start, start + rows)
            out = None if logits_NV is None else logits_NV[: N - start]
            losses_N[piece], wide_gradient = pieces(product.logits(hidden_ND[piece], out), labels_N[piece], factor)
            # Rounded to the format of the working gradients. The next piece gets the memory of the wide one.
            gradient = gradient_NV[piece].copy_(wide_gradient) if at_once else wide_gradient.to(dtype)
            del wide_gradient
            grad_hidden_ND[piece] = product.to_hidden(gradient)
            if not at_once:
                product.add_(grad_weight_VD, gradient, hidden_ND[piece])
        if at_once:
            grad_weight_VD = gradient_NV.t() @ hidden_ND
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), factor)
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        grad_hidden_ND, grad_weight_VD, factor = ctx.saved_tensors
        ratio = grad / factor  # exactly 1 when the announced factor is what arrives
        if ratio.device.type != "cpu" or ratio != 1:
            grad_hidden_ND = (widen(grad_hidden_ND) * ratio).to(grad_hidden_ND.dtype)
            grad_weight_VD = (widen(grad_weight_VD) * ratio).to(grad_weight_VD.dtype)
        return grad_hidden_ND, grad_weight_VD, None, None, None, None, None


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    tf32: bool = False,
    native_bf16: bool = False,
    pieces: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = softmax_gradient,
) -> Tensor:
    """Sum over real targets of the cross entropy of `hidden @ weight.T`, 0-d, in nats, fp32 (fp64 for fp64).

    Shapes: hidden [N, D] and weight [V, D] of one dtype, labels [N] int64 with -100 ignored. The softmax runs in fp32 on
    fp32 logits; the gradient of the weight is accumulated in fp32 over all pieces and rounded once.

    Args:
        tf32: round the operands to tf32 first (for a CPU; a GPU does it itself).
        native_bf16: this CPU multiplies bf16 natively.
        pieces: `softmax_gradient`, or a compiled twin of it.
    """
    rows = piece_rows(labels_N.shape[0], weight_VD.shape[0], hidden_ND.device.type)
    product = _Product(weight_VD, tf32, native_bf16)
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        announced, wide = _FACTOR.get(), wide_dtype(hidden_ND.dtype)
        factor = torch.ones((), dtype=wide, device=hidden_ND.device) if announced is None else announced.to(wide)
        return _LinearCrossEntropy.apply(  # type: ignore[no-any-return, no-untyped-call]
            hidden_ND, weight_VD, labels_N, factor, rows, product, pieces
        )
    losses = []
    for start in range(0, labels_N.shape[0], rows):
        piece = slice(start, start + rows)
        logits_NV = product.logits(hidden_ND[piece])
        losses.append(
            torch.nn.functional.cross_entropy(logits_NV, labels_N[piece], ignore_index=IGNORE, reduction="none")
        )
    return torch.cat(losses).sum()
