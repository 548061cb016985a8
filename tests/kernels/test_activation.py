"""Activations with their largest magnitude, or as fp8 codes, are those of the definition (in Triton's interpreter)."""

import math

import pytest
import torch
from interpreter import INTERPRETED

from fewbits.formats import Format
from fewbits.kernels import activation as kernel
from fewbits.kernels.layouts import Known
from fewbits.numerics import activation as definition
from fewbits.numerics import quantize
from fewbits.numerics.scaling import power_of_two_scale

pytestmark = INTERPRETED

DEFINED = {
    "gelu": definition.gelu_wide,
    "gelu_backward": definition.gelu_backward,
    "swiglu": definition.swiglu,
    "swiglu_backward": definition.swiglu_backward,
}
SHAPES = ((1, 1), (130, 3), (3, 300), (65, 200), (80, 144), (64, 128), (64, 130), (512, 64), (530, 70))


def inputs(name: str, shape: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Values over many binades, with zeros and numbers beyond the reach of the sigmoid."""
    generator = torch.Generator().manual_seed(sum(shape))
    found = []
    for _ in range(kernel.NAMES[name][0]):
        x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(2).exp()
        found.append(torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, x).clamp(-200, 200).to(dtype))
    return found


def results(name: str, given: list[torch.Tensor]) -> list[torch.Tensor]:
    y = DEFINED[name](*given)
    return list(y) if isinstance(y, tuple) else [y]


@pytest.mark.parametrize("name", DEFINED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_those_of_the_definition_and_the_largest_magnitude_is_theirs(name, dtype):
    for shape in SHAPES:
        given = inputs(name, shape, dtype)
        found = kernel.activate(name, *given)
        wanted = results(name, given)
        assert len(found) == len(wanted)
        for (y, amax), want in zip(found, wanted, strict=True):
            assert y.dtype == dtype and y.shape == want.shape
            assert amax.shape == (1, 1) and float(amax) == float(y.float().abs().max())
            unit = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-16}[dtype]
            size = given[0].float().abs() * (1.0 if len(given) == 1 else given[-1].float().abs().clamp(min=1.0))
            # each is within half a unit in the last place of its own fp32 value; those differ by an exponential whose
            # argument, up to 88, is rounded (88 * 2^-24), and by a few roundings of terms no larger than 2 * size
            bound = unit * want.float().abs() + 2.0**-16 * size + 2.0**-24
            assert bool(((y.float() - want.float()).abs() <= bound).all())


def noted(scale: torch.Tensor, fmt: Format) -> Known:
    """With a maximum of its own."""
    return Known(scale, fmt, torch.zeros(1, 1))


FORWARD = [name for name in kernel.NAMES if not name.endswith("backward")]
FORMATS = [Format.parse("fp8_e4m3"), Format.parse("fp8_e5m2")]


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_of_an_activation_are_those_of_its_values_bit_for_bit(name, fmt):
    for shape in SHAPES:
        given = inputs(name, shape, torch.bfloat16)
        ((y, amax),) = kernel.activate(name, *given)
        for factor in (2.0**9, 2.0**-3):  # one scale leaves range idle and the other saturates, as delayed ones may
            scale = power_of_two_scale(amax, fmt.max) * factor
            known = noted(scale, fmt)
            codes = kernel.activate_codes(name, known, *given)
            wanted = quantize.encode_both([y], scale, fmt)[0]
            assert torch.equal(codes.view(torch.uint8), wanted.view(torch.uint8))
            assert float(known.maximum) == float(amax)


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize(("fmt", "of_hidden"), [FORMATS, FORMATS[::-1]], ids=str)
def test_a_backward_pass_gives_codes_of_its_values_and_again_those_of_the_activation(name, fmt, of_hidden):
    for shape in SHAPES:
        grad, *given = inputs(name + "_backward", shape, torch.bfloat16)
        ((y, amax),) = kernel.activate(name, *given)
        hidden = (power_of_two_scale(amax, of_hidden.max) * 2.0**-3, of_hidden)
        values = kernel.activate(name + "_backward", grad, *given)
        scales = [power_of_two_scale(amax, fmt.max) * 2.0 ** (9 - 12 * i) for i, (_, amax) in enumerate(values)]
        known = [noted(scale, fmt) for scale in scales]
        hidden_t, coded = kernel.activate_backward(name + "_backward", *hidden, known, True, grad, *given)
        wanted_t = quantize.encode_both([y], *hidden)[1]
        assert torch.equal(hidden_t.view(torch.uint8), wanted_t.view(torch.uint8)) and hidden_t.is_contiguous()
        for (y, amax), (scale, _, maximum), one in zip(values, known, coded, strict=True):
            codes, codes_t, sums, _ = quantize.encode_both([y], scale, fmt)
            assert torch.equal(one.codes.view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(one.codes_t.view(torch.uint8), codes_t.view(torch.uint8)) and one.codes_t.is_contiguous()
            assert float(maximum) == float(amax)
            bound = 2.0**-23 * shape[0] * y.float().abs().sum(0)  # R roundings of fp32, of two orders of one sum
            assert one.sums is not None and bool(((one.sums - sums).abs() <= bound).all())
        _, others = kernel.activate_backward(name + "_backward", *hidden, known, False, grad, *given)
        assert all(one.sums is None for one in others)


@pytest.mark.parametrize("name", kernel.NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_shows_in_its_codes_and_the_largest_magnitude(name, value):
    given = inputs(name, (70, 90), torch.bfloat16)
    given[0][60, 80] = value
    for x in given[1:]:
        x[60, 80] = 0.5
    for _, amax in kernel.activate(name, *given):
        assert not bool(amax.isfinite())
    known = [noted(torch.ones(1, 1), FORMATS[0]) for _ in range(kernel.NAMES[name][1])]
    if name in FORWARD:
        made = [kernel.activate_codes(name, *known, *given)]
    else:
        _, coded = kernel.activate_backward(name, *known[0][:2], known, False, *given)
        made = [one.codes for one in coded] + [one.codes_t.t() for one in coded]
    assert all(codes.float().isnan().nonzero().tolist() == [[60, 80]] for codes in made)
    assert not any(bool(one.maximum.isfinite()) for one in known)


@pytest.mark.parametrize("x", [-3e38, -1e10, -31.0, 31.0, 1e10, 3e38])
def test_inputs_far_out_have_finite_values_and_slopes(x):
    given, one = torch.full((1, 1), x, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    limit = max(x, 0.0)
    assert float(kernel.activate("gelu", given)[0][0]) == pytest.approx(limit, rel=2.0**-8)
    assert float(kernel.activate("gelu_backward", one, given)[0][0]) == float(x > 0)
    assert float(kernel.activate("swiglu", given, one)[0][0]) == pytest.approx(limit, rel=2.0**-8, abs=1e-11)
    by_gate, by_up = kernel.activate("swiglu_backward", one, given, one)
    assert float(by_gate[0]) == pytest.approx(float(x > 0), abs=1e-11)
    assert float(by_up[0]) == pytest.approx(limit, rel=2.0**-8, abs=1e-11)


def test_definitions_are_the_gradients_of_autograd():
    x = torch.linspace(-40, 40, 801, dtype=torch.float32).requires_grad_()
    torch.nn.functional.gelu(x.double(), approximate="tanh").sum().backward()
    found = definition.gelu_backward(torch.ones_like(x), x.detach())
    torch.testing.assert_close(found, x.grad, rtol=0, atol=2.0**-19)
    torch.testing.assert_close(
        definition.gelu_wide(x.detach()), torch.nn.functional.gelu(x.detach(), approximate="tanh"), rtol=0, atol=2e-6
    )
    gate, up, grad = (torch.randn(300).requires_grad_() for _ in range(3))
    (torch.nn.functional.silu(gate.double()) * up.double()).mul(grad.detach().double()).sum().backward()
    by_gate, by_up = definition.swiglu_backward(grad.detach(), gate.detach(), up.detach())
    torch.testing.assert_close(by_gate, gate.grad, rtol=2.0**-18, atol=2.0**-20)
    torch.testing.assert_close(by_up, up.grad, rtol=2.0**-18, atol=2.0**-20)
