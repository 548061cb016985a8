"""GELU from a sigmoid is the GELU of the tanh approximation, in every 16-bit value."""

from __future__ import annotations

import math

import pytest
import torch

from fewbits.numerics import activation
from fewbits.numerics.activation import gelu

# Half a unit in the last place, relative; the fp32 evaluation inside is far more exact.
HALF_ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# The smallest subnormal; in bf16 what is left where exp(-z) exceeds fp32 and the sigmoid is 0.
SMALLEST = {torch.bfloat16: 2.0**-124, torch.float16: 2.0**-24}


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a 16-bit format, up to 1e30."""
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.double().abs() < 1e30]  # the cube of larger ones, here in fp64, says nothing


def exact(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gelu(x) and its derivative in fp64, in a form that cancels nowhere."""
    x = x.double()
    k = 2 * math.sqrt(2 / math.pi)
    z, slope = k * (x + 0.044715 * x**3), k * (1 + 3 * 0.044715 * x**2)
    s, rest = torch.sigmoid(z), torch.sigmoid(-z)
    return x * s, s + x * slope * s * rest


@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_every_value_and_its_slope_are_exact_up_to_one_rounding(dtype):
    x = every_value(dtype).requires_grad_()
    y = gelu(x)
    y.backward(torch.ones_like(y))
    for found, wanted in zip((y.detach(), x.grad), exact(x.detach()), strict=True):
        # the slope has a zero near x = -0.75, where the fp32 terms that cancel leave 2^-23 of 1
        bound = 1.01 * HALF_ULP[dtype] * wanted.abs() + SMALLEST[dtype] + (2.0**-22 if found is x.grad else 0)
        assert bool(((found.double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_formats_keep_the_kernel_of_torch(dtype):
    x = torch.randn(1000, dtype=dtype)
    assert torch.equal(gelu(x), torch.nn.functional.gelu(x, approximate="tanh"))


def test_pieces_and_strides_do_not_matter(monkeypatch):
    x = torch.randn(6, 5, 7).bfloat16()
    whole = gelu(x)
    monkeypatch.setattr(activation, "_PIECE", 11)
    assert torch.equal(gelu(x), whole)
    assert torch.equal(gelu(x.transpose(0, 2)), whole.transpose(0, 2))


def test_the_slope_is_right_in_a_chain_and_without_a_gradient_nothing_breaks():
    x = torch.randn(64).bfloat16()
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    (gelu(a) * 3).sum().backward()
    (torch.nn.functional.gelu(b, approximate="tanh") * 3).sum().backward()
    torch.testing.assert_close(a.grad.double(), b.grad, rtol=3 * HALF_ULP[torch.bfloat16], atol=2.0**-20)
    with torch.no_grad():
        assert torch.equal(gelu(x), gelu(a.detach()))
