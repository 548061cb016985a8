"""Attention over short contexts in bf16 on a CPU: plain matmuls, and the probabilities are kept for the backward pass.

torch's fused CPU kernel computes bf16 no faster than fp32, and the scores twice. Where a context is no longer than four
heads are wide, the probabilities take no more memory than the feed-forward activations, and native matmuls are faster.

    S = scale q k^T    P = softmax(S)    y = P v
    dP = g v^T         dS = scale P (dP - sum(P dP))      dq = dS k      dk = dS^T q      dv = P^T g

S, dP and the softmax are fp32 (fp64 for fp64); P and dS are rounded to the dtype of q as they enter a matmul.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fewbits.numerics.matmul import onednn_bf16
from fewbits.numerics.wide import wide_dtype, widen

_SCORE_BYTES = 8 << 20  # fp32 scores of one piece of the batch: what the last level of a CPU's cache holds


def _pieces(B: int, H: int, T: int) -> Iterator[slice]:
    rows = max(1, _SCORE_BYTES // (4 * H * T * T))
    return (slice(start, min(start + rows, B)) for start in range(0, B, rows))


def _flat(x_bHTd: Tensor) -> Tensor:
    """[b, H, T, d] of any strides -> [b H, T, d], contiguous."""
    return x_bHTd.reshape(-1, *x_bHTd.shape[2:]).contiguous()


def _put(out_BTHd: Tensor, piece: slice, values_NTd: Tensor) -> None:
    """Writes [b H, T, d] into the b rows `piece` of [B, T, H, d]."""
    _B, T, H, d = out_BTHd.shape
    out_BTHd[piece] = values_NTd.view(-1, H, T, d).transpose(1, 2)


def _probabilities(q: Tensor, k: Tensor, hidden: Tensor, native_bf16: bool) -> Tensor:
    """softmax(q k^T / sqrt(d) + hidden) in fp32 for q, k [b, H, T, d]; hidden: fp32, broadcasts to [b, H, T, T]."""
    b, H, T, d = q.shape
    with onednn_bf16(native_bf16):
        scores = torch.bmm(widen(_flat(q)), widen(_flat(k)).transpose(1, 2)).view(b, H, T, T)
    torch.add(hidden, scores, alpha=1 / math.sqrt(d), out=scores)
    return torch.softmax(scores, -1)


def _score_gradient(g: Tensor, v: Tensor, p: Tensor, native_bf16: bool) -> Tensor:
    """dS / scale in fp32, from the gradient of y and v [N, T, d] and p [N, T, T]."""
    with onednn_bf16(native_bf16):
        dP = torch.bmm(widen(g), widen(v).transpose(1, 2))
    return torch._softmax_backward_data(dP, widen(p), -1, dP.dtype)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, native_bf16: bool) -> Tensor:
        B, H, T, d = q.shape
        out, P = q.new_empty(B, T, H, d), q.new_empty(B, H, T, T)
        zero = torch.zeros((), dtype=wide_dtype(q.dtype))
        later = torch.full((T, T), -math.inf, dtype=zero.dtype).triu_(1)
        for piece in _pieces(B, H, T):
            hidden = later if mask is None else zero.masked_fill(~mask[piece], -math.inf)
            P[piece] = _probabilities(q[piece], k[piece], hidden, native_bf16)
            _put(out, piece, torch.bmm(_flat(P[piece]), _flat(v[piece])))
        ctx.save_for_backward(q, k, v, P)
        ctx.native_bf16 = native_bf16
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, P = ctx.saved_tensors
        B, H, T, d = q.shape
        grad_q, grad_k, grad_v = (q.new_empty(B, T, H, d) for _ in range(3))
        for piece in _pieces(B, H, T):
            g, p = _flat(grad[piece]), _flat(P[piece])
            dS = _score_gradient(g, _flat(v[piece]), p, ctx.native_bf16).mul_(1 / math.sqrt(d)).to(q.dtype)
            _put(grad_q, piece, torch.bmm(dS, _flat(k[piece])))
            _put(grad_k, piece, torch.bmm(dS.transpose(1, 2), _flat(q[piece])))
            _put(grad_v, piece, torch.bmm(p.transpose(1, 2), g))
        return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2), None, None


def short_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, native_bf16: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on a CPU, causal or under a mask, with every probability kept.

    Shapes: q, k, v [B, H, T, d] of one dtype; mask bool [B, 1, T, T], true where a key counts, or None for causal. The
    result is like q, and contiguous once heads and positions are swapped.

    Args:
        native_bf16: this CPU multiplies bf16 natively, and q is bf16.
    """
    return _ShortAttention.apply(q, k, v, mask, native_bf16)  # type: ignore[no-any-return, no-untyped-call]
