"""Causal self-attention with grouped key and value heads, rotary positions and document masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fewbits.kernels.dispatch import attention_by_kernel, emulated, fused
from fewbits.nn.documents import Mask
from fewbits.nn.linear import FORMAT_OF, Linear
from fewbits.nn.lowbit import Codes, beside
from fewbits.nn.norm import RMSNorm
from fewbits.numerics.attention import short_attention
from fewbits.numerics.wide import widen
from fewbits.ranges import ATTENTION, span


def rotary_table(context: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, head_dim] in fp32, halves repeated (Su et al. 2021, in the layout of Llama)."""
    inverse = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    angles = torch.outer(torch.arange(context, dtype=torch.float32), inverse)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary position embedding of queries or keys, computed in fp32 and stored in the dtype of x."""
    wide = widen(x_BHTD)
    low, high = wide.chunk(2, dim=-1)
    return (wide * cos_TD + torch.cat((-high, low), dim=-1) * sin_TD).to(x_BHTD.dtype)


def _is_short(q: Tensor, k: Tensor) -> bool:
    """Whether the probabilities of all heads are few enough to keep, in eager code on a CPU."""
    T, d = q.shape[2:]
    return q.device.type == "cpu" and k.shape[2] == T and 4 * d >= T and not torch.compiler.is_compiling()


def _repeated(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, T, d] once for each of `heads`: themselves where G is that."""
    if (times := heads // k.shape[1]) == 1:
        return k, v
    return k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with fp32 scores, for q [B, H, T, d] and k, v [B, G, T, d] where G divides H. Blocks as a mask
    go without dropout, and into compiled code on CUDA.

    The scores are scaled before they could overflow fp16: torch's fused kernels hold them in fp32, and its plain path
    scales q and k before it multiplies them. Where 16-bit matmuls are emulated, the inputs are widened.
    """
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    dtype = q.dtype
    if not dropout and (twin := attention_by_kernel(q, k, v, mask)) is not None:
        return twin.attention(q, *_repeated(k, v, q.shape[1]), mask)  # type: ignore[no-any-return]
    name = FORMAT_OF.get(dtype)
    emulate = name is not None and emulated(name, q.device.type)
    if emulate:
        q, k, v = q.float(), k.float(), v.float()
    if q.dtype == torch.bfloat16 and not dropout and _is_short(q, k):
        return short_attention(q, *_repeated(k, v, q.shape[1]), mask, native_bf16=True, softmax=fused(q))
    y = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, enable_gqa=k.shape[1] != q.shape[1]
    )
    return y.to(dtype)


class Attention(nn.Module):
    """Multi-head attention; the rows of `qkv` are the query heads, then the key heads, then the value heads."""

    def __init__(self, width: int, heads: int, kv_heads: int, bias: bool, qk_norm: bool, eps: float, dropout: float):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.dropout = heads, kv_heads, width // heads, dropout
        self.qkv = Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.output = Linear(width, width, bias=bias)
        self.query_norm = RMSNorm(self.head_dim, eps=eps) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, eps=eps) if qk_norm else None

    def reader(self) -> Linear | None:
        """The layer whose codes of x `forward` takes now, if it takes any."""
        return self.qkv if type(self.qkv) is Linear and self.qkv.takes_codes() else None

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Mask, codes: Codes | None = None
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]; rotary: cosines and sines that broadcast to [B, H, T, d]; mask as `attend` takes it; codes:
        those of x for the `reader`."""
        B, T, D = x.shape
        q, k, v = self._heads(x, codes)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        with span(ATTENTION):
            y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.output(y.transpose(1, 2).reshape(B, T, D))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor, codes: Codes | None = None) -> Sequence[Tensor]:
        """Queries [B, T, H, d], keys and values [B, T, G, d], slices of one product.

        Behind norms of q and k a compiler puts the gradients side by side in the kernels that make them, so that splitting
        wins nothing there: 30.6 ms a step instead of 29.9 (minimind-64m in fp8-delayed, an H200).
        """
        counts = (self.heads, self.kv_heads, self.kv_heads)
        if self.query_norm is None and type(self.qkv) is Linear and self.qkv.splits(x):
            parts = self.qkv.split(x, tuple(count * self.head_dim for count in counts), codes)
            return [part.view(*x.shape[:-1], count, self.head_dim) for part, count in zip(parts, counts, strict=True)]
        product = self.qkv(x) if codes is None else self.qkv(x, codes)
        heads = product.view(*x.shape[:-1], sum(counts), self.head_dim)
        q, k, v = heads.split(counts, dim=2)
        if x.device.type == "cpu" and self.kv_heads == self.heads:
            kernel = attention_by_kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None)
            if kernel is not None:  # its gradients of q, k and v lie side by side
                return _Parts.apply(heads, counts)  # type: ignore[no-any-return, no-untyped-call]
        return q, k, v


class _Parts(torch.autograd.Function):
    """x [B, T, C, d] split along C, whose gradient is put together without a copy where its parts lie side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.shape = x.shape
        return x.split_with_sizes(counts, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        B, T, C, d = ctx.shape
        return beside([grad.reshape(B * T, grad.shape[2] * d) for grad in grads]).view(B, T, C, d), None
