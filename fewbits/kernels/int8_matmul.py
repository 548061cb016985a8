"""Matmul of int8 operands with int32 sums: exact, by torch's `_int_mm` on CPU and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_ROWS, MULTIPLE = 32, 8  # of torch._int_mm on CUDA: more than 16 rows, K and O multiples of 8


def int8_matmul(a_NK: Tensor, b_OK: Tensor) -> Tensor:
    """a @ b.T in integers: int8 [N, K] and [O, K] give int32 [N, O]. Exact for K below 2**17.

    Any shape: on CUDA rows, K and O are filled with zeros up to what `_int_mm` takes, and cut again.
    """
    (N, K), O = a_NK.shape, b_OK.shape[0]  # noqa: E741 (the letters of the shapes)
    if not N or not K or not O:
        return torch.zeros(N, O, dtype=torch.int32, device=a_NK.device)
    if a_NK.device.type == "cuda":
        pad = torch.nn.functional.pad
        more_K, more_O, more_N = -K % MULTIPLE, -O % MULTIPLE, max(0, LEAST_ROWS - N)
        if more_K or more_N:
            a_NK = pad(a_NK, (0, more_K, 0, more_N))
        if more_K or more_O:
            b_OK = pad(b_OK, (0, more_K, 0, more_O))
    return torch._int_mm(a_NK.contiguous(), b_OK.t())[:N, :O]
