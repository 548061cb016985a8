"""Results that are fp32 inside and rounded once to their format, held to fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_ULP = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}  # relative, at most: 2^-p for p significant bits
FP32 = 2.0**-21  # a handful of fp32 roundings of half a unit in the last place, 2^-24, each


def assert_close(ours: Tensor, exact: Tensor, fp32_error: Tensor | float, subnormal: float = 2.0**-25) -> None:
    """Within one rounding to the dtype of ours of what fp32 arithmetic with that absolute error makes of it.

    subnormal: half the gap between the subnormals of fp16 (bf16 and fp32 have finer ones).
    """
    assert ours.isfinite().all()
    error = (ours.double() - exact).abs()
    allowed = HALF_ULP[ours.dtype] * (exact.abs() + fp32_error) + fp32_error + subnormal * (ours.dtype == torch.float16)
    assert (error <= allowed).all(), (error / allowed).max()


def exact_gradients(function, *inputs: Tensor, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y = function(*wide)
    return y.detach(), torch.autograd.grad(y, wide, grad.double())


def assert_threads_do_not_show(results: Callable[[], Sequence[Tensor]], threads: int = 3) -> None:
    """`results` under one thread and under several are the same bits."""
    one = results()
    torch.set_num_threads(threads)
    try:
        many = results()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))
