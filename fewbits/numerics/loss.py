"""Linear head and cross entropy in pieces of rows: the logits of the whole batch never exist at once.

The gradients are formed in the forward pass, piece by piece, while the logits of the piece are at hand, so the head is
multiplied three times and not four. That needs the factor by which the sum of losses will be multiplied (loss scale over
the number of targets): dividing afterwards would let 16-bit gradients overflow or underflow first. `gradient_factor`
announces it; whatever arrives in the backward pass is applied relative to it, so a caller that announces nothing gets
right gradients too.

This is the definition, and what runs on a CPU. kernels/loss.py has what a GPU runs instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fewbits.formats import Format
from fewbits.numerics.matmul import onednn_bf16, operand
from fewbits.numerics.quantize import Quantized, encode
from fewbits.numerics.scaling import Granularity, power_of_two_scale
from fewbits.numerics.wide import wide_dtype, widen

IGNORE = -100  # label of a position that is no target: torch's convention

Pieces = Callable[[Tensor, Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]
"""(logits [N, V], labels [N], factor 0-d, dtype) -> (losses [N], gradient [N, V] in dtype), as `softmax_gradient`. The
logits are the callee's afterwards: it may write the gradient over them."""

Gradients = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(hidden [N, D], weight [V, D], labels [N], factor 0-d) -> (losses [N], gradient of hidden, gradient of weight) of
`factor * sum(losses)`."""

_FACTOR: ContextVar[Tensor | None] = ContextVar("gradient_factor", default=None)

# Bytes of the logits of one piece: on a CPU about what the last cache level holds; on a GPU few enough of memory, and so
# many that a piece more, which reads and writes the fp32 sum of the weight gradient, does not show.
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


class Twin(Protocol):
    """A head that runs elsewhere: see `DeviceHead` of kernels/loss.py."""

    def gradients(
        self, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(losses [N], gradient of hidden, gradient of weight) of `factor * sum(losses)`."""

    def losses(self, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        """Losses [N], nothing else."""


def piece_rows(rows: int, vocabulary: int, device_type: str, logit_bytes: int = 4) -> int:
    """Rows in one piece, bounded by memory: on a GPU pieces of equal size, elsewhere at most a quarter of the batch unless
    that is fewer than 64 rows.

    >>> piece_rows(2048, 4096, "cpu")
    512
    >>> piece_rows(32768, 50304, "cuda", logit_bytes=2)
    8192
    """
    by_memory = _PIECE_BYTES.get(device_type, 64 << 20) // (logit_bytes * vocabulary)
    most = max(64, by_memory // 64 * 64)
    if device_type == "cuda":  # a short last piece would pass over the fp32 sum of the weight gradient for a few rows
        pieces = max(1, -(-rows // most))
        return max(1, -(-rows // (64 * pieces)) * 64)
    return max(1, min(most, max(64, -(-rows // 4))))


def softmax_losses(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Cross entropy of every row in nats, fp32 or wider; 0 where the label is -100."""
    return torch.nn.functional.cross_entropy(widen(logits_NV), labels_N, ignore_index=IGNORE, reduction="none")


def softmax_gradient(logits_NV: Tensor, labels_N: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Loss of every row in fp32 or wider, and the gradient of `factor * sum(losses)` with respect to the logits, in `dtype`.

    Whatever the dtype of the logits, the softmax is computed in fp32 or wider and the gradient rounded once.
    """
    logits_NV = widen(logits_NV)
    real_N = labels_N != IGNORE
    index_N1 = torch.where(real_N, labels_N, 0).unsqueeze(1)  # any other negative label is an error, as in torch
    weight_N1 = torch.where(real_N, factor, 0.0).unsqueeze(1)
    if torch.compiler.is_compiling():  # one loop; a scatter would be a second kernel
        log_p_NV = torch.log_softmax(logits_NV, 1)
        losses_N = torch.where(real_N, -log_p_NV.gather(1, index_N1).squeeze(1), 0.0)
        target_NV = torch.arange(logits_NV.shape[1], device=logits_NV.device).unsqueeze(0) == index_N1
        return losses_N, ((log_p_NV.exp() - target_NV.to(logits_NV.dtype)) * weight_N1).to(dtype)
    p_NV = torch.softmax(logits_NV, 1)
    # -log p of the target, by way of the likeliest token, whose p is at least 1 / V: one exponential of every logit, not two
    losses_N = (logits_NV.amax(1) - logits_NV.gather(1, index_N1).squeeze(1)) - p_NV.amax(1).log()
    gradient_NV = p_NV.scatter_add_(1, index_N1, torch.full_like(index_N1, -1, dtype=logits_NV.dtype))
    return torch.where(real_N, losses_N, 0.0), gradient_NV.mul_(weight_N1).to(dtype)


def gradient_scale(factor: Tensor, format: Format) -> Tensor:
    """The scale under which `format` holds any gradient of `factor * sum(losses)` with respect to logits: fp32 [1, 1].

    A probability less a one or a zero is at most 1 in magnitude, so it is known before the logits are. NaN where the factor is
    not finite.
    """
    return power_of_two_scale(factor.abs().float().view(1, 1), format.max)


def softmax_codes(
    logits_NV: Tensor, labels_N: Tensor, factor: Tensor, scale: Tensor, format: Format
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_gradient` with the gradient as codes under a `gradient_scale`, rounded once from fp32, but for the targets:
    (losses [N], codes [N, V], apart [N]).

    The entries of a row add up to zero, those that are rounded one by one do not: a softmax does not see what they then push
    all logits by, but the weights do, always the same way. So codes hold the probabilities of the others and 0 for the
    target, whose entry is to be taken apart: -apart, minus the sum of the row's codes in fp32 or wider, which is the factor
    times 1 - p of the target as far as the codes of the others say. 0 where there is no target.
    """
    logits_NV = widen(logits_NV)
    real_N, p_NV = labels_N != IGNORE, torch.softmax(logits_NV, 1)
    others_NV = p_NV.scatter(1, torch.where(real_N, labels_N, 0).unsqueeze(1), 0.0)
    others_NV = others_NV * torch.where(real_N, factor, 0.0).unsqueeze(1)
    codes_NV = encode(others_NV, scale, format, Granularity(), scales="power-of-two")
    apart_N = codes_NV.to(logits_NV.dtype).sum(1) * scale.view(())
    return softmax_losses(logits_NV, labels_N), codes_NV, apart_N


def hidden_less_targets(
    product_PD: Tensor, weight: Quantized, labels_P: Tensor, apart_P: Tensor, out_PD: Tensor
) -> None:
    """What `softmax_codes` leaves out of the gradient of hidden states, taken from the product of its codes with those of the
    weight [V, D]: apart times the weight's row that the label names. Into out, rounded once."""
    rows = replace(weight, codes=weight.codes.view(torch.uint8)[labels_P.clamp(min=0)].view(weight.codes.dtype))
    out_PD.copy_(product_PD - apart_P.unsqueeze(1) * rows.dequantize())


def weight_less_targets_(total_VD: Tensor, hidden: Quantized, labels_N: Tensor, apart_N: Tensor) -> None:
    """The same of the gradient of the weight, in place, in fp32 or wider: apart times the hidden state [N, D], in the label's
    row."""
    total_VD.index_add_(0, labels_N.clamp(min=0), -apart_N.unsqueeze(1) * hidden.dequantize(total_VD.dtype))


class _Product:
    """How this head multiplies: logits are fp32, and the sum over tokens that is the weight gradient is fp32 until it ends.

    Operands are widened; where a CPU multiplies bf16 natively, oneDNN may narrow them again inside, exact for what came
    from bf16. There a bf16 matmul, which rounds its fp32 accumulator, does for what is rounded in any case: the gradient of
    the hidden states, and that of the weight in one product.
    """

    def __init__(self, weight_VD: Tensor, tf32: bool, native_bf16: bool, logits: torch.dtype | None):
        self.weight_VD, self.tf32, self.rounded = weight_VD, tf32, logits
        self.native_bf16 = native_bf16 and weight_VD.dtype == torch.bfloat16
        self.entering_VD = operand(weight_VD, tf32)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden @ weight.T in fp32 or wider, written into `out` where it is given, which then stays in a CPU's caches;
        values of the format that logits are to have."""
        with onednn_bf16(self.native_bf16):
            logits = torch.mm(operand(hidden, self.tf32), self.entering_VD.t(), out=out)
        if self.rounded is None or self.rounded.itemsize >= logits.dtype.itemsize:
            return logits
        return logits.copy_(logits.to(self.rounded))

    def to_hidden(self, gradient: Tensor) -> Tensor:
        """gradient @ weight in the dtype of the gradient."""
        if self.native_bf16:
            return gradient @ self.weight_VD
        return (operand(gradient, self.tf32) @ self.entering_VD).to(gradient.dtype)

    def add_(self, total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
        """total += gradient.T @ hidden, in fp32 or wider."""
        with onednn_bf16(self.native_bf16):
            total.addmm_(operand(gradient, self.tf32).t(), operand(hidden, self.tf32))


class _Head:
    """The head in pieces as it is defined."""

    def __init__(self, product: _Product, pieces: Pieces):
        self.product, self.pieces = product, pieces

    def gradients(
        self, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        product, dtype, wide = self.product, hidden_ND.dtype, wide_dtype(hidden_ND.dtype)
        N, V = labels_N.shape[0], weight_VD.shape[0]
        rows = piece_rows(N, V, hidden_ND.device.type)
        losses_N = hidden_ND.new_empty(N, dtype=wide)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        at_once = product.native_bf16 and dtype.itemsize * N * V <= _GRADIENT_BYTES
        gradient_NV = hidden_ND.new_empty(N if at_once else 0, V)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if not at_once else torch.empty(0)
        logits_NV = hidden_ND.new_empty(min(rows, N), V, dtype=wide)
        for start in range(0, N, rows):
            piece = slice(start, start + rows)
            logits = product.logits(hidden_ND[piece], logits_NV[: N - start])
            losses_N[piece], gradient = self.pieces(logits, labels_N[piece], factor, dtype)
            if at_once:
                gradient = gradient_NV[piece].copy_(gradient)
            grad_hidden_ND[piece] = product.to_hidden(gradient)
            if not at_once:
                product.add_(grad_weight_VD, gradient, hidden_ND[piece])
        if at_once:
            grad_weight_VD = gradient_NV.t() @ hidden_ND
        return losses_N, grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype)

    def losses(self, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        rows = piece_rows(labels_N.shape[0], weight_VD.shape[0], hidden_ND.device.type)
        pieces = [slice(start, start + rows) for start in range(0, labels_N.shape[0], rows)]
        return torch.cat([softmax_losses(self.product.logits(hidden_ND[piece]), labels_N[piece]) for piece in pieces])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, factor: Tensor, make: Gradients
    ) -> Tensor:
        losses_N, grad_hidden_ND, grad_weight_VD = make(hidden_ND, weight_VD, labels_N, factor)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, factor)
        return losses_N.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden_ND, grad_weight_VD, factor = ctx.saved_tensors
        if not _same(grad, factor):
            ratio = grad / factor  # exactly 1 when the announced factor is what arrives
            if ratio.device.type != "cpu" or ratio != 1:
                grad_hidden_ND = (widen(grad_hidden_ND) * ratio).to(grad_hidden_ND.dtype)
                grad_weight_VD = (widen(grad_weight_VD) * ratio).to(grad_weight_VD.dtype)
        return grad_hidden_ND, grad_weight_VD, None, None, None


def _same(grad: Tensor, factor: Tensor) -> bool:
    """Whether the two are one number in memory, so that a device need not be asked (it would make the host wait).

    `factor` is alive and unchanged since forward (autograd checks its version), so one address means one value.
    """
    if torch.compiler.is_compiling() or grad.dtype != factor.dtype or grad.device != factor.device:
        return False
    return grad is factor or grad.data_ptr() == factor.data_ptr()


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    tf32: bool = False,
    native_bf16: bool = False,
    logits: torch.dtype | None = None,
    pieces: Pieces = softmax_gradient,
    twin: Twin | None = None,
    gradients: Gradients | None = None,
) -> Tensor:
    """Sum over real targets of the cross entropy of `hidden @ weight.T`, 0-d, in nats, fp32 (fp64 for fp64).

    Shapes: hidden [N, D] and weight [V, D] of one dtype, labels [N] int64 with -100 ignored. The softmax runs in fp32; the
    gradient of the weight is accumulated in fp32 over all pieces and rounded once.

    Args:
        tf32: round the operands to tf32 first (for a CPU; a GPU does it itself).
        native_bf16: this CPU multiplies bf16 natively.
        logits: what logits are rounded to from their fp32 sums while gradients are asked for; None leaves them as they are.
        pieces: `softmax_gradient`, or a compiled twin of it.
        twin: what runs instead of all that: a head with the same losses and gradients.
        gradients: what makes the losses that are trained on and their gradients in another precision, if anything does.
    """
    training = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    head = twin or _Head(_Product(weight_VD, tf32, native_bf16, logits if training else None), pieces)
    if not training:
        return head.losses(hidden_ND, weight_VD, labels_N).sum()
    announced, wide = _FACTOR.get(), wide_dtype(hidden_ND.dtype)
    factor = torch.ones((), dtype=wide, device=hidden_ND.device) if announced is None else announced.to(wide)
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, factor, gradients or head.gradients)  # type: ignore[no-any-return, no-untyped-call]
