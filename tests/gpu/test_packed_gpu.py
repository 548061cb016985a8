"""Packed layers on CUDA: the same weights and the same integers as on the CPU, on every awkward shape."""

from __future__ import annotations

import pytest
import torch

from fewbits.choice import Choice
from fewbits.formats import Format
from fewbits.kernels.int8_matmul import int8_matmul
from fewbits.nn.packed import PackedLinear, Scheme
from fewbits.numerics.affine import pack

CUDA = torch.device("cuda")
SHAPES = [
    (0, 8, 8),
    (1, 1, 1),
    (1, 64, 24),
    (3, 5, 7),
    (16, 8, 8),
    (17, 33, 9),
    (33, 128, 64),
    (4, 0, 3),
    (2048, 4096, 512),
]
FORMATS = ["int8", "int4", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "binary"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_matmul_is_exact_on_every_shape(shape):
    N, K, O = shape  # noqa: E741
    a = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    b = torch.randint(-128, 128, (O, K), dtype=torch.int8)
    found = int8_matmul(a.to(CUDA), b.to(CUDA))
    # sums below 2^53 are exact in fp64, and a CPU multiplies that much faster than int64
    assert found.dtype == torch.int32 and torch.equal(found.cpu().double(), a.double() @ b.double().t())


def layer(name: str, activations: str = "none") -> PackedLinear:
    fmt = Format.parse(name)
    finite = fmt.finite_codes()
    codes = finite[torch.randint(len(finite), (24, 40))]
    scale = torch.rand(24, 1).bfloat16() / 64 + 2**-6
    scheme = Scheme(fmt, "row", "int8" if activations == "int8" else "none")
    return PackedLinear(pack(codes, fmt.bits), scale, torch.randn(24).bfloat16(), scheme, 40)


@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_is_the_same_as_on_the_cpu(name):
    packed = layer(name)
    expected = packed.weight
    assert torch.equal(packed.to(CUDA).weight.cpu(), expected)
    x = torch.randn(5, 40, device=CUDA)
    assert packed(x).shape == (5, 24) and packed(x).isfinite().all()


def test_activations_in_int8_are_the_same_as_on_the_cpu(monkeypatch):
    monkeypatch.setattr("fewbits.nn.packed.int8_execution", lambda device, dtype: Choice("integers", "a test"))
    packed, x = layer("int8", "int8"), torch.randn(3, 7, 40)
    expected = packed(x)
    found = packed.to(CUDA)(x.to(CUDA)).cpu()
    # the same integers; scales and sums are rounded by fp32 products that a GPU may contract: one ulp of bf16
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=0.0)
