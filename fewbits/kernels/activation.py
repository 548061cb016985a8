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
from fewbits.kernels.layouts import Known, _constants, _interpreted, processors, unpadded
from fewbits.numerics.quantize import carrier

NAMES = {"gelu": (1, 1), "gelu_backward": (2, 1), "swiglu": (2, 1), "swiglu_backward": (3, 2)}
"""Name -> how many tensors it takes, and how many it makes."""
TILES = {"gelu_backward": (64, 64, 4, 4, 3), "swiglu_backward": (64, 64, 4, 8, 3)}
"""Rows, columns, warps, turns and stages of a program of `activate_backward`, the fastest of bench/layouts.py on an H200."""
_BLOCKS = (8192, 4096)  # elements a program, forward and backward: four or two loads of 16 bytes a thread and tensor


class Coded(NamedTuple):
    """A matrix [R, C] that was never written: its fp8 codes [R, C] and [C, R], each row by row, and the sums of its columns in
    fp32, [C], where they were asked for."""

    codes: Tensor
    codes_t: Tensor
    sums: Tensor | None


def activate(name: str, *inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each result of `name` in the dtype of its inputs, and the largest magnitude in it, fp32 [1, 1]: that of the values as
    they are rounded; not finite where one of them is not.

    inputs: as the definition takes them, of one shape and one dtype, fp32 or 16 bits.
    """
    first, second, amax = _operators()[0](name, [x.contiguous() for x in inputs])
    results = (first, second)[: NAMES[name][1]]
    return [(y, amax[i].view(1, 1)) for i, y in enumerate(results)]


def activate_codes(name: str, known: Known, *inputs: Tensor) -> Tensor:
    """The fp8 codes of the result of gelu or swiglu as `activate` has it, of its shape; raises `known.maximum`."""
    codes: Tensor = _operators()[1](
        name, [x.contiguous() for x in inputs], known.scale, known.format.name, known.maximum
    )
    return codes


def activate_backward(
    name: str, hidden_scale: Tensor, hidden_format: Format, gradients: Sequence[Known], sums: bool, *inputs: Tensor
) -> tuple[Tensor, list[Coded]]:
    """Of a backward `name`: the transpose of the codes that `activate_codes` makes of the activation, [C, R] row by row, and
    each result of `activate` as codes.

    inputs: matrices [R, C] as `activate` takes them. gradients: of one format; their maxima are raised. sums: whether those of
    the columns are wanted.
    """
    scales, (format, *_), maxima = zip(*gradients, strict=True)
    codes, codes_t, hidden_t, parts = _operators()[2](
        name, hidden_scale, hidden_format.name, list(scales), format.name, list(maxima), sums,
        [x.contiguous() for x in inputs],
    )  # fmt: skip
    rows = codes.shape[1]
    found = [
        Coded(codes[i], unpadded(codes_t[i], rows), parts[i].sum(0) if sums else None) for i in range(NAMES[name][1])
    ]
    return unpadded(hidden_t, rows), found


@cache
def _operators() -> tuple[Any, Any, Any]:
    """The operators, made when first needed: naming their kernels imports Triton."""
    from torch.library import triton_op

    values = triton_op("fewbits::activate", mutates_args=())(_activate)
    codes = triton_op("fewbits::activate_codes", mutates_args=("maximum",))(_activate_codes)
    return values, codes, triton_op("fewbits::activate_backward", mutates_args=("maxima",))(_activate_backward)


def _activate(name: str, inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    makes, a = NAMES[name][1], inputs[0]
    amax = torch.zeros(makes, dtype=torch.float32, device=a.device)
    first, second = _launch(name, inputs, None, "", amax)
    return first, second, amax


def _activate_codes(name: str, inputs: list[Tensor], scale: Tensor, format: str, maximum: Tensor) -> Tensor:
    return _launch(name, inputs, scale, format, maximum)[0]


def _launch(
    name: str, inputs: list[Tensor], scale: Tensor | None, format: str, maxima: Tensor
) -> tuple[Tensor, Tensor]:
    from torch.library import wrap_triton

    from fewbits.kernels.activation_triton import activate_kernel

    takes, makes = NAMES[name]
    a = inputs[0]
    fmt = Format.parse(format) if scale is not None else None
    first = torch.empty_like(a, dtype=a.dtype if fmt is None else carrier(fmt))
    second = torch.empty_like(a) if makes > 1 else a.new_empty(0)
    kernel: Any = activate_kernel if _interpreted(activate_kernel) else wrap_triton(activate_kernel)
    mantissa, lowest, limit = (0, 0, 0) if fmt is None else _constants(fmt)
    n, backward = a.numel(), name.endswith("backward")
    block = _BLOCKS[backward]
    kernel[(-(-n // block),)](
        a, inputs[min(1, takes - 1)], inputs[-1], first, second if makes > 1 else a, a if scale is None else scale,
        maxima, n, GATED=name.startswith("swiglu"), BACKWARD=backward, CODES=fmt is not None,
        mantissa=mantissa, lowest=lowest, limit=limit, BLOCK=block, NATIVE=a.is_cuda, num_warps=8,
    )  # fmt: skip
    return first, second


def _activate_backward(
    name: str, hidden_scale: Tensor, hidden_format: str, scales: list[Tensor], format: str, maxima: list[Tensor],
    sums: bool, inputs: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from torch.library import wrap_triton

    from fewbits.kernels.activation_triton import activate_backward_kernel

    fmt, of_hidden, makes, grad = Format.parse(format), Format.parse(hidden_format), NAMES[name][1], inputs[0]
    R, C = grad.shape
    BM, BN, warps, turns, stages = TILES[name]
    if grad.element_size() > 2:  # three stages of such tiles do not fit into the 99 KiB that smaller cards have
        stages = 1
    while turns > 1 and -(-R // (BM * turns)) * -(-C // BN) < 2 * processors(grad.device):
        turns //= 2
    down, across, quads = -(-R // (BM * turns)), -(-C // BN), -(-R // 4)
    codes = torch.empty(makes, R, C, dtype=carrier(fmt), device=grad.device)
    codes_t = torch.empty(makes, C, 4 * quads, dtype=carrier(fmt), device=grad.device)
    hidden_t = torch.empty(C, 4 * quads, dtype=carrier(of_hidden), device=grad.device)
    parts = torch.empty(makes, down if sums else 0, C, dtype=torch.float32, device=grad.device)
    kernel: Any = activate_backward_kernel
    kernel = kernel if _interpreted(kernel) else wrap_triton(kernel)
    mantissa, lowest, limit = _constants(fmt)
    hidden_mantissa, hidden_lowest, hidden_limit = _constants(of_hidden)
    kernel[(down * across,)](
        grad, inputs[1], inputs[-1], scales[0], scales[-1], hidden_scale, codes, codes_t, hidden_t,
        parts if sums else hidden_scale, maxima[0], maxima[1] if makes > 1 else hidden_scale,
        R, C, quads, across, R * C, 4 * quads * C, down * C,
        mantissa=mantissa, lowest=lowest, limit=limit,
        hidden_mantissa=hidden_mantissa, hidden_lowest=hidden_lowest, hidden_limit=hidden_limit,
        GATED=makes > 1, SUMS=sums, BM=BM, BN=BN, TURNS=turns, STAGES=stages, WHOLE=R % (BM * turns) == 0 and C % BN == 0,
        NATIVE=grad.is_cuda, num_warps=warps,
    )  # fmt: skip
    return codes, codes_t, hidden_t, parts
