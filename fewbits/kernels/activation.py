"""Activations of a feed-forward layer and their gradients as one call that a compiler keeps, with what fp8 wants of them.

Two ways, both one pass: the values and their largest magnitude, for scales of the current tensor; or, under scales known
before, fp8 codes and never the values. The backward pass then makes the codes of the activation a second time, transposed,
from what it reads anyway, so that nobody keeps them. Definitions: the functions of numerics/activation.py of the same names,
in `NAMES`, and `encode_both` of numerics/quantize.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewbits.formats import Format
from fewbits.kernels.layouts import _constants, _interpreted, unpadded
from fewbits.numerics.quantize import carrier

NAMES = {"gelu": (1, 1), "gelu_backward": (2, 1), "swiglu": (2, 1), "swiglu_backward": (3, 2)}
"""Name -> how many tensors it takes, and how many it makes."""
TILES = {"gelu_backward": (64, 64, 4), "swiglu_backward": (32, 128, 4)}
"""Rows, columns and warps of a program of `activate_backward`, the fastest of bench/layouts.py on an H200."""
_BLOCK = 4096  # elements a program: two loads of 16 bytes a thread and tensor


class Known(NamedTuple):
    """A scale known before what it scales, a power of two, fp32 [1, 1], and the fp8 format of the codes."""

    scale: Tensor
    format: Format


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
    first, second, amax = _operators()[0](name, [x.contiguous() for x in inputs], None, "")
    results = (first, second)[: NAMES[name][1]]
    return [(y, amax[i : i + 1].view(torch.float32).view(1, 1)) for i, y in enumerate(results)]


def activate_codes(name: str, known: Known, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The fp8 codes of the result of gelu or swiglu as `activate` has it, of its shape, and its largest magnitude."""
    codes, _, amax = _operators()[0](name, [x.contiguous() for x in inputs], known.scale, known.format.name)
    return codes, amax.view(torch.float32).view(1, 1)


def activate_backward(
    name: str, hidden: Known, gradients: Sequence[Known], sums: bool, *inputs: Tensor
) -> tuple[Tensor, list[Coded]]:
    """Of a backward `name`: the transpose of the codes that `activate_codes` makes of the activation, [C, R] row by row, and
    each result of `activate` as codes.

    inputs: matrices [R, C] as `activate` takes them. gradients: of one format. sums: whether those of the columns are wanted.
    """
    scales, (format, *_) = zip(*gradients, strict=True)
    codes, codes_t, hidden_t, parts, amax = _operators()[1](
        name, hidden.scale, hidden.format.name, list(scales), format.name, sums, [x.contiguous() for x in inputs]
    )
    rows = codes.shape[1]
    found = [
        Coded(
            codes[i], unpadded(codes_t[i], rows), amax[i : i + 1].view(torch.float32).view(1, 1),
            parts[i].sum(0) if sums else None,
        )
        for i in range(NAMES[name][1])
    ]  # fmt: skip
    return unpadded(hidden_t, rows), found


@cache
def _operators() -> tuple[Any, Any]:
    """The operators, made when first needed: naming their kernels imports Triton."""
    from torch.library import triton_op

    one = triton_op("fewbits::activate", mutates_args=())(_activate)
    return one, triton_op("fewbits::activate_backward", mutates_args=())(_activate_backward)


def _activate(name: str, inputs: list[Tensor], scale: Tensor | None, format: str) -> tuple[Tensor, Tensor, Tensor]:
    from torch.library import wrap_triton

    from fewbits.kernels.activation_triton import activate_kernel

    takes, makes = NAMES[name]
    a = inputs[0]
    fmt = Format.parse(format) if scale is not None else None
    first = torch.empty_like(a, dtype=a.dtype if fmt is None else carrier(fmt))
    second = torch.empty_like(a) if makes > 1 else a.new_empty(0)
    amax = torch.zeros(makes, dtype=torch.int32, device=a.device)
    kernel: Any = activate_kernel if _interpreted(activate_kernel) else wrap_triton(activate_kernel)
    mantissa, lowest, limit = (0, 0, 0) if fmt is None else _constants(fmt)
    n = a.numel()
    kernel[(-(-n // _BLOCK),)](
        a, inputs[min(1, takes - 1)], inputs[-1], first, second if makes > 1 else a, amax if scale is None else scale,
        amax, n, GATED=name.startswith("swiglu"), BACKWARD=name.endswith("backward"), CODES=fmt is not None,
        mantissa=mantissa, lowest=lowest, limit=limit, BLOCK=_BLOCK, NATIVE=a.is_cuda, num_warps=8,
    )  # fmt: skip
    return first, second, amax


def _activate_backward(
    name: str, hidden_scale: Tensor, hidden_format: str, scales: list[Tensor], format: str, sums: bool,
    inputs: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from torch.library import wrap_triton

    from fewbits.kernels.activation_triton import activate_backward_kernel

    fmt, of_hidden, makes, grad = Format.parse(format), Format.parse(hidden_format), NAMES[name][1], inputs[0]
    R, C = grad.shape
    BM, BN, warps = TILES[name]
    down, across, quads = -(-R // BM), -(-C // BN), -(-R // 4)
    codes = torch.empty(makes, R, C, dtype=carrier(fmt), device=grad.device)
    codes_t = torch.empty(makes, C, 4 * quads, dtype=carrier(fmt), device=grad.device)
    hidden_t = torch.empty(C, 4 * quads, dtype=carrier(of_hidden), device=grad.device)
    parts = torch.empty(makes, down if sums else 0, C, dtype=torch.float32, device=grad.device)
    amax = torch.zeros(makes, dtype=torch.int32, device=grad.device)
    kernel: Any = activate_backward_kernel
    kernel = kernel if _interpreted(kernel) else wrap_triton(kernel)
    mantissa, lowest, limit = _constants(fmt)
    hidden_mantissa, hidden_lowest, hidden_limit = _constants(of_hidden)
    kernel[(down * across,)](
        grad, inputs[1], inputs[-1], scales[0], scales[-1], hidden_scale, codes, codes_t, hidden_t,
        parts if sums else hidden_scale, amax, R, C, quads, across, R * C, 4 * quads * C, down * C,
        mantissa=mantissa, lowest=lowest, limit=limit,
        hidden_mantissa=hidden_mantissa, hidden_lowest=hidden_lowest, hidden_limit=hidden_limit,
        GATED=makes > 1, SUMS=sums, BM=BM, BN=BN, WHOLE=R % BM == 0 and C % BN == 0, NATIVE=grad.is_cuda,
        num_warps=warps,
    )  # fmt: skip
    return codes, codes_t, hidden_t, parts, amax
