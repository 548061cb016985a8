"""Attention as it is defined, and over short contexts in bf16 on a CPU where its own kernel does not run (AMX, no compiler):
plain matmuls, and the probabilities are kept for the backward pass.

torch's fused CPU kernel computes bf16 no faster than fp32, and the scores twice. Where a context is no longer than four
heads are wide, the probabilities take no more memory than the feed-forward activations, and native matmuls are faster.

    S = scale q k^T    P = softmax(S)    y = P v
    dP = g v^T         dS = scale P (dP - sum(P dP))      dq = dS k      dk = dS^T q      dv = P^T g

S, dP and the softmax are fp32 (fp64 for fp64); P and dS are rounded to the dtype of q as they enter a matmul. Queries come in
blocks, and S and dP stop at the last key that a block may see; beyond it P and dS are 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from fewbits.numerics.matmul import onednn_bf16
from fewbits.numerics.wide import widen

_QUERIES = 64  # in one block: of a context of 256 tokens five eighths of S and dP are computed
_SCORE_BYTES = 8 << 20  # fp32 scores of one piece of the batch: what the last level of a CPU's cache holds


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in fp32 or wider, rounded once: the definition, which keeps everything.

    Shapes: q, k, v [B, H, T, d]; mask bool [B, 1, T, T], true where a key counts, or None for causal. A query that no key
    counts for has NaN here and 0 in torch's operators and in our kernel.
    """
    wide_q, wide_k, wide_v = widen(q), widen(k), widen(v)
    allowed = torch.ones(2 * q.shape[2:3], dtype=torch.bool, device=q.device).tril() if mask is None else mask
    scores = wide_q @ wide_k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores.masked_fill(~allowed, -math.inf).softmax(-1) @ wide_v).to(q.dtype)


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


def _blocks(T: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """(queries, number of keys from the first on that they may see)"""
    for start in range(0, T, _QUERIES):
        stop = min(start + _QUERIES, T)
        yield slice(start, stop), stop if causal else T


class Softmax(Protocol):
    """The two elementwise passes of attention over a block of queries `rows`: this module's, or a fast twin of them."""

    def write_softmax(self, P_bHTT: Tensor, scores: Tensor, rows: slice, scale: float, mask: Tensor | None) -> None:
        """Writes softmax(scale * scores) into P[:, :, rows], zeros where a query sees no key. scores: fp32 or wider
        [b H, rows, seen], not used afterwards. mask: bool [b, 1, T, T], or None for causal."""

    def write_gradient(self, dS_NTT: Tensor, dP: Tensor, P_NTT: Tensor, rows: slice, scale: float) -> None:
        """Writes scale P (dP - sum(P dP)) into dS[:, rows], zeros beyond. dP: fp32 or wider [N, rows, seen]."""


def write_softmax(P_bHTT: Tensor, scores: Tensor, rows: slice, scale: float, mask: Tensor | None) -> None:
    """See `Softmax`."""
    b, H, _, _ = P_bHTT.shape
    count, seen = scores.shape[1:]
    scores = scores.view(b, H, count, seen).mul_(scale)
    if mask is None:
        later = torch.ones(count, count, dtype=torch.bool).triu_(1)
        scores[..., rows].masked_fill_(later, -math.inf)
    else:
        scores.masked_fill_(~mask[:, :, rows], -math.inf)
    P_bHTT[:, :, rows, :seen] = torch.softmax(scores, -1)
    P_bHTT[:, :, rows, seen:] = 0


def write_gradient(dS_NTT: Tensor, dP: Tensor, P_NTT: Tensor, rows: slice, scale: float) -> None:
    """See `Softmax`."""
    seen = dP.shape[2]
    wide = widen(P_NTT[:, rows, :seen]).contiguous()
    dS_NTT[:, rows, :seen] = torch._softmax_backward_data(dP, wide, -1, dP.dtype).mul_(scale)
    dS_NTT[:, rows, seen:] = 0


def _probabilities(P: Tensor, q: Tensor, k: Tensor, mask: Tensor | None, native_bf16: bool, softmax: Softmax) -> None:
    """Writes softmax(q k^T / sqrt(d)) into P [b, H, T, T]; q, k [b, H, T, d], mask bool [b, 1, T, T]."""
    T, d = q.shape[2:]
    wide_q, wide_k = widen(_flat(q)), widen(_flat(k)).transpose(1, 2)
    for rows, seen in _blocks(T, mask is None):
        with onednn_bf16(native_bf16):
            scores = torch.bmm(wide_q[:, rows], wide_k[:, :, :seen])
        softmax.write_softmax(P, scores, rows, 1 / math.sqrt(d), mask)


def _score_gradient(
    dS: Tensor, g: Tensor, v: Tensor, p: Tensor, causal: bool, native_bf16: bool, softmax: Softmax
) -> None:
    """Writes dS [N, T, T], from the gradient of y and v [N, T, d] and p [N, T, T]."""
    wide_g, wide_v = widen(g), widen(v).transpose(1, 2)
    for rows, seen in _blocks(g.shape[1], causal):
        with onednn_bf16(native_bf16):
            dP = torch.bmm(wide_g[:, rows], wide_v[:, :, :seen])
        softmax.write_gradient(dS, dP, p, rows, 1 / math.sqrt(g.shape[2]))


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, native_bf16: bool, softmax: Softmax
    ) -> Tensor:
        B, H, T, d = q.shape
        out, P = q.new_empty(B, T, H, d), q.new_empty(B, H, T, T)
        for piece in _pieces(B, H, T):
            _probabilities(P[piece], q[piece], k[piece], None if mask is None else mask[piece], native_bf16, softmax)
            _put(out, piece, torch.bmm(_flat(P[piece]), _flat(v[piece])))
        ctx.save_for_backward(q, k, v, P)
        ctx.causal, ctx.native_bf16, ctx.softmax = mask is None, native_bf16, softmax
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, P = ctx.saved_tensors
        B, H, T, d = q.shape
        grad_q, grad_k, grad_v = (q.new_empty(B, T, H, d) for _ in range(3))
        for piece in _pieces(B, H, T):
            g, p = _flat(grad[piece]), _flat(P[piece])
            dS = torch.empty_like(p)
            _score_gradient(dS, g, _flat(v[piece]), p, ctx.causal, ctx.native_bf16, ctx.softmax)
            _put(grad_q, piece, torch.bmm(dS, _flat(k[piece])))
            _put(grad_k, piece, torch.bmm(dS.transpose(1, 2), _flat(q[piece])))
            _put(grad_v, piece, torch.bmm(p.transpose(1, 2), g))
        return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v.transpose(1, 2), None, None, None


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, native_bf16: bool = False, softmax: Softmax | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v on a CPU, causal or under a mask, with every probability kept.

    Shapes: q, k, v [B, H, T, d] of one dtype; mask bool [B, 1, T, T], true where a key counts, or None for causal. The
    result is like q, and contiguous once heads and positions are swapped.

    Args:
        native_bf16: this CPU multiplies bf16 natively, and q is bf16.
        softmax: a twin of this module's `write_softmax` and `write_gradient`, or None for them.
    """
    passes = softmax or _Definition()
    return _ShortAttention.apply(q, k, v, mask, native_bf16, passes)  # type: ignore[no-any-return, no-untyped-call]


class _Definition:
    write_softmax = staticmethod(write_softmax)
    write_gradient = staticmethod(write_gradient)
