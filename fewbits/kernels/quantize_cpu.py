"""Quantization on a CPU, the fast twin of numerics/quantize.py: the same codes and scales, the same values back.

A row of blocks is read once: its maxima, scales and codes are made while it lies in the cache. Codes keep the strides of
what is quantized, so a transposed view costs nothing; random bits are keyed by the index in the matrix as it is seen.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.kernels import cpp
from fewbits.kernels.quantize import why_no_bytes
from fewbits.numerics import quantize as definition
from fewbits.numerics.quantize import Key, Quantized, carrier, default_scales
from fewbits.numerics.random import spread_key
from fewbits.numerics.scaling import Granularity, scale_of

_IN_C = ("power-of-two", "exact")  # kinds of scale that the kernel makes itself

_FUNCTIONS = {
    "block_amax": "ipp", "quantize": "ipppp", "encode": "ipppp", "decode": "ippiiip", "rescale": "ipllpppip",
}  # fmt: skip


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("format", ctypes.c_int),
        *((name, ctypes.c_long) for name in ("rows", "columns", "stride", "block_rows", "block_columns")),
        *((name, ctypes.c_long) for name in ("scale_row", "scale_column", "index_row", "index_column")),
    )


class _Target(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("integer", "mantissa", "min_exponent", "infinite")),
        *((name, ctypes.c_int) for name in ("carrier_mantissa", "carrier_bias")),
        ("max", ctypes.c_float),
        ("exact_max", ctypes.c_double),
        ("max_mantissa", ctypes.c_uint32),
        *((name, ctypes.c_int) for name in ("max_exponent", "power_of_two", "stochastic")),
        *((name, ctypes.c_uint32) for name in ("a", "b")),
    )


@cache
def library() -> Choice:
    """Choice(the compiled library or None, why), settled for the life of the process."""
    return cpp.library("quantize_cpu", _FUNCTIONS)


def why_not(x: Tensor, format: Format, rounding: str = "nearest-even", scales: str = "") -> str:
    """What keeps this twin from quantizing a matrix, or "" where it can: codes of one byte, bf16, fp16 or fp32."""
    if library().value is None:
        return library().reason
    if x.dtype not in cpp.FORMATS or x.ndim != 2 or not 0 < x.numel() < 2**32:
        return f"{x.dtype} of shape {tuple(x.shape)}; a matrix of bf16, fp16 or fp32 that is not empty fits"
    return why_no_bytes(format, rounding) or ("full-range scales" if scales == "full-range" else "")


def block_amax(x: Tensor, granularity: Granularity) -> Tensor:
    """The largest magnitude in every block of a matrix, fp32 [grid rows, grid columns]; NaN or inf where one is inside."""
    matrix, shared, turned = _as_it_lies(x, granularity)
    amax = torch.zeros(shared.grid(matrix.shape), dtype=torch.float32)
    view = _view(matrix, shared, amax, turned)
    library().value.block_amax(torch.get_num_threads(), ctypes.byref(view), amax.data_ptr())
    return amax.t() if turned else amax


def quantize(
    x: Tensor,
    format: str | Format,
    granularity: str | Granularity = "tensor",
    rounding: str = "nearest-even",
    seed: Key = 0,
    scales: str = "",
) -> Quantized:
    """`quantize` of numerics/quantize.py for a matrix on a CPU, bit for bit; codes have the strides of x.

    x: bf16, fp16 or fp32 [R, C]. Raises FewbitsError for what `why_not` names.
    """
    fmt, whole = Format.parse(format), Granularity.parse(granularity)
    kind = scales or default_scales(fmt)
    _refuse(x, fmt, rounding, kind)
    if kind not in _IN_C:  # a small matter, left to the definition
        scale = scale_of(block_amax(x.detach(), whole), fmt, kind)
        return Quantized(encode(x, scale, fmt, whole, rounding, seed, kind), scale, fmt, whole, kind)
    matrix, shared, turned = _as_it_lies(x.detach(), whole)
    scale = torch.empty(shared.grid(matrix.shape), dtype=torch.float32)
    codes = torch.empty(matrix.shape, dtype=carrier(fmt))
    view, target = _view(matrix, shared, scale, turned), _target(fmt, kind, rounding, seed)
    library().value.quantize(
        torch.get_num_threads(), ctypes.byref(view), ctypes.byref(target), scale.data_ptr(), codes.data_ptr()
    )
    if turned:
        codes, scale = codes.t(), scale.t()
    return Quantized(codes, scale, fmt, whole, kind)


def quantize_both(
    x: Tensor,
    format: str | Format,
    granularity: str | Granularity = "tensor",
    rounding: str = "nearest-even",
    seed: Key = 0,
    scales: str = "",
) -> tuple[Quantized, Quantized]:
    """A matrix [R, C] and its transpose [C, R] with the same codes and scales; see `quantize`.

    They share their memory: CPU matmuls take either order at the same speed, so nothing is turned.
    """
    q = quantize(x, format, granularity, rounding, seed, scales)
    return q, q.transposed()


def encode(
    x: Tensor,
    scale: Tensor,
    format: Format,
    granularity: Granularity,
    rounding: str = "nearest-even",
    seed: Key = 0,
    scales: str = "exact",
) -> Tensor:
    """Codes of a matrix under given fp32 scales, as `encode` of numerics/quantize.py makes them; strides of x."""
    _refuse(x, format, rounding, scales)
    matrix, shared, turned = _as_it_lies(x.detach(), granularity)
    codes = torch.empty(matrix.shape, dtype=carrier(format))
    view = _view(matrix, shared, scale.t() if turned else scale, turned)
    target = _target(format, scales, rounding, seed)
    library().value.encode(
        torch.get_num_threads(), ctypes.byref(view), ctypes.byref(target), scale.data_ptr(), codes.data_ptr()
    )
    return codes.t() if turned else codes


def decode(codes: Tensor, scale: Tensor, granularity: Granularity, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale of a matrix in `dtype` (bf16, fp16 or fp32), as `decode` of numerics/quantize.py; strides of codes."""
    matrix, shared, turned = _as_it_lies(codes, granularity)
    out = torch.empty(matrix.shape, dtype=dtype)
    view = _view(matrix, shared, scale.t() if turned else scale, turned)
    mantissa, bias = {torch.float8_e4m3fn: (3, 7), torch.float8_e5m2: (2, 15)}.get(codes.dtype, (0, 0))
    library().value.decode(
        torch.get_num_threads(), ctypes.byref(view), scale.data_ptr(), mantissa, bias,
        cpp.FORMATS[dtype], out.data_ptr(),
    )  # fmt: skip
    return out.t() if turned else out


def rescale(total: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """int32 sums [M, N] times fp32 scales [M] and [N], plus a bias [N], rounded once into `out`, in one pass.

    The same bits as `(total.float() * row_scale * column_scale + bias.float()).to(out.dtype)`. total, out: contiguous.
    """
    scales = row_scale.contiguous(), column_scale.contiguous()
    wide = None if bias is None else bias.float().contiguous()
    library().value.rescale(
        torch.get_num_threads(), total.data_ptr(), *total.shape, *(x.data_ptr() for x in scales),
        None if wide is None else wide.data_ptr(), cpp.FORMATS[out.dtype], out.data_ptr(),
    )  # fmt: skip
    return out


def _as_it_lies(x: Tensor, granularity: Granularity) -> tuple[Tensor, Granularity, bool]:
    """The matrix (or its transpose: True) as its rows lie in memory, and its granularity."""
    if x.stride(0) == 1 and x.stride(1) >= x.shape[0] and x.stride(1) != 1:
        return x.t(), granularity.transposed(), True
    return x if x.stride(1) == 1 and x.stride(0) > 0 else x.contiguous(), granularity, False


def _view(x: Tensor, granularity: Granularity, scale: Tensor, turned: bool) -> _Matrix:
    (R, C), block = x.shape, granularity.block(x.shape)
    index = (1, R) if turned else (C, 1)
    return _Matrix(x.data_ptr(), cpp.FORMATS.get(x.dtype, 0), R, C, x.stride(0), *block, *scale.stride(), *index)


@cache
def _shape_of(format: Format) -> tuple[float, ...]:
    fraction, exponent = math.frexp(format.max)
    held = Format.parse(carrier(format)) if format.kind == "float" else format
    return (
        format.kind == "int", format.mantissa_bits, format.min_exponent, format.has_infinity,
        held.mantissa_bits, held.bias, format.max, format.max, round((2 * fraction - 1) * 2**23), exponent - 1,
    )  # fmt: skip


def _target(format: Format, kind: str, rounding: str, seed: Key) -> _Target:
    stochastic = rounding == "stochastic"
    a, b = spread_key(int(seed)) if stochastic else (0, 0)
    return _Target(*_shape_of(format), kind == "power-of-two", stochastic, a, b)


def _refuse(x: Tensor, format: Format, rounding: str, scales: str) -> None:
    if reason := why_not(x, format, rounding, scales):
        raise FewbitsError(f"The CPU twin does not quantize this: {reason}. Use {definition.__name__}.quantize.")
