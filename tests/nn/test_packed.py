"""Packed layers: the weight that codes and scales stand for, exactly, and matmuls that run in integers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.kernels import dispatch
from fewbits.nn.linear import Linear
from fewbits.nn.packed import PackedLinear, Scheme, make_packed, packed_layers, refuse_packed
from fewbits.nn.prepare import prepare
from fewbits.numerics.affine import pack

FORMATS = ["int8", "int4", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "binary"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(name: str, granularity: str = "row", dtype: torch.dtype = torch.float32, columns: int = 24) -> PackedLinear:
    """A layer of 6 rows in which every finite code of up to 4 bits occurs."""
    fmt = Format.parse(name)
    finite = fmt.finite_codes()
    codes = finite[torch.randint(len(finite), (6, columns))]
    groups = 1 if granularity == "row" else columns // int(granularity.partition(":")[2])
    scale = torch.rand(6, groups).to(dtype) / 64 + 2**-6
    return PackedLinear(pack(codes, fmt.bits), scale, torch.randn(6, dtype=dtype), Scheme(fmt, granularity), columns)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("granularity", "columns"), [("row", 24), ("row", 13), ("group:8", 24)])
def test_the_weight_is_code_times_scale_rounded_once(name, granularity, columns, dtype):
    packed = layer(name, granularity, dtype, columns)
    fmt = packed.scheme.format
    each, mask = 8 // fmt.bits, 2**fmt.bits - 1
    codes = torch.stack([(packed.codes >> (fmt.bits * i)) & mask for i in range(each)], -1).flatten(1)[:, :columns]
    scale = packed.scale.double().repeat_interleave(columns // packed.scale.shape[1], 1)
    # the product of a code and a scale of 16 bits is exact in fp64, so this rounds once
    assert torch.equal(packed.weight, (fmt.decode(codes).double() * scale).to(dtype))
    x = torch.randn(2, 3, columns)
    expected = nn.functional.linear(x.to(dtype), packed.weight, packed.bias)
    torch.testing.assert_close(packed(x), expected, atol=0.02, rtol=0.02)  # 16 bits: emulated sums may round otherwise


@pytest.mark.parametrize("name", FORMATS)
def test_values_on_the_grid_come_back(name):
    fmt = Format.parse(name)
    values = fmt.decode(fmt.finite_codes())[torch.randint(len(fmt.finite_codes()), (4, 16))]
    packed = PackedLinear.from_values(values, torch.ones(4, 1), None, Scheme(fmt, "row"))
    assert torch.equal(packed.weight, values)
    assert packed.bytes == 4 * 16 * fmt.bits // 8 + 4 * 4


def integers(packed: PackedLinear, way: str, monkeypatch: pytest.MonkeyPatch, x: torch.Tensor) -> torch.Tensor:
    monkeypatch.setattr("fewbits.nn.packed.int8_execution", lambda device, dtype: Choice(way, "a test"))
    return packed(x)


def with_activations(dtype: torch.dtype = torch.float32, columns: int = 40) -> PackedLinear:
    packed = layer("int8", "row", dtype, columns)
    packed.scheme = Scheme(packed.scheme.format, "row", "int8").check()
    return packed


def test_activations_in_int8_are_the_sums_of_integers(monkeypatch):
    packed, x = with_activations(), torch.randn(2, 5, 40) * torch.logspace(-3, 3, 5).unsqueeze(1)
    x[1, 2] = 0.0
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    codes = torch.where(scale > 0, x / scale, 0.0).round().clamp(-128, 127)
    sums = codes.long() @ packed.codes.view(torch.int8).long().t()
    expected = sums.float() * scale * packed.scale.t() + packed.bias
    assert torch.equal(integers(packed, "integers", monkeypatch, x), expected)
    # 40 products below 2^14 are exact in fp32 sums; in bf16 the sum is rounded to 8 bits once
    assert torch.equal(integers(packed, "widened", monkeypatch, x), expected)
    packed, y = with_activations(torch.bfloat16), x.bfloat16()
    a, b = (integers(packed, way, monkeypatch, y).float() for way in ("integers", "widened"))
    torch.testing.assert_close(a, b, rtol=2**-6, atol=0.02)
    # rounding x to 255 steps a token: an error of half a step for each of 40 weights at most
    plain = nn.functional.linear(x, with_activations().weight)
    assert plain.shape == expected.shape


def test_a_token_that_is_not_finite_gives_nan_and_spoils_no_other(monkeypatch):
    packed, x = with_activations(), torch.randn(4, 40)
    clean = integers(packed, "integers", monkeypatch, x)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    found = integers(packed, "integers", monkeypatch, x)
    assert found[1].isnan().all() and found[2].isnan().all() and torch.equal(found[[0, 3]], clean[[0, 3]])
    assert integers(packed, "integers", monkeypatch, torch.zeros(0, 40)).shape == (0, 6)


def test_another_dtype_does_not_touch_codes_or_scales():
    packed = layer("fp8_e4m3", "group:8", torch.bfloat16)
    before = copy.deepcopy(packed)
    packed.to(torch.float32).half()
    assert torch.equal(packed.codes, before.codes) and torch.equal(packed.scale, before.scale)
    assert packed.scale.dtype == torch.bfloat16


def test_a_quantized_model_is_not_prepared_for_training():
    model = nn.Sequential(layer("int4", columns=16), Linear(6, 2))
    assert list(packed_layers(model)) == ["0"]
    message = r"is quantized \(int4 row, 1 layers\), so it cannot be prepared as bf16-mixed. Use the checkpoint"
    with pytest.raises(FewbitsError, match=message):
        prepare(model, "bf16-mixed")
    refuse_packed(nn.Linear(2, 2), "be anything")


def test_schemes_and_codes_that_do_not_fit_are_refused():
    for scheme in (Scheme(Format.parse("int4"), "row", "int8"), Scheme(Format.parse("int8"), "group:8", "int8")):
        with pytest.raises(FewbitsError, match="multiply int8 weights with one scale a row"):
            scheme.check()
    codes = torch.zeros(4, 8, dtype=torch.uint8)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    with pytest.raises(FewbitsError, match="codes for '0', which is no linear layer"):
        make_packed(model, {"0.codes": codes}, Scheme(Format.parse("int8"), "row"))
    with pytest.raises(FewbitsError, match=r"group:3 does not divide the width 8 of 1. Use group:2"):
        make_packed(model, {"1.codes": codes}, Scheme(Format.parse("int8"), "group:3"))


def test_the_timing_of_int8_is_recorded_with_the_other_choices():
    dispatch.int8_execution(torch.device("cpu"), torch.float32)
    assert "int8 against fp32 on cpu" in dispatch.recorded()
