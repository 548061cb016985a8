"""Compiled blocks learn what eager ones do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fewbits
from fewbits import ModelConfig, Transformer
from fewbits.choice import Choice
from fewbits.kernels import dispatch
from fewbits.nn import norm, transformer
from fewbits.nn.candidates import BF16, Shape
from fewbits.nn.timing import LEAST_ROUNDS, LayerTimer
from fewbits.numerics.norm import norm_backward as norm_definition
from fewbits.precision.recipe import RECIPES

GPT = ModelConfig(vocab_size=61, context=16, n_layer=1, n_head=2, n_embd=16)
LLAMA = dataclasses.replace(
    GPT, n_kv_head=1, norm="rmsnorm", activation="swiglu", positions="rope", bias=False, qk_norm=True
)


# The same sums in another order: fp32 agrees to 1e-4; in bf16 the compiler keeps intermediates wide, so that a tensor of
# gradients differs by the unit of the format, 2^-8, times the dozen roundings that eager code adds.
@pytest.mark.parametrize(("config", "precision", "bound"), [(GPT, "fp32", 1e-4), (LLAMA, "bf16-mixed", 0.1)])
def test_compiled_gradients_are_the_eager_ones(config, precision, bound):
    ids = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(0))
    micro_batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    gradients = []
    for compiled in (False, True):
        model = fewbits.prepare(Transformer(config), precision)
        if compiled:
            model.compile_blocks()
        (model.loss_sum(micro_batch) / 64).backward()
        gradients.append({name: p.grad.double() for name, p in model.named_parameters()})
    for name, eager in gradients[0].items():
        assert float((gradients[1][name] - eager).norm()) < bound * float(eager.norm()), name


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
def test_a_compiler_takes_norms_whose_gradients_are_made_by_one_call(config, monkeypatch):
    """By the definition of that call here, of sums that wait and of norms that two layers read."""
    called = []
    monkeypatch.setitem(dispatch._choices, ("gradients of norms", "cpu"), Choice("kernel", "a test"))
    monkeypatch.setattr(
        norm.kernel, "norm_backward", lambda grads, *rest: (called.append(len(grads)), norm_definition(grads, *rest))[1]
    )
    ids = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(0))
    micro_batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    gradients = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = Transformer(dataclasses.replace(config, n_layer=2))
        if compiled:
            model.compile_blocks()
        assert not called
        (model.loss_sum(micro_batch) / 64).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert sorted(set(called)) == ([1, 2] if config.activation == "swiglu" else [1])
    for name, eager in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], eager, rtol=2.0**-12, atol=2.0**-16, msg=name)


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "stack"])
def test_sums_that_wait_for_the_next_block_are_the_same_sums(config, whole, monkeypatch):
    """Bit for bit in eager code, and not at all where somebody listens to a block or has put another in its place."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ids = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(0))
    micro_batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    found, heard = [], []
    for how in ("block by block", "joining", "heard", "replaced"):
        model = Transformer(dataclasses.replace(config, n_layer=3))
        model.compile_blocks()
        if whole:
            model._run_stack = transformer._train_stack
        if how == "block by block":
            model._run_joining = model._run_stack = None
        if how == "heard":
            model.blocks[1].register_forward_hook(lambda *given: heard.append(given[2].shape))
        if how == "replaced":
            model.blocks[1] = Wrapped(model.blocks[1])
        loss = model.loss_sum(micro_batch)
        (loss / 64).backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert heard == [(4, 16, 16)]
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


class Wrapped(torch.nn.Module):
    """Somebody's module in place of one of ours: it has none of its attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs):
        return self.inner(*inputs)


class InPlace(torch.nn.Module):
    """It changes what it is given, which is nobody else's."""

    def forward(self, x):
        return x.mul_(2.0)


class Doubled(norm.RMSNorm):
    """A norm with a forward pass of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("replaced", ["mlp", "in place", "weightless", "subclass"])
def test_a_compiler_takes_what_was_put_in_place_of_layers_as_it_is(replaced, monkeypatch):
    monkeypatch.setitem(dispatch._choices, ("gradients of norms", "cpu"), Choice("kernel", "a test"))
    monkeypatch.setattr(norm.kernel, "norm_backward", norm_definition)
    torch._dynamo.reset()
    block = Transformer(LLAMA).blocks[0]
    if replaced == "mlp":
        block.mlp = Wrapped(block.mlp)
    elif replaced == "in place":
        block.mlp = InPlace()
    else:
        block.norm2 = norm.RMSNorm(16, 1e-5, False) if replaced == "weightless" else Doubled(16, 1e-5)
    x, branch = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted = block.join(x, branch, None, None)
    found = torch.compile(type(block).join, backend="aot_eager", fullgraph=True)(block, x, branch, None, None)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-16, atol=2.0**-16)


def test_who_listens_to_a_layer_hears_one_input_and_the_whole_of_its_gradient():
    block, heard = Transformer(LLAMA).blocks[0], []
    block.mlp.register_full_backward_hook(lambda _module, grads, _outputs: heard.append([g.shape for g in grads]))
    block(torch.randn(4, 16, 16, requires_grad=True), None, None).sum().backward()
    assert heard == [[(4, 16, 16)]]


def test_a_layer_is_timed_compiled_where_the_run_will_be():
    ways = (BF16, str(RECIPES["fp8"]))
    times = LayerTimer(torch.device("cpu"), "compiled", rounds=LEAST_ROUNDS)(Shape(32, 64, 64, True), ways)
    assert list(times) == list(ways) and all(len(found) == LEAST_ROUNDS for found in times.values())


def test_the_tenth_model_of_a_process_is_compiled_too(monkeypatch):
    """torch gives up on code that it has compiled eight times, with a warning, and runs it eagerly from then on."""
    torch._dynamo.reset()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=counter, **options))
    monkeypatch.setattr(Transformer, "compile_head", lambda _: None)
    ids = torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(0))
    for number in range(1, 11):
        model = Transformer(dataclasses.replace(GPT, n_embd=8 * number))
        model.compile_blocks()
        model.hidden(ids)
        assert counter.frame_count == number
