"""Accumulators as hardware has them: what naive half precision costs, and what promotion buys."""

from __future__ import annotations

import pytest
import torch

from fewbits import FewbitsError, cast
from fewbits.numerics.hadamard import random_hadamard
from fewbits.numerics.matmul import modelled_matmul


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def operands(K=1024):
    return torch.randn(32, K).half().float(), torch.randn(24, K).half().float()


def test_naive_half_precision_is_ten_thousand_times_worse_than_an_fp32_accumulator():
    left, right = operands()
    exact = left.double() @ right.double().t()
    # sequential rounding at 2^-11 a step wanders as the root of the number of additions; fp32 sits 2^13 below it
    assert 1e-3 < error(modelled_matmul(left, right, "fp16"), exact) < 1e-2
    assert error(modelled_matmul(left, right, "fp32"), exact) < 1e-6


def test_the_half_precision_sum_rounds_every_product_and_every_sum():
    left, right = operands(K=40)
    total = torch.zeros(32, 24, dtype=torch.float16)
    for k in range(40):
        product = (left[:, k].half().view(-1, 1) * right[:, k].half().view(1, -1)).half()
        total = (total.float() + product.float()).half()
    assert torch.equal(modelled_matmul(left, right, "fp16").half(), total)


def test_a_14_bit_accumulator_swallows_small_terms_and_promotion_saves_most():
    K = 4096
    left, right = torch.rand(16, K) + 0.5, torch.rand(16, K) + 0.5
    exact = left.double() @ right.double().t()
    plain, promoted, wide = (
        error(modelled_matmul(left, right, kind), exact) for kind in ("14bit", "14bit/128", "fp32")
    )
    assert wide < promoted < plain / 4


def test_14_bits_means_14_significant_bits_cut_toward_zero():
    left, right = torch.ones(1, 64), torch.zeros(1, 64)
    right[0, 0], right[0, 32] = 8192.0, 0.999
    assert float(modelled_matmul(left, right, "14bit")) == 8192.0
    right[0, 32] = 1.0
    assert float(modelled_matmul(left, right, "14bit")) == 8193.0
    total = modelled_matmul(torch.randn(8, 96), torch.randn(8, 96), "14bit")
    assert torch.equal(cast(total, "e8m13"), total)


def test_an_unknown_accumulator_is_refused():
    with pytest.raises(FewbitsError, match="no accumulator 'fp12'"):
        modelled_matmul(torch.ones(2, 2), torch.ones(2, 2), "fp12")


def test_a_random_hadamard_transform_leaves_products_as_they_are_and_spreads_outliers():
    left, right = torch.randn(8, 100, dtype=torch.float64).float(), torch.randn(6, 100)
    turned = random_hadamard(left, 3) @ random_hadamard(right, 3).t()
    # orthogonal up to the rounding of four additions and the sum of 100 products
    assert error(turned, left.double() @ right.double().t()) < 1e-6
    outlier = torch.zeros(1, 32)
    outlier[0, 5] = 16.0
    assert sorted(set(random_hadamard(outlier, 1)[0, :16].abs().tolist())) == [4.0]
    assert not torch.equal(random_hadamard(left, 1), random_hadamard(left, 2))
