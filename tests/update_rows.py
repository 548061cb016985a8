"""Rows for the update kernel, made alike for the interpreter and for a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewbits.kernels import update as kernel
from fewbits.optim import master

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
MASTERS = [(bf16, "split"), (bf16, "fp32"), (bf16, "none"), (fp16, "fp32"), (fp16, "none"), (fp32, "none")]
SCALARS = [[0.999, 0.1, 0.1, 0.95, 0.05, 0.3, 1e-8, 1e-2], [1e-2, 0.05, 0.9, 0.9, 0.1, 0.7, 1e-6, 3e-3]]


class ExactRoots(TorchFunctionMode):
    """torch's fp32 square root on a CPU may be off by a unit; rounded from fp64 it is exact (53 bits are 2 * 24 + 2)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].double().sqrt().float() if func is Tensor.sqrt else func(*args, **(kwargs or {}))


def spread(shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Exact weights over many binades."""
    return torch.randn(shape, device=device) * torch.randn(shape, device=device).mul(2).exp()


def row_from(
    exact: Tensor, dtype: torch.dtype, kind: str, gradient: torch.dtype, moments: int, number: int
) -> kernel.Row:
    """One tensor with these exact weights, its moments (the second over many binades) and a gradient."""
    working, kept = master.rounded(kind, exact, dtype)
    held = [torch.randn_like(exact) * 0.1, torch.rand_like(exact) * torch.randn_like(exact).mul(4).exp()][:moments]
    kept = kept.clone() if kept is not None else None
    return kernel.Row(torch.randn_like(exact).to(gradient), working.clone(), kept, tuple(held), number)


def copied(row: kernel.Row) -> kernel.Row:
    kept = None if row.kept is None else row.kept.clone()
    return row._replace(working=row.working.clone(), kept=kept, moments=tuple(m.clone() for m in row.moments))


def stored(row: kernel.Row) -> list[Tensor]:
    return [row.working, *([] if row.kept is None else [row.kept]), *row.moments]


def bits(tensor: Tensor) -> Tensor:
    """The bits, NaN made one (which NaN it is does not matter, the sign of a zero does)."""
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    return tensor.reshape(-1).view(torch.uint8)


def table_of(rule: Callable[..., None], kind: str, rows: list[kernel.Row], cut: kernel.Cut) -> kernel.Table:
    assert not any(kernel.why_not(rule, kind, row) for row in rows)
    formats = (kernel.FORMATS[tensor.dtype] for tensor in (rows[0].working, rows[0].gradient))
    return kernel.Table(kernel.Variant(kernel.RULES[rule], kind, *formats, len(rows[0].moments)), rows, cut)
