"""Norms around a residual sum as calls that a compiler keeps: forward to fp8 codes, and backward.

Forward, one kernel writes the sum and its statistics, and one reads it again for the codes of its norm in both layouts: 0.073
ms at 32,768 x 768 and 0.092 ms at 16,384 x 2,048 on an H200. A compiler's kernel and one that turns its codes take 0.141 and
0.281 ms, and one kernel that reads once 0.094 and 0.108 (bench/results/norm_codes_h200.json, 2026-11-30).

Backward, one kernel reads everything once. A compiler makes the sums over rows and over columns in one kernel too, but adds the
latter up in four more, which take 22 us a layer norm at 32,768 x 768 on an H200
(bench/results/levers_words_gpt2-124m_h200.json); here that is one. The definitions are those of numerics/norm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fewbits.formats import Format
from fewbits.kernels.layouts import BOTH_TILE, Known, _constants, _interpreted, processors, unpadded
from fewbits.numerics.quantize import carrier

WIDEST = 8192  # a row lies in the registers of a program
_ROWS = 4
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FEW = 1024  # columns up to which three turns of 16-bit rows fit beside one another, in the 99 KiB that smaller cards have too
_STAGES = 3
_ELEMENTS = 8192  # of a program that finds statistics: 64 in the registers of each of 128 threads


def why_not(x: Tensor) -> str:
    """What keeps the kernel from rows like these, or ""."""
    if x.dtype not in _DTYPES:
        return f"rows of {x.dtype}; bf16, fp16 and fp32 fit"
    if x.shape[-1] > WIDEST:
        return f"rows of {x.shape[-1]}; up to {WIDEST} fit"
    return "" if x.numel() else "no rows"


def add_norm_codes(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool, known: Known
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """`add_norm_codes` of numerics/norm.py of x and branch [..., D], up to the order of sums, the largest magnitude noted."""
    D = x.shape[-1]
    rows = [tensor.reshape(-1, D).contiguous() for tensor in (x, branch)]
    scale, format, maximum = known
    total, codes, codes_t, mean, rstd = _operators()[0](*rows, weight, bias, eps, centered, scale, format.name, maximum)
    mean, rstd = (found.view(*x.shape[:-1], 1) for found in (mean, rstd))
    return total.view(x.shape), codes, unpadded(codes_t, len(codes)), mean if centered else None, rstd


def norm_backward(
    grads: Sequence[Tensor], along: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`norm_backward` of numerics/norm.py, up to the order of sums; of one gradient or two."""
    D = x.shape[-1]
    *rows, along_rows, x_rows = [tensor.reshape(-1, D).contiguous() for tensor in (*grads, along, x)]
    grad_x, totals = _operators()[1](
        rows, along_rows, x_rows, weight, None if mean is None else mean.view(-1), rstd.view(-1)
    )
    return grad_x.view(x.shape), totals[0], None if mean is None else totals[1]


@cache
def _operators() -> tuple[Any, Any]:
    """The operators, made when first needed: naming their kernels imports Triton."""
    from torch.library import triton_op

    forward = triton_op("fewbits::add_norm_codes", mutates_args=("maximum",))(_add_norm_codes)
    return forward, triton_op("fewbits::norm_backward", mutates_args=())(_norm_backward)


def _add_norm_codes(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centered: bool, scale: Tensor,
    format: str, maximum: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from torch.library import wrap_triton

    from fewbits.kernels.norm_triton import add_statistics_kernel, encode_norm_kernel

    (N, D), (BM, BN, warps), fmt = x.shape, BOTH_TILE, Format.parse(format)
    quads, block = -(-N // 4), 1 << (D - 1).bit_length()
    rows = max(1, min(_ROWS, _ELEMENTS // block))
    total = torch.empty_like(x)
    rstd = torch.empty(N, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd)  # not written unless centered
    codes = torch.empty(N, D, dtype=carrier(fmt), device=x.device)
    codes_t = torch.empty(D, 4 * quads, dtype=carrier(fmt), device=x.device)
    first: Any = add_statistics_kernel
    second: Any = encode_norm_kernel
    if not _interpreted(first):
        first, second = wrap_triton(first), wrap_triton(second)
    first[(-(-N // rows),)](
        x, branch, total, mean, rstd, N, eps, D=D, CENTERED=centered, ROWS=rows, BLOCK=block, num_warps=4
    )
    mantissa, lowest, limit = _constants(fmt)
    second[(-(-N // BM) * -(-D // BN),)](
        total, weight, weight if bias is None else bias, mean, rstd, scale, codes, codes_t, maximum, N, quads, D=D,
        CENTERED=centered, BIASED=bias is not None, BM=BM, BN=BN, WHOLE=N % BM == 0 and D % BN == 0, mantissa=mantissa,
        lowest=lowest, limit=limit, NATIVE=x.is_cuda, num_warps=warps,
    )  # fmt: skip
    return total, codes, codes_t, mean, rstd


def _norm_backward(
    grads: list[Tensor], along: Tensor, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    from torch.library import wrap_triton

    from fewbits.kernels.norm_triton import norm_backward_kernel, totals_kernel

    (N, D), matrices, device = x.shape, 1 if mean is None else 2, x.device
    programs = min(2 * processors(device), -(-N // _ROWS))
    out, totals = torch.empty_like(x), torch.empty(matrices, D, dtype=weight.dtype, device=device)
    parts = torch.empty(matrices, programs, D, dtype=torch.float32, device=device)
    first: Any = norm_backward_kernel
    second: Any = totals_kernel
    if not _interpreted(first):
        first, second = wrap_triton(first), wrap_triton(second)
    first[(programs,)](
        grads[0], grads[-1], along, x, weight, rstd if mean is None else mean, rstd, out, parts, N, D=D,
        TURNS=-(-N // (programs * _ROWS)), TWO=len(grads) > 1, CENTERED=mean is not None, ROWS=_ROWS,
        BLOCK=1 << (D - 1).bit_length(), STAGES=_STAGES if D <= _FEW and x.element_size() == 2 else 1,
        num_warps=4,
    )  # fmt: skip
    second[(-(-D // 32), matrices)](parts, totals, P=programs, D=D, ROWS=64, BLOCK=32, num_warps=4)
    return out, totals
