"""Codes and scales: exact where they can be, within half a step where they round, and never silently wrong."""

from __future__ import annotations

import math

import pytest
import torch

from fewbits import FewbitsError, Format, Quantized, quantize
from fewbits.numerics.quantize import carrier, decode, encode
from fewbits.numerics.scaling import Granularity

FORMATS = ["fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1", "int8", "int4", "e3m4", "e5m10"]
GRANULARITIES = ["tensor", "row", "block(1x32)", "block(16x16)"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_carrier_holds_every_value_of_its_format(name):
    fmt = Format.parse(name)
    values = fmt.decode(fmt.finite_codes())
    held = values.to(carrier(fmt))
    assert torch.equal(held.to(torch.float32), values)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_numbers_on_the_grid_come_back_bit_for_bit(name, granularity):
    fmt = Format.parse(name)
    codes = fmt.finite_codes()
    x = fmt.decode(codes[torch.randint(len(codes), (33, 40))])
    if fmt.kind == "int":
        x = x.clamp(-fmt.max, fmt.max)
    x[:, :] = torch.where(torch.rand(33, 40) < 0.5, fmt.max, x)  # every block holds the largest number: its scale is 1
    q = quantize(x, name, granularity)
    assert torch.equal(q.dequantize(), x)
    assert torch.equal(q.scale, torch.ones_like(q.scale))


@pytest.mark.parametrize("scales", ["power-of-two", "exact", "two-level"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_error_is_half_a_step_and_the_bf16_path_gives_the_same_codes(name, granularity, scales):
    fmt = Format.parse(name)
    x = torch.randn(50, 70).bfloat16()
    q, wide = quantize(x, name, granularity, scales=scales), quantize(x.float(), name, granularity, scales=scales)
    assert torch.equal(q.codes.float(), wide.codes.float()) and torch.equal(q.scale, wide.scale)
    other = quantize(x.t(), name, Granularity.parse(granularity).transposed(), scales=scales)
    assert torch.equal(other.codes.t().float(), q.codes.float())
    if scales == "two-level":
        return  # its block scales round to nearest, so the largest element may lie beyond the largest code
    step = fmt.ulp(x.float() / q_scale(q, x))
    error = (q.dequantize().double() - x.double()).abs() / q_scale(q, x).double()
    # half a step; formed in fp32, so one rounding of the product with inv_scale (2^-24, twice for an exact scale) is added
    assert bool((error <= 0.5 * step * (1 + 2.0**-20) + 2.0**-22 * fmt.max).all())


def q_scale(q: Quantized, x: torch.Tensor) -> torch.Tensor:
    return decode(torch.ones_like(x, dtype=torch.float32), q.scale, q.granularity)


def test_dequantizing_to_bf16_is_exact_where_it_says_so():
    x = torch.randn(64, 64)
    for name in FORMATS:
        for scales in ("power-of-two", "exact", "two-level"):
            q = quantize(x, name, "block(1x32)", scales=scales)
            narrow, wide = q.dequantize(torch.bfloat16), q.dequantize()
            assert torch.equal(narrow, wide.bfloat16())
            if q.exact_in_bf16:
                assert torch.equal(narrow.float(), wide)


def test_nothing_is_hidden_nan_and_infinity_stay_not_finite():
    for bad in (math.nan, math.inf):
        for name in FORMATS:
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(8, 32, dtype=dtype)
                x[3, 7] = bad
                assert not quantize(x, name, "row").dequantize()[3].isfinite().any(), (name, bad)
                assert quantize(x, name, "row").dequantize()[[0, 1, 2, 4]].isfinite().all()


def test_what_lies_beyond_a_given_scale_saturates():
    x = torch.tensor([[1e6, -1e6, 500.0, -3.0]])
    for name in ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "int8"):
        fmt = Format.parse(name)
        values = encode(x, torch.ones(1, 1), fmt, Granularity()).float()
        assert values[0, :2].tolist() == [fmt.max, -fmt.max]


def test_stochastic_rounding_is_keyed_and_unbiased():
    x = torch.full((1000, 100), 1.3)
    x[:, 0] = 6.0
    a, b, c = (quantize(x, "fp4_e2m1", "row", "stochastic", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.codes.float(), b.codes.float()) and not torch.equal(a.codes.float(), c.codes.float())
    assert set(a.dequantize()[:, 1:].unique().tolist()) == {1.0, 1.5}
    # 99,000 draws of 0.5 with p = 0.6: 3 sigma of the mean are 3 * 0.5 * sqrt(0.24 / 99000) = 2.4e-3
    assert float(a.dequantize()[:, 1:].mean()) == pytest.approx(1.3, abs=2.4e-3)


def test_any_shape_keeps_its_shape():
    for shape in [(), (5,), (2, 3, 32), (0, 4), (2, 0)]:
        q = quantize(torch.randn(shape), "int8", "row")
        assert q.codes.shape == q.dequantize().shape == torch.Size(shape)


def test_integers_and_unknown_names_are_refused_in_a_sentence():
    with pytest.raises(FewbitsError, match="cannot be quantized"):
        quantize(torch.arange(4), "int8")
    with pytest.raises(FewbitsError, match="no number format"):
        quantize(torch.ones(4), "fp9")
    with pytest.raises(FewbitsError, match="Did you mean 'exact'"):
        quantize(torch.ones(4), "int8", scales="exakt")
