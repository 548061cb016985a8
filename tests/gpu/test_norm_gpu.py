"""The gradients of norms by one kernel on a GPU, and compiled models that use it."""

from __future__ import annotations

import pytest
import torch

import fewbits
from fewbits import ModelConfig, Transformer
from fewbits.choice import Choice
from fewbits.kernels import dispatch
from fewbits.kernels import norm as kernel
from fewbits.numerics import norm as definition

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

GPT = ModelConfig(vocab_size=512, context=64, n_layer=2, n_head=4, n_embd=256)
LLAMA = ModelConfig(
    vocab_size=512, context=64, n_layer=2, n_head=4, n_embd=256, activation="swiglu", bias=False, norm="rmsnorm"
)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 130), (4096, 768), (2048, 2048), (300, 8192)])
def test_gradients_are_those_of_the_definition(centered, shape):
    first, second, along, x = (torch.randn(shape, device="cuda").bfloat16() for _ in range(4))
    weight = torch.randn(shape[1], device="cuda").bfloat16()
    mean, rstd = definition.statistics(x, 1e-5, centered)
    for grads in ([first], [first, second]):
        found = kernel.norm_backward(grads, along, x, weight, mean, rstd)
        wanted = definition.norm_backward(grads, along, x, weight, mean, rstd)
        assert (found[2] is None) == (not centered)
        for one, other in zip(found[: 2 + centered], wanted, strict=False):
            # a unit of bf16 where sums of fp32 in another order fall on the other side of a tie, and those of thousands of
            # rows that cancel are off by 2^-24 of their terms each
            torch.testing.assert_close(one, other, rtol=2.0**-7, atol=2.0**-12)


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_compiled_models_have_the_gradients_that_the_compiler_makes_by_itself(config, precision, monkeypatch):
    ids = torch.randint(512, (8, 65), generator=torch.Generator().manual_seed(0)).cuda()
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    gradients = []
    for choice in ("kernel", "definition"):
        torch._dynamo.reset()
        monkeypatch.setitem(dispatch._choices, ("gradients of norms", "cuda"), Choice(choice, "a test"))
        model = fewbits.prepare(Transformer(config), precision).cuda()
        model.compile_blocks()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            (model.loss_sum(batch) / 512).backward()
            torch.cuda.synchronize()
        ran = sum(event.count for event in profile.key_averages() if "norm_backward_kernel" in event.key)
        assert (ran > 0) == (choice == "kernel"), ran
        gradients.append({name: p.grad.double() for name, p in model.named_parameters()})
    bound = 2.0**-14 if precision == "fp32" else 2.0**-5
    for name, wanted in gradients[1].items():
        assert float((gradients[0][name] - wanted).norm()) <= bound * float(wanted.norm()), name
