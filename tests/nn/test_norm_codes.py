"""Norms that are written as codes for the layers behind them: when, what they lead to, and who still gets values."""

import dataclasses
import functools

import pytest
import torch
from interpreter import INTERPRETED

import fewbits
from fewbits import AdamW, ModelConfig, Precision, Step, Transformer
from fewbits.choice import Choice
from fewbits.kernels import dispatch, layouts
from fewbits.kernels.activation import Coded
from fewbits.nn import draw, mlp, norm, transformer
from fewbits.nn.block_timing import block_step, prepared, warm_steps
from fewbits.nn.lowbit import held_weights
from fewbits.nn.plan import takes
from fewbits.nn.scale_history import scale_history
from fewbits.nn.stacks import stacks
from fewbits.numerics import activation, quantize
from fewbits.numerics import norm as definition
from fewbits.numerics.scaling import Granularity, block_amax

pytestmark = INTERPRETED

GPT = ModelConfig(vocab_size=61, context=8, n_layer=1, n_head=2, n_embd=64)
LLAMA = dataclasses.replace(GPT, norm="rmsnorm", activation="swiglu", positions="rope", bias=False)
CONFIGS = {"gpt": GPT, "llama": LLAMA, "qk_norm": dataclasses.replace(LLAMA, qk_norm=True, n_kv_head=1)}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    for what in ("both layouts of fp8 codes", "activations between low-bit layers", "gradients of norms"):
        monkeypatch.setitem(dispatch._choices, (what, "cpu"), Choice("kernel", "a test"))


@pytest.fixture
def made(monkeypatch):
    """Every call of `add_norm_codes`."""
    calls, kernel = [], norm.kernel.add_norm_codes
    monkeypatch.setattr(norm.kernel, "add_norm_codes", lambda *given: (calls.append(given), kernel(*given))[1])
    return calls


def joining(config: ModelConfig) -> Transformer:
    """A model in fp8 whose blocks have the sum before their first norm, as compiled ones do."""
    model = fewbits.prepare(Transformer(config), "fp8-delayed")
    model._run_joining = transformer._train_joining
    return model


def batch(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def train(model: Transformer, steps: int = 3) -> list[float]:
    step = Step(model, AdamW(model.named_parameters(), lr=1e-3), "fp8-delayed")
    return [float(step([batch(2 * i), batch(2 * i + 1)]).loss) for i in range(steps)]


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
def test_steps_with_norms_as_codes_are_those_with_values(config, made, monkeypatch):
    """From the third step on, for both norms of a block in both micro-batches. Sums of a row in another order move a code now
    and then, by 2^-3 of one value: losses differ by far less than fp8 itself costs them, 0.1 %."""
    model = joining(config)
    losses, seen = train(model), scale_history(model)
    assert len(made) == 2 * 2
    monkeypatch.setitem(dispatch._choices, ("gradients of norms", "cpu"), Choice("definition", "a test"))
    other = joining(config)
    torch.testing.assert_close(train(other), losses, rtol=2.0**-10, atol=0)
    assert len(made) == 2 * 2
    for name, wanted in scale_history(other).items():
        torch.testing.assert_close(torch.tensor(seen[name]), torch.tensor(wanted), rtol=2.0**-4, atol=0)


def known(config: ModelConfig) -> Transformer:
    """A model whose scales are known, as after two steps."""
    model = joining(config)
    for history in (getattr(module, "history", None) for module in model.modules()):
        if history is not None:
            history.window.copy_(torch.tensor([[4.0], [0.125], [2.0**-6]]))
    for _ in range(2):
        with held_weights(model):
            pass
    return model


@pytest.mark.parametrize("place", ["attention", "attention.qkv", "mlp", "mlp.up", "mlp.down", "norm1", "norm2"])
def test_who_listens_gets_values(place, made):
    model, heard = known(GPT), []
    model.blocks[0].get_submodule(place).register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    with held_weights(model):
        model.loss_sum(batch(0)).backward()
    assert len(made) == len(heard) == 1 and bool(heard[0].isfinite().all())


@pytest.mark.parametrize("place", ["attention", "mlp", "attention.qkv", "mlp.up", "norm1", "norm2"])
def test_what_was_put_in_place_of_a_layer_gets_values(place, made):
    class Checked(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, *others):
            assert bool(x.isfinite().all())
            return self.inner(x, *others)

    model = known(GPT)
    parent, _, name = place.rpartition(".")
    setattr(model.blocks[0].get_submodule(parent), name, Checked(model.blocks[0].get_submodule(place)))
    with held_weights(model):
        model.loss_sum(batch(0)).backward()
    assert len(made) == 1


def test_a_layer_of_a_class_of_its_own_gets_values(made):
    class Own(transformer.MLP):
        def forward(self, x, again=None):
            assert bool(x.isfinite().all())
            return super().forward(x, again)

    model = known(LLAMA)
    model.blocks[0].mlp.__class__ = Own
    with held_weights(model):
        model.loss_sum(batch(0)).backward()
    assert len(made) == 1


def test_without_gradients_or_outside_of_a_step_norms_are_values(made):
    model = known(LLAMA)
    model.loss_sum(batch(0)).backward()
    with held_weights(model), torch.no_grad():
        model.loss_sum(batch(0))
    assert not made
    model.blocks[0].attention.qkv.weight.requires_grad_(False)
    with held_weights(model):
        model.loss_sum(batch(0)).backward()
    assert len(made) == 1  # before the feed-forward layer; the other is before a layer that is frozen


def test_two_forward_passes_may_come_before_their_backward_passes(made):
    """Autograd keeps no maximum: those of the other pass may have raised it."""
    found = []
    for together in (True, False):
        model = known(LLAMA)
        with held_weights(model):
            if together:
                first, second = (model.loss_sum(batch(i)) for i in range(2))
                first.backward()
                second.backward()
            else:
                for i in range(2):
                    model.loss_sum(batch(i)).backward()
            maxima = [
                one.clone() for m in model.modules() if hasattr(m, "history") and m.history for one in m.history.maxima
            ]
        found.append(([p.grad for p in model.parameters()], maxima))
    assert len(made) == 8
    for ours, theirs in zip(*found, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_going_backward_after_another_step_has_begun_is_refused(made):
    """Codes that were kept would be multiplied under the scales of that step."""
    model = known(LLAMA)
    with held_weights(model):
        loss = model.loss_sum(batch(0))
    with held_weights(model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert len(made) == 2


@pytest.mark.parametrize(("config", "mode", "norms"), [(GPT, "eager", 1), (LLAMA, "compiled", 2)])
def test_timed_stacks_write_norms_as_codes(config, mode, norms, made, monkeypatch):
    """One norm of each block in eager code, both where it is compiled: as in a training from its third step on, and in more
    than one step before anything is timed."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    outline, recipe = Transformer(config), Precision.parse("fp8-delayed")
    alone = {name: Choice("bf16", "a test") for name in takes(outline, recipe)}
    (stack,) = stacks(outline, recipe, 8, (), alone)
    assert warm_steps(stack) > 3
    for values, seen in ((dict.fromkeys(dict(stack.picks), stack.recipe), norms), (dict(stack.picks), 0)):
        model = prepared(stack, values, torch.device("cpu"), mode)
        x, grad = torch.randn(2, 1, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        step, counts = block_step(model, x, grad, 1), []
        for _ in range(4):
            made.clear()
            step()
            counts.append(len(made))
        assert counts == [0, 0, len(model.blocks) * seen, len(model.blocks) * seen]


def by_definition(monkeypatch) -> None:
    """Puts definitions in place of the kernels, which an interpreter cannot run on what a compiler traces with."""

    def raised(maximum, amax):
        if maximum is not None:
            maximum.copy_(torch.maximum(maximum, amax))

    def add_norm_codes(x, branch, weight, bias, eps, centered, known):
        rows = [tensor.flatten(0, -2) for tensor in (x, branch)]
        total, codes, codes_t, amax, mean, rstd = definition.add_norm_codes(
            *rows, weight, bias, eps, centered, known.scale, known.format
        )
        raised(known.maximum, amax)
        shaped = [None if one is None else one.view(*x.shape[:-1], 1) for one in (mean, rstd)]
        return total.view(x.shape), codes, codes_t, *shaped

    def encode_both(parts, scale, format, sums=False, maximum=None):
        codes, codes_t, found, amax = quantize.encode_both(parts, scale, format)
        raised(maximum, amax)
        return codes, codes_t, found if sums else None

    def results(name, inputs):
        y = {"gelu": activation.gelu_wide}.get(name, getattr(activation, name, None))(*inputs)
        return y if isinstance(y, tuple) else (y,)

    def activate_codes(name, known, *inputs):
        (y,) = results(name, inputs)
        codes, _, _ = encode_both([y.flatten(0, -2)], known.scale, known.format, False, known.maximum)
        return codes.view(y.shape)

    def activate_backward(name, scale, format, gradients, sums, *inputs):
        (hidden,) = results(name.removesuffix("_backward"), inputs[1:])
        made = [
            Coded(*encode_both([y], one.scale, one.format, sums, one.maximum))
            for y, one in zip(results(name, inputs), gradients, strict=True)
        ]
        return encode_both([hidden], scale, format)[1], made

    monkeypatch.setattr(norm.kernel, "add_norm_codes", add_norm_codes)
    monkeypatch.setattr(norm.kernel, "norm_backward", definition.norm_backward)
    monkeypatch.setattr(layouts, "encode_both", encode_both)
    monkeypatch.setattr(
        mlp,
        "activate",
        lambda name, *given: [(y, block_amax(y, Granularity())) for y in results(name, given)],
    )
    monkeypatch.setattr(draw, "activate_codes", activate_codes)
    monkeypatch.setattr(draw, "activate_backward", activate_backward)


@each_config
def test_a_compiler_takes_norms_that_are_codes(config, monkeypatch):
    """The calls are traced into graphs that note maxima forward and backward. Codes of a step that differ by a rounding move
    those of the next; the largest of some hundred gradients, a single number, moves by an eighth."""
    by_definition(monkeypatch)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = joining(config)
        if compiled:
            model.compile_blocks()
        found.append((train(model), scale_history(model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2.0**-10, atol=0)
    for name, wanted in found[0][1].items():
        torch.testing.assert_close(torch.tensor(found[1][1][name]), torch.tensor(wanted), rtol=2.0**-2, atol=0)
