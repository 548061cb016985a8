"""fp8 codes under one scale a matrix in both layouts, for compiled code and for all weights of a model at once.

A matmul wants `left` row by row and `right` column by column, and each operand of a linear layer enters two matmuls, once
as a matrix and once as its transpose: codes [R, C] and [C, R] written by one reading (4 bytes an element in bf16) save the
pass that transposes codes later. The definition is `encode_both` of numerics/quantize.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewbits.formats import Format
from fewbits.kernels.quantize import why_not as why_no_codes
from fewbits.kernels.recording import keep
from fewbits.numerics.quantize import POWERS, carrier
from fewbits.numerics.scaling import Granularity

TILE = (
    128,
    128,
)  # elements of bf16 in 64 registers of each of 256 threads; both layouts are written 128 bytes at a time
TURN_TILE = (256, 128)
"""Rows and columns of a program of `turn_into`, with 8 warps: 5 % faster than `TILE` on an H200."""
BOTH_TILE = (128, 64, 4)
"""Rows, columns and warps of a program of `encode_both`: the fastest of bench/layouts.py on an H200, with and without the
largest magnitude."""
_MOST = 3  # matrices side by side that a kernel reads
_LONGEST = 1 << 24  # of a side: places within a tile are 32 bits
_ALIGNED = 256  # bytes between the codes of two weights: a compiled graph copies inputs whose address is odd to it
SCALE_STRIDE = 4  # numbers from one scale to the next, for the same reason: 16 bytes


def why_not(x: Tensor, format: Format, granularity: Granularity, rounding: str, scales: str) -> str:
    """What keeps these kernels from a matrix, or "": fp8 under one power of two, rounded to nearest even."""
    if format.kind != "float" or carrier(format) != format.dtype or format.bits != 8:
        return f"{format} is not fp8"
    if max(x.shape, default=0) > _LONGEST:
        return f"a side of {max(x.shape):,}; up to {_LONGEST:,} fit"
    if granularity != Granularity() or scales not in POWERS or rounding != "nearest-even":
        return f"{scales} scales by {granularity}, rounded {rounding}; one power of two, rounded to nearest even fits"
    return why_no_codes(x, format, rounding)


def encode_both(
    parts: Sequence[Tensor], scale: Tensor, format: Format, sums: bool = False, maximum: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`encode_both` of numerics/quantize.py as one call that a compiler keeps: codes bit for bit, sums in another order.

    parts: up to three matrices side by side, bf16, fp16 or fp32 [R, C_i], read where they lie unless no tile fits between
    them; scale: fp32 [1, 1]. Sums are None unless asked for. maximum: an fp32 number, not negative, that is raised to the
    largest magnitude: to NaN or infinity where a value is that.
    """
    if len(parts) > _MOST or any(part.shape[1] % BOTH_TILE[1] for part in parts[:-1]):  # a tile lies within one of them
        parts = [torch.cat(tuple(parts), 1)]
    codes, codes_t, found = _operator()([part.contiguous() for part in parts], scale, format.name, sums, maximum)
    return codes, unpadded(codes_t, len(codes)), found.sum(0) if sums else None


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, which programs should not be fewer than; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def unpadded(codes_t: Tensor, rows: int) -> Tensor:
    """Transposed codes [C, R] of `rows` R from columns that kernels pad to whole words."""
    return codes_t if codes_t.shape[1] == rows else codes_t[:, :rows].contiguous()


def turn_into(codes_t: Tensor, codes: Tensor) -> None:
    """Writes codes.t() of a matrix of one-byte codes into codes_t, row by row with rows that may lie further apart: 2 bytes an
    element."""
    from fewbits.kernels.layouts_triton import turn_kernel

    assert codes_t.stride(1) == 1
    (R, C), (BM, BN), stride = codes.shape, TURN_TILE, codes_t.stride(0)
    down, across = -(-R // BM), -(-C // BN)
    pairs = R % 2 == 0 and stride % 2 == 0 and codes_t.data_ptr() % 2 == 0
    turn_kernel[(down * across,)](
        codes.contiguous(), codes_t, R, C, stride, across, BM=BM, BN=BN, PAIRS=pairs, num_warps=8
    )


@cache
def _operator() -> Any:
    """The operator, made when first needed: naming its kernel imports Triton.

    A compiler sees the kernel inside and calls it as one of its own, which costs the host less than an operator of Python.
    """
    from torch.library import triton_op

    return triton_op("fewbits::encode_both", mutates_args=("maximum",))(_encode_both)


def _encode_both(
    parts: list[Tensor], scale: Tensor, format: str, sums: bool, maximum: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from torch.library import wrap_triton

    from fewbits.kernels.layouts_triton import encode_both_kernel

    fmt, (first, *others) = Format.parse(format), parts
    ends = list(accumulate(part.shape[1] for part in parts))
    R, C = first.shape[0], ends[-1]
    BM, BN, warps = BOTH_TILE
    down, across, quads = -(-R // BM), -(-C // BN), -(-R // 4)
    codes = torch.empty(R, C, dtype=carrier(fmt), device=first.device)
    codes_t = torch.empty(C, 4 * quads, dtype=carrier(fmt), device=first.device)
    found = torch.empty(down if sums else 0, C, dtype=torch.float32, device=first.device)
    kernel: Any = encode_both_kernel if _interpreted(encode_both_kernel) else wrap_triton(encode_both_kernel)
    mantissa, lowest, limit = _constants(fmt)
    kernel[(down * across,)](
        first, others[0] if others else first, others[-1] if others else first, scale, codes, codes_t,
        found if sums else scale, scale if maximum is None else maximum, R, C, quads, ends[0],
        ends[min(1, len(others))], across, mantissa=mantissa, lowest=lowest, limit=limit, PARTS=len(parts), SUMS=sums,
        NOTE=maximum is not None, BM=BM, BN=BN, WHOLE=R % BM == 0 and C % BN == 0, NATIVE=first.is_cuda, num_warps=warps,
    )  # fmt: skip
    return codes, codes_t, found


class Known(NamedTuple):
    """A scale known before what it scales, a power of two, fp32 [1, 1], the fp8 format of the codes, and an fp32 number that is
    raised to the largest magnitude of what is scaled, as `encode_both` does."""

    scale: Tensor
    format: Format
    maximum: Tensor


class Held(NamedTuple):
    """What `encode_all` makes of one matrix [R, C]: codes [R, C] and [C, R], each row by row, and their scale, fp32 [1, 1]."""

    codes: Tensor
    codes_t: Tensor
    scale: Tensor


def encode_all(matrices: Sequence[Tensor], format: Format, earlier: Tensor | None = None) -> tuple[list[Held], Tensor]:
    """Many matrices in fp8 under a power of two each, in three launches: `quantize` with scales of the tensor, bit for bit.

    matrices: of one dtype and device, each row by row. earlier: for delayed scaling, fp32 [matrices] with any stride: the
    largest magnitude that each is scaled by, 0 for its own. Returns codes and scales, and the largest magnitudes, fp32
    [matrices]; a matrix that is not finite gets the scale NaN.
    """
    from fewbits.kernels.layouts_triton import amax_all_kernel, encode_all_kernel

    device, (BM, BN) = matrices[0].device, TILE
    known = _table(tuple((m.data_ptr(), m.shape[0], m.shape[1]) for m in matrices), str(device))
    keep(known)
    amax = torch.zeros(len(matrices), dtype=torch.int32, device=device)
    scale = torch.empty(len(matrices), SCALE_STRIDE, device=device)
    codes = torch.empty(known.length, dtype=carrier(format), device=device)
    codes_t = torch.empty_like(codes)
    native = device.type == "cuda"
    grid, options = (len(known.owners),), {"BM": BM, "BN": BN, "EVEN": known.even, "num_warps": 8}
    first = matrices[0].detach()
    amax_all_kernel[grid](first, known.table, known.owners, amax, **options)
    mantissa, lowest, limit = _constants(format)
    exponent = math.frexp(format.max)[1]
    encode_all_kernel[grid](
        first, known.table, known.owners, amax, scale if earlier is None else earlier, codes, codes_t, scale,
        0 if earlier is None else earlier.stride(0), SCALE_STRIDE, format.max, exponent - 1, limit & 0x7FFFFF,
        mantissa=mantissa, lowest=lowest, limit=limit, NATIVE=native, DELAYED=earlier is not None, **options,
    )  # fmt: skip
    held = []
    for i, (matrix, at) in enumerate(zip(matrices, known.places, strict=True)):
        R, C = matrix.shape
        one = scale.as_strided((1, 1), (1, 1), i * SCALE_STRIDE)
        held.append(Held(codes.as_strided((R, C), (C, 1), at), codes_t.as_strided((C, R), (R, 1), at), one))
    return held, amax.view(torch.float32)


class _Table(NamedTuple):
    """Where the matrices lie, as `_place` of the kernels reads it, and the matrix that each program belongs to."""

    table: Tensor
    owners: Tensor
    places: tuple[int, ...]
    length: int
    even: bool


@lru_cache(maxsize=8)
def _table(matrices: tuple[tuple[int, int, int], ...], device: str) -> _Table:
    """Made and sent to the device once for matrices of these addresses, rows and columns."""
    rows: list[tuple[int, ...]] = []
    owners: list[int] = []
    places, length = [], 0
    for number, (address, R, C) in enumerate(matrices):
        rows.append((address, length, R, C, len(owners)))
        owners += [number] * (-(-R // TILE[0]) * -(-C // TILE[1]))
        places.append(length)
        length += -(-R * C // _ALIGNED) * _ALIGNED
    even = all(value % 16 == 0 for row in rows for value in row[:4])
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    return _Table(table, torch.tensor(owners, dtype=torch.int32, device=device), tuple(places), length, even)


def _constants(format: Format) -> tuple[int, int, int]:
    """Mantissa bits, biased fp32 exponent of the smallest normal number, bits of the largest."""
    (limit,) = struct.unpack("<i", struct.pack("<f", format.max))
    return format.mantissa_bits, 127 + format.min_exponent, limit


def _interpreted(kernel: Any) -> bool:
    """Whether Triton's interpreter runs the kernel; torch 2.11 does not wrap such a one."""
    return type(kernel).__name__ == "InterpretedFunction"
