"""Affine integers, `value = (integer - zero_point) * scale`: what inference engines read (Jacob et al. 2018).

    inside    integer = clamp(round(x / scale + zero_point))     torch.quantize_per_tensor, torch.quantize_per_channel (2.13)
    outside   integer = clamp(round(x / scale) + zero_point)     ONNX QuantizeLinear, torch.fake_quantize_*, all of torch 2.11

Rounding is to nearest even, so the two differ on ties when the zero point is odd; without one they are the same.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fewbits.errors import FewbitsError, nearest
from fewbits.formats import Format
from fewbits.numerics.scaling import Granularity, quotient

ZeroPoint = Literal["inside", "outside"]


def integer_range(format: str | Format, signed: bool = True) -> tuple[int, int]:
    """(lowest, highest) integer of intN, or of its unsigned twin: int8 is -128..127, unsigned 0..255.

    Raises FewbitsError for a format that holds no integers.
    """
    fmt = Format.parse(format)
    if fmt.kind != "int":
        raise FewbitsError(f"{fmt.name} holds no integers; affine codes are intN, such as int8 or int4.")
    return (int(fmt.min), int(fmt.max)) if signed else (0, 2**fmt.bits - 1)


def affine_parameters(
    low: Tensor, high: Tensor, format: str | Format, symmetric: bool = True, signed: bool = True
) -> tuple[Tensor, Tensor]:
    """(scale, zero_point) with which an integer format covers low..high; 0 is always one of the values.

    low, high: fp32 or fp64, any equal shape; scale has their dtype, zero_point is int32, both their shape.
    symmetric: scale = max(-low, high) / highest integer and zero_point 0 (the middle, 2**(bits - 1), when unsigned).
    Otherwise scale = (high - low) / (2**bits - 1) and the zero point lies where 0 falls. An empty range has scale 1.

    >>> affine_parameters(torch.tensor(-1.0), torch.tensor(3.0), "int4", symmetric=False, signed=False)
    (tensor(0.2667), tensor(4, dtype=torch.int32))
    """
    lowest, highest = integer_range(format, signed)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if symmetric:
        middle = (lowest + highest + 1) // 2
        scale = quotient(torch.maximum(-low, high), highest - middle)
        return torch.where(scale > 0, scale, 1.0), torch.full(low.shape, middle, dtype=torch.int32, device=low.device)
    scale = quotient(high - low, highest - lowest)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (lowest - low / scale).round().clamp(lowest, highest).to(torch.int32)


def affine_encode(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | int = 0,
    format: str | Format = "int8",
    signed: bool = True,
    order: str = "inside",
) -> Tensor:
    """The integers of x, int32, shape of x, computed in fp32 (fp64 for fp64) as the engines do. NaN becomes zero_point.

    x: any shape and float dtype; scale, zero_point broadcast against it. order: "inside" or "outside", see above.
    Raises FewbitsError for another order and for a format that holds no integers.

    >>> x, one = torch.tensor([0.5, 1.5, 2.5]), torch.tensor(1.0)
    >>> affine_encode(x, one, 1).tolist(), affine_encode(x, one, 1, order="outside").tolist()
    ([2, 2, 4], [1, 3, 3])
    """
    if order not in get_args(ZeroPoint):
        raise FewbitsError(f"There is no order {order!r}.{nearest(order, get_args(ZeroPoint))} Use inside or outside.")
    lowest, highest = integer_range(format, signed)
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    steps = wide / scale
    rounded = (steps + zero_point).round() if order == "inside" else steps.round() + zero_point
    rounded = torch.where(rounded.isnan(), torch.as_tensor(zero_point, device=x.device), rounded)
    return rounded.clamp(lowest, highest).to(torch.int32)


def affine_decode(integers: Tensor, scale: Tensor, zero_point: Tensor | int = 0) -> Tensor:
    """The values of integers: (integers - zero_point) * scale, shape of integers, dtype of scale (at least fp32)."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    return (integers - zero_point).to(wide) * scale.to(wide)


def grouped(x: Tensor, granularity: str) -> Tensor:
    """x [..., K] as [rows, groups, width], a view where one scale is shared by the last dimension.

    granularity: "tensor" (one group in all), "row" (one a row), "group:N" (N neighbours of a row, along the input).
    Raises FewbitsError for a granularity that is none of these, or a width that does not divide K.
    """
    if granularity == "tensor":
        return x.reshape(1, 1, -1)
    rows = x.reshape(-1, x.shape[-1])
    width = group_width(granularity, x.shape[-1])
    return rows.reshape(len(rows), -1, width) if rows.numel() else rows.unsqueeze(1)


def group_width(granularity: str, columns: int, name: str = "the tensor") -> int:
    """How many neighbours in a row of so many columns share a scale. Raises FewbitsError, saying `name`, as `grouped`."""
    shared = Granularity.parse(granularity)
    if shared.rows != 1:
        raise FewbitsError(f"Granularity {shared} shares a scale between rows. Use row, or group:N such as group:128.")
    width = shared.columns or columns
    if width and columns % width:
        fitting = max((n for n in range(1, width) if columns % n == 0), default=1)
        raise FewbitsError(
            f"{granularity} does not divide the width {columns} of {name}. Use group:{fitting}, or row for one scale a row."
        )
    return width


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of 1, 2, 4 or 8 bits, 8 / bits to a byte, the first in the lowest bits: uint8 [..., ceil(K * bits / 8)].

    codes: uint8 [..., K], each below 2**bits. What fills the last byte is 0.

    >>> pack(torch.tensor([1, 2, 15], dtype=torch.uint8), 4)
    tensor([33, 15], dtype=torch.uint8)
    """
    each = _per_byte(bits)
    missing = -codes.shape[-1] % each
    whole = torch.nn.functional.pad(codes, (0, missing)) if missing else codes
    lanes = whole.reshape(*whole.shape[:-1], -1, each)
    packed: Tensor = lanes[..., 0].clone()
    for lane in range(1, each):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., columns]."""
    each = _per_byte(bits)
    if each == 1:
        return packed[..., :columns]
    lanes = [(packed >> (lane * bits)) & (2**bits - 1) for lane in range(each)]
    return torch.stack(lanes, dim=-1).flatten(-2)[..., :columns]


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a packed row of so many codes."""
    return -(-columns // _per_byte(bits))


def _per_byte(bits: int) -> int:
    if bits not in (1, 2, 4, 8):
        raise FewbitsError(f"Codes of {bits} bits do not fill a byte; 1, 2, 4 and 8 do.")
    return 8 // bits
