"""Clipping: one read measures the gradients, one factor inside the update rescales them; nothing is written back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fewbits.errors import FewbitsError, nearest
from fewbits.numerics.wide import wide_dtype
from fewbits.optim import sharding

CLIP_KINDS = ("norm", "inf", "value")
_ROW = 65536
"""Elements that a CPU sums in fp32 before fp64 takes over; the sum then does not depend on the number of threads."""


def check_kind(kind: str) -> str:
    """`kind` itself, or FewbitsError."""
    if kind not in CLIP_KINDS:
        raise FewbitsError(f"clip_kind={kind!r} is unknown; use norm, inf or value.{nearest(kind, CLIP_KINDS)}")
    return kind


def measure(gradients: Iterable[Tensor], kind: str = "norm") -> Tensor:
    """The global norm of all gradients, 0-d fp32 on their device (fp64 if a gradient is fp64).

    The 2-norm for "norm" and "value", the largest absolute value for "inf". One read, summed in fp32 within a tensor
    and in fp64 across (fp64 gradients: all in fp64), whatever the dtype of the gradients. It is finite exactly when
    every gradient is; a tensor whose own 2-norm exceeds sqrt(fp32 max) = 1.8e19 counts as not finite. DTensors are
    measured whole: every rank gets the same number. An empty list measures 0, on the CPU.
    """
    order = math.inf if check_kind(kind) == "inf" else 2.0
    groups: dict[object, list[Tensor]] = {}
    dtype = torch.float32
    for gradient in gradients:
        dtype = torch.float64 if gradient.dtype == torch.float64 else dtype
        groups.setdefault(sharding.layout(gradient), []).append(gradient.detach())
    norms = [
        _norm(_local_norms(group, order), order) if layout is None else _sharded_norm(group, order)
        for layout, group in groups.items()
    ]
    return _norm(torch.stack(norms), order).to(dtype) if norms else torch.zeros(())


def coefficient(norm: Tensor, clip: float) -> Tensor:
    """The 0-d factor min(1, clip / norm) for a 0-d `norm`.

    There is no epsilon, unlike torch.nn.utils.clip_grad_norm_ (clip / (norm + 1e-6)): [10, 1] under the infinity norm
    and clip=1 becomes [1, 0.1] exactly. A norm of 0 gives 1; NaN stays NaN, and the step that has one is not applied.
    """
    return torch.clamp(clip / norm, max=1.0)


def _norm(values: Tensor, order: float) -> Tensor:
    """The norm of 1-D `values` in fp64, 0-d."""
    norm: Tensor = torch.linalg.vector_norm(values.to(torch.float64), order)
    return norm


def _local_norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    """Norms of pieces of the plain `tensors`, 1-D fp64, whose norm is the norm of all."""
    if tensors[0].device.type == "cuda":
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel():
                groups.setdefault(tensor.dtype, []).append(tensor)
        parts = [
            torch.stack(torch._foreach_norm(group, order, dtype=wide_dtype(dtype))).double()
            for dtype, group in groups.items()
        ]
    else:
        parts = [part for tensor in tensors if tensor.numel() for part in _row_norms(tensor, order)]
    return torch.cat(parts) if parts else torch.zeros(1, dtype=torch.float64, device=tensors[0].device)


def _row_norms(tensor: Tensor, order: float) -> list[Tensor]:
    flat = tensor.detach().reshape(-1)
    if order == math.inf:  # 20 times as fast on a CPU as the vector norm, and NaN goes through too
        low, high = torch.aminmax(flat)
        return [torch.stack([low, high]).double()]
    whole = flat.numel() // _ROW * _ROW
    dtype = wide_dtype(flat.dtype)
    blocks = [block.view(-1, _ROW) for block in torch.split(flat[:whole], 16 * _ROW)] if whole else []
    blocks += [flat[whole:].view(1, -1)] if whole < flat.numel() else []
    # A cast of its own is faster here than vector_norm's dtype argument, and a block of it stays small.
    return [torch.linalg.vector_norm(block.to(dtype), order, dim=1).double() for block in blocks]


def _sharded_norm(group: Sequence[Tensor], order: float) -> Tensor:
    """The norm of DTensors of one layout, 0-d fp64; one collective for each mesh dimension that splits them."""
    local = _norm(_local_norms([sharding.local(tensor) for tensor in group], order), order)
    if order == 2.0:
        return sharding.reduce(local.square(), group[0], "sum").sqrt()
    return sharding.reduce(local, group[0], "max")
