"""What the optimizer needs to know about DTensors (FSDP2): the local part, and how to put one back.

torch.distributed is imported only when a DTensor has come: it takes time, and some builds of torch do not have it.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from fewbits.errors import FewbitsError


def is_sharded(tensor: Tensor) -> bool:
    """Is it a DTensor?"""
    return hasattr(tensor, "_local_tensor")


def local(tensor: Tensor) -> Tensor:
    """The tensor this rank holds, detached, sharing memory and version counter."""
    return cast(Tensor, getattr(tensor, "_local_tensor", tensor)).detach()


def layout(tensor: Tensor) -> object:
    """None for a plain tensor; equal for DTensors whose local parts one collective can reduce together."""
    if not is_sharded(tensor):
        return None
    held: Any = tensor
    if any(place.is_partial() for place in held.placements):
        raise FewbitsError("a gradient is a DTensor with a partial placement; reduce it before the step.")
    return held.device_mesh, tuple(place.is_replicate() for place in held.placements)


def placed(value: Tensor, like: Tensor) -> Tensor:
    """The local tensor `value` as a tensor with the shape, mesh and placement of `like`."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor

    held: Any = like
    return DTensor.from_local(
        value, held.device_mesh, held.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def reduce(value: Tensor, like: Tensor, operation: str) -> Tensor:
    """The "sum" or "max" of the 0-d `value` over the ranks that hold different parts of the DTensor `like`."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    held: Any = like
    places = [Replicate() if place.is_replicate() else Partial(operation) for place in held.placements]
    whole: Tensor = DTensor.from_local(value, held.device_mesh, places, run_check=False).full_tensor()
    return whole
