"""Quantization on a GPU, the fast twin of numerics/quantize.py: the same codes and scales, one or two kernels a matrix.

Where a block fits into a tile, one kernel reads the matrix once and writes codes and scales; elsewhere (tensor, long
rows) a first one finds the maxima. Both orientations of the codes come from one reading: a matmul wants `left` row by
row and `right` column by column, so the operands of two matmuls are a matrix and its transpose.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.numerics import quantize as definition
from fewbits.numerics.quantize import Key, Quantized, carrier, default_scales
from fewbits.numerics.scaling import Granularity, scale_of

ROUNDINGS = ("nearest-even", "stochastic")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LONGEST = 8192  # columns of a row that one program holds in registers
_WIDEST = 128  # rows and columns of a part otherwise


@cache
def installed() -> bool:
    """Whether Triton is there to be imported; asking imports nothing."""
    return importlib.util.find_spec("triton") is not None


def why_not(x: Tensor, format: Format, rounding: str = "nearest-even") -> str:
    """What keeps this twin from quantizing a matrix, or "" where it can: codes of one byte, bf16, fp16 or fp32."""
    if not installed():
        return "triton is not installed"
    if x.dtype not in _DTYPES or x.ndim != 2 or x.numel() == 0:
        return f"{x.dtype} of shape {tuple(x.shape)}; a matrix of bf16, fp16 or fp32 that is not empty fits"
    return why_no_bytes(format, rounding)


def why_no_bytes(format: Format, rounding: str) -> str:
    """What keeps a kernel, on any device, from codes of one signed byte each, or ""."""
    if rounding not in ROUNDINGS:
        return f"rounding {rounding}"
    if format.kind == "binary" or not format.signed or carrier(format).itemsize != 1:
        return f"codes of {format} are not one signed byte each"
    if format.specials == "ieee" and format.dtype is None:
        return f"{format} has infinities that its carrier has not"
    return ""


def block_amax(x: Tensor, granularity: Granularity) -> Tensor:
    """The largest magnitude in every block of a matrix, fp32 [grid rows, grid columns]; NaN where a NaN is inside."""
    return _amax_bits(x, granularity, _tiles(x, granularity, False)).view(torch.float32)


def quantize(
    x: Tensor,
    format: str | Format,
    granularity: str | Granularity = "tensor",
    rounding: str = "nearest-even",
    seed: Key = 0,
    scales: str = "",
) -> Quantized:
    """`quantize` of numerics/quantize.py for a matrix on the device, bit for bit; codes lie row by row.

    x: bf16, fp16 or fp32 [R, C], any strides (a transposed view costs nothing). Raises FewbitsError for what `why_not`
    names.
    """
    return _quantize(x, format, granularity, rounding, seed, scales, both=False)[0]


def quantize_both(
    x: Tensor,
    format: str | Format,
    granularity: str | Granularity = "tensor",
    rounding: str = "nearest-even",
    seed: Key = 0,
    scales: str = "",
) -> tuple[Quantized, Quantized]:
    """A matrix [R, C] and its transpose [C, R] with the same codes and scales, each row by row; see `quantize`."""
    return _quantize(x, format, granularity, rounding, seed, scales, both=True)


def encode(
    x: Tensor,
    scale: Tensor,
    format: Format,
    granularity: Granularity,
    rounding: str = "nearest-even",
    seed: Key = 0,
    scales: str = "exact",
) -> Tensor:
    """Codes of a matrix under given fp32 scales, as `encode` of numerics/quantize.py makes them; row by row."""
    _refuse(x, format, rounding)
    codes, _ = _outputs(x, carrier(format), False)
    _launch(x, codes, None, None, scale.contiguous(), format, granularity, rounding, seed, scales, "scale")
    return codes


def _quantize(
    x: Tensor, format: str | Format, granularity: str | Granularity, rounding: str, seed: Key, scales: str, both: bool
) -> tuple[Quantized, Quantized]:
    fmt, shared = Format.parse(format), Granularity.parse(granularity)
    x, kind = x.detach(), scales or default_scales(fmt)
    _refuse(x, fmt, rounding)
    if kind == "full-range":
        raise FewbitsError(f"The Triton twin knows symmetric codes only. Use {definition.__name__}.quantize.")
    tiles = _tiles(x, shared, both)
    codes, turned = _outputs(x, carrier(fmt), both)
    amax, source = None, "tile" if tiles.whole else "amax"
    if kind not in ("power-of-two", "exact"):  # a small matter, left to the definition
        scale, source = scale_of(_amax_bits(x, shared, tiles).view(torch.float32), fmt, kind).contiguous(), "scale"
    else:
        scale = torch.empty(shared.grid(x.shape), dtype=torch.float32, device=x.device)
        amax = None if tiles.whole else _amax_bits(x, shared, tiles)
    _launch(x, codes, turned, amax, scale, fmt, shared, rounding, seed, kind, source)
    q = Quantized(codes, scale, fmt, shared, kind)
    other = codes.t() if turned is None else turned
    return q, Quantized(other, scale.t(), fmt, shared.transposed(), kind)


class _Tiles(NamedTuple):
    """How a matrix is cut: tiles of BM x BN elements, parts of SR x SC that lie inside one block.

    whole: every block is one part. block: rows and columns of a block, no larger than the matrix needs.
    """

    BM: int
    BN: int
    SR: int
    SC: int
    block: tuple[int, int]
    whole: bool


def _tiles(x: Tensor, granularity: Granularity, both: bool) -> _Tiles:
    rows, columns = granularity.block(x.shape)
    turned = x.stride(0) == 1 and x.stride(1) != 1
    square = turned or both  # equally good along both axes
    SR, all_rows = _part(rows, x.shape[0], _WIDEST)
    SC, all_columns = _part(columns, x.shape[1], _WIDEST if square else max(_WIDEST, _LONGEST // SR))
    BN = max(SC, 64 if square else _WIDEST)  # not cut for small matrices, which would be compiled anew for each size
    BM = max(SR, 64 if square else max(1, 8192 // BN))
    return _Tiles(BM, BN, SR, SC, (rows, columns), all_rows and all_columns)


def _part(block: int, length: int, most: int) -> tuple[int, bool]:
    """Size of a part along an axis of that length, a power of two, and whether it spans a block."""
    if block >= length:
        size = min(max(_power(length), _WIDEST), most)
        return size, length <= size
    size = min(block & -block, most)
    return size, size == block


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _amax_bits(x: Tensor, granularity: Granularity, tiles: _Tiles) -> Tensor:
    """Bits of the largest magnitude of every block, int32 [grid rows, grid columns]."""
    from fewbits.kernels.quantize_triton import amax_kernel

    above, across = granularity.grid(x.shape)
    amax = torch.zeros(above, across, dtype=torch.int32, device=x.device)
    down, right = _counts(x, tiles)
    amax_kernel[(down * right,)](
        x, amax, *x.shape, *x.stride(), *tiles.block, across, right, *tiles[:4], num_warps=_warps(tiles)
    )  # fmt: skip
    return amax


def _launch(
    x: Tensor,
    codes: Tensor,
    turned: Tensor | None,
    amax: Tensor | None,
    scale: Tensor,
    format: Format,
    granularity: Granularity,
    rounding: str,
    seed: Key,
    kind: str,
    source: str,
) -> None:
    from fewbits.kernels.quantize_triton import encode_kernel

    tiles = _tiles(x, granularity, turned is not None)
    down, right = _counts(x, tiles)
    fraction, exponent = math.frexp(format.max)
    limit = ((exponent + 126) << 23) | round((2 * fraction - 1) * 2**23)
    integer = format.kind == "int"
    raw = codes.view(torch.uint8)
    encode_kernel[(down * right,)](
        x, raw, raw if turned is None else turned.view(torch.uint8), scale if amax is None else amax, scale,
        _key(seed, x.device) if rounding == "stochastic" else scale,
        *x.shape, *x.stride(), *tiles.block, granularity.grid(x.shape)[1], right,
        format.max, exponent - 1, limit & 0x7FFFFF, format.mantissa_bits,
        127 + (format.mantissa_bits if integer else format.min_exponent), limit, *tiles[:4],
        FROM=source, KIND="" if source == "scale" else kind, INTEGER=integer,
        CARRIED=not integer and format.dtype is None, STOCHASTIC=rounding == "stochastic",
        INFINITE=rounding == "stochastic" and format.has_infinity, BOTH=turned is not None, num_warps=_warps(tiles),
    )  # fmt: skip


def _counts(x: Tensor, tiles: _Tiles) -> tuple[int, int]:
    return -(-x.shape[0] // tiles.BM), -(-x.shape[1] // tiles.BN)


def _warps(tiles: _Tiles) -> int:
    return 8 if tiles.BM * tiles.BN >= 8192 else 4


def _key(seed: Key, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed
    signed = ((seed & (2**64 - 1)) ^ 2**63) - 2**63
    return torch.full((), signed, dtype=torch.int64, device=device)


def _outputs(x: Tensor, dtype: torch.dtype, both: bool) -> tuple[Tensor, Tensor | None]:
    R, C = x.shape
    codes = torch.empty(R, C, dtype=dtype, device=x.device)
    return codes, torch.empty(C, R, dtype=dtype, device=x.device) if both else None


def _refuse(x: Tensor, format: Format, rounding: str) -> None:
    if reason := why_not(x, format, rounding):
        raise FewbitsError(f"The Triton twin does not quantize this: {reason}. Use {definition.__name__}.quantize.")
