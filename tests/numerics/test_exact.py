"""Rounding against ml_dtypes and an oracle of integers: every 16-bit input, every halfway point, ten million of fp32.

The oracle is written without a look at how fewbits rounds: numpy int64, one definition, no short ways.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
import torch

from fewbits.formats import FORMATS, Format
from fewbits.numerics import rounding as rounding_module
from fewbits.numerics.random import random_bits
from fewbits.numerics.rounding import cast

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
TEN_MILLION, CHUNK = 10_000_000, 1_000_000
ROUNDINGS = ["nearest-even", "nearest-away", "toward-zero", "stochastic"]


@dataclass(frozen=True)
class Fields:
    """A float format by its fields."""

    exponent_bits: int
    mantissa_bits: int
    specials: str = "ieee"

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def largest(self) -> float:
        top = 2**self.exponent_bits - 1 - (self.specials == "ieee") - self.bias
        significand = 2 ** (self.mantissa_bits + 1) - 1 - (self.specials == "nan_only")
        return float(np.ldexp(float(significand), top - self.mantissa_bits))


FIELDS = {  # IEEE 754, OCP 8-bit v1.0, OCP MX v1.0, and the shapes that people make up
    "tf32": Fields(8, 10),
    "bf16": Fields(8, 7),
    "fp16": Fields(5, 10),
    "e5m10": Fields(5, 10),
    "fp8_e4m3": Fields(4, 3, "nan_only"),
    "fp8_e5m2": Fields(5, 2),
    "fp6_e2m3": Fields(2, 3, "none"),
    "fp6_e3m2": Fields(3, 2, "none"),
    "fp4_e2m1": Fields(2, 1, "none"),
    "e6m9": Fields(6, 9),
    "e3m4": Fields(3, 4),
    "e2m2": Fields(2, 2),
    "e8m1": Fields(8, 1),
    "e9m6": Fields(9, 6),
    "e4m20": Fields(4, 20),
}


def round_fp32(
    x: np.ndarray, fields: Fields, rounding: str, overflow: str, words: np.ndarray | None = None
) -> np.ndarray:
    """fp32 of any shape to its values on the grid, fp64. words: uint32 of that shape, for stochastic rounding."""
    bits = x.view(np.uint32).astype(np.int64)
    field, fraction = bits >> 23 & 255, bits & 0x7FFFFF
    significand = np.where(field > 0, fraction | 0x800000, fraction)
    lowest_bit = np.maximum(field, 1) - 150  # |x| = significand * 2**lowest_bit
    length = sum((significand >> k > 0).astype(np.int64) for k in range(24))
    ulp = np.maximum(lowest_bit + length - 1, 1 - fields.bias) - fields.mantissa_bits
    dropped = np.clip(ulp - lowest_bit, 0, 60)
    exact = significand << np.clip(lowest_bit - ulp, 0, 30)
    whole, rest = exact >> dropped, exact & (1 << dropped) - 1
    twice, one = rest * 2, np.int64(1) << dropped
    if rounding == "stochastic":
        assert words is not None
        # rest has at most 24 bits; its share of an ulp in 32 bits, plus the word, carries or does not
        up = ((rest << 32) >> dropped) + words.astype(np.int64) >= 2**32
    else:
        up = {
            "nearest-even": (twice > one) | ((twice == one) & (whole % 2 == 1)),
            "nearest-away": twice >= one,
            "toward-zero": np.zeros_like(rest, bool),
        }[rounding] & (dropped > 0)
    with np.errstate(over="ignore"):
        value = np.ldexp((whole + up).astype(np.float64), ulp)
    beyond = fields.largest
    if overflow == "inf" and fields.specials != "none" and rounding != "toward-zero":
        beyond = np.inf if fields.specials == "ieee" else np.nan
    value = np.where(value > fields.largest, beyond, value)
    infinite = (field == 255) & (fraction == 0)
    value = np.where(infinite, np.inf if fields.specials == "ieee" else beyond, value)
    value = np.where((field == 255) & (fraction > 0), np.nan, value)
    return np.copysign(value, np.where(bits >> 31, -1.0, 1.0))


def through_ml_dtypes(x: np.ndarray, name: str) -> np.ndarray:
    """fp32 to fp32. A NaN stays one, as in fewbits, also where the format has none."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = x.astype(ML_DTYPES[name]).astype(np.float32)
    if (
        name == "e8m0"
    ):  # ml_dtypes rounds everything between 2**-127 and 2**-126 up, though below the middle 2**-127 is nearer
        rounded = np.where((x > 2.0**-127) & (x < 1.5 * 2.0**-127), np.float32(2.0**-127), rounded)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


def assert_same(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Equal bit for bit as fp64, signs of zeros included; a NaN equals a NaN."""
    ours = actual.double().numpy()
    theirs = expected.astype(np.float64)
    same = (ours.view(np.int64) == theirs.view(np.int64)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all(), f"{(~same).sum()} differ, first {ours[~same][:4]} instead of {theirs[~same][:4]}"


def every_16_bit(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def any_fp32(count: int, seed: int) -> torch.Tensor:
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    return torch.from_numpy(bits.view(np.float32))


def around_halfway_points(name: str) -> torch.Tensor:
    """Every number of a format, every middle of two neighbours, and what lies one fp32 beside them; both signs."""
    fmt = Format.parse(name)
    codes = fmt.finite_codes().long()
    values = fmt.decode(codes[codes < 2 ** (fmt.bits - 1)] if fmt.signed else codes).double()
    values = values[:: 1 + len(values) // 40_000]  # every 14th of tf32's; each with the middle of it and the next
    points = torch.cat([values, values + fmt.ulp(values) / 2, values + fmt.ulp(values)]).float()
    beside = [torch.nextafter(points, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    points = torch.cat([points, *beside])
    return torch.cat([points, -points])


@pytest.mark.parametrize("name", ML_DTYPES)
def test_ten_million_fp32_round_as_in_ml_dtypes(name):
    for chunk in range(TEN_MILLION // CHUNK):
        x = any_fp32(CHUNK, chunk)
        assert_same(cast(x, name, overflow="inf"), through_ml_dtypes(x.numpy(), name))


@pytest.mark.parametrize("name", ["tf32", "fp8_e4m3", "e3m4"])
def test_ten_million_fp32_round_as_the_integers_say(name):
    for chunk in range(TEN_MILLION // CHUNK):
        x = any_fp32(CHUNK, chunk)
        assert_same(cast(x, name), round_fp32(x.numpy(), FIELDS[name], "nearest-even", "saturate"))


@pytest.mark.parametrize("overflow", ["saturate", "inf"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", FIELDS)
def test_any_fp32_rounds_as_the_integers_say(name, rounding, overflow):
    x = any_fp32(300_000, 1)
    if name == "e9m6":  # has numbers beyond fp32, the dtype of x, where the result overflows in another way
        x = x[~(x.abs() >= 2.0**127)]
    words = random_bits(5, x.shape).numpy().view(np.uint32) if rounding == "stochastic" else None
    expected = round_fp32(x.numpy(), FIELDS[name], rounding, overflow, words)
    assert_same(cast(x, name, rounding, overflow, seed=5), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in FIELDS if name.startswith(("fp8", "fp6", "fp4", "e2", "e3"))])
def test_every_16_bit_input_rounds_as_the_integers_say_in_either_dtype(name, dtype):
    x = every_16_bit(dtype)
    words = random_bits(0, x.shape).numpy().view(np.uint32)
    for rounding in ROUNDINGS:
        for overflow in ("saturate", "inf"):
            expected = round_fp32(x.float().numpy(), FIELDS[name], rounding, overflow, words)
            assert_same(cast(x, name, rounding, overflow), expected)
            assert_same(cast(x.float(), name, rounding, overflow), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_16_bit_input_rounds_as_in_ml_dtypes_and_so_do_its_codes(name, dtype):
    x = every_16_bit(dtype).float()
    assert_same(cast(x, name, overflow="inf"), through_ml_dtypes(x.numpy(), name))
    fmt = FORMATS[name]
    kept = x[(x.abs() <= fmt.max) & ((x > 0) | fmt.signed)]
    stored = np.uint16 if fmt.bits == 16 else np.uint8
    codes = through_ml_dtypes(kept.numpy(), name).astype(ML_DTYPES[name]).view(stored).astype(np.int64)
    assert np.array_equal(fmt.encode(kept).long().numpy() & (2**fmt.bits - 1), codes & (2**fmt.bits - 1))


@pytest.mark.parametrize("name", ML_DTYPES)
def test_halfway_points_round_as_in_ml_dtypes(name):
    x = around_halfway_points(name)
    assert_same(cast(x, name, overflow="inf"), through_ml_dtypes(x.numpy(), name))


@pytest.mark.parametrize(
    "name", [name for name, fields in FIELDS.items() if fields.mantissa_bits <= 10 and name != "e9m6"]
)
def test_halfway_points_round_as_the_integers_say(name):
    x = around_halfway_points(name)
    words = random_bits(0, x.shape).numpy().view(np.uint32)
    for rounding in ROUNDINGS:
        assert_same(cast(x, name, rounding), round_fp32(x.numpy(), FIELDS[name], rounding, "saturate", words))


@pytest.mark.parametrize("overflow", ["saturate", "inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1", "fp16", "e6m9", "e3m4"])
def test_the_short_way_gives_the_bits_of_the_general_way(name, dtype, overflow, monkeypatch):
    x = any_fp32(200_000, 2).to(dtype)
    ordinary = torch.randn(70_000).to(dtype)
    short = cast(x, name, overflow=overflow), cast(ordinary, name, overflow=overflow)
    monkeypatch.setattr(rounding_module, "_has_short_way", lambda x, fmt: False)
    assert_same(short[0], cast(x, name, overflow=overflow).double().numpy())
    assert_same(short[1], cast(ordinary, name, overflow=overflow).double().numpy())


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_integers_round_as_in_numpy_and_to_the_range_of_ml_dtypes(bits):
    x = torch.cat([any_fp32(100_000, 3), torch.arange(-70_000, 70_000) / 2])
    x = x[~x.isnan()]
    info = {2: ml_dtypes.iinfo(ml_dtypes.int2), 4: ml_dtypes.iinfo(ml_dtypes.int4)}.get(bits) or np.iinfo(f"int{bits}")
    expected = np.clip(np.rint(x.numpy().astype(np.float64)), int(info.min), int(info.max))
    assert_same(cast(x, f"int{bits}"), expected)
    assert np.array_equal(Format.parse(f"int{bits}").decode(Format.parse(f"int{bits}").encode(x)).numpy(), expected)
