"""Products of codes: what runs natively gets operands as the instruction wants them, and agrees with the exact values."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fewbits.formats import Format
from fewbits.kernels import dispatch
from fewbits.kernels.matmul import _native_int8, _rows, block_scales, native_kind, scaled_matmul, scaled_mm_blocks
from fewbits.numerics.quantize import quantize
from fewbits.precision.hardware import Hardware, native_granularities
from fewbits.precision.recipe import Recipe

SHAPES = [(256, 640, 384), (64, 128, 128), (4, 256, 128)]


@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
@pytest.mark.parametrize("square", [False, True], ids=["1x128", "128x128"])
def test_torch_takes_the_scales_of_blocks_as_they_are_laid_out(M, K, N, square):
    """The checks are those of torch's shape function for `scaled_mm`, which are the device's (torch 2.13)."""
    with FakeTensorMode():
        left, right = torch.empty(M, K).to(torch.float8_e4m3fn), torch.empty(N, K).to(torch.float8_e4m3fn)
        scales = torch.empty(M, K // 128), torch.empty(N // 128 if square else N, K // 128)
        y = scaled_mm_blocks._init_fn(left, scales[0], right, scales[1], torch.bfloat16)
    assert (y.shape, y.dtype) == ((M, N), torch.bfloat16)


def test_scales_of_square_blocks_are_padded_along_the_contraction():
    scale = torch.arange(1.0, 11.0).view(2, 5)
    laid = block_scales(scale, square=True)
    assert laid.shape == (8, 2)
    assert laid.stride() == (1, 8)
    assert torch.equal(laid[:5], scale.t())
    assert torch.equal(laid[5:], torch.zeros(3, 2))
    assert torch.equal(block_scales(scale, square=False), scale)
    assert block_scales(scale, square=False).stride() == (1, 2)


def test_the_operator_of_blocks_has_the_shape_that_compilers_are_told():
    left, right = (torch.zeros(n, 128).to(torch.float8_e4m3fn) for n in (4, 128))
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = torch.ops.fewbits.scaled_mm_blocks(left, torch.ones(4, 1), right, torch.ones(1, 1), torch.bfloat16)
    assert (y.shape, y.dtype) == ((4, 128), torch.bfloat16)


def test_two_e5m2_operands_are_never_multiplied_natively():
    matmul = Recipe.parse("output=e5m2/tensor").output
    assert native_granularities(matmul, Hardware("cuda", "NVIDIA H100", (9, 0))) == set()


def test_scales_of_blocks_are_native_on_hopper_alone():
    matmul = Recipe.parse("output=e4m3/block(1x128)").output
    pair = (matmul.left.granularity, matmul.right.granularity)
    found = {major: pair in native_granularities(matmul, Hardware("cuda", "", (major, 0))) for major in (8, 9, 10, 12)}
    assert found == {8: False, 9: True, 10: False, 12: False}


def test_a_probe_is_asked_once_and_its_reason_is_recorded(monkeypatch):
    monkeypatch.setattr(dispatch, "_choices", {})
    asked = []
    for _ in range(2):
        choice = dispatch.probed("fp8 blocks", torch.device("cpu"), lambda: asked.append(1) or "refused: no reason")
    assert choice == ("emulated", "refused: no reason")
    assert asked == [1]
    assert dispatch.recorded() == {"fp8 blocks on cpu": ["emulated", "refused: no reason"]}


# Half a unit of bf16 for the result, and fp32 sums of 256 products on either side.
BOUND = 2.0**-9 + 256 * 2.0**-24


@pytest.mark.parametrize("granularity", ["tensor", "row", "block(1x128)", "block(1x32)"])
@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2", "int8", "fp4_e2m1"])
@pytest.mark.parametrize(("M", "N"), [(40, 24), (1, 7), (33, 16)])
def test_a_product_is_that_of_the_exact_values_whatever_the_shape(format, granularity, M, N):
    left, right = (quantize(torch.randn(n, 256), format, granularity) for n in (M, N))
    exact = left.dequantize(torch.float64) @ right.dequantize(torch.float64).t()
    largest = left.dequantize(torch.float64).abs() @ right.dequantize(torch.float64).abs().t()
    y = scaled_matmul(left, right, "fp32", torch.bfloat16)
    assert bool(((y.double() - exact).abs() <= BOUND * largest).all())


def test_int8_products_are_exact_before_the_one_rounding():
    left, right = (quantize(torch.randn(n, 4096), "int8", "row") for n in (40, 24))
    total = left.codes.long() @ right.codes.long().t()
    expected = total.float() * left.scale * right.scale.t()
    assert torch.equal(_native_int8(left, right, torch.float32, None), expected)


def test_an_empty_operand_has_no_native_product():
    left, right = quantize(torch.zeros(0, 32), "int8", "row"), quantize(torch.zeros(16, 32), "int8", "row")
    assert native_kind(left, right, "fp32") == ""
    assert scaled_matmul(left, right, "fp32", torch.bfloat16).shape == (0, 16)


def test_what_quantizes_does_not_show():
    x, fmt = torch.randn(8, 32), Format.parse("fp8_e4m3")
    from fewbits.numerics.scaling import Granularity

    ours = dispatch.quantize(x, fmt, Granularity(1, 0), "nearest-even", 0, "power-of-two")
    assert torch.equal(ours.codes.view(torch.uint8), quantize(x, fmt, "row").codes.view(torch.uint8))


def test_codes_are_copied_only_where_their_rows_do_not_lie_as_a_matmul_wants_them():
    codes = torch.arange(64 * 96, dtype=torch.int32).to(torch.uint8).view(64, 96)
    for fits in (codes, codes[:, :32], codes[:, 16:48], codes[3:40], codes[:1]):
        assert _rows(fits) is fits
    odd = torch.arange(8 * 40, dtype=torch.int32).to(torch.uint8).view(8, 40)
    for not_fit in (codes[:, 8:40], codes[::2, ::2], codes.t(), odd[:, :32], codes[:1].expand(4, -1)):
        rows = _rows(not_fit)
        assert rows.is_contiguous() and rows.storage_offset() == 0 and torch.equal(rows, not_fit)
