"""Stochastic rounding keeps the mean, goes to one of the two neighbours, and is a function of its key."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.formats import FORMATS, Format
from fewbits.numerics.random import mix_key, random_bits
from fewbits.numerics.rounding import cast, round_to

DRAWS = 1_000_000
LISTED = [fmt for fmt in FORMATS.values() if fmt.bits <= 19]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp8_e4m3", 1.05),
        ("fp8_e4m3", -300.3),
        ("fp8_e4m3", 0.003),  # between subnormals
        ("fp8_e4m3", 2.0**-9 / 300),  # below the smallest
        ("fp8_e5m2", 3.3e-5),
        ("fp6_e2m3", 0.07),
        ("fp6_e3m2", 27.1),
        ("fp4_e2m1", 4.9),
        ("fp16", -1.234e-6),
        ("bf16", 256.1),
        ("tf32", 1.00003),
        ("e8m0", 5.5),
        ("int8", 100.7),
        ("int4", -2.71),
        ("binary", 0.3),
    ],
)
def test_the_mean_is_the_value_within_three_sigma_and_only_its_neighbours_come_up(name, value):
    x = torch.full((DRAWS,), value)
    exact = x[0].double().item()
    rounded = cast(x, name, "stochastic", seed=mix_key(1)).double()
    low, high = rounded.min().item(), rounded.max().item()
    assert set(rounded.unique().tolist()) == {low, high}
    assert low < exact < high
    step = 2.0 if name == "binary" else Format.parse(name).ulp(min(abs(low), abs(high)))
    assert high - low == step
    up = (exact - low) / step
    sigma = step * math.sqrt(up * (1 - up) / DRAWS)
    assert abs(rounded.mean().item() - exact) < 3 * sigma


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", LISTED, ids=str)
def test_what_is_on_the_grid_stays(fmt, dtype):
    values = fmt.decode(fmt.finite_codes()).to(dtype)
    for seed in range(3):
        assert torch.equal(cast(values, fmt, "stochastic", seed=seed), values)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fp8_e4m3", "int8"])
def test_fp64_gets_the_share_of_the_ulp_in_32_bits(name):
    """Against exact fractions: up when the share of the ulp, cut to 32 bits, and the word carry."""
    fmt = Format.parse(name)
    generator = torch.Generator().manual_seed(0)
    scales = torch.exp2(torch.randint(-12, 6, (2000,), generator=generator).double())
    x = torch.randn(2000, generator=generator, dtype=torch.float64) * scales
    words = random_bits(3, x.shape).tolist()
    expected = []
    for value, word in zip(x.tolist(), words, strict=True):
        ulp = Fraction(fmt.ulp(value))
        steps = abs(Fraction(value)) / ulp
        share = math.floor((steps - math.floor(steps)) * 2**32)
        carried = math.floor(steps) + (share + word % 2**32 >= 2**32)
        expected.append(math.copysign(float(min(carried * ulp, Fraction(fmt.max))), value))
    assert torch.equal(cast(x, name, "stochastic", seed=3), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("name", "low", "bits"), [("int8", 3.0, 32), ("fp16", 1024.0, 32), ("fp32", 2.0**23, 29)])
def test_a_share_and_a_word_that_make_just_one_ulp_carry_and_the_next_smaller_share_does_not(name, low, bits):
    """low: where the ulp is 1. bits: how many of an ulp fp64 has there, if fewer than the words."""
    words = random_bits(9, (1000,)).long() % 2**32 >> (32 - bits)
    share = (2**bits - words).double() / 2.0**bits
    assert (cast(low + share, name, "stochastic", seed=9) == low + 1).all()
    assert (cast(low + share - 2.0**-bits, name, "stochastic", seed=9) == low).all()


def test_the_same_key_gives_the_same_bits_and_another_key_others():
    x = torch.randn(300, 1000)
    first = cast(x, "e4m3", "stochastic", seed=7)
    assert torch.equal(first, cast(x, "e4m3", "stochastic", seed=7))
    assert torch.equal(first, cast(x, "e4m3", "stochastic", seed=torch.tensor(7)))
    assert not torch.equal(first, cast(x, "e4m3", "stochastic", seed=8))
    assert torch.equal(first, cast(x.flatten(), "e4m3", "stochastic", seed=7).view(300, 1000))


def test_an_element_depends_on_its_index_not_on_the_layout_or_dtype_around_it():
    x = cast(torch.randn(64, 96), "bf16")
    expected = cast(x, "e4m3", "stochastic", seed=1)
    assert torch.equal(cast(x.t().contiguous().t(), "e4m3", "stochastic", seed=1), expected)
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(cast(x.to(dtype), "e4m3", "stochastic", seed=1).float(), expected)


def test_beyond_the_largest_number_it_saturates_or_overflows_at_random():
    x = torch.full((10_000,), 460.0)  # 12/32 of the way from 448 to where 480 would be
    assert (cast(x, "e4m3", "stochastic") == 448).all()
    rounded = cast(x, "e4m3", "stochastic", "inf")
    assert (rounded[~rounded.isnan()] == 448).all()
    share = rounded.isnan().double().mean().item()
    assert abs(share - 12 / 32) < 3 * math.sqrt(12 / 32 * 20 / 32 / len(x))
    extremes = torch.tensor([1e30, -1e30, math.inf, -math.inf, math.nan, 0.0, -0.0])
    assert cast(extremes, "e5m2", "stochastic")[:4].tolist() == [57344, -57344, math.inf, -math.inf]
    assert cast(extremes, "int8", "stochastic")[:4].tolist() == [127, -128, 127, -128]
    for name in ("e5m2", "fp4", "int8"):
        rounded = cast(extremes, name, "stochastic")
        assert rounded[4].isnan() and torch.signbit(rounded[5:]).tolist() == [False, True]


def test_small_updates_survive_on_average():
    """256 + 1 in bf16 is 256 to nearest, always; at random the mean of many weights moves by 1."""
    weights = torch.full((100_000,), 257.0)
    assert (round_to(weights, "bf16", "nearest-even") == 256).all()
    mean = round_to(weights, "bf16", "stochastic", seed=5).double().mean().item()
    assert abs(mean - 257) < 3 * 1 / math.sqrt(len(weights))  # half of them go to 258: sigma is 1


def test_a_seed_that_is_no_key_is_one_sentence():
    with pytest.raises(FewbitsError, match="0-d int64"):
        cast(torch.ones(3), "e4m3", "stochastic", seed=torch.tensor([1, 2]))
