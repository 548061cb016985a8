"""int8 codes times int8 codes, rescaled and rounded in one pass, on a CPU with VNNI: the fast twin of `scaled_int8_matmul` of
numerics/matmul.py, bit for bit.

torch's `_int_mm` writes 32-bit sums, which another pass reads and rescales. Here both operands are put in the order in which
the instruction wants them, in whatever layout they lie, and sums leave the registers as results.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fewbits.choice import Choice
from fewbits.kernels import cpp

_FUNCTIONS = {"scaled_int8_matmul": "iiplllpllllpppp"}


@cache
def library() -> Choice:
    """Choice(the compiled library or None, why), settled for the life of the process."""
    return cpp.library("int8_matmul_cpu", _FUNCTIONS, "AVX-512 instructions that multiply int8 (avx512_vnni)")


def scaled_int8_matmul(
    left_MK: Tensor,
    right_NK: Tensor,
    row_scale_M: Tensor,
    column_scale_N: Tensor,
    bias_N: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """left @ right.T in integers, times both scales, plus the bias, each in fp32, then rounded to `dtype`: [M, N].

    left, right: int8, fastest where one of their strides is 1. Scales: fp32. dtype: bf16, fp16 or fp32. Exact up to the
    rescaling for K below 2**17.
    """
    (M, K), N = left_MK.shape, right_NK.shape[0]
    left_MK, right_NK = (x if 1 in x.stride() else x.contiguous() for x in (left_MK, right_NK))
    scales = row_scale_M.contiguous(), column_scale_N.contiguous()
    bias = None if bias_N is None else bias_N.float().contiguous()
    out = torch.empty(M, N, dtype=dtype)
    operands = left_MK, M, *left_MK.stride(), right_NK, N, *right_NK.stride(), K
    cpp.call(library().value, "scaled_int8_matmul", dtype, *operands, *scales, bias, out)
    return out
