"""Attention in few bits on a GPU: gradients of q, k and v are quantized where they lie, and are those of one product."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fewbits
from fewbits import ModelConfig, Transformer
from fewbits.formats import Format
from fewbits.kernels import layouts
from fewbits.nn.attention import rotary_table
from fewbits.nn.linear import Linear
from fewbits.nn.lowbit import held_weights
from fewbits.numerics import quantize as definition

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs fp8 on CUDA"
)

B, T = 16, 64  # keys in one block, so that the flash kernel adds up in one order
GPT = ModelConfig(vocab_size=64, context=T, n_layer=1, n_head=4, n_embd=256)
LLAMA = dataclasses.replace(GPT, n_kv_head=1, norm="rmsnorm", activation="swiglu", positions="rope", bias=False)
CONFIGS = {"gpt": GPT, "grouped, rope": LLAMA, "qk_norm": dataclasses.replace(LLAMA, qk_norm=True, n_kv_head=2)}


@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize(
    "widths", [(768, 768, 768), (256, 64, 64), (128, 256), (192, 64, 40), (130, 7), (300,)], ids=str
)
@pytest.mark.parametrize("compiled", [False, True])
def test_matrices_side_by_side_give_the_codes_of_the_one_that_they_are(format, widths, compiled):
    fmt = Format.parse(format)
    for rows, (sums, maximum) in zip((1, 130, 4096, 2048), itertools.product((True, False), repeat=2), strict=True):
        torch._dynamo.reset()
        parts = [
            (4.0**i * torch.randn(rows, width, device="cuda")).to(torch.bfloat16) for i, width in enumerate(widths)
        ]
        scale = definition.quantize(torch.cat(parts, 1), fmt).scale * 2.0**-3  # saturates

        def work(scale, *parts, fmt=fmt, sums=sums, maximum=maximum):
            amax = torch.zeros(1, 1, device="cuda")
            return *layouts.encode_both(parts, scale, fmt, sums, amax if maximum else None), amax

        if compiled:
            torch.compiler.allow_in_graph(work)
        run = torch.compile(lambda *given, work=work: work(*given), dynamic=False) if compiled else work
        codes, codes_t, found, amax = run(scale, *parts)
        wanted, wanted_t, _, wanted_amax = definition.encode_both(parts, scale, fmt)
        for mine, theirs in ((codes, wanted), (codes_t, wanted_t)):
            assert mine.is_contiguous() and torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
        assert (found is not None) == sums
        assert float(amax) == (float(wanted_amax) if maximum else 0)
        if found is not None:  # at most R roundings of a sum of magnitudes
            exact = torch.cat(parts, 1).double()
            bound = 2.0**-24 * rows * exact.abs().sum(0)
            assert bool(((found.double() - exact.sum(0)).abs() <= bound).all())


def gradients(config, precision, compiled, steps=5):
    """Output and gradients of an attention layer by name, after its scales are known, and the kernels of the backward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = fewbits.prepare(Transformer(config), precision).cuda().blocks[0].attention
    run = torch.compile(layer, dynamic=False) if compiled else layer
    rotary = None
    if config.positions == "rope":
        rotary = tuple(table.cuda() for table in rotary_table(T, layer.head_dim, 1e4))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, config.n_embd, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
    grad = (0.01 * torch.randn(B, T, config.n_embd, generator=generator)).to("cuda", torch.bfloat16)
    for _ in range(steps):
        with held_weights(layer), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            y = run(x, rotary, None)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                found = torch.autograd.grad(y, [x, *layer.parameters()], grad)
                torch.cuda.synchronize()
    assert precision == "fp8" or layer.qkv.history.known
    names = ["y", "x", *(name for name, _ in layer.named_parameters())]
    ran = {event.key: event.count for event in profile.key_averages()}
    return dict(zip(names, (y.detach(), *found), strict=True)), ran


def cats(ran):
    """How often matrices were put side by side: by torch, or in a kernel of a compiler, which is named after what it does."""
    return sum(count for key, count in ran.items() if re.search("CatArray|_cat(_|$)", key))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("precision", ["fp8", "fp8-delayed"])
def test_eager_gradients_are_those_of_one_product_and_never_put_side_by_side(config, precision, monkeypatch):
    divided, ran = gradients(config, precision, False)
    monkeypatch.setattr(Linear, "splits", lambda *_: False)
    whole, others = gradients(config, precision, False)
    # rotations have cats of their own; behind norms gradients are put side by side
    assert cats(others) - cats(ran) == (0 if config.qk_norm else 1), (ran, others)
    assert config is not GPT or cats(ran) == 0, ran
    for name, mine in divided.items():
        if "bias" in name:  # two orders of one fp32 sum, rounded to bf16
            torch.testing.assert_close(mine, whole[name], rtol=2.0**-7, atol=2.0**-8 * float(mine.abs().max()))
        else:
            assert torch.equal(mine, whole[name]), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("precision", ["fp8", "fp8-delayed"])
def test_compiled_gradients_are_those_of_one_product(config, precision, monkeypatch):
    """A compiler fuses other things, which may move a number before its rounding to bf16, and that a code of fp8: few of them,
    by 1/8 of their value at most."""
    divided, ran = gradients(config, precision, True)
    # the gradients of both layers
    assert sum(count for key, count in ran.items() if "encode_both" in key) == 2, ran
    assert config is not GPT or cats(ran) == 0, ran
    monkeypatch.setattr(Linear, "splits", lambda *_: False)
    for other in (gradients(config, precision, True)[0], gradients(config, precision, False)[0]):
        for name, mine in divided.items():
            difference = float((mine.double() - other[name].double()).norm())
            assert difference <= 0.03 * float(other[name].double().norm()), name
