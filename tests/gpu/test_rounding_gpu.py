"""Rounding, random bits and measures on a CUDA device: the bits of the CPU, eager and compiled, without waiting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewbits.formats import FORMATS, Format
from fewbits.numerics.measure import cosine, exponent_histogram, relative_error, saturation, sqnr, underflow
from fewbits.numerics.random import mix_key, random_bits
from fewbits.numerics.rounding import cast

ROUNDINGS = ["nearest-even", "nearest-away", "toward-zero", "stochastic"]


def any_fp32(count: int) -> torch.Tensor:
    bits = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint32)
    return torch.cat([torch.from_numpy(bits.view(np.float32)), torch.randn(count)])


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    actual, expected = actual.cpu().double(), expected.cpu().double()
    same = (actual.view(torch.int64) == expected.view(torch.int64)) | (actual.isnan() & expected.isnan())
    assert same.all(), f"{(~same).sum()} differ, first {actual[~same][:4]} instead of {expected[~same][:4]}"


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", [*FORMATS, "e6m9", "e9m6", "int16"])
def test_every_rounding_gives_the_bits_of_the_cpu(name, rounding):
    x = any_fp32(300_000)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for overflow in ("saturate", "inf"):
            expected = cast(x.to(dtype), name, rounding, overflow, seed=3)
            assert_same(cast(x.to(dtype).cuda(), name, rounding, overflow, seed=3), expected)


def test_random_bits_are_those_of_the_cpu_beyond_a_piece_and_beyond_32_bits_of_index():
    for start in (0, 2**32 - 1000):
        expected = random_bits(mix_key(1), ((1 << 24) + 5,), start=start)
        assert torch.equal(random_bits(mix_key(1), ((1 << 24) + 5,), "cuda", start=start).cpu(), expected)
    key = torch.tensor(mix_key(1), device="cuda")
    assert torch.equal(random_bits(key, (1000,)).cpu(), random_bits(mix_key(1), (1000,)))


def test_compiled_casts_give_the_bits_of_eager_ones_for_every_key():
    def graph(x: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
        grids = [cast(x, name) for name in ("fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp4_e2m1", "bf16", "int8")]
        return [2 * grid for grid in grids + [cast(x, name, "stochastic", seed=key) for name in ("fp8_e5m2", "int8")]]

    x = any_fp32(200_000).cuda()
    compiled = torch.compile(graph, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, -2, mix_key(3)):
            key = torch.tensor(seed, device="cuda")
            for actual, expected in zip(compiled(x, key), graph(x.cpu(), key.cpu()), strict=True):
                assert_same(actual, expected)


def test_nothing_waits_for_the_device():
    x = torch.randn(1000, device="cuda")
    key = torch.tensor(5, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in ("fp8_e4m3", "fp8_e5m2", "bf16", "e8m0", "int8", "binary"):
            for rounding in ROUNDINGS:
                rounded = cast(x, Format.parse(name), rounding, seed=key)
        for measure in (underflow, sqnr, relative_error, cosine):
            measure(x, rounded)
        saturation(x, "fp4", 2.0)
        exponent_histogram(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
