"""Clipping: one read of the gradients measures them, one factor inside the update rescales them; they are never written back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from fewbits.errors import FewbitsError, nearest

CLIP_KINDS = ("norm", "inf", "value")
_ROW = 65536  # elements summed in fp32 before fp64 takes over; also makes the CPU sum independent of the number of threads


def check_kind(kind: str) -> str:
    """`kind` itself, or FewbitsError."""
    if kind not in CLIP_KINDS:
        raise FewbitsError(f"clip_kind={kind!r} is unknown; use norm, inf or value.{nearest(kind, CLIP_KINDS)}")
    return kind


def measure(gradients: Iterable[Tensor], kind: str = "norm") -> Tensor:
    """The global norm of all gradients, 0-d fp32 on their device: the 2-norm for "norm" and "value", the largest absolute value
    for "inf".

    One read, accumulated in fp32 within a tensor and fp64 across, whatever the dtype of the gradients. It is finite exactly when every
    gradient is, as long as no 2-norm exceeds sqrt(fp32 max) = 1.8e19, which counts as not finite. DTensors are measured
    whole: every rank gets the same number. An empty list measures 0 on the CPU.
    """
    order = math.inf if check_kind(kind) == "inf" else 2.0
    plain: list[Tensor] = []
    sharded: dict[tuple[object, tuple[bool, ...]], list[DTensor]] = {}
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            split = tuple(not place.is_replicate() for place in gradient.placements)
            sharded.setdefault((gradient.device_mesh, split), []).append(gradient)
        else:
            plain.append(gradient)
    norms = [_norm(_local_norms(plain, order), order)] if plain else []
    norms += [_sharded_norm(group, order, split) for (_, split), group in sharded.items()]
    if not norms:
        return torch.zeros(())
    return _norm(torch.stack(norms), order).to(torch.float32)


def coefficient(norm: Tensor, clip: float) -> Tensor:
    """The 0-d factor min(1, clip / norm) for a 0-d `norm`.

    There is no epsilon, unlike torch.nn.utils.clip_grad_norm_ (clip / (norm + 1e-6)): [10, 1] under the infinity norm and
    clip=1 becomes [1, 0.1] exactly. A norm of 0 gives 1; NaN stays NaN, and the step that has one is not applied.
    """
    return torch.clamp(clip / norm, max=1.0)


def _norm(values: Tensor, order: float) -> Tensor:
    """The norm of 1-D `values` in fp64, 0-d."""
    return torch.linalg.vector_norm(values.to(torch.float64), order)


def _local_norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    """Norms of pieces of the plain `tensors`, 1-D fp64, whose norm is the norm of all."""
    if tensors[0].device.type == "cuda":
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel():
                groups.setdefault(tensor.dtype, []).append(tensor)
        parts = [
            torch.stack(torch._foreach_norm(group, order, dtype=_sum_dtype(dtype))).double()  # type: ignore[call-overload]
            for dtype, group in groups.items()
        ]
    else:
        parts = [part for tensor in tensors if tensor.numel() for part in _row_norms(tensor, order)]
    return torch.cat(parts) if parts else torch.zeros(1, dtype=torch.float64, device=tensors[0].device)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_norms(tensor: Tensor, order: float) -> list[Tensor]:
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    dtype = _sum_dtype(flat.dtype)
    rows = [flat[:whole].view(-1, _ROW)] if whole else []
    rows += [flat[whole:].view(1, -1)] if whole < flat.numel() else []
    return [torch.linalg.vector_norm(block, order, dim=1, dtype=dtype).double() for block in rows]


def _sharded_norm(group: Sequence[DTensor], order: float, split: tuple[bool, ...]) -> Tensor:
    """The norm of DTensors that share a mesh and split dimensions, 0-d fp64, with one collective per split dimension."""
    if any(place.is_partial() for tensor in group for place in tensor.placements):
        raise FewbitsError("a gradient is a DTensor with unreduced (partial) placement; reduce it before it is measured.")
    local = _norm(_local_norms([tensor._local_tensor for tensor in group], order), order)
    if order == 2.0:
        local = local.square()
    reduce = Partial("sum" if order == 2.0 else "max")
    places = [reduce if is_split else Replicate() for is_split in split]
    total = DTensor.from_local(local, group[0].device_mesh, places, run_check=False).full_tensor()
    return total.sqrt() if order == 2.0 else total
