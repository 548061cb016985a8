"""Measures of a rounding: exact counts, errors as defined, at the edges too."""

from __future__ import annotations

import math

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.numerics.measure import cosine, exponent_histogram, relative_error, saturation, sqnr, underflow
from fewbits.numerics.rounding import cast


def test_underflow_counts_nonzero_values_that_became_zero():
    x = torch.tensor([0.0, -0.0, 1.0, 1e-8, -1e-9, 6e-8])
    assert underflow(x, cast(x, "fp16")).item() == 2 / 4
    assert underflow(torch.zeros(3), torch.zeros(3)).item() == 0
    assert underflow(torch.empty(0), torch.empty(0)).item() == 0


def test_saturation_counts_what_lies_beyond_the_range_after_scaling():
    x = torch.tensor([448.0, 448.5, -449.0, 1.0, math.inf, math.nan])
    assert saturation(x, "e4m3").item() == 3 / 6
    assert saturation(x, "e4m3", 2.0).item() == 1 / 6
    assert saturation(x.view(2, 3), "e4m3", torch.tensor([[1.0], [0.001]])).item() == 4 / 6
    assert saturation(torch.tensor([127.0, 128.0, -128.0, -129.0]), "int8").item() == 2 / 4
    assert saturation(torch.tensor([1.0, -2.0]), "e8m0").item() == 0
    assert saturation(torch.empty(0), "int8").item() == 0


def test_sqnr_is_that_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator)
    rounded = cast(x, "e4m3")
    signal, noise = x.double().square().sum(), (x.double() - rounded.double()).square().sum()
    # the difference of two fp32 numbers is rounded once: 2**-24 of it, 20 log10(1 + 2**-24) = 5e-7 dB
    assert abs(sqnr(x, rounded).item() - (10 * torch.log10(signal / noise)).item()) < 1e-6
    assert abs(relative_error(x, rounded).item() / (noise / signal).sqrt().item() - 1) < 2.0**-23


@pytest.mark.parametrize("bits", [4, 8])
def test_sqnr_of_a_uniform_quantizer_is_six_decibels_a_bit(bits):
    """A full-scale uniform signal on 2**bits steps: 20 log10(2**bits) dB (the classic 6.02 dB a bit)."""
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2**bits
    # the noise power is a mean of 200,000 terms with relative deviation sqrt(4/5): 5 sigma are 1 %, or 0.05 dB
    assert (
        abs(sqnr(x - 2 ** (bits - 1), cast(x - 2 ** (bits - 1), f"int{bits + 2}")).item() - 20 * math.log10(2**bits))
        < 0.05
    )


def test_equal_opposite_and_zero_tensors_have_the_expected_limits():
    x, zero = torch.tensor([1.0, -2.0]), torch.zeros(2)
    assert sqnr(x, x).item() == math.inf and sqnr(zero, zero).item() == math.inf
    assert sqnr(zero, x).item() == -math.inf
    assert relative_error(zero, x).item() == math.inf
    assert relative_error(x, zero).item() == 1 and sqnr(x, zero).item() == 0
    assert cosine(x, 3 * x).item() == pytest.approx(1, abs=1e-15)
    assert cosine(x, -x).item() == pytest.approx(-1, abs=1e-15)
    assert cosine(x, torch.tensor([2.0, 1.0])).item() == 0
    assert cosine(zero, zero).item() == 1 and cosine(zero, x).item() == 0


@pytest.mark.parametrize("magnitude", [2.0**-146, 2.0**125])
def test_tiny_and_huge_values_neither_vanish_nor_overflow(magnitude):
    x = torch.tensor([3.0, 4.0]) * magnitude  # exact, as the noise of half a magnitude is; their squares are not fp32
    assert sqnr(x, x + torch.tensor([0.0, 0.5]) * magnitude).item() == pytest.approx(20, abs=1e-12)
    assert cosine(x, x.flip(0)).item() == pytest.approx(24 / 25, abs=1e-15)


def test_sixteen_bit_inputs_are_compared_exactly():
    x = torch.tensor([256.0, 1.0])
    y = torch.tensor([258.0, 1.0])
    expected = 2 / math.sqrt(256**2 + 1)
    for dtype in (torch.bfloat16, torch.float16):
        assert relative_error(x.to(dtype), y.to(dtype)).item() == pytest.approx(expected, rel=1e-15)
        assert relative_error(x, y.to(dtype)).item() == pytest.approx(expected, rel=1e-15)


def test_a_nan_is_not_hidden():
    x = torch.tensor([1.0, math.nan])
    assert sqnr(torch.ones(2), x).isnan() and cosine(x, torch.ones(2)).isnan()


def test_every_binade_is_counted_once():
    x = torch.tensor([0.0, -0.0, 1.0, 1.99, -2.0, 0.5, 2.0**-149, 3e38, math.inf, math.nan])
    found = exponent_histogram(x)
    assert (found.zeros.item(), found.not_finite.item(), found.counts.sum().item()) == (2, 2, 6)
    expected = {0: 2, 1: 1, -1: 1, -149: 1, 127: 1}
    assert {int(i) + found.lowest: int(found.counts[i]) for i in found.counts.nonzero().flatten()} == expected


def test_a_narrow_histogram_keeps_what_lies_outside_in_its_ends():
    found = exponent_histogram(torch.tensor([2.0**-20, 1.0, 2.0, 2.0**20]), lowest=0, highest=3)
    assert found.counts.tolist() == [2, 1, 0, 1]
    assert exponent_histogram(torch.empty(0, 3)).counts.sum() == 0


def test_rounding_moves_small_values_to_zero_in_the_histogram():
    x = torch.exp2(-torch.arange(0.0, 20.0))
    before, after = exponent_histogram(x), exponent_histogram(cast(x, "e4m3"))
    assert (before.zeros.item(), after.zeros.item()) == (0, 10)  # below 2**-9; the tie 2**-10 goes to the even code, 0
    assert torch.equal(after.counts[-137:], before.counts[-137:])


def test_results_are_scalars_that_carry_no_gradient():
    x = torch.randn(5, 3, requires_grad=True)
    y = torch.randn(5, 3)
    for result in (underflow(x, y), saturation(x, "fp4"), sqnr(x, y), cosine(x, y), relative_error(x, y)):
        assert result.shape == () and result.dtype == torch.float64 and not result.requires_grad


def test_shapes_that_differ_and_empty_ranges_are_one_sentence():
    for measure in (underflow, sqnr, cosine, relative_error):
        with pytest.raises(FewbitsError, match=r"\(2,\) and \(3,\)"):
            measure(torch.ones(2), torch.ones(3))
    with pytest.raises(FewbitsError, match="lowest <= highest"):
        exponent_histogram(torch.ones(1), 3, 2)
