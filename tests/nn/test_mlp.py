"""A feed-forward layer as one node gives the products, gradients and histories of layer by layer."""

import dataclasses

import pytest
import torch
from interpreter import INTERPRETED

import fewbits
from fewbits import AdamW, ModelConfig, Step, Transformer
from fewbits.choice import Choice
from fewbits.kernels import dispatch
from fewbits.kernels.activation import activate
from fewbits.nn import draw, mlp, transformer
from fewbits.nn.lowbit import chains, held_weights
from fewbits.nn.scale_history import ACTIVATION, GRADIENT, scale_history
from fewbits.numerics import activation, quantize
from fewbits.precision.recipe import RECIPES

pytestmark = INTERPRETED

GPT = ModelConfig(vocab_size=61, context=16, n_layer=1, n_head=2, n_embd=64)
LLAMA = dataclasses.replace(GPT, norm="rmsnorm", activation="swiglu", positions="rope", bias=False)


@pytest.fixture
def kernels(monkeypatch):
    for what in ("both layouts of fp8 codes", "activations between low-bit layers"):
        monkeypatch.setitem(dispatch._choices, (what, "cpu"), Choice("kernel", "a test"))


class Layered(torch.autograd.Function):
    """The activation by the very kernel, between layers that quantize for themselves."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs)
        ctx.name = ("gelu", "swiglu")[len(inputs) - 1]
        return activate(ctx.name, *inputs)[0][0]

    @staticmethod
    def backward(ctx, grad):
        found = activate(f"{ctx.name}_backward", grad.contiguous(), *ctx.saved_tensors)
        return tuple(value for value, _ in found)


def layered(layers, x, _again=None, _codes=None):
    *first, down = layers
    return down(Layered.apply(*(layer(x) for layer in first)))


def run(config, precision, monkeypatch, how):
    monkeypatch.setattr(transformer, "mlp", how)
    model = fewbits.prepare(Transformer(config), precision)
    step = Step(model, AdamW(model.named_parameters(), lr=1e-2), precision)
    losses = []
    for i in range(4):  # delayed scales are known from the third on
        ids = torch.randint(61, (8, 17), generator=torch.Generator().manual_seed(i))
        parts = [part.contiguous() for part in ids.chunk(2)]
        result = step([{"input_ids": p[:, :-1].contiguous(), "labels": p[:, 1:].contiguous()} for p in parts])
        losses.append(float(result.loss))
    return losses, scale_history(model), {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("precision", ["fp8", "fp8-delayed"])
def test_steps_are_those_of_layer_by_layer(config, precision, kernels, monkeypatch):
    """Bit for bit, but for the order in which the columns of a gradient are added up for its bias."""
    one, other = run(config, precision, monkeypatch, mlp.mlp), run(config, precision, monkeypatch, layered)
    assert bool(one[1]) == (precision == "fp8-delayed")
    if not config.bias:
        assert one[0] == other[0] and one[1] == other[1]
        assert all(torch.equal(weight, other[2][name]) for name, weight in one[2].items())
    torch.testing.assert_close(one[0], other[0], rtol=2.0**-10, atol=0)
    for name, weight in one[2].items():  # a bias that moves one bit moves what comes behind by a rounding, 2^-8
        assert float((weight - other[2][name]).norm()) <= 2.0**-7 * float(weight.norm()) + 1e-3, name


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("precision", ["fp8", "fp8-delayed"])
def test_one_backward_gives_the_gradients_of_layer_by_layer_bit_for_bit(config, precision, kernels):
    model = fewbits.prepare(Transformer(config), precision)
    block = model.blocks[0].mlp
    layers = [layer for layer in (block.gate, block.up, block.down) if layer is not None]
    found = []
    for _ in range(3):
        for how in (mlp.mlp, layered):
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(4, 33, 64, generator=generator).to(torch.bfloat16).requires_grad_()
            with held_weights(model):
                assert mlp.together(layers)
                y = how(layers, x)
                grad = torch.randn(y.shape, generator=generator).to(torch.bfloat16)
                found.append((y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], grad)))
    *_, one, other = found
    names = ["output", "input", *(name for name, _ in block.named_parameters())]
    for name, mine, theirs in zip(names, one, other, strict=True):
        if "bias" in name:  # two orders of one fp32 sum, rounded to bf16
            torch.testing.assert_close(mine, theirs, rtol=2.0**-7, atol=2.0**-9)
        else:
            assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
@pytest.mark.parametrize("role", [GRADIENT, ACTIVATION], ids=["gradient", "activation"])
def test_under_a_known_scale_one_reading_gives_codes_and_maximum(kernels, value, role):
    recipe, site = RECIPES["fp8-delayed"], {GRADIENT: "grad_input", ACTIVATION: "output"}[role]
    operand = getattr(recipe, site).left
    x = torch.randn(48, 80, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    if value is not None:
        x[40, 70] = value
    maxima = [torch.full((1, 1), 0.5), torch.full((1, 1), 0.25)]
    scales = [torch.full((1, 1), 2.0), torch.full((1, 1), 0.125)]
    which = int(role == GRADIENT)
    both = draw.Draw.of(None, *maxima, None, *scales).both([x], operand, site, role, True)
    codes, codes_t, sums, amax = quantize.encode_both([x], scales[which], operand.format)
    for mine, theirs in ((both.matrix.codes, codes), (both.transpose.codes, codes_t)):
        assert torch.equal(mine.float().isnan(), theirs.float().isnan())
        assert torch.equal(mine.float().nan_to_num(), theirs.float().nan_to_num())
    assert both.matrix.scale.tolist() == both.transpose.scale.tolist() == scales[which].tolist()
    torch.testing.assert_close(both.sums, sums, rtol=2.0**-20, atol=2.0**-20, equal_nan=True)
    torch.testing.assert_close(maxima[which], amax, rtol=0, atol=0, equal_nan=True)
    assert float(maxima[1 - which]) == [0.5, 0.25][1 - which]


@pytest.mark.parametrize("value", [0.5, float("inf"), float("nan")])
def test_alone_under_a_known_scale_an_operand_is_honest_by_its_scale(kernels, value):
    """Of one that two matmuls do not share no kernel makes the codes."""
    operand = RECIPES["fp8-delayed"].grad_weight.right
    x = torch.full((16, 32), 0.25, dtype=torch.bfloat16)
    x[3, 4] = value
    maximum, scale = torch.zeros(1, 1), torch.full((1, 1), 2.0**-6)
    found = draw.Draw.of(None, maximum, None, None, scale, scale).quantized(x, operand, "grad_weight", ACTIVATION)
    assert bool(found.scale.isnan()) == (not bool(maximum.isfinite())) == (value != 0.5)
    assert float(found.codes[0, 0].float()) * 2.0**-6 == 0.25 and bool(scale.isfinite())


def test_of_what_a_feed_forward_layer_multiplies_only_gradients_are_read_for_their_codes(kernels, monkeypatch):
    """Its norm and its activation are codes where they are made, and so is the gradient of the latter. Of an attention the
    input, whose norm is none of a block's sum here, and the result are read; and the gradients of all other layers."""
    monkeypatch.setitem(dispatch._choices, ("gradients of norms", "cpu"), Choice("kernel", "a test"))
    seen, kernel = [], draw.encode_noting
    monkeypatch.setattr(draw, "encode_noting", lambda parts, *rest: (seen.append(rest), kernel(parts, *rest))[1])
    run(GPT, "fp8-delayed", monkeypatch, mlp.mlp)
    formats = [rest[1].name for rest in seen]
    # an activation is e4m3, a gradient e5m2: those of qkv, output and down; up's leaves the kernel of the activation as codes
    assert 2 * formats.count("fp8_e5m2") == 3 * formats.count("fp8_e4m3") > 0


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_codes_of_values_that_were_never_written_do_not_hide_an_infinity(name, kernels):
    """It is NaN in them, and in the maxima that later steps look back on."""
    recipe, count = RECIPES["fp8-delayed"], {"gelu": 1, "swiglu": 2}[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(48, 80, generator=generator).to(torch.bfloat16) for _ in range(count)]
    grad = torch.randn(48, 80, generator=generator).to(torch.bfloat16)
    scales = [torch.full((1, 1), 2.0**-6) for _ in range(2)]
    draws = [draw.Draw.of(None, *torch.zeros(2, 1, 1), None, *scales) for _ in range(count + 1)]
    for value in (0.5, float("inf")):
        inputs[0][40, 70] = grad[41, 71] = value
        hidden = draw.coded(name, inputs, recipe.output.left, draws[-1])
        operands = recipe.output.left, draws[-1], recipe.grad_input.left, draws[:-1]
        hidden_t, made = draw.coded_backward(f"{name}_backward", [grad, *inputs], *operands, False)
        codes = [hidden.codes, hidden_t, *(q.codes for both in made for q in (both.matrix, both.transpose))]
        maxima = [draws[-1].delayed.maximum, *(one.delayed.grad_maximum for one in draws[:-1])]
        assert all(bool(one.float().isnan().any()) == (value == float("inf")) for one in codes)
        assert all(bool(most.isfinite()) == (value == 0.5) and most != 0 for most in maxima)


def test_only_what_nobody_listens_to_in_a_training_step_is_one_node(kernels):
    model = fewbits.prepare(Transformer(GPT), "fp8")
    layers, x = (model.blocks[0].mlp.up, model.blocks[0].mlp.down), torch.randn(4, 64)
    assert not mlp.together(layers)  # not within a step
    with held_weights(model):
        assert mlp.together(layers) and model.blocks[0].mlp(x[:0]).shape == (0, 64)
        with torch.no_grad():
            assert not mlp.together(layers)
        handle = layers[0].register_forward_hook(lambda *_: None)
        assert not mlp.together(layers)
        handle.remove()
        layers[1].weight.requires_grad_(False)
        assert not mlp.together(layers)
    assert [name for name in RECIPES if chains(str(RECIPES[name]))] == ["fp8", "fp8-delayed"]


def test_without_kernels_layers_stay_layers(monkeypatch):
    monkeypatch.setattr(transformer, "mlp", None)
    model = fewbits.prepare(Transformer(GPT), "fp8")
    with held_weights(model):
        model.blocks[0].mlp(torch.randn(4, 64).to(torch.bfloat16)).sum().backward()


def test_activations_written_once_keep_what_layers_keep(kernels):
    """Codes of both inputs and the outputs of the first matmuls; no activation in 16 bits."""
    model = fewbits.prepare(Transformer(LLAMA), "fp8")
    block, saved = model.blocks[0].mlp, []
    with held_weights(model), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        block(torch.randn(256, 64).to(torch.bfloat16).requires_grad_())
    wide = [t for t in saved if t.shape[0] == 256 and t.element_size() == 2]
    assert [tuple(t.shape) for t in wide] == [(256, LLAMA.ff)] * 2
    assert sorted(t.shape[1] for t in saved if t.shape[0] == 256 and t.element_size() == 1) == [64, LLAMA.ff]
    assert activation.swiglu(*wide).shape == (256, LLAMA.ff)
