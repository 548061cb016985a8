"""Formats against torch.finfo, ml_dtypes and the tables of the OCP specifications."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.formats import ALIASES, FORMATS, Format

SMALL = [fmt for fmt in FORMATS.values() if fmt.bits <= 19]
ML_DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}


@pytest.mark.parametrize("name", ["fp64", "fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2"])
def test_range_and_precision_are_those_of_torch(name):
    fmt = FORMATS[name]
    info = torch.finfo(fmt.dtype)
    assert (fmt.max, fmt.min, fmt.smallest_normal, fmt.bits) == (info.max, info.min, info.smallest_normal, info.bits)
    assert fmt.ulp(1.0) == info.eps
    assert fmt.smallest_subnormal == info.smallest_normal * info.eps


@pytest.mark.parametrize(
    ("name", "largest", "normal", "subnormal"),
    [  # OCP 8-bit v1.0 table 1; OCP MX v1.0 tables 1 to 7; tf32 is fp32 with 10 mantissa bits
        ("tf32", (2 - 2.0**-10) * 2.0**127, 2.0**-126, 2.0**-136),
        ("fp8_e4m3", 448.0, 2.0**-6, 2.0**-9),
        ("fp8_e5m2", 57344.0, 2.0**-14, 2.0**-16),
        ("fp6_e2m3", 7.5, 1.0, 0.125),
        ("fp6_e3m2", 28.0, 0.25, 0.0625),
        ("fp4_e2m1", 6.0, 1.0, 0.5),
        ("e8m0", 2.0**127, 2.0**-127, 2.0**-127),
        ("int8", 127.0, 1.0, 1.0),
        ("int4", 7.0, 1.0, 1.0),
    ],
)
def test_range_is_that_of_the_specification(name, largest, normal, subnormal):
    fmt = Format.parse(name)
    assert (fmt.max, fmt.smallest_normal, fmt.smallest_subnormal) == (largest, normal, subnormal)


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_every_finite_code_survives_decode_then_encode(fmt):
    codes = fmt.finite_codes()
    values = fmt.decode(codes)
    assert values.isfinite().all()
    assert torch.equal(fmt.encode(values), codes)
    assert values.max() == fmt.max
    assert values.min() == fmt.min


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_code_decodes_as_in_ml_dtypes(name):
    fmt = FORMATS[name]
    codes = np.arange(2**fmt.bits)
    storage = np.uint16 if fmt.bits == 16 else np.uint8
    expected = torch.tensor(codes.astype(storage).view(ML_DTYPES[name]).astype(np.float32))
    torch.testing.assert_close(fmt.decode(torch.from_numpy(codes)), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [2, 4])
def test_every_code_of_a_small_integer_is_its_twos_complement(bits):
    info = ml_dtypes.iinfo(f"int{bits}")
    values = Format.parse(f"int{bits}").decode(torch.arange(2**bits))
    in_order = [*range(0, int(info.max) + 1), *range(int(info.min), 0)]
    assert values.tolist() == in_order
    stored = np.array(in_order, dtype=f"int{bits}").view(np.uint8) & (2**bits - 1)
    assert Format.parse(f"int{bits}").encode(values).tolist() == stored.tolist()


@pytest.mark.parametrize("fmt", [*SMALL, Format.parse("e3m4"), Format.parse("int5")], ids=str)
def test_finite_codes_are_counted_without_being_listed(fmt):
    assert fmt.finite_count == len(fmt.finite_codes())


@pytest.mark.parametrize("exponent", range(2, 9))
@pytest.mark.parametrize("mantissa", [1, 2, 5, 9])
def test_any_exponent_and_mantissa_follow_ieee_754(exponent, mantissa):
    """Largest, smallest normal and subnormal by the formulas of IEEE 754, and every code survives."""
    fmt = Format.parse(f"e{exponent}m{mantissa}")
    bias = 2 ** (exponent - 1) - 1
    if fmt.name not in FORMATS:  # e2m1 and its like are the OCP's, which have no infinities
        assert fmt.max == (2 - 2.0**-mantissa) * 2.0**bias
    assert fmt.smallest_normal == 2.0 ** (1 - bias)
    assert fmt.smallest_subnormal == 2.0 ** (1 - bias - mantissa)
    codes = fmt.finite_codes()
    assert torch.equal(fmt.encode(fmt.decode(codes)), codes)


@pytest.mark.parametrize(("name", "integer"), [("fp32", torch.int32), ("fp64", torch.int64)])
def test_wide_codes_are_the_bits(name, integer):
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-1090, 1030, (20_000,), generator=generator)
    x = torch.randn(20_000, generator=generator, dtype=torch.float64) * torch.exp2(exponents.double() / 2)
    extremes = [0.0, -0.0, math.inf, -math.inf, fmt.max, fmt.min, fmt.smallest_normal, -fmt.smallest_subnormal]
    x = torch.cat([x, torch.tensor(extremes, dtype=torch.float64)])
    x = torch.where(x.abs() > fmt.max, x.sign() * math.inf, x).to(fmt.dtype)
    codes = fmt.encode(x)
    assert torch.equal(codes.to(integer), x.view(integer))
    assert torch.equal(fmt.decode(codes).view(integer), x.view(integer))


def test_encode_rounds_to_nearest_even_and_saturates():
    e4m3 = Format.parse("e4m3")
    x = torch.tensor([1.0625, 1.1875, 460.0, 1e30, -1e30, math.inf, math.nan, -0.0])
    assert e4m3.encode(x).tolist() == [0x38, 0x3A, 0x7E, 0x7E, 0xFE, 0x7E, 0x7F, 0x80]
    fp16 = Format.parse("fp16")
    assert fp16.encode(torch.tensor([70000.0, math.inf, -math.inf])).tolist() == [0x7BFF, 0x7C00, 0xFC00]


@pytest.mark.parametrize("fmt", [f for f in SMALL if f.kind == "float"], ids=str)
def test_ulp_is_the_distance_to_the_next_number(fmt):
    codes = fmt.finite_codes()
    positive = fmt.decode(codes[codes.long() < 2 ** (fmt.bits - 1)] if fmt.signed else codes).double()
    assert torch.equal(fmt.ulp(positive[:-1]), positive.diff())


def test_ulp_of_special_values_and_floats():
    fmt = Format.parse("bf16")
    assert fmt.ulp(0.0) == fmt.smallest_subnormal
    assert fmt.ulp(256.0) == 2.0  # 256 + 1 = 256
    assert math.isnan(fmt.ulp(math.inf))
    assert math.isnan(fmt.ulp(math.nan))
    assert Format.parse("fp64").ulp(5e-324) == 5e-324


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
def test_the_name_parses_back(fmt):
    assert Format.parse(str(fmt)) is fmt
    assert fmt.dtype is None or Format.parse(fmt.dtype) is fmt


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_names_a_format(alias):
    assert Format.parse(alias.upper()).name in FORMATS


def test_any_exponent_and_mantissa_width_is_a_format():
    assert Format.parse("e5m10") is FORMATS["fp16"]
    fmt = Format.parse("e6m9")
    assert (str(fmt), fmt.bits, fmt.max, fmt.smallest_subnormal) == ("e6m9", 16, (2 - 2.0**-9) * 2.0**31, 2.0**-39)
    assert Format.parse("e6m9") == fmt
    assert Format.parse("int5").max == 15


@pytest.mark.parametrize("text", ["bf17", "", "e1m2", "e12m2", "e5m0", "e5m53", "int1", "int64", "fp", "float128"])
def test_an_unknown_format_is_one_sentence(text):
    with pytest.raises(FewbitsError, match=r"format|Format"):
        Format.parse(text)


def test_a_close_name_is_suggested():
    with pytest.raises(FewbitsError, match="'bf16'"):
        Format.parse("bf61")


def test_codes_that_cannot_be_listed_are_refused():
    with pytest.raises(FewbitsError, match="too many"):
        Format.parse("fp32").finite_codes()
