"""Attention whose gradients of q, k and v are quantized where they lie learns what it does with them side by side."""

import dataclasses
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import fewbits
from fewbits import AdamW, ModelConfig, Step, Transformer
from fewbits.choice import Choice
from fewbits.kernels import dispatch, layouts
from fewbits.nn.attention import rotary_table
from fewbits.nn.linear import Linear
from fewbits.nn.lowbit import held_weights, lowbit_linear
from fewbits.nn.scale_history import scale_history
from fewbits.precision.recipe import RECIPES

GPT = ModelConfig(vocab_size=61, context=16, n_layer=1, n_head=2, n_embd=128)
LLAMA = dataclasses.replace(
    GPT, n_head=4, n_kv_head=2, norm="rmsnorm", activation="swiglu", positions="rope", bias=False
)
CONFIGS = {"gpt": GPT, "grouped, rope": LLAMA, "qk_norm": dataclasses.replace(LLAMA, qk_norm=True, bias=True)}
LOW_BIT = [name for name, recipe in RECIPES.items() if not recipe.fake]
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def kernels(monkeypatch):
    triton = pytest.importorskip("triton")
    if torch.cuda.is_available() or not triton.knobs.runtime.interpret:
        pytest.skip("tests/gpu has its own; or no interpreter")
    for what in ("both layouts of fp8 codes", "activations between low-bit layers"):
        monkeypatch.setitem(dispatch._choices, (what, "cpu"), Choice("kernel", "a test"))


@pytest.fixture
def whole(monkeypatch):
    """Makes layers give the product as one from then on."""
    return lambda: monkeypatch.setattr(Linear, "splits", lambda *_: False)


def attention(config, precision):
    torch.manual_seed(0)
    return fewbits.prepare(Transformer(config), precision).blocks[0].attention


def trained(config, precision, steps=4, run=lambda layer: layer):
    """Outputs and gradients of an attention layer by name in every step (delayed scales are known from the third on), and
    what its scales look back on."""
    layer, found = attention(config, precision), []
    called = run(layer)
    rotary = rotary_table(33, layer.head_dim, 1e4) if config.positions == "rope" else None
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(2, 33, config.n_embd, generator=generator).to(torch.bfloat16).requires_grad_()
        with held_weights(layer):
            y = called(x, rotary, None)
            grad = torch.randn(y.shape, generator=generator).to(torch.bfloat16)
            grads = torch.autograd.grad(y, [x, *layer.parameters()], grad)
        found.append(dict(zip(["y", "x", *(name for name, _ in layer.named_parameters())], (y, *grads), strict=True)))
    return found, scale_history(layer)


def assert_same(one, other, sums=True):
    """Bit for bit; where not `sums`, biases up to two orders of one sum in fp32, rounded to bf16."""
    assert one[1] == other[1]
    for mine, theirs in zip(one[0], other[0], strict=True):
        for name, tensor in mine.items():
            assert tensor.shape == theirs[name].shape and bool(tensor.any()), name
            if "bias" in name and not sums:
                torch.testing.assert_close(tensor, theirs[name], rtol=2.0**-7, atol=2.0**-7)
            else:
                assert torch.equal(tensor, theirs[name]), name


@each_config
@pytest.mark.parametrize("precision", LOW_BIT)
def test_outputs_and_gradients_are_those_of_the_undivided_product(config, precision, whole):
    divided = trained(config, precision)
    whole()
    assert_same(divided, trained(config, precision))


@each_config
@pytest.mark.parametrize("precision", ["fp8", "fp8-delayed"])
def test_gradients_are_read_where_they_lie(config, precision, kernels, whole, monkeypatch):
    """Never put side by side, but behind norms, and the codes are the same."""
    read, encode = [], layouts.encode_both

    def reading(parts, *rest):
        read.append([part.shape[1] for part in parts])
        return encode(parts, *rest)

    monkeypatch.setattr(layouts, "encode_both", reading)
    widths = [
        count * config.n_embd // config.n_head for count in (config.n_head, *[config.n_kv_head or config.n_head] * 2)
    ]
    times = 0 if config.qk_norm else 4
    divided = trained(config, precision)
    assert read.count(widths) == times and (config.qk_norm or [sum(widths)] not in read)
    whole()
    assert_same(divided, trained(config, precision), sums=False)
    assert read.count(widths) == times
    assert bool(divided[1]) == (precision == "fp8-delayed")


def test_narrow_parts_are_put_side_by_side_by_the_kernel_and_read_as_one(kernels, whole):
    config = dataclasses.replace(GPT, n_embd=48, n_head=3)
    divided = trained(config, "fp8")
    whole()
    assert_same(divided, trained(config, "fp8"), sums=False)


@pytest.mark.parametrize("precision", ["fp8", "fp8-delayed", "int8"])
def test_steps_are_those_of_undivided_products(precision, whole):
    ends = []
    for _ in range(2):
        model = fewbits.prepare(Transformer(CONFIGS["grouped, rope"]), precision)
        step = Step(model, AdamW(model.named_parameters(), lr=1e-2), precision)
        for i in range(3):
            ids = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(i))
            step([{"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}])
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
        torch.manual_seed(0)
        whole()
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


@each_config
@pytest.mark.parametrize("precision", ["fp8", "fp8-delayed", "int8", "nvfp4"])
def test_compiled_layers_are_divided_in_one_graph(config, precision, whole):
    def run(layer):
        torch._dynamo.reset()
        return torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)

    divided = trained(config, precision, 3, run)
    whole()
    assert_same(divided, trained(config, precision, 3, run))


@each_config
def test_queries_keys_and_values_lie_where_they_did(config, whole):
    """Slices of one product, in its memory: nothing is copied for the norms, rotations and kernels that take them."""
    layer = attention(config, "fp8")
    x = torch.randn(2, 5, config.n_embd).to(torch.bfloat16)
    divided = layer._heads(x)
    whole()
    for mine, theirs in zip(divided, layer._heads(x), strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()
        assert mine.storage_offset() == theirs.storage_offset()
        assert mine.untyped_storage().data_ptr() == divided[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 2)], ids=str)
def test_a_part_that_nobody_uses_has_the_gradient_zero(precision, used):
    torch.manual_seed(0)
    layer = fewbits.prepare(torch.nn.Sequential(torch.nn.Linear(64, 192)), precision)[0]
    x, grad = torch.randn(32, 64).to(torch.bfloat16).requires_grad_(), torch.randn(32, 192).to(torch.bfloat16)
    found = []
    for parts in (layer.split(x, (64, 96, 32)), layer(x).split((64, 96, 32), -1)):
        grads = grad.split((64, 96, 32), -1)
        outputs, given = [parts[i] for i in used], [grads[i] for i in used]
        found.append(torch.autograd.grad(outputs, [x, *layer.parameters()], given))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)
    assert not bool(found[0][2].all()) and bool(found[0][2].any())


def test_only_low_bit_products_in_training_that_nobody_listens_to_are_divided(monkeypatch):
    x = torch.randn(2, 5, 128).to(torch.bfloat16)
    layer = attention(GPT, "fp8")
    assert layer.qkv.splits(x) and not layer.qkv.splits(x[:0])
    with torch.no_grad():
        assert not layer.qkv.splits(x)
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(layer.qkv, f"register_{register}")(lambda *_: None)
        assert not layer.qkv.splits(x)
        handle.remove()
    layer.qkv.weight.requires_grad_(False)
    assert not layer.qkv.splits(x)
    assert not attention(GPT, "bf16-mixed").qkv.splits(x) and not attention(GPT, "int8-qat").qkv.splits(x)

    class Strange(Linear):
        split = None

    layer = attention(GPT, "fp8")
    layer.qkv.__class__ = Strange
    assert [part.shape[2] for part in layer._heads(x)] == [2, 2, 2]


def test_a_layer_that_needs_one_of_its_gradients_only_has_that(kernels):
    layer = attention(GPT, "fp8").qkv
    x = torch.randn(66, 128).to(torch.bfloat16)
    with held_weights(layer):
        assert layer.splits(x)
        sum(part.sum() for part in layer.split(x, (128, 128, 128))).backward()
    assert x.grad is None and layer.weight.grad is not None and bool(layer.bias.grad.eq(66).all())
    assert lowbit_linear(x, *layer.parameters(), *(None,) * 10, layer.recipe).shape == (66, 384)
