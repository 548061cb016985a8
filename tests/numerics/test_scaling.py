"""Scales: which elements share one, and how the largest magnitude becomes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewbits import FewbitsError, Format
from fewbits.numerics.affine import affine_parameters
from fewbits.numerics.ranges import largest_scale
from fewbits.numerics.scaling import (
    Granularity,
    block_amax,
    exact_scale,
    inverse,
    power_of_two_scale,
    quotient,
    scale_of,
    times,
    two_level_scale,
)

GRANULARITIES = ["tensor", "row", "block(1x128)", "block(128x128)", "block(1x32)", "block(16x16)", "block(5x3)"]
SHAPES = [(1, 1), (3, 5), (16, 48), (130, 257), (256, 128), (1, 1000), (1000, 1)]


@pytest.mark.parametrize("text", GRANULARITIES)
def test_a_granularity_prints_as_it_parses(text):
    assert str(Granularity.parse(text)) == text
    assert Granularity.parse(Granularity.parse(text)).transposed().transposed() == Granularity.parse(text)


def test_a_group_is_a_block_of_one_row():
    assert Granularity.parse("group:128") == Granularity.parse("block(1x128)") == Granularity(1, 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rwo", "Did you mean 'row'"),
        ("block(0x4)", "out of range"),
        ("block(1x99999999)", "out of range"),
        ("", "Use tensor"),
    ],
)
def test_a_granularity_that_does_not_exist_is_one_sentence(text, message):
    with pytest.raises(FewbitsError, match=message):
        Granularity.parse(text)


def plain_amax(x, granularity):
    """Block by block, in Python."""
    rows, columns = granularity.block(x.shape)
    above, across = granularity.grid(x.shape)
    return torch.tensor(
        [
            [float(x[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].abs().max()) for j in range(across)]
            for i in range(above)
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", GRANULARITIES)
def test_every_block_gets_its_largest_magnitude_however_the_matrix_lies(text, shape, dtype):
    g = Granularity.parse(text)
    x = torch.randn(shape).to(dtype)
    assert torch.equal(block_amax(x, g), plain_amax(x, g))
    assert torch.equal(block_amax(x.t().contiguous().t(), g), plain_amax(x, g))
    values = torch.rand(g.grid(shape)).exp2()
    rows, columns = g.block(shape)
    spread = values.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
    assert torch.equal(times(x.float(), values, g), x.float() * spread)
    assert torch.equal(times(x.float().t().contiguous().t(), values, g), x.float() * spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_marks_its_block_and_no_other(bad, dtype):
    x = torch.randn(4, 64, dtype=dtype)
    x[1, 40] = bad
    for kind in ("power-of-two", "exact"):
        scale = scale_of(block_amax(x, Granularity(1, 32)), Format.parse("fp8_e4m3"), kind)
        assert scale.isnan().nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp4_e2m1", "int8", "int4", "e5m10"])
def test_a_power_of_two_scale_is_the_smallest_that_lets_nothing_overflow(name):
    largest = Format.parse(name).max
    amax = torch.cat((torch.rand(10_000) * 2.0 ** torch.randint(-100, 100, (10_000,)), torch.tensor([largest, 1.0])))
    scale = power_of_two_scale(amax, largest)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    exact, limit = amax.double() / scale.double(), largest
    assert bool((exact <= limit).all()) and bool((2 * exact > limit).all())
    assert power_of_two_scale(torch.tensor([largest]), largest).item() == 1.0
    assert power_of_two_scale(torch.nextafter(torch.tensor([largest]), torch.tensor(math.inf)), largest).item() == 2.0


def test_zero_and_tiny_maxima_have_finite_scales_and_reciprocals():
    for kind in ("power-of-two", "exact"):
        scale = scale_of(torch.tensor([[0.0, 1e-45, 1e-38, 3e38]]), Format.parse("fp8_e4m3"), kind)
        assert scale.isfinite().all() and inverse(scale).isfinite().all() and (scale > 0).all()


def test_an_exact_scale_is_the_rounded_quotient():
    amax = torch.rand(1000) + 0.5
    wanted = torch.tensor([a / 127 for a in amax.tolist()], dtype=torch.float64).float()
    assert torch.equal(exact_scale(amax, 127.0), wanted)


class ByReciprocal(TorchFunctionMode):
    """Divides by a Python number as torch does on CUDA: multiplies by its reciprocal, rounded to the dtype."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.div and not isinstance(args[1], Tensor):
            return args[0] * torch.tensor(args[1], dtype=args[0].dtype).reciprocal()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "scale",
    [
        lambda x: exact_scale(x.amax(-1), 127.0),
        lambda x: quotient(x.amax(-1), 127.5),
        lambda x: largest_scale(x, "int4"),
        lambda x: largest_scale(x, "fp8_e4m3"),
        lambda x: affine_parameters(x.amin(-1), x.amax(-1), "int8")[0],
        lambda x: affine_parameters(x.amin(-1), x.amax(-1), "int8", symmetric=False)[0],
    ],
    ids=["exact", "full-range", "largest-int4", "largest-fp8", "symmetric", "asymmetric"],
)
def test_a_device_that_divides_by_a_reciprocal_finds_the_same_scale(scale: Callable[[Tensor], Tensor]):
    x = torch.randn(1000, 16)
    with ByReciprocal():
        found = scale(x)
        assert not torch.equal(x / 127.0, (x.double() / 127.0).float())  # in fp32 it would not
    assert torch.equal(found, scale(x))


def test_two_level_scales_are_e4m3_numbers_under_one_power_of_two():
    amax = torch.rand(8, 8) * 10
    amax[0, 0] = 0.0
    scale = two_level_scale(amax, 6.0)
    tensor_scale = power_of_two_scale(amax.amax().view(1), 6.0 * 448).item()
    inner = scale / tensor_scale
    assert torch.equal(inner.to(torch.float8_e4m3fn).float(), inner) and inner.max() <= 448
    # e4m3 rounds by at most 1/16 in its normal range: nothing lies further beyond the largest code
    assert bool((amax[1:] / scale[1:] <= 6.0 * (1 + 1 / 16)).all())
