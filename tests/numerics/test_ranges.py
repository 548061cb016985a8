"""Ranges: what each covers, and that a search finds the smallest error."""

from __future__ import annotations

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.numerics.affine import affine_decode, affine_encode, affine_parameters
from fewbits.numerics.binary import binarize
from fewbits.numerics.ranges import (
    MovingAverage,
    largest_scale,
    least_squares,
    least_squares_scale,
    min_max,
    percentile,
)
from fewbits.numerics.rounding import cast


def test_min_max_and_percentile_cover_what_they_say():
    x = torch.arange(1001.0).roll(300).repeat(2, 1)
    x[1] *= -2
    assert [t.tolist() for t in min_max(x)] == [[[0.0], [-2000.0]], [[1000.0], [0.0]]]
    low, high = percentile(x, 0.9)  # 5 % of 1,001 values cut at each end
    assert low.tolist() == [[50.0], [-1900.0]] and high.tolist() == [[950.0], [-100.0]]
    assert all(torch.equal(a, b) for a, b in zip(percentile(x, 1.0), min_max(x), strict=True))
    with pytest.raises(FewbitsError, match="fraction=0"):
        percentile(x, 0.0)


def error(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, symmetric: bool) -> torch.Tensor:
    scale, zero = affine_parameters(low, high, "int4", symmetric)
    back = affine_decode(affine_encode(x, scale, zero, "int4"), scale, zero)
    return (back - x).square().sum(-1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_least_squares_is_the_best_of_its_candidates(symmetric):
    x = torch.randn(16, 128)
    found = error(x, *least_squares(x, "int4", symmetric, steps=30), symmetric)
    low, high = min_max(x)
    parts = [1.0 - 0.6 * step / 30 for step in range(30)]
    every = torch.stack([error(x, low * part, high * part, symmetric) for part in parts])
    torch.testing.assert_close(found, every.min(0).values)
    assert found.sum() < 0.95 * every[0].sum()  # Gaussian rows in 16 steps: clipping pays


@pytest.mark.parametrize("name", ["int8", "int4", "fp8_e4m3", "fp4_e2m1"])
def test_a_searched_scale_is_never_worse_than_the_one_that_clips_nothing(name):
    x = torch.randn(32, 64) * torch.logspace(-3, 3, 32).unsqueeze(1)
    x[0], x[1, 3] = 0.0, 1e4

    def squared(scale: torch.Tensor) -> torch.Tensor:
        return (cast(x / scale, name) * scale - x).square().sum(-1)

    whole, found = largest_scale(x, name), least_squares_scale(x, name)
    assert (squared(found) <= squared(whole)).all() and (found <= whole).all() and (found > 0).all()
    assert name not in ("int4", "fp4_e2m1") or squared(found).sum() < squared(whole).sum()


def test_importance_moves_the_scale_to_where_it_matters():
    x = torch.cat((torch.full((1, 8), 0.3), torch.tensor([[8.0]])), 1)
    plain = least_squares_scale(x, "int4")
    weighed = least_squares_scale(x, "int4", torch.cat((torch.full((1, 8), 100.0), torch.tensor([[0.01]])), 1))
    small = [(cast(x / s, "int4") * s - x)[0, 0].abs() for s in (plain, weighed)]
    assert weighed < plain and small[1] < small[0]


def test_a_moving_average_starts_at_the_first_range_and_follows_slowly():
    average = MovingAverage(0.9)
    low, high = average.update(torch.tensor([[-1.0, 2.0]]))
    assert (low.item(), high.item()) == (-1.0, 2.0)
    low, high = average.update(torch.tensor([[-2.0, 12.0]]))
    assert low.item() == pytest.approx(-1.1) and high.item() == pytest.approx(3.0)
    with pytest.raises(FewbitsError, match="momentum=1"):
        MovingAverage(1.0)


def test_binary_is_the_sign_with_the_scale_of_the_smallest_error():
    x = torch.randn(4, 100)
    values = binarize(x)
    scale = x.abs().mean(-1, keepdim=True)
    assert torch.equal(values, torch.where(x < 0, -scale, scale))
    best = (values - x).square().sum(-1)
    for factor in (0.99, 1.01):  # a parabola in the scale: both sides of its lowest point are higher
        assert ((values * factor - x).square().sum(-1) > best).all()
    assert binarize(torch.zeros(1, 3)).tolist() == [[1.0, 1.0, 1.0]]  # an empty scale is 1, and the sign of 0 is +


def test_the_gradient_of_binary_goes_straight_through_and_stops_beyond_the_limit():
    x = torch.tensor([[0.5, -0.5, 1.0, -1.0, 1.5, -2.0]], requires_grad=True)
    grad = torch.arange(1.0, 7.0).unsqueeze(0)
    binarize(x).backward(grad)
    assert x.grad is not None and x.grad.tolist() == [[1.0, 2.0, 3.0, 4.0, 0.0, 0.0]]
    x.grad = None
    binarize(x, limit=2.0).backward(grad)
    assert torch.equal(x.grad, grad)
