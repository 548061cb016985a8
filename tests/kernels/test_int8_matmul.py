"""int8 matmul with int32 sums is exact on every shape."""

from __future__ import annotations

import pytest
import torch

from fewbits.kernels.dispatch import int8_execution
from fewbits.kernels.int8_matmul import int8_matmul

SHAPES = [
    (0, 8, 8),
    (1, 1, 1),
    (1, 64, 24),
    (3, 5, 7),
    (17, 33, 9),
    (33, 128, 64),
    (256, 200, 100),
    (4, 0, 3),
    (4, 3, 0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_sums_are_those_of_wide_integers(shape):
    N, K, O = shape  # noqa: E741
    a = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    b = torch.randint(-128, 128, (O, K), dtype=torch.int8)
    found = int8_matmul(a, b)
    assert found.dtype == torch.int32 and torch.equal(found.long(), a.long() @ b.long().t())


def test_extremes_do_not_saturate():
    a, b = torch.full((20, 4096), -128, dtype=torch.int8), torch.full((8, 4096), -128, dtype=torch.int8)
    assert (int8_matmul(a, b) == 4096 * 128 * 128).all()


def test_the_choice_between_integers_and_the_compute_dtype_has_numbers_in_its_reason():
    choice = int8_execution(torch.device("cpu"), torch.bfloat16)
    assert choice.value in ("integers", "widened") and "ms in int8 and" in choice.reason
    assert int8_execution(torch.device("cpu"), torch.bfloat16) is choice  # timed once a process
