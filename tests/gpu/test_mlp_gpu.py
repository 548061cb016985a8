"""A feed-forward layer in few bits on a GPU: its kernels against their definition, and which of them run."""

from __future__ import annotations

import pytest
import torch

import fewbits
from fewbits import ModelConfig, Transformer
from fewbits.choice import Choice
from fewbits.formats import Format
from fewbits.kernels import activation as kernel
from fewbits.kernels import dispatch
from fewbits.kernels.layouts import Known, encode_both, turn_into
from fewbits.nn.lowbit import held_weights
from fewbits.nn.scale_history import scales_known
from fewbits.numerics import activation as definition
from fewbits.numerics import quantize
from fewbits.numerics.scaling import power_of_two_scale

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs fp8 on CUDA"
)

GPT = ModelConfig(vocab_size=64, context=16, n_layer=1, n_head=2, n_embd=256)
LLAMA = ModelConfig(vocab_size=64, context=16, n_layer=1, n_head=2, n_embd=256, activation="swiglu", bias=False)
SHAPES = ((1, 1), (130, 3), (65, 200), (2048, 768), (80, 144), (4096, 3072))


def inputs(name: str, shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    found = []
    for _ in range(kernel.NAMES[name][0]):
        x = torch.randn(shape, device="cuda") * torch.randn(shape, device="cuda").mul(2).exp()
        found.append(x.clamp(-200, 200).to(dtype))
    return found


def noted(scale: torch.Tensor, fmt: Format) -> Known:
    """With a maximum of its own."""
    return Known(scale, fmt, torch.zeros(1, 1, device="cuda"))


@pytest.mark.parametrize("name", kernel.NAMES)
def test_values_maxima_and_codes_are_those_of_the_definition(name):
    """Values within fp32, which the sizes of the inputs bound as in tests/kernels; what is made of the values exactly."""
    defined = {"gelu": definition.gelu_wide}.get(name) or getattr(definition, name)
    for shape, fmt in zip(SHAPES, map(Format.parse, ("fp8_e4m3", "fp8_e5m2") * 3), strict=True):
        given = inputs(name, shape)
        found, wanted = kernel.activate(name, *given), defined(*given)
        size = given[0].float().abs() * (1.0 if len(given) == 1 else given[-1].float().abs().clamp(min=1.0))
        for (y, amax), want in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            assert float(amax) == float(y.float().abs().max())
            bound = 2.0**-7 * want.float().abs() + 2.0**-16 * size + 2.0**-24
            assert bool(((y.float() - want.float()).abs() <= bound).all())
        scales = [power_of_two_scale(amax, fmt.max) * 2.0 ** (9 - 12 * i) for i, (_, amax) in enumerate(found)]
        known = [noted(scale, fmt) for scale in scales]
        if not name.endswith("backward"):
            codes = kernel.activate_codes(name, known[0], *given)
            wanted_codes = quantize.encode_both([found[0][0]], *known[0][:2])[0]
            assert torch.equal(codes.view(torch.uint8), wanted_codes.view(torch.uint8))
            assert float(known[0].maximum) == float(found[0][1])
            continue
        hidden = noted(scales[0] * 2.0**5, Format.parse("fp8_e4m3"))
        hidden_t, coded = kernel.activate_backward(name, *hidden[:2], known, True, *given)
        its = kernel.activate_codes(name.removesuffix("_backward"), hidden, *given[1:])
        assert torch.equal(hidden_t.view(torch.uint8), its.view(torch.uint8).t().contiguous())
        for (y, amax), (scale, _, maximum), one in zip(found, known, coded, strict=True):
            codes, codes_t, sums, _ = quantize.encode_both([y], scale, fmt)
            assert torch.equal(one.codes.view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(one.codes_t.view(torch.uint8), codes_t.view(torch.uint8))
            assert float(maximum) == float(amax) and one.sums is not None
            assert bool(((one.sums - sums).abs() <= 2.0**-23 * shape[0] * y.float().abs().sum(0)).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_shows_in_its_codes_and_the_largest_magnitude(value):
    """Every fourth row of a tile is read by itself."""
    fmt, one = Format.parse("fp8_e4m3"), torch.ones(1, 1, device="cuda")
    for row in range(60, 64):
        for name in kernel.NAMES:
            given = inputs(name, (256, 128))
            given[0][row, 80] = value
            for x in given[1:]:
                x[row, 80] = 0.5
            known = [noted(one, fmt) for _ in range(kernel.NAMES[name][1])]
            if name.endswith("backward"):
                made = [c.codes for c in kernel.activate_backward(name, one, fmt, known, False, *given)[1]]
            else:
                made = [kernel.activate_codes(name, *known, *given)]
            assert all(codes.float().isnan().nonzero().tolist() == [[row, 80]] for codes in made), (name, row)
            assert not any(bool(one.maximum.isfinite()) for one in known), (name, row)
        known = noted(one, fmt)
        codes, codes_t, _ = encode_both([given[0]], one, fmt, maximum=known.maximum)
        assert codes.float().isnan().nonzero().tolist() == codes_t.t().float().isnan().nonzero().tolist() == [[row, 80]]
        assert not bool(known.maximum.isfinite())


@pytest.mark.parametrize("shape", [(1, 1), (130, 3), (131, 70), (80, 144), (2048, 768), (16384, 2560)])
def test_turned_codes_are_the_transpose(shape):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    for begin, beside in ((0, 0), (64, 16), (3, 2), (3, 1)):
        wide = torch.full((shape[1], begin + shape[0] + beside), 0x55, dtype=torch.uint8, device="cuda")
        place = wide[:, begin : begin + shape[0]]
        turn_into(place.view(torch.float8_e4m3fn), codes.view(torch.float8_e4m3fn))
        assert torch.equal(place, codes.t())
        assert bool((wide[:, :begin] == 0x55).all() and (wide[:, begin + shape[0] :] == 0x55).all())


def gradients(config, precision, compiled, steps=5):
    """Output and gradients of a feed-forward layer after its scales are known, and the names of the kernels that ran."""
    torch._dynamo.reset()
    model = fewbits.prepare(Transformer(config), precision).cuda()
    block = model.blocks[0].mlp
    run = torch.compile(block, dynamic=False) if compiled else block
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 256, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
    grad = (0.01 * torch.randn(1024, 256, generator=generator)).to("cuda", torch.bfloat16)
    for i in range(steps):
        with held_weights(model), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            y = run(x)
            found = (y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], grad))
            torch.cuda.synchronize()
        # what is not in the feed-forward layer has no maxima; these scales are as if the whole model had run
        for history in (m.history for m in model.modules() if getattr(m, "history", None) is not None):
            history.window[:, -1].clamp_(min=2.0**-20)
        assert i < 2 or all(scales_known(model)) or precision == "fp8"
    return found, {event.key: event.count for event in profile.key_averages()}


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gelu", "swiglu"])
@pytest.mark.parametrize(
    ("precision", "names"),
    [("fp8", ["activate_kernel"] * 2), ("fp8-delayed", ["activate_kernel", "activate_backward_kernel"])],
)
def test_one_kernel_each_way_makes_what_layer_by_layer_makes(config, precision, names, monkeypatch):
    """The activation of a compiler differs by a rounding of bf16 in few places, each worth one code of fp8 at most: some 3 % of
    the codes by 6 % of their value, 0.01 of the whole."""
    found, ran = gradients(config, precision, True)
    assert all(sum(count for key, count in ran.items() if name in key) == names.count(name) for name in names), ran
    key = ("activations between low-bit layers", "cuda")
    monkeypatch.setitem(dispatch._choices, key, Choice("definition", "a test"))
    wanted, others = gradients(config, precision, True)
    assert not any(name in key for key in others for name in names)
    for mine, theirs in zip(found, wanted, strict=True):
        assert float((mine.double() - theirs.double()).norm()) <= 0.03 * float(theirs.double().norm())


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("precision", ["fp8", "fp8-delayed"])
def test_compiled_or_not_the_gradients_are_the_same(config, precision):
    """The same codes are multiplied; sums of columns may be added up in another order."""
    eager, compiled = gradients(config, precision, False)[0], gradients(config, precision, True)[0]
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-7, atol=2.0**-8 * float(one.abs().max()))
