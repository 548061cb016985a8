"""Measuring and clipping gradients."""

from __future__ import annotations

import math

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.optim.clip import coefficient, measure


def test_inf_norm_rescales_the_whole_gradient_and_value_bounds_each_element():
    gradient = torch.tensor([10.0, 1.0])
    factor = coefficient(measure([gradient], "inf"), 1.0)
    assert torch.equal(gradient * factor, torch.tensor([1.0, 0.1]))
    assert gradient.clamp(-1, 1).tolist() == [1.0, 1.0]  # what clip_value does inside the update


def test_two_norm_brings_the_gradient_to_the_clip_and_never_enlarges_it():
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert measure(gradients).item() == 5.0
    assert coefficient(measure(gradients), 1.0).item() == pytest.approx(0.2, rel=2.0**-23)
    assert coefficient(measure(gradients), 10.0).item() == 1.0
    assert coefficient(measure([torch.zeros(3)]), 1.0).item() == 1.0
    assert measure([torch.tensor([-7.0, 2.0])], "inf").item() == 7.0
    assert measure([torch.tensor([3.0, 4.0])], "value").item() == 5.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_of_many_elements_is_summed_wider_than_16_bits(dtype: torch.dtype):
    gradients = [torch.full((200_001,), 0.25, dtype=dtype), torch.full((3, 7), 0.25, dtype=dtype)]
    exact = 0.25 * math.sqrt(200_001 + 21)
    # at most 65,536 equal terms in fp32, added in lanes: relative error below 65,536 * 2^-24 / 2, in practice far less
    assert measure(gradients).item() == pytest.approx(exact, rel=1e-3)
    assert measure([g.double() for g in gradients]).item() == pytest.approx(exact, rel=2.0**-23)


@pytest.mark.parametrize("kind", ["norm", "inf", "value"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("place", [0, 5, 70_001])
def test_one_value_that_is_not_finite_anywhere_makes_the_norm_not_finite(
    kind: str, poison: float, dtype: torch.dtype, place: int
):
    gradient = torch.randn(70_002).to(dtype)
    assert measure([torch.ones(3), gradient], kind).isfinite()
    gradient[place] = poison
    norm = measure([torch.ones(3), gradient, torch.ones(2, dtype=torch.bfloat16)], kind)
    assert not norm.isfinite()
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and norm.ndim == 0


def test_largest_finite_16_bit_gradients_have_a_finite_norm():
    assert measure([torch.full((100,), 65504.0, dtype=torch.float16)]).isfinite()
    assert measure([torch.full((4,), 3e38)], "inf").isfinite()
    assert measure([torch.full((4,), 1e30, dtype=torch.float64)]).isfinite()


def test_nothing_and_empty_tensors_measure_zero():
    assert measure([]).item() == 0.0
    assert measure([torch.zeros(0, 3)]).item() == 0.0


def test_measuring_does_not_change_a_gradient_and_takes_strided_ones():
    gradient = torch.randn(30, 20)
    before = gradient.clone()
    assert measure([gradient.t()]).item() == pytest.approx(before.double().norm().item(), rel=1e-6)
    assert torch.equal(gradient, before)


def test_unknown_kind_is_refused():
    with pytest.raises(FewbitsError, match="norm, inf or value"):
        measure([torch.ones(2)], "max")
