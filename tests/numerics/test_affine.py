"""Affine integers: what torch and ONNX Runtime compute, exact round trips, and how codes share bytes."""

from __future__ import annotations

import warnings
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.numerics.affine import (
    affine_decode,
    affine_encode,
    affine_parameters,
    grouped,
    integer_range,
    pack,
    packed_width,
    unpack,
)

TIES = torch.arange(-4000, 4000) / 8  # every halfway point of scales 1/4 .. 4, and what lies between


def torch_quantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to remove these functions; they are the peer as long as they last
        return torch.quantize_per_tensor(x, scale, zero_point, torch.qint8).int_repr().int()


# torch added the zero point outside until some version between 2.11 and 2.13
TORCH_ORDER = "inside" if torch_quantized(torch.tensor([0.5]), 1.0, 1).tolist() == [2] else "outside"


# Powers of two divide exactly. At other scales torch multiplies by 1 / scale, which moves a quotient by an ulp or two:
# of values drawn at random none comes that close to a tie.
@pytest.mark.parametrize("zero_point", [-3, 0, 1, 6])
@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0, 0.1])
def test_inside_is_what_torch_quantizes_and_outside_what_it_fakes(scale, zero_point):
    x = TIES if scale != 0.1 else torch.randn(20_000) * 8
    inside = affine_encode(x, torch.tensor(scale), zero_point)
    outside = affine_encode(x, torch.tensor(scale), zero_point, order="outside")
    faked = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127)
    assert torch.equal(inside if TORCH_ORDER == "inside" else outside, torch_quantized(x, scale, zero_point))
    assert torch.equal(affine_decode(outside, torch.tensor(scale), zero_point), faked)
    assert torch.equal(inside, outside) == (zero_point % 2 == 0 or scale == 0.1)


def test_the_orders_differ_on_ties_as_torch_and_onnx_runtime_do():
    x, one = torch.tensor([0.5, 1.5, 2.5]), torch.tensor(1.0)
    assert affine_encode(x, one, 1).tolist() == [2, 2, 4]
    assert torch_quantized(x, 1.0, 1).tolist() == affine_encode(x, one, 1, order=TORCH_ORDER).tolist()
    # onnxruntime 1.32, QuantizeLinear to int8 and uint8 with scale 1 and zero point 1
    assert affine_encode(x, one, 1, order="outside").tolist() == [1, 3, 3]
    assert affine_encode(x, one, 1, signed=False, order="outside").tolist() == [1, 3, 3]


def test_rows_and_groups_have_scales_of_their_own_as_in_torch():
    x, scale, zero = torch.randn(3, 40) * 5, torch.tensor([0.5, 0.25, 2.0]), torch.tensor([1, -2, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.quantize_per_channel(x, scale, zero, 0, torch.qint8).int_repr().int()
    assert torch.equal(affine_encode(x, scale.unsqueeze(1), zero.unsqueeze(1)), theirs)
    groups = grouped(x, "group:8")
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    scales, zeros = affine_parameters(low, high, "int4", symmetric=False)
    codes = affine_encode(groups, scales, zeros, "int4")
    assert codes.shape == (3, 5, 8) and int(codes.min()) == -8 and int(codes.max()) == 7
    # two roundings: of the zero point and of the value, half a step each
    assert ((affine_decode(codes, scales, zeros) - groups).abs() <= 1.01 * scales).all()


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_integers_are_those_of_exact_fractions(order):
    for scale in (Fraction(1, 2), Fraction(2)):
        for zero_point in (-1, 0, 2):
            x = [Fraction(k, 8) for k in range(-60, 61)]
            if order == "inside":
                exact = [round(v / scale + zero_point) for v in x]  # Python rounds fractions to nearest even
            else:
                exact = [round(v / scale) + zero_point for v in x]
            given = torch.tensor([float(v) for v in x])
            found = affine_encode(given, torch.tensor(float(scale)), zero_point, "int4", order=order)
            assert found.tolist() == [min(7, max(-8, e)) for e in exact]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 12])
@pytest.mark.parametrize("signed", [True, False])
def test_every_integer_survives_decode_then_encode(bits, signed):
    lowest, highest = integer_range(f"int{bits}", signed)
    integers = torch.arange(lowest, highest + 1)
    assert len(integers) == 2**bits
    for scale in (0.1, 3.0, 2.0**-20):
        for zero_point in (lowest, 0 if signed else 3, highest):
            values = affine_decode(integers, torch.tensor(scale), zero_point)
            back = affine_encode(values, torch.tensor(scale), zero_point, f"int{bits}", signed)
            assert torch.equal(back, integers.int())


def test_parameters_cover_the_range_and_hold_zero_exactly():
    low, high = torch.tensor([-1.0, 0.5, -3.0, 0.0]), torch.tensor([3.0, 2.0, -1.0, 0.0])
    for signed in (True, False):
        for symmetric in (True, False):
            scale, zero = affine_parameters(low, high, "int8", symmetric, signed)
            lowest, highest = integer_range("int8", signed)
            zeros = affine_decode(affine_encode(torch.zeros(4), scale, zero, "int8", signed), scale, zero)
            assert torch.equal(zeros, torch.zeros(4)) and bool((scale > 0).all())
            for end in (low, high):
                back = affine_decode(affine_encode(end, scale, zero, "int8", signed), scale, zero)
                assert ((back - end).abs() <= scale).all()
            assert not symmetric or zero.tolist() == [(lowest + highest + 1) // 2] * 4


def test_what_is_not_finite_is_clamped_and_nan_becomes_zero():
    x = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert affine_encode(x, torch.tensor(0.5), 3).tolist() == [127, -128, 3]


def test_names_that_do_not_fit_are_refused():
    with pytest.raises(FewbitsError, match="bf16 holds no integers"):
        integer_range("bf16")
    with pytest.raises(FewbitsError, match=r"no order 'insid'. Did you mean 'inside'"):
        affine_encode(TIES, torch.tensor(1.0), order="insid")
    with pytest.raises(FewbitsError, match=r"no granularity 'rows'. Did you mean 'row'"):
        grouped(TIES, "rows")
    with pytest.raises(FewbitsError, match=r"group:48 does not divide the width 64 of the tensor. Use group:32"):
        grouped(torch.zeros(2, 64), "group:48")
    with pytest.raises(FewbitsError, match="Codes of 3 bits do not fill a byte"):
        pack(torch.zeros(8, dtype=torch.uint8), 3)


def test_granularities_share_scales_as_they_say():
    x = torch.arange(24.0).reshape(2, 12)
    assert grouped(x, "tensor").shape == (1, 1, 24) and grouped(x, "row").shape == (2, 1, 12)
    assert torch.equal(grouped(x, "group:4")[1, 2], torch.tensor([20.0, 21, 22, 23]))
    assert grouped(x.reshape(2, 3, 4), "row").shape == (6, 1, 4)
    assert grouped(torch.zeros(0, 8), "group:4").shape[0] == 0


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_packed_codes_come_back(bits, columns):
    codes = torch.randint(0, 2**bits, (3, 2, columns), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 2, packed_width(columns, bits)) and packed_width(columns, bits) == -(
        -columns * bits // 8
    )
    assert torch.equal(unpack(packed, bits, columns), codes)


def test_the_first_code_stands_in_the_lowest_bits():
    assert pack(torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 1], dtype=torch.uint8), 1).tolist() == [0b00001001, 1]
    nibbles = torch.arange(8, dtype=torch.uint8)
    assert pack(nibbles, 4).view(torch.int32).tolist() == [0x76543210]  # as compressed-tensors fills its words
