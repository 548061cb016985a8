"""Packed layers on CUDA: the same weights and the same integers as on the CPU, on every awkward shape."""

from __future__ import annotations

import pytest
import torch

from fewbits.choice import Choice
from fewbits.export.options import QuantizeOptions
from fewbits.export.quantized import quantize_model
from fewbits.formats import Format
from fewbits.kernels.int8_matmul import int8_matmul
from fewbits.nn.packed import PackedLinear, Scheme
from fewbits.nn.transformer import ModelConfig, Transformer
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


@pytest.mark.parametrize("method", ["nearest", "mse", "gptq", "awq"])
def test_a_model_is_quantized_on_the_gpu_as_well_as_on_the_cpu(method):
    config = ModelConfig(vocab_size=50, context=16, n_layer=2, n_head=4, n_embd=32)
    batches = [{"input_ids": torch.randint(0, 50, (4, 16)), "labels": torch.randint(0, 50, (4, 16))}]
    options = QuantizeOptions(format="int4", method=method, dtype="fp32")
    found = []
    for device in (torch.device("cpu"), CUDA):
        model = Transformer(config).to(device).eval()
        found.append([row["output_sqnr_db"] for row in quantize_model(model, options, batches).layers])
        assert model(batches[0]["input_ids"].to(device)).isfinite().all()
    # a value near a tie may fall the other way: the errors are alike, not equal
    assert found[1] == pytest.approx(found[0], abs=1.0)
