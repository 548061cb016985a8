"""Activations of a feed-forward layer and their gradients as one call that a compiler keeps, with what fp8 wants of them.

Two ways, both one pass: the values and their largest magnitude, for scales of the current tensor; or, under scales known
before, fp8 codes in both layouts and never the values. Definitions: the functions of numerics/activation.py of the same
names, in `NAMES`, and `encode_both` of numerics/quantize.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewbits.formats import Format
from fewbits.kernels.layouts import _constants, _interpreted
from fewbits.numerics.quantize import carrier

NAMES = {"gelu": (1, 1), "gelu_backward": (2, 1), "swiglu": (2, 1), "swiglu_backward": (3, 2)}
"""Name -> how many tensors it takes, and how many it makes."""
TILES = {"gelu": (32, 128, 4), "gelu_backward": (32, 64, 2), "swiglu": (64, 64, 4), "swiglu_backward": (64, 128, 8)}
"""Rows, columns and warps of a program of `activate_both`, the fastest of bench/layouts.py on an H200."""
_BLOCK = 4096  # elements a program: two loads of 16 bytes a thread and tensor


class Coded(NamedTuple):
    """A matrix [R, C] that was never written: its fp8 codes [R, C] and [C, R], each row by row, its largest magnitude, fp32
    [1, 1], and the sums of its columns in fp32, [C], where they were asked for."""

    codes: Tensor
    codes_t: Tensor
    amax: Tensor
    sums: Tensor | None


def activate(name: str, *inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each result of `name` in the dtype of its inputs, and the largest magnitude in it, fp32 [1, 1]: that of the values as
    they are rounded; not finite where one of them is not.

    inputs: as the definition takes them, of one shape and one dtype, fp32 or 16 bits.
    """
    first, second, amax = _operators()[0](name, [x.contiguous() for x in inputs])
    results = (first, second)[: NAMES[name][1]]
    return [(y, amax[i : i + 1].view(torch.float32).view(1, 1)) for i, y in enumerate(results)]


def activate_both(
    name: str, scales: Sequence[Tensor], format: Format, sums: bool, *inputs: Tensor
) -> list[Coded]:  # fmt: skip
    """Each result of `name`, rounded to the dtype of its inputs, as fp8 codes under its scale, a power of two, fp32 [1, 1].

    inputs: matrices as `activate` takes them. sums: whether those of the columns are wanted.
    """
    codes, codes_t, parts, amax = _operators()[1](
        name, list(scales), format.name, sums, [x.contiguous() for x in inputs]
    )
    return [
        Coded(codes[i], codes_t[i], amax[i : i + 1].view(torch.float32).view(1, 1), parts[i].sum(0) if sums else None)
        for i in range(NAMES[name][1])
    ]


@cache
def _operators() -> tuple[Any, Any]:
    """The operators, made when first needed: naming their kernels imports Triton."""
    from torch.library import triton_op

    one = triton_op("fewbits::activate", mutates_args=())(_activate)
    return one, triton_op("fewbits::activate_both", mutates_args=())(_activate_both)


def _activate(name: str, inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    from torch.library import wrap_triton

    from fewbits.kernels.activation_triton import activate_kernel

    takes, makes = NAMES[name]
    a = inputs[0]
    first = torch.empty_like(a)
    second = torch.empty_like(a) if makes > 1 else a.new_empty(0)
    amax = torch.zeros(makes, dtype=torch.int32, device=a.device)
    kernel: Any = activate_kernel if _interpreted(activate_kernel) else wrap_triton(activate_kernel)
    n = a.numel()
    kernel[(-(-n // _BLOCK),)](
        a, inputs[min(1, takes - 1)], inputs[-1], first, second if makes > 1 else a, amax, n,
        GATED=name.startswith("swiglu"), BACKWARD=name.endswith("backward"), BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return first, second, amax


def _activate_both(
    name: str, scales: list[Tensor], format: str, sums: bool, inputs: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from torch.library import wrap_triton

    from fewbits.kernels.activation_triton import activate_both_kernel

    fmt, (takes, makes), a = Format.parse(format), NAMES[name], inputs[0]
    R, C = a.shape
    BM, BN, warps = TILES[name]
    codes = torch.empty(makes, R, C, dtype=carrier(fmt), device=a.device)
    codes_t = torch.empty(makes, C, R, dtype=carrier(fmt), device=a.device)
    down, across = -(-R // BM), -(-C // BN)
    parts = torch.empty(makes, down if sums else 0, C, dtype=torch.float32, device=a.device)
    amax = torch.zeros(makes, dtype=torch.int32, device=a.device)
    kernel: Any = activate_both_kernel if _interpreted(activate_both_kernel) else wrap_triton(activate_both_kernel)
    mantissa, lowest, limit = _constants(fmt)
    last = makes - 1
    kernel[(down * across,)](
        a, inputs[min(1, takes - 1)], inputs[-1], scales[0], scales[last], codes, codes_t, parts if sums else scales[0],
        amax, R, C, across, last * R * C, last * down * C,
        mantissa=mantissa, lowest=lowest, limit=limit, GATED=name.startswith("swiglu"),
        BACKWARD=name.endswith("backward"), SUMS=sums, BM=BM, BN=BN, NATIVE=a.is_cuda, num_warps=warps,
    )  # fmt: skip
    return codes, codes_t, parts, amax
