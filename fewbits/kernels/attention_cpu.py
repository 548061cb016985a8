"""Attention on a CPU in eager code: the fast twin of `attention` of numerics/attention.py.

A head at a time in fp32, whatever the storage format, with no copy of q, k and v and no probability in memory.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewbits.choice import Choice
from fewbits.kernels import cpp

_FUNCTIONS = {"attention": "iipppppp", "attention_backward": "iipppppppppl"}


@cache
def library() -> Choice:
    """Choice(the compiled library or None, why), settled for the life of the process."""
    needs = "instructions that multiply and add 8 numbers at once (AVX2 with FMA)"
    return cpp.library("attention_cpu", _FUNCTIONS, needs)


def _call(function: str, format: torch.dtype, *arguments: Any) -> None:
    cpp.call(library().value, function, format, *arguments)


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("B", "H", "T", "d")),
        ("scale", ctypes.c_float),
        ("mask", ctypes.c_void_p),
        ("strides", ctypes.c_long * 12),
    )

    @classmethod
    def of(cls, mask: Tensor | None, *inputs: Tensor) -> _Shape:
        """Of q, k, v and perhaps the gradient, [B, H, T, d] with elements side by side."""
        B, H, T, d = inputs[0].shape
        strides = [stride for x in inputs for stride in x.stride()[:3]]
        where = None if mask is None else mask.data_ptr()
        return cls(B, H, T, d, 1 / math.sqrt(d), where, (ctypes.c_long * 12)(*strides))


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        B, H, T, d = q.shape
        q, k, v = (_side_by_side(x) for x in (q, k, v))
        mask = None if mask is None else mask.expand(B, 1, T, T).contiguous()
        y, logs = q.new_empty(B, T, H, d), torch.empty(B, H, T)
        shape = _Shape.of(mask, q, k, v)
        _call("attention", q.dtype, ctypes.addressof(shape), q, k, v, y, logs)
        ctx.save_for_backward(q, k, v, mask, logs)
        return y.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, mask, logs = ctx.saved_tensors
        B, H, T, d = q.shape
        grad = _side_by_side(grad)
        # as the rows of one product lie: nobody needs to put them together
        parts = q.new_empty(B, T, 3, H, d).unbind(2)
        shape = _Shape.of(mask, q, k, v, grad)
        _call("attention_backward", q.dtype, ctypes.addressof(shape), q, k, v, grad, logs, *parts, 3 * H * d)
        grad_q, grad_k, grad_v = (part.transpose(1, 2) for part in parts)
        return grad_q, grad_k, grad_v, None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`attention` of numerics/attention.py, a head at a time: q, k, v [B, H, T, d] of one dtype, bf16, fp16 or fp32, and any
    strides; mask bool [B, 1, T, T] or [1, 1, T, T], or None for causal. The result is contiguous once heads and positions are
    swapped, and the three gradients lie beside one another as [B, T, 3, H, d]."""
    return _Attention.apply(q, k, v, mask)  # type: ignore[no-any-return, no-untyped-call]
