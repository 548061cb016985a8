"""The CPU twin of `quantize` gives the codes, scales and values of the definition, bit for bit."""

import itertools
import math

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.kernels import cpp, dispatch
from fewbits.kernels import quantize_cpu as kernel
from fewbits.numerics import quantize as definition
from fewbits.numerics.scaling import Granularity, block_amax, scale_of

pytestmark = pytest.mark.skipif(kernel.library().value is None, reason=kernel.library().reason)

FORMATS = ("fp8_e4m3", "fp8_e5m2", "int8", "int4", "fp4_e2m1", "fp6_e2m3", "fp6_e3m2")
GRANULARITIES = ("tensor", "row", "block(1x128)", "block(1x16)", "block(16x16)", "block(3x5)")
SCALES = ("power-of-two", "exact", "two-level")
ROUNDINGS = ("nearest-even", "stochastic")


def matrix(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Values over many binades, with zeros, so that subnormal codes, ties and saturation all come up."""
    x = torch.randn(shape) * torch.randn(shape).mul(4).exp()
    return torch.where(torch.rand(shape) < 0.05, 0.0, x).clamp(-6e4, 6e4).to(dtype)


def assert_same_values(mine: torch.Tensor, other: torch.Tensor) -> None:
    """Which NaN it is does not matter, the sign of a zero does."""
    assert mine.dtype == other.dtype
    mine, other = mine.float(), other.float()
    assert torch.equal(mine.isnan(), other.isnan())
    assert torch.equal(*(values.nan_to_num(nan=0.0).contiguous().view(torch.int32) for values in (mine, other)))


def assert_same(ours: definition.Quantized, theirs: definition.Quantized) -> None:
    assert_same_values(ours.scale, theirs.scale)
    assert_same_values(ours.codes, theirs.codes)
    assert (ours.format, ours.granularity, ours.scales) == (theirs.format, theirs.granularity, theirs.scales)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_codes_and_scales_are_those_of_the_definition(granularity, rounding):
    for index, (format, scales) in enumerate(itertools.product(FORMATS, SCALES)):
        dtype = (torch.bfloat16, torch.float32, torch.float16)[index % 3]
        for shape in ((3, 5), (16, 48), (70, 150), (130, 3), (1, 7), (9, 1))[index % 2 :: 2]:
            x = matrix(shape, dtype)
            for view in (x, x.t(), x[:, ::2]):
                arguments = (view, format, granularity, rounding, 2**40 + 7, scales)
                assert_same(kernel.quantize(*arguments), definition.quantize(*arguments))


def test_codes_do_not_depend_on_the_number_of_threads():
    x = matrix((300, 700), torch.bfloat16)
    arguments = (x, "int8", "row", "stochastic", torch.tensor(-(2**40) - 7))
    one = kernel.quantize(*arguments)
    torch.set_num_threads(2)
    try:
        assert_same(kernel.quantize(*arguments), one)
    finally:
        torch.set_num_threads(1)
    assert_same(one, definition.quantize(*arguments))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_block_that_is_not_finite_is_not_hidden(format, value):
    x = matrix((4, 64), torch.float32)
    x[1, 20] = value
    for granularity, rounding in itertools.product(("row", "block(1x16)", "tensor"), ROUNDINGS):
        arguments = (x, format, granularity, rounding)
        ours = kernel.quantize(*arguments)
        assert_same(ours, definition.quantize(*arguments))
        assert ours.dequantize().isnan().any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_bf16_value_is_encoded_alike_under_given_scales(format, rounding):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    fmt, row = Format.parse(format), Granularity(1, 0)
    for scale in (1.0, 2.0**-20, 1.5, 2.0**20):
        arguments = (x, torch.full((256, 1), scale), fmt, row, rounding, 3)
        assert_same_values(kernel.encode(*arguments), definition.encode(*arguments))


@pytest.mark.parametrize("format", FORMATS)
def test_ties_and_the_smallest_values_of_fp32_round_alike(format):
    codes = Format.parse(format).decode(Format.parse(format).finite_codes()).unique()
    halfway = (codes[1:] + codes[:-1]) / 2
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 2.0**-126, 3e38, -3e38])
    near = torch.cat((codes, halfway, halfway.nextafter(codes[1:]), halfway.nextafter(codes[:-1]), tiny))
    x, one = near.view(1, -1), torch.ones(1, 1)
    for view, scale in ((x, one), (x * 2.0**-100, one * 2.0**-100)):
        arguments = (view, scale, Format.parse(format), Granularity())
        assert_same_values(kernel.encode(*arguments), definition.encode(*arguments))


def test_scales_at_the_ends_of_fp32_are_those_of_the_definition():
    for format, scales in itertools.product(FORMATS, ("power-of-two", "exact")):
        x = torch.tensor([[1e-45], [1e-38], [2.0**-126], [0.0], [3.4e38], [448.0], [448.1], [127.0]])
        for granularity in ("row", "block(2x1)"):
            ours = kernel.quantize(x, format, granularity, scales=scales).scale
            assert torch.equal(
                ours, scale_of(block_amax(x, Granularity.parse(granularity)), Format.parse(format), scales)
            )


def test_amax_is_that_of_the_definition():
    x = matrix((37, 150), torch.float16)
    for granularity in map(Granularity.parse, GRANULARITIES):
        assert torch.equal(kernel.block_amax(x, granularity), block_amax(x, granularity))
        assert torch.equal(kernel.block_amax(x.t(), granularity), block_amax(x.t(), granularity))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_every_code_decodes_to_the_value_of_the_definition(dtype):
    every = torch.arange(256, dtype=torch.uint8).view(16, 16)
    for carrier in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8):
        for granularity, scale in (
            (Granularity(), torch.tensor([[2.0**-3]])),
            (Granularity(1, 0), 2.0 ** torch.arange(-8, 8).float().view(16, 1)),
            (Granularity(1, 0), torch.rand(16, 1)),
            (Granularity(8, 4), 2.0 ** torch.arange(-4, 4).float().view(2, 4)),
        ):
            codes = every.view(carrier)
            for view, shared, own in ((codes, granularity, scale), (codes.t(), granularity.transposed(), scale.t())):
                expected = definition.decode(view, own, shared, dtype)  # "exact": formed in fp32, rounded once
                assert_same_values(kernel.decode(view, own, shared, dtype), expected)


def test_one_reading_gives_a_matrix_and_its_transpose():
    x = matrix((70, 150), torch.bfloat16)
    for format, granularity in itertools.product(FORMATS, ("tensor", "row", "block(1x128)")):
        one, other = kernel.quantize_both(x, format, granularity)
        assert_same(one, definition.quantize(x, format, granularity))
        assert torch.equal(one.codes.t().float(), other.codes.float())
        assert other.granularity == one.granularity.transposed()


@pytest.mark.parametrize("bias", [False, True])
def test_integer_sums_are_rescaled_to_the_bits_of_the_definition(bias):
    total = torch.randint(-(2**31), 2**31 - 1, (37, 150), dtype=torch.int32)
    rows, columns, added = torch.rand(37), torch.rand(150), torch.randn(150).bfloat16() if bias else None
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        expected = total.float() * rows.view(-1, 1) * columns
        expected = (expected if added is None else expected + added.float()).to(dtype)
        assert_same_values(kernel.rescale(total, rows, columns, added, torch.empty(37, 150, dtype=dtype)), expected)


def test_what_does_not_fit_is_named():
    x = torch.zeros(4, 4)
    for arguments, word in (
        ((x.double(), "int8"), "float64"),
        ((x[:0], "int8"), "empty"),
        ((x, "e5m10"), "one signed byte"),
        ((x, "int8", "row", "toward-zero"), "toward-zero"),
    ):
        with pytest.raises(FewbitsError, match=word):
            kernel.quantize(*arguments)


def test_the_cpu_quantizes_by_the_kernel_and_says_why():
    choice = dispatch.quantize_execution(torch.device("cpu"))
    assert choice.value == "kernel"
    assert "one reading" in choice.reason


def test_a_source_that_does_not_compile_names_the_first_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))
    (tmp_path / "broken.cpp").write_text("this is no C++;\n")
    for header in cpp._HEADERS:
        (tmp_path / header).write_text("")
    monkeypatch.setattr(cpp, "_HERE", tmp_path)
    choice = cpp.library("broken", {})
    assert choice.value is None
    assert "error" in choice.reason
    assert list((tmp_path / "kernels").iterdir()) == []
