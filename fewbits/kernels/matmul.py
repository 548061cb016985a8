"""Products of two quantized matrices: natively where the device has the instruction, else on their exact values.

`left @ right.T` with left [M, K] and right [N, K], both `Quantized` with the contraction along the columns. The
definition is `scaled_matmul` of numerics/matmul.py; what runs instead gives the same sums in another order.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fewbits.choice import Choice
from fewbits.formats import Format
from fewbits.kernels import int8_matmul_cpu, quantize_cpu
from fewbits.kernels.cpp import FORMATS
from fewbits.kernels.dispatch import by_cpu_kernel, dequantize, emulated, probed, rescales_in_registers
from fewbits.numerics.matmul import modelled_matmul
from fewbits.numerics.quantize import Quantized, quantize
from fewbits.numerics.scaling import Granularity
from fewbits.precision.hardware import describe, native_granularities
from fewbits.precision.recipe import Matmul, Operand

TENSOR, ROW = Granularity(), Granularity(1, 0)
BLOCK, SQUARE = Granularity(1, 128), Granularity(128, 128)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def scaled_matmul(
    left: Quantized, right: Quantized, accumulator: str, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """left @ right.T (+ bias) in `dtype`: [M, N], rounded once (fp8 with scales of rows or blocks: once more for the bias).
    accumulator: as a recipe names it."""
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
        return torch.nn.functional.linear(dequantize(left, dtype), dequantize(right, dtype), bias)
    wide = None if bias is None else bias.float()
    return torch.nn.functional.linear(dequantize(left, torch.float32), dequantize(right, torch.float32), wide).to(dtype)


def native_kind(left: Quantized, right: Quantized, accumulator: str) -> str:
    """ "fp8", "int8", or "" where exact values are multiplied instead."""
    a, b, device = left.codes, right.codes, left.codes.device
    if accumulator not in ("fp32", "fast") or min(a.shape[0], b.shape[0], a.shape[1]) == 0:
        return ""
    pair = (left.granularity, right.granularity)
    if a.dtype in _FP8 and b.dtype in _FP8 and left.format.dtype == a.dtype and right.format.dtype == b.dtype:
        if device.type != "cuda" or a.shape[1] % 16 or b.shape[0] % 16 or emulated("fp8_e4m3", "cuda"):
            return ""
        if pair not in _pairs(left.format, right.format, "cuda"):
            return ""
        return "fp8" if pair not in _BLOCKS or _blocks_fit(left, right) else ""
    if a.dtype == torch.int8 and b.dtype == torch.int8 and pair in _pairs(left.format, right.format, device.type):
        if emulated("int8", device.type):
            return ""
        fits = device.type == "cpu" or (a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[0] % 8 == 0)
        return "int8" if fits else ""
    return ""


def _blocks_fit(left: Quantized, right: Quantized) -> bool:
    """Whether the instruction takes these sides under scales of blocks: whole blocks, and scales in fours (16 bytes)."""
    (M, K), N = left.codes.shape, right.codes.shape[0]
    whole = K % 128 == 0 and M % 4 == 0 and N % (128 if right.granularity == SQUARE else 4) == 0
    return whole and block_execution(left.codes.device).value == "native"


def block_execution(device: torch.device) -> Choice:
    """Whether fp8 with scales of blocks runs natively: cuBLAS has it since 12.9, on Hopper alone. Tried once, since a
    layout of scales that another version reads otherwise would give wrong numbers and no error."""

    def probe() -> str:
        generator = torch.Generator().manual_seed(0)  # 5 blocks along K: their number is padded to 8
        x, w = (torch.randn(n, 640, generator=generator).cumsum(0).to(device, torch.bfloat16) for n in (256, 384))
        left = quantize(x, "fp8_e4m3", BLOCK)
        for granularity in (SQUARE, BLOCK):
            right = quantize(w, "fp8_e4m3", granularity)
            exact = left.dequantize(torch.float64) @ right.dequantize(torch.float64).t()
            try:
                found = scaled_mm_blocks(left.codes, left.scale, right.codes, right.scale, torch.float32)
            except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
                return f"{BLOCK} x {granularity} is refused: {str(error).splitlines()[0]}"
            # Hopper keeps some 14 bits of an fp8 sum between promotions; a wrong scale is off by a factor of 2 or more
            if not (found.double() - exact).norm() < 2.0**-7 * exact.norm():
                return f"{BLOCK} x {granularity} gives wrong products here"
        return ""

    return probed("fp8 blocks", device, probe)


_BLOCKS = {(BLOCK, SQUARE), (BLOCK, BLOCK)}


@cache
def _pairs(left: Format, right: Format, device_type: str) -> set[tuple[Granularity, Granularity]]:
    """The pairs of granularities that the device's instruction takes."""
    return native_granularities(
        Matmul(Operand(left, TENSOR), Operand(right, TENSOR)), describe(torch.device(device_type))
    )


def _native_fp8(left: Quantized, right: Quantized, fast: bool, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """torch._scaled_mm, which wants `left` row by row and `right` column by column."""
    if left.granularity == BLOCK:
        y: Tensor = scaled_mm_blocks(left.codes, left.scale, right.codes, right.scale, dtype)
        return y if bias is None else y + bias
    a, b = _rows(left.codes), _rows(right.codes).t()
    if left.granularity == TENSOR:
        return torch._scaled_mm(
            a, b, left.scale.view(()), right.scale.view(()), bias=bias, out_dtype=dtype, use_fast_accum=fast
        )
    scale_a, scale_b = left.scale.contiguous(), right.scale.t().contiguous()
    y = torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype, use_fast_accum=fast)
    return y if bias is None else y + bias


def _rows(codes: Tensor) -> Tensor:
    """Codes row by row, where they lie if whole sixteens of bytes are between rows and before them: what cuBLAS asks for."""
    fits = codes.stride(1) == 1 and codes.stride(0) >= codes.shape[1]
    fits = fits and codes.stride(0) % 16 == 0 and codes.storage_offset() % 16 == 0
    return codes if fits else codes.contiguous()


# An operator of its own: what inductor makes of aten's would fix neither the strides nor the padding of the scales
@torch.library.custom_op("fewbits::scaled_mm_blocks", mutates_args=())
def scaled_mm_blocks(
    left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """left [M, K] @ right [N, K].T of e4m3 codes in `dtype`. left_scale: fp32 [M, K / 128]; right_scale: [N, K / 128], or
    [N / 128, K / 128] for square blocks. Promoted to fp32 along K. Raises what torch raises."""
    from torch.nn.functional import ScalingType, scaled_mm

    square = right_scale.shape[0] != right.shape[0]
    scale_a, scale_b = block_scales(left_scale, False), block_scales(right_scale, square)
    recipe = ScalingType.BlockWise128x128 if square else ScalingType.BlockWise1x128
    a, b = left.contiguous(), right.contiguous().t()
    y: Tensor = scaled_mm(a, b, scale_a, ScalingType.BlockWise1x128, scale_b, recipe, output_dtype=dtype)
    return y


@scaled_mm_blocks.register_fake
def _(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[0], dtype=dtype)


def block_scales(scale: Tensor, square: bool) -> Tensor:
    """Scales of blocks [rows, K / 128] as cuBLAS reads them ("1D and 2D block scaling for FP8 data types" of its manual).

    1 x 128: the same matrix, column by column. 128 x 128: the transpose, with K / 128 padded to a multiple of 4, K / 128
    side by side in memory; torch._scaled_mm asks for the unpadded matrix, which cuBLAS misreads, so scaled_mm is called.
    """
    if not square:
        return scale.t().contiguous().t()
    padded = torch.zeros(scale.shape[0], -(-scale.shape[1] // 4) * 4, dtype=scale.dtype, device=scale.device)
    padded[:, : scale.shape[1]] = scale
    return padded.t()


def _native_int8(left: Quantized, right: Quantized, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """Products and sums in int32, exact; then one rounding."""
    a, b = left.codes, right.codes.t()
    if by_cpu_kernel(a) and dtype in FORMATS:
        M, N = a.shape[0], right.codes.shape[0]
        scales = left.scale.view(-1).expand(M), right.scale.view(-1).expand(N)
        if rescales_in_registers():
            return int8_matmul_cpu.scaled_int8_matmul(a, right.codes, *scales, bias, dtype)
        total = torch._int_mm(a, b)  # either order of the codes in memory multiplies at the same speed here
        return quantize_cpu.rescale(total, *scales, bias, torch.empty(M, N, dtype=dtype))
    total = torch._int_mm(a.contiguous(), b if b.t().is_contiguous() else b.t().contiguous().t())
    y = total.float() * left.scale.view(-1, 1) * right.scale.view(1, -1)
    return (y if bias is None else y + bias.float()).to(dtype)
