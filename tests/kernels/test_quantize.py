"""The Triton twin of `quantize` gives the codes and scales of the definition, bit for bit (in Triton's interpreter)."""

import itertools
import math

import pytest
import torch
from interpreter import INTERPRETED, triton

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.kernels import quantize as kernel
from fewbits.kernels.quantize_triton import _random_bits
from fewbits.numerics import quantize as definition
from fewbits.numerics.random import mix_key, random_bits
from fewbits.numerics.scaling import Granularity, block_amax, scale_of

pytestmark = INTERPRETED
tl = triton.language

FORMATS = ("fp8_e4m3", "fp8_e5m2", "int8", "int4", "fp4_e2m1", "fp6_e2m3", "fp6_e3m2")
GRANULARITIES = ("tensor", "row", "block(1x128)", "block(1x16)", "block(16x16)", "block(3x5)")
SCALES = ("power-of-two", "exact", "two-level")


def matrix(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Values over many binades, with zeros, so that subnormal codes, ties and saturation all come up."""
    x = torch.randn(shape) * torch.randn(shape).mul(4).exp()
    return torch.where(torch.rand(shape) < 0.05, 0.0, x).clamp(-6e4, 6e4).to(dtype)


def assert_same(ours: definition.Quantized, theirs: definition.Quantized) -> None:
    assert ours.codes.dtype == theirs.codes.dtype
    assert ours.codes.is_contiguous()
    for mine, other in ((ours.scale, theirs.scale), (ours.codes.float(), theirs.codes.float())):
        assert torch.equal(mine.isnan(), other.isnan())  # which NaN it is does not matter, the sign of a zero does
        assert torch.equal(*(values.nan_to_num(nan=0.0).view(torch.int32) for values in (mine, other)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scales", SCALES)
def test_codes_and_scales_are_those_of_the_definition(granularity, scales):
    for index, format in enumerate(FORMATS):
        dtype = (torch.bfloat16, torch.float32, torch.float16)[index % 3]
        for shape in ((3, 5), (16, 48), (20, 150))[index % 2 :]:
            x = matrix(shape, dtype)
            for view in (x, x.t()):
                assert_same(
                    kernel.quantize(view, format, granularity, scales=scales),
                    definition.quantize(view, format, granularity, scales=scales),
                )


@pytest.mark.parametrize("shape", [(1, 7), (9, 1), (1, 1), (130, 3), (2, 300)])
@pytest.mark.parametrize("granularity", ["tensor", "row", "block(1x128)"])
def test_awkward_shapes_are_quantized_alike(shape, granularity):
    x = matrix(shape, torch.bfloat16)
    assert_same(kernel.quantize(x, "fp8_e4m3", granularity), definition.quantize(x, "fp8_e4m3", granularity))


@pytest.mark.parametrize("format", FORMATS)
def test_one_reading_gives_a_matrix_and_its_transpose(format):
    x = matrix((70, 150), torch.bfloat16)
    for granularity in ("tensor", "row", "block(1x128)"):
        one, other = kernel.quantize_both(x, format, granularity)
        assert_same(one, definition.quantize(x, format, granularity))
        assert torch.equal(one.codes.t().float(), other.codes.float())
        assert other.codes.is_contiguous()
        assert other.granularity == one.granularity.transposed()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_block_that_is_not_finite_is_not_hidden(format, value):
    x = matrix((4, 64), torch.float32)
    x[1, 20] = value
    for granularity in ("row", "block(1x16)"):
        assert_same(kernel.quantize(x, format, granularity), definition.quantize(x, format, granularity))


@pytest.mark.parametrize("format", FORMATS)
def test_every_bf16_value_is_encoded_alike_under_given_scales(format):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    finite = torch.where(x.isfinite(), x, 0)
    fmt, row = Format.parse(format), Granularity(1, 0)
    for scale in (1.0, 2.0**-20, 1.5, 2.0**20):
        given = torch.full((256, 1), scale)
        ours = kernel.encode(finite, given, fmt, row)
        theirs = definition.encode(finite, given, fmt, row)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("format", FORMATS)
def test_ties_and_the_smallest_values_of_fp32_round_alike(format):
    codes = Format.parse(format).decode(Format.parse(format).finite_codes()).unique()
    halfway = (codes[1:] + codes[:-1]) / 2
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 2.0**-126, 3e38, -3e38])
    near = torch.cat((codes, halfway, halfway.nextafter(codes[1:]), halfway.nextafter(codes[:-1]), tiny))
    x, one = near.view(1, -1), torch.ones(1, 1)
    for view, scale in ((x, one), (x * 2.0**-100, one * 2.0**-100)):
        arguments = (view, scale, Format.parse(format), Granularity())
        ours, theirs = kernel.encode(*arguments), definition.encode(*arguments)
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("seed", [5, torch.tensor(-(2**40) - 7)], ids=["int", "tensor"])
def test_random_roundings_are_those_of_the_definition(format, seed):
    for granularity, scales in (("row", "power-of-two"), ("tensor", "exact"), ("block(1x16)", "two-level")):
        x = matrix((24, 150), torch.float32) * torch.randn(24, 150).mul(8).exp()
        for view in (x, x.t()):
            arguments = (view, format, granularity, "stochastic", seed, scales)
            assert_same(kernel.quantize(*arguments), definition.quantize(*arguments))


def test_amax_is_that_of_the_definition():
    x = matrix((37, 150), torch.float16)
    for granularity in map(Granularity.parse, GRANULARITIES):
        assert torch.equal(kernel.block_amax(x, granularity), block_amax(x, granularity))
        assert torch.equal(kernel.block_amax(x.t(), granularity), block_amax(x.t(), granularity))


def test_scales_at_the_ends_of_fp32_are_those_of_the_definition():
    for format, scales in itertools.product(FORMATS, ("power-of-two", "exact")):
        x = torch.tensor([[1e-45], [1e-38], [2.0**-126], [0.0], [3.4e38], [448.0], [448.1], [127.0]])
        fmt = Format.parse(format)
        ours = kernel.quantize(x, format, "row", scales=scales).scale
        assert torch.equal(ours, scale_of(x.abs(), fmt, scales))


@triton.jit
def draw(out, key, start, COUNT: tl.constexpr):
    index = start + tl.arange(0, COUNT).to(tl.int64)
    tl.store(out + tl.arange(0, COUNT), _random_bits(tl.load(key), index).to(tl.int32, bitcast=True))


def test_the_kernel_draws_the_random_bits_of_the_definition():
    for start in (0, 2**31 - 8, 2**32 - 8, 5 * 2**33 + 3):
        for key in (0, 1, mix_key(3, 1), -5):
            out = torch.empty(64, dtype=torch.int32)
            draw[(1,)](out, torch.tensor(key), start, COUNT=64)
            assert torch.equal(out, random_bits(key, (64,), start=start))


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
