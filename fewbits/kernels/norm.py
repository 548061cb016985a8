"""The backward pass of a norm by one kernel that reads everything once, as one call that a compiler keeps.

A compiler makes the sums over rows and over columns in one kernel too, but adds the latter up in four more, which take 22 us a
layer norm at 32,768 x 768 on an H200 (bench/results/levers_words_gpt2-124m_h200.json); here that is one. The definition is
`norm_backward` of numerics/norm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewbits.kernels.layouts import _interpreted

WIDEST = 8192  # a row lies in the registers of a program
_ROWS = 4
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FEW = 1024  # columns up to which a program has 8 warps


def why_not(x: Tensor) -> str:
    """What keeps the kernel from rows like these, or ""."""
    if x.dtype not in _DTYPES:
        return f"rows of {x.dtype}; bf16, fp16 and fp32 fit"
    if x.shape[-1] > WIDEST:
        return f"rows of {x.shape[-1]}; up to {WIDEST} fit"
    return "" if x.numel() else "no rows"


def norm_backward(
    grads: Sequence[Tensor], along: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`norm_backward` of numerics/norm.py, up to the order of sums; of one gradient or two."""
    D = x.shape[-1]
    *rows, along_rows, x_rows = [tensor.reshape(-1, D).contiguous() for tensor in (*grads, along, x)]
    grad_x, totals = _operator()(
        rows, along_rows, x_rows, weight, None if mean is None else mean.view(-1), rstd.view(-1)
    )
    return grad_x.view(x.shape), totals[0], None if mean is None else totals[1]


@cache
def _operator() -> Any:
    """The operator, made when first needed: naming its kernels imports Triton."""
    from torch.library import triton_op

    return triton_op("fewbits::norm_backward", mutates_args=())(_norm_backward)


def _norm_backward(
    grads: list[Tensor], along: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    from torch.library import wrap_triton

    from fewbits.kernels.norm_triton import norm_backward_kernel, totals_kernel

    (N, D), matrices, device = x.shape, 1 if mean is None else 2, x.device
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    programs = min(2 * units, -(-N // _ROWS))
    out, totals = torch.empty_like(x), torch.empty(matrices, D, dtype=weight.dtype, device=device)
    parts = torch.empty(matrices, programs, D, dtype=torch.float32, device=device)
    first: Any = norm_backward_kernel
    second: Any = totals_kernel
    if not _interpreted(first):
        first, second = wrap_triton(first), wrap_triton(second)
    first[(programs,)](
        grads[0], grads[-1], along, x, weight, rstd if mean is None else mean, rstd, out, parts, N, D=D,
        TURNS=-(-N // (programs * _ROWS)), TWO=len(grads) > 1, CENTERED=mean is not None, ROWS=_ROWS,
        BLOCK=1 << (D - 1).bit_length(), num_warps=8 if D <= _FEW else 4,
    )  # fmt: skip
    second[(-(-D // 32), matrices)](parts, totals, P=programs, D=D, ROWS=64, BLOCK=32, num_warps=4)
    return out, totals
