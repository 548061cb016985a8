"""int8 products that are rescaled in registers have the bits of the definition, in every layout and on every edge."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from rounded_once import assert_threads_do_not_show
from torch import Tensor

from fewbits.kernels import dispatch, matmul
from fewbits.kernels import int8_matmul_cpu as kernel
from fewbits.numerics import matmul as definition
from fewbits.numerics.quantize import quantize

without_kernel = pytest.mark.skipif(kernel.library().value is None, reason=kernel.library().reason)

# tiles of 8 rows by 48 columns, groups of 16 and of 64 rows, four products at a time, pieces of 256 rows: all of their edges
SHAPES = [(1, 1, 1), (7, 5, 3), (16, 4, 16), (37, 63, 50), (64, 64, 48), (33, 257, 17), (65, 130, 97), (270, 66, 113)]


def codes(rows: int, columns: int, layout: str) -> Tensor:
    """Random codes row by row, column by column, or with a gap behind every row, or every second column of others."""
    if layout == "columns":
        return codes(columns, rows, "rows").t()
    wide = torch.randint(-128, 128, (rows, 2 * columns), dtype=torch.int8)
    return {"rows": wide[:, :columns].contiguous(), "apart": wide[:, :columns], "second": wide[:, ::2]}[layout]


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype and torch.equal(ours.isnan(), theirs.isnan())
    whole = torch.int32 if ours.dtype == torch.float32 else torch.int16
    assert torch.equal(*(x.nan_to_num(nan=0.0).view(whole) for x in (ours, theirs)))


@without_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_definition(shape):
    M, K, N = shape
    layouts = itertools.product(("rows", "columns", "apart", "second"), repeat=2)
    for index, (one, other) in enumerate(layouts):
        dtype = (torch.bfloat16, torch.float32, torch.float16)[index % 3]
        left, right = codes(M, K, one), codes(N, K, other)
        scales = torch.rand(M) * 1e-3, torch.rand(N)
        for bias in (None, torch.randn(N).bfloat16()):
            given = (left, right, *scales, bias, dtype)
            assert_same_bits(kernel.scaled_int8_matmul(*given), definition.scaled_int8_matmul(*given))


@without_kernel
def test_extremes_do_not_saturate_and_what_is_not_finite_stays_so():
    left, right = (torch.full((n, 4096), -128, dtype=torch.int8) for n in (20, 50))
    rows, columns = torch.ones(20), torch.ones(50)
    assert (kernel.scaled_int8_matmul(left, right, rows, columns) == 4096 * 128 * 128).all()
    rows[3], rows[4], columns[5] = torch.nan, torch.inf, 1e-45  # and a subnormal sum
    rows[5] = 2.0**-30
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        given = (left, right, rows, columns, -torch.full((50,), torch.inf), dtype)
        assert_same_bits(kernel.scaled_int8_matmul(*given), definition.scaled_int8_matmul(*given))
        given = (left, right, rows, columns, None, dtype)
        assert_same_bits(kernel.scaled_int8_matmul(*given), definition.scaled_int8_matmul(*given))


@without_kernel
def test_the_number_of_threads_does_not_show():
    left, right = codes(300, 200, "rows"), codes(170, 200, "columns")
    given = (left, right, torch.rand(300), torch.rand(170), None, torch.bfloat16)
    assert_threads_do_not_show(lambda: [kernel.scaled_int8_matmul(*given)], threads=2)


@without_kernel
def test_the_kernel_and_the_operator_give_the_same_product(monkeypatch):
    left, right = (quantize(torch.randn(n, 96).bfloat16(), "int8", "row") for n in (70, 50))
    bias, found = torch.randn(50), []
    for kernels in (True, False):
        monkeypatch.setattr(matmul, "rescales_in_registers", lambda kernels=kernels: kernels)
        found.append(matmul.scaled_matmul(left, right, "fp32", torch.bfloat16, bias))
    assert torch.equal(*found)


def test_the_choice_has_a_reason():
    choice = dispatch.int8_product_execution()
    assert choice.value in ("kernel", "operator") and choice.reason
    assert dispatch.rescales_in_registers() == (choice.value == "kernel")


@without_kernel
def test_where_amx_multiplies_the_operator_runs(monkeypatch):
    hardware = dispatch.describe(torch.device("cpu"))
    for features, value in (
        ({"avx512_vnni"}, "kernel"),
        ({"avx512_vnni", "amx_int8"}, "operator"),
        (set(), "operator"),
    ):
        monkeypatch.setattr(dispatch, "_choices", {})
        monkeypatch.setattr(dispatch, "describe", lambda _, f=features: replace(hardware, cpu_features=frozenset(f)))
        assert dispatch.int8_product_execution().value == value
