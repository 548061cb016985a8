"""The gradients of norms by one kernel on a GPU, and compiled models that use it."""

from __future__ import annotations

import pytest
import torch

import fewbits
from fewbits import ModelConfig, Transformer
from fewbits.choice import Choice
from fewbits.formats import Format
from fewbits.kernels import dispatch
from fewbits.kernels import norm as kernel
from fewbits.kernels.layouts import Known
from fewbits.nn.lowbit import held_weights
from fewbits.numerics import norm as definition

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs fp8 on CUDA"
)

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


@needs_fp8
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 130), (4096, 768), (2048, 2048), (300, 8192)])
def test_a_sum_its_statistics_and_the_codes_of_its_norm_are_those_of_the_definition(centered, shape):
    x, branch = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    weight, bias = (torch.randn(shape[1], device="cuda").bfloat16() for _ in range(2))
    for fmt, one in ((Format.parse("fp8_e4m3"), bias), (Format.parse("fp8_e5m2"), None)):
        scale, step = torch.full((1, 1), 2.0**-6, device="cuda"), 2.0**-fmt.mantissa_bits
        known = Known(scale, fmt, torch.zeros(1, 1, device="cuda"))
        total, codes, codes_t, mean, rstd = kernel.add_norm_codes(x, branch, weight, one, 1e-5, centered, known)
        wanted = definition.add_norm_codes(x, branch, weight, one, 1e-5, centered, scale, fmt)
        assert torch.equal(total, wanted[0]) and codes_t.is_contiguous()
        assert torch.equal(codes_t.view(torch.uint8), codes.view(torch.uint8).t())
        # fp32 sums in another order move a value to another bf16 now and then, and that to the next code
        values, others = codes.float() * scale, wanted[1].float() * scale
        assert bool(((values - others).abs() <= step * others.abs() + 2.0**-14).all())
        assert float((values != others).float().mean()) <= 0.01
        torch.testing.assert_close(known.maximum, wanted[3], rtol=2.0**-7, atol=0)
        assert (mean is None) == (not centered)
        for mine, theirs in ((mean, wanted[4]), (rstd, wanted[5])):
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=2.0**-16, atol=2.0**-20)


def gradients_in_fp32(config, batches):
    model = Transformer(config).cuda()
    for batch in batches:
        (model.loss_sum(batch) / 1024).backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


@needs_fp8
@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_norm_before_layers_of_few_bits_is_written_as_codes_from_the_third_step_on(config, compiled, monkeypatch):
    """What is noted is that of layers that read values, up to the error of fp8, and gradients are as far from exact ones: a
    norm that is rounded to another code now and then moves codes behind it, and those others. On fresh models gradients in fp8
    are some 11 % off (bench/gradient_errors.py), in other directions for two such models."""
    ids = [torch.randint(512, (8, 65), generator=torch.Generator().manual_seed(i)).cuda() for i in range(2)]
    batches = [{"input_ids": one[:, :-1].contiguous(), "labels": one[:, 1:].contiguous()} for one in ids]
    found = []
    exact = gradients_in_fp32(config, batches)
    for choice in ("kernel", "definition"):
        torch._dynamo.reset()
        monkeypatch.setitem(dispatch._choices, ("gradients of norms", "cuda"), Choice(choice, "a test"))
        model = fewbits.prepare(Transformer(config), "fp8-delayed").cuda()
        if compiled:
            model.compile_blocks()
        histories = [m.history for m in model.modules() if getattr(m, "history", None) is not None]
        for step in range(4):
            model.zero_grad(set_to_none=True)
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with held_weights(model), torch.profiler.profile(activities=activities) as profile:
                for batch in batches:
                    (model.loss_sum(batch) / 1024).backward()
                torch.cuda.synchronize()
            ran = sum(event.count for event in profile.key_averages() if "encode_norm_kernel" in event.key)
            # eagerly, the sum before a block is not the block's, so only the norm before the feed-forward layer has one
            each = (2 if compiled else 1) * config.n_layer * len(batches)
            assert ran == (each if step >= 2 and choice == "kernel" else 0), (step, choice)
        maxima = torch.cat([place for history in histories for place in history.maxima])
        found.append((maxima, {name: p.grad.double() for name, p in model.named_parameters()}))
    (ours, mine), (theirs, others) = found
    assert bool((theirs > 0).all())
    torch.testing.assert_close(ours, theirs, rtol=2.0**-4, atol=0)
    for name, wanted in exact.items():
        ours, theirs = (float((one[name] - wanted).norm() / wanted.norm()) for one in (mine, others))
        assert ours <= 1.2 * theirs + 0.005, name


@needs_fp8
def test_what_is_not_finite_behind_a_norm_in_codes_makes_a_loss_that_is_not():
    model = fewbits.prepare(Transformer(GPT), "fp8-delayed").cuda()
    model.compile_blocks()
    ids = torch.randint(512, (8, 65), generator=torch.Generator().manual_seed(0)).cuda()
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    for step in range(4):
        if step == 3:
            with torch.no_grad():
                model.blocks[1].norm2.weight[3] = float("inf")
        with held_weights(model):
            loss = model.loss_sum(batch)
            loss.backward()
        assert bool(loss.isfinite()) == (step < 3)


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
