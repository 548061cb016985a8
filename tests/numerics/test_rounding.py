"""Rounding is exact: against torch and ml_dtypes where they have the format, against the list of its numbers elsewhere.

Every comparison is bit for bit (NaN as NaN), on the CPU and where there is one on a CUDA device.
"""

from __future__ import annotations

import math
import shutil
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.formats import FORMATS, Format
from fewbits.numerics.rounding import cast, round_to

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FLOATS = [fmt for fmt in FORMATS.values() if fmt.kind == "float"]
SIGNED = [fmt for fmt in FLOATS if fmt.signed and fmt.bits <= 19] + [Format.parse("e6m9"), Format.parse("e9m6")]
ROUNDINGS = ["nearest-even", "nearest-away", "toward-zero", "stochastic"]
DETERMINISTIC = ROUNDINGS[:3]
ML_DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, -(2.0**-149), 2.0**-126, 3.4028234663852886e38]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, signs of zeros included; a NaN equals a NaN."""
    assert actual.dtype == expected.dtype
    actual, expected = actual.cpu(), expected.cpu()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.dtype.itemsize]
    same = (actual.view(integer) == expected.view(integer)) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{(~same).sum()} differ, first {actual[~same][:4]} instead of {expected[~same][:4]}"


def any_fp32(count: int) -> torch.Tensor:
    """Random bit patterns: every exponent, subnormals, infinities and NaNs; special values in front."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    return torch.cat([torch.tensor(SPECIAL), bits.view(torch.float32)])


def every_16_bit(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def through_ml_dtypes(x: torch.Tensor, name: str) -> torch.Tensor:
    with np.errstate(over="ignore", invalid="ignore"):
        return torch.from_numpy(x.numpy().astype(ML_DTYPES[name]).astype(np.float32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_any_fp32_rounds_as_in_torch_and_ml_dtypes(name, device):
    x = any_fp32(500_000)
    actual = cast(x.to(device), name, overflow="inf")
    assert_same(actual, x.to(FORMATS[name].dtype).float())
    assert_same(actual, through_ml_dtypes(x, name))


@pytest.mark.parametrize("name", [n for n in ML_DTYPES if n.startswith(("fp8", "fp6", "fp4"))])
def test_any_fp32_rounds_to_few_bits_as_in_ml_dtypes(name):
    x = any_fp32(200_000)
    x = x[~x.isnan()]  # ml_dtypes turns NaN into a zero where the format has none; here it stays NaN
    assert_same(cast(x, name, overflow="inf"), through_ml_dtypes(x, name))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overflow", ["saturate", "inf"])
@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_input_rounds_as_in_torch(dtype, name, overflow, device):
    fmt = FORMATS[name]
    x = every_16_bit(dtype)
    expected = x.float().to(fmt.dtype).to(dtype)
    if overflow == "saturate":
        # the largest number on both grids: 65280 is the largest bf16 that fp16 holds, and the other way round
        largest = fmt.max if dtype == fmt.dtype else 65280.0
        expected = torch.where(
            x.isfinite() & expected.isinf(), torch.copysign(torch.tensor(largest, dtype=dtype), x), expected
        )
    assert_same(cast(x.to(device), name, overflow=overflow), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", SIGNED, ids=str)
def test_halfway_points_and_their_neighbours_round_as_defined(fmt, dtype, device):
    """Between two neighbouring numbers the result is one of them, by definition of the rounding."""
    if fmt.min_exponent < -126 and dtype == torch.float32:
        pytest.skip("fp32 cannot hold the subnormals of this format")
    codes = fmt.finite_codes().long()
    codes = codes[codes < 2 ** (fmt.bits - 1)]
    if len(codes) > 70_000:
        codes = torch.cat([codes[:4000], codes[100_000:104_000], codes[-4000:]])
        codes = codes[1:][codes.diff() == 1] - 1
        codes = torch.cat([codes, codes[-1:] + 1])
    low, high = fmt.decode(codes[:-1]).double(), fmt.decode(codes[1:]).double()
    adjacent = codes.diff() == 1
    low, high, even = low[adjacent], high[adjacent], codes[:-1][adjacent] % 2 == 0
    middle = (low + high).div(2).to(dtype)
    assert torch.equal(middle.double() * 2, low + high)
    below, above = torch.nextafter(middle, low.to(dtype)), torch.nextafter(middle, high.to(dtype))
    low, high = low.to(dtype), high.to(dtype)
    for sign in (1, -1):

        def rounded(x: torch.Tensor, rounding: str, sign: int = sign) -> torch.Tensor:
            return cast((sign * x).to(device), fmt, rounding) * sign

        for rounding in ("nearest-even", "nearest-away"):
            assert_same(rounded(below, rounding), low)
            assert_same(rounded(above, rounding), high)
        assert_same(rounded(middle, "nearest-even"), torch.where(even, low, high))
        assert_same(rounded(middle, "nearest-away"), high)
        for x in (low, below, middle, above):
            assert_same(rounded(x, "toward-zero"), low)
        for rounding in ROUNDINGS:
            assert_same(rounded(high, rounding), high)


@pytest.mark.parametrize("name", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("rounding", DETERMINISTIC)
def test_fp64_is_rounded_once(name, rounding):
    """Against exact fractions; most inputs lie 2**-45 beside a tie, where rounding to fp32 first would go wrong."""
    fmt = Format.parse(name)
    generator = torch.Generator().manual_seed(2)
    low_exponent = -14 if name == "fp16" else -100
    exponents = torch.randint(low_exponent, 15, (300,), generator=generator)
    significands = torch.randint(0, 2**fmt.mantissa_bits, (300,), generator=generator)
    ties = (1 + (significands.double() + 0.5) * 2.0**-fmt.mantissa_bits) * torch.exp2(exponents.double())
    near = ties * (1 + torch.randint(-1, 2, (300,), generator=generator) * 2.0**-45)
    anywhere = torch.randn(300, generator=generator, dtype=torch.float64) * torch.exp2(exponents.double())
    x = torch.cat([near, -near, anywhere])
    expected = torch.tensor([round_exactly(value, fmt, rounding) for value in x.tolist()], dtype=torch.float64)
    assert_same(cast(x, fmt, rounding, "inf"), expected)


def round_exactly(value: float, fmt: Format, rounding: str) -> float:
    """The oracle: exact fractions, and Python's round, which is half to even."""
    exponent = max(math.frexp(value)[1] - 1, fmt.min_exponent)
    ulp = Fraction(2) ** (exponent - fmt.mantissa_bits)
    steps = abs(Fraction(value)) / ulp
    whole = {
        "nearest-even": lambda: round(steps),
        "nearest-away": lambda: math.floor(steps + Fraction(1, 2)),
        "toward-zero": lambda: math.floor(steps),
    }[rounding]()
    return math.copysign(float(whole * ulp), value)


def test_planted_double_rounding_does_not_happen():
    x = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert cast(x, "bf16").item() == 1 + 2.0**-7  # through fp32 it would be the tie 1 + 2**-8, and then 1
    assert round_to(x, "bf16").item() == 1 + 2.0**-7
    x = torch.tensor([1 + 2.0**-8 - 2.0**-40], dtype=torch.float64)
    assert round_to(x, "bf16").item() == 1.0  # through fp32 the tie would go away from zero


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@pytest.mark.parametrize("name", ["bf16", "tf32"])
def test_the_short_way_for_ordinary_values_is_the_general_way(name, rounding):
    x = any_fp32(200_000)
    general = cast(x, name, rounding)  # the NaN in it forbids the short way
    ordinary = x.abs() <= FORMATS[name].max
    assert_same(cast(x[ordinary], name, rounding), general[ordinary])


@pytest.mark.parametrize("name", ["fp64", "fp32"])
def test_a_format_as_wide_as_the_input_changes_nothing(name):
    x = any_fp32(1000)
    assert_same(cast(x, name, overflow="inf"), x)
    assert_same(cast(x.double(), "fp64"), x.double())


def test_overflow_saturates_or_becomes_infinite_as_asked():
    x = torch.tensor([65519.0, 65520.0, 1e30, -1e30, math.inf, -math.inf])
    assert cast(x, "fp16").tolist() == [65504, 65504, 65504, -65504, math.inf, -math.inf]
    assert cast(x, "fp16", overflow="inf").tolist() == [65504, math.inf, math.inf, -math.inf, math.inf, -math.inf]
    assert cast(x, "fp16", "toward-zero", "inf").tolist() == [65504, 65504, 65504, -65504, math.inf, -math.inf]
    assert cast(x, "e4m3").tolist() == [448, 448, 448, -448, 448, -448]
    assert cast(x, "e4m3", overflow="inf").isnan().all()
    assert cast(x, "fp4", overflow="inf").tolist() == [6, 6, 6, -6, 6, -6]
    biggest = torch.tensor([torch.finfo(torch.float32).max])
    assert cast(biggest, "bf16").item() == FORMATS["bf16"].max
    assert cast(biggest, "bf16", overflow="inf").item() == math.inf


def test_nan_stays_nan_and_zero_keeps_its_sign():
    for fmt in FLOATS:
        for rounding in ROUNDINGS:
            assert cast(torch.tensor([math.nan]), fmt, rounding).isnan().all()
            if fmt.signed:
                assert_same(cast(torch.tensor([0.0, -0.0]), fmt, rounding), torch.tensor([0.0, -0.0]))


@pytest.mark.parametrize("fmt", [f for f in FLOATS if f.bits <= 19], ids=str)
def test_encode_agrees_with_cast(fmt):
    x = any_fp32(20_000).double()
    x = x[~x.isnan()] if not fmt.has_nan else x
    actual = fmt.decode(fmt.encode(x))
    assert_same(actual.float(), cast(x, fmt).float())


def test_integers_and_signs_have_their_grids_too():
    x = torch.tensor([0.5, 1.5, -2.5, 200.0, -200.0, 0.49999997])
    assert cast(x, "int8").tolist() == [0, 2, -2, 127, -128, 0]
    assert cast(x, "int8", "nearest-away").tolist() == [1, 2, -3, 127, -128, 0]
    assert cast(x, "binary").tolist() == [1, 1, -1, 1, -1, 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_working_weights_round_ties_away_by_either_path(name, device):
    x = any_fp32(300_000)
    fmt = FORMATS[name]
    codes = fmt.finite_codes()[: 2 ** (fmt.bits - 1) - 2**fmt.mantissa_bits]
    values = fmt.decode(codes)
    x = torch.cat([x, (values[1:] + values[:-1]) / 2, -(values[1:] + values[:-1]) / 2]).to(device)
    weights = round_to(x, name)
    assert weights.dtype == fmt.dtype
    assert_same(weights.float(), cast(x, name, "nearest-away", "inf"))
    assert_same(round_to(x.double(), name), weights)
    assert_same(round_to(x, name, "nearest-even"), x.cpu().to(fmt.dtype))
    assert_same(round_to(x, name, "toward-zero").float(), cast(x, name, "toward-zero", "inf"))


def test_a_remainder_of_ties_away_fits_signed_16_bits():
    """Why ties go away: 16 low bits of fp32 minus the rounded ones lie in -32768..32767 (to even it could be 32768)."""
    x = torch.arange(2**17, dtype=torch.int32).add(0x3F80_0000).view(torch.float32)
    difference = x.view(torch.int32) - round_to(x, "bf16").float().view(torch.int32)
    assert (difference.min(), difference.max()) == (-32768, 32767)
    to_even = x.view(torch.int32) - round_to(x, "bf16", "nearest-even").float().view(torch.int32)
    assert to_even.max() == 32768


@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a compiler"
)
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_rounding_gives_the_same_bits(device):
    """Compilers keep 16-bit intermediates in fp32 and drop casts there and back; bits leave them no such freedom."""

    def graph(x: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # the doubling afterwards shows a cast that was dropped inside a fused kernel
        grids = [cast(x, "bf16"), cast(x, "fp16", "nearest-away", "inf"), cast(x, "tf32", "toward-zero")]
        grids += [cast(x, name) for name in ("fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp4_e2m1", "int8")]
        grids += [cast(x, name, "stochastic", seed=key) for name in ("fp8_e5m2", "int4")]
        return (*(2 * grid for grid in grids), 2 * round_to(x, "bf16").float(), 2 * round_to(x, "fp16").float())

    x = any_fp32(100_000).to(device)
    compiled = torch.compile(graph, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for key in (3, 4):
            seed = torch.tensor(key, device=device)
            for actual, expected in zip(compiled(x, seed), graph(x, seed), strict=True):
                assert_same(actual, expected)


def test_no_gradient_flows_and_the_input_is_left_alone():
    x = torch.tensor([1.001, 2.002], requires_grad=True)
    before = x.detach().clone()
    assert not cast(x, "bf16").requires_grad
    assert not round_to(x, "bf16").requires_grad
    assert torch.equal(x.detach(), before)


def test_any_shape_and_stride_is_rounded_in_place_of_its_elements():
    x = torch.randn(6, 5).t()
    assert_same(cast(x, "bf16").contiguous(), cast(x.contiguous(), "bf16"))
    assert cast(torch.empty(0, 3), "fp16").shape == (0, 3)
    assert cast(torch.tensor(1.01), "bf16").shape == ()
    assert round_to(torch.randn(8, 3)[::2].t(), "fp16").shape == (3, 4)
    for rounding in ROUNDINGS:
        for x in (torch.randn(3, 4, 5).permute(2, 0, 1), torch.randn(7, 9)[::2, 1::3], torch.randn(4, 1).expand(4, 5)):
            assert_same(cast(x, "e4m3", rounding).contiguous(), cast(x.contiguous(), "e4m3", rounding))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bf17",), "no number format 'bf17'"),
        (("bf16", "nearest"), "no rounding 'nearest'"),
        (("bf16", "nearest-even", "wrap"), "no overflow 'wrap'"),
    ],
)
def test_an_unknown_argument_is_one_sentence(arguments, message):
    with pytest.raises(FewbitsError, match=message):
        cast(torch.ones(1), *arguments)


def test_a_tensor_of_integers_is_refused():
    with pytest.raises(FewbitsError, match="int64"):
        cast(torch.arange(3), "bf16")
    with pytest.raises(FewbitsError, match="tf32 has no torch dtype"):
        round_to(torch.ones(1), "tf32")
