"""Products of two quantized matrices: natively where the device has the instruction, else on their exact values.

`left @ right.T` with left [M, K] and right [N, K], both `Quantized` with the contraction along the columns. The
definition is `scaled_matmul` of numerics/matmul.py; what runs instead gives the same sums in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.choice import Choice
from fewbits.formats import Format
from fewbits.kernels.dispatch import emulated, matmul_execution
from fewbits.numerics.matmul import modelled_matmul
from fewbits.numerics.quantize import Quantized
from fewbits.numerics.scaling import Granularity

TENSOR, ROW = Granularity(), Granularity(1, 0)
_BLOCK = {Granularity(1, 128), Granularity(128, 128)}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def scaled_matmul(
    left: Quantized, right: Quantized, accumulator: str, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """left @ right.T (+ bias) in `dtype`, rounded once: [M, N]. accumulator: as a recipe names it."""
    kind = native_kind(left, right, accumulator)
    if kind == "fp8":
        return _native_fp8(left, right, accumulator == "fast", dtype, bias)
    if kind == "int8":
        return _native_int8(left, right, dtype, bias)
    if accumulator not in ("fp32", "fast"):
        total = modelled_matmul(left.dequantize(), right.dequantize(), accumulator)
        return (total if bias is None else total + bias.float()).to(dtype)
    narrow = dtype == torch.bfloat16 and left.exact_in_bf16 and right.exact_in_bf16
    if narrow and not emulated("bf16", left.codes.device.type):
        return torch.nn.functional.linear(left.dequantize(dtype), right.dequantize(dtype), bias)
    wide = None if bias is None else bias.float()
    return torch.nn.functional.linear(left.dequantize(), right.dequantize(), wide).to(dtype)


def execution(
    left: Format, right: Format, granularities: tuple[Granularity, Granularity], device: torch.device
) -> Choice:
    """What multiplies two formats on a device: Choice("native" | "emulated", reason). Shapes may still stand in the way:
    a matmul that fp8 instructions cannot take (sides not divisible by 16) falls back to the exact values."""
    name = "fp8" if {left.name, right.name} <= {"fp8_e4m3", "fp8_e5m2"} else left.name
    if name not in ("fp8", "int8") or (name == "int8" and right.name != "int8"):
        return Choice(
            "emulated", f"no device that is known here multiplies {left} by {right}; exact values in 16 bits do"
        )
    choice = matmul_execution(left, device)
    if choice.value == "emulated":
        return Choice("emulated", f"{choice.reason}; the codes are exact in bf16")
    allowed = _granularities(name, left, right)
    if granularities not in allowed:
        shown = " or ".join(f"{a} x {b}" for a, b in sorted(allowed, key=str))
        return Choice(
            "emulated",
            f"{device.type} multiplies {name} with scales of {shown}, not {granularities[0]} x {granularities[1]}",
        )
    return choice


def native_kind(left: Quantized, right: Quantized, accumulator: str) -> str:
    """ "fp8", "int8", or "" where exact values are multiplied instead."""
    a, b, device = left.codes, right.codes, left.codes.device
    if accumulator not in ("fp32", "fast") or min(a.shape[0], b.shape[0], a.shape[1]) == 0:
        return ""
    pair = (left.granularity, right.granularity)
    if a.dtype in _FP8 and b.dtype in _FP8 and left.format.dtype == a.dtype and right.format.dtype == b.dtype:
        fits = device.type == "cuda" and a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0
        if fits and pair in _granularities("fp8", left.format, right.format) and not emulated("fp8_e4m3", "cuda"):
            return "fp8" if pair not in _block_pairs() or a.shape[1] % 128 == 0 else ""
        return ""
    if a.dtype == torch.int8 and b.dtype == torch.int8 and pair in _granularities("int8", left.format, right.format):
        if emulated("int8", device.type):
            return ""
        fits = device.type == "cpu" or (a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0)
        return "int8" if fits else ""
    return ""


def _block_pairs() -> set[tuple[Granularity, Granularity]]:
    return {(Granularity(1, 128), Granularity(128, 128)), (Granularity(1, 128), Granularity(1, 128))}


def _granularities(name: str, left: Format, right: Format) -> set[tuple[Granularity, Granularity]]:
    """The pairs of granularities that the device's instruction takes."""
    outer = {(a, b) for a in (TENSOR, ROW) for b in (TENSOR, ROW)}
    if name == "int8":
        return outer
    both_e4m3 = left.name == right.name == "fp8_e4m3"
    return {(TENSOR, TENSOR)} | ({(ROW, ROW)} | _block_pairs() if both_e4m3 else set())


def _native_fp8(left: Quantized, right: Quantized, fast: bool, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """torch._scaled_mm, which wants `left` row by row and `right` column by column."""
    a, b = left.codes.contiguous(), right.codes.contiguous().t()
    if left.granularity == TENSOR:
        return torch._scaled_mm(
            a, b, left.scale.view(()), right.scale.view(()), bias=bias, out_dtype=dtype, use_fast_accum=fast
        )
    if left.granularity == ROW:
        y = torch._scaled_mm(
            a, b, left.scale.contiguous(), right.scale.t().contiguous(), out_dtype=dtype, use_fast_accum=fast
        )
        return y if bias is None else y + bias
    # scales of 1 x 128 blocks lie column by column, those of 128 x 128 blocks row by row (cuBLAS 12.9)
    scale_a = left.scale.t().contiguous().t()
    scale_b = right.scale.t() if right.granularity == Granularity(128, 128) else right.scale.t().contiguous()
    y = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype, use_fast_accum=False)
    return y if bias is None else y + bias


def _native_int8(left: Quantized, right: Quantized, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """Products and sums in int32, exact; then one rounding."""
    total = torch._int_mm(left.codes.contiguous(), right.codes.contiguous().t())
    y = total.float() * left.scale.view(-1, 1) * right.scale.view(1, -1)
    return (y if bias is None else y + bias.float()).to(dtype)
