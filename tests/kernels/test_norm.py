"""Norms by kernels, forward to codes and backward, are those of the definition (in Triton's interpreter), and of autograd."""

import math

import pytest
import torch
from interpreter import INTERPRETED

from fewbits.formats import Format
from fewbits.kernels import norm as kernel
from fewbits.kernels import norm_triton
from fewbits.kernels.layouts import Known
from fewbits.nn.norm import LayerNorm, RMSNorm, add_norm, add_norm_codes
from fewbits.numerics import norm as definition
from fewbits.precision.recipe import RECIPES

pytestmark = INTERPRETED

SHAPES = ((1, 1), (3, 5), (9, 130), (2, 7, 64))


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """What arrives at a norm, what arrives at the sum before it, that sum, and a weight."""
    generator = torch.Generator().manual_seed(sum(shape))
    rows = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    return [*rows, torch.randn(shape[-1], generator=generator).to(dtype)]


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_are_those_of_the_definition(centered, dtype, count):
    for shape in SHAPES:
        grad, along, x, weight = inputs(shape, dtype)
        mean, rstd = definition.statistics(x, 1e-5, centered)
        grads = [grad, along][:count]
        found = kernel.norm_backward(grads, along, x, weight, mean, rstd)
        wanted = definition.norm_backward(grads, along, x, weight, mean, rstd)
        assert (found[2] is None) == (wanted[2] is None) == (not centered)
        # fp32 sums of a row or of at most 14 rows in another order; bf16 the interpreter cuts instead of rounding
        unit = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
        for one, other in zip(found[:3], wanted, strict=True):
            if one is not None and other is not None:
                assert one.dtype == dtype and one.shape == other.shape
                torch.testing.assert_close(one, other, rtol=unit, atol=2.0**-18)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2"])
def test_a_sum_its_statistics_and_the_codes_of_its_norm_are_those_of_the_definition(centered, biased, format):
    fmt = Format.parse(format)
    for shape in (*SHAPES, (130, 70), (128, 64), (2, 300)):
        for dtype in (torch.float32, torch.float16):  # bf16 the interpreter cuts instead of rounding
            x, branch, bias, weight = inputs(shape, dtype)
            bias = bias.flatten()[: shape[-1]] if biased else None
            rows = [tensor.flatten(0, -2) for tensor in (x, branch)]
            scale = torch.full((1, 1), 2.0**-6)
            wanted = definition.add_norm_codes(*rows, weight, bias, 1e-5, centered, scale, fmt)
            known = Known(scale, fmt, torch.zeros(1, 1))
            found = kernel.add_norm_codes(x, branch, weight, bias, 1e-5, centered, known)
            total, codes, codes_t, mean, rstd = found
            assert torch.equal(total, x + branch) and total.dtype == dtype
            assert torch.equal(codes_t.view(torch.uint8), codes.view(torch.uint8).t()) and codes_t.is_contiguous()
            values, others = codes.float() * scale, wanted[1].float() * scale
            # fp32 sums in another order move a value by a few of its roundings, and that now and then to the next code
            step = 2.0**-2 if format == "fp8_e5m2" else 2.0**-3
            assert bool(((values - others).abs() <= step * others.abs() + 2.0**-14).all())
            assert float((values != others).float().mean()) <= 0.01
            torch.testing.assert_close(known.maximum, wanted[3], rtol=2.0**-9, atol=2.0**-18)
            assert (mean is None) == (wanted[4] is None) == (not centered)
            for mine, theirs in ((mean, wanted[4]), (rstd, wanted[5])):
                if mine is not None:
                    assert mine.shape == (*shape[:-1], 1)
                    torch.testing.assert_close(mine.view(-1), theirs.view(-1), rtol=2.0**-18, atol=2.0**-20)


def test_a_norm_that_its_dtype_does_not_hold_is_nan_in_its_codes_and_in_the_note():
    x, branch, _, _ = inputs((9, 130), torch.float16)
    weight = torch.ones(130, dtype=torch.float16)
    weight[100] = 6e4  # times a value beyond 1.1 it is infinite in fp16
    x[6, 100] = 9.0
    known = Known(torch.ones(1, 1), Format.parse("fp8_e4m3"), torch.zeros(1, 1))
    codes = kernel.add_norm_codes(x, branch * 0, weight, None, 1e-5, True, known)[1]
    assert bool(codes[6, 100].float().isnan()) and not bool(codes[6, :100].float().isnan().any())
    assert not bool(known.maximum.isfinite())


def test_rows_that_are_not_there_have_no_maximum():
    """Their norm would be the bias."""
    x, weight = torch.tensor([[1.0, -1.0]]), torch.tensor([-1.0, 1.0])
    known = Known(torch.ones(1, 1), Format.parse("fp8_e4m3"), torch.zeros(1, 1))
    kernel.add_norm_codes(x, torch.zeros(1, 2), weight, torch.ones(2), 0.0, True, known)
    assert float(known.maximum) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_nan_in_its_codes_and_in_the_note(value):
    x, branch, bias, weight = inputs((9, 130), torch.float32)
    x[6, 100] = value
    known = Known(torch.ones(1, 1), Format.parse("fp8_e4m3"), torch.zeros(1, 1))
    codes = kernel.add_norm_codes(x, branch, weight, bias[0], 1e-5, True, known)[1]
    assert codes.float().isnan().any(1).nonzero().tolist() == [[6]] and not bool(known.maximum.isfinite())


def test_totals_are_those_of_any_number_of_programs():
    """More than a kernel reads at once: a GPU has hundreds, an interpreter two."""
    parts, totals = torch.randn(2, 130, 40, generator=torch.Generator().manual_seed(0)), torch.empty(2, 40)
    norm_triton.totals_kernel[(2, 2)](parts, totals, P=130, D=40, ROWS=64, BLOCK=32)
    torch.testing.assert_close(totals, parts.sum(1))


@pytest.mark.parametrize("centered", [True, False])
def test_the_definition_is_the_gradient_of_autograd(centered):
    grad, along, x, weight = (tensor.double() for tensor in inputs((2, 7, 64), torch.float32))
    x.requires_grad_()
    weight.requires_grad_()
    mean, rstd = definition.statistics(x, 1e-5, centered)
    y = (x if mean is None else x - mean) * rstd * weight
    wanted = torch.autograd.grad([y, x * 1.0], [x, weight], [grad, along])
    halves = [grad * 0.25, grad * 0.75]
    found = definition.norm_backward(halves, along, x.detach(), weight.detach(), mean, rstd.detach())
    for one, other in zip(found[:2], wanted, strict=True):
        torch.testing.assert_close(one, other)
    if found[2] is not None:
        torch.testing.assert_close(found[2], grad.flatten(0, -2).sum(0))


@pytest.mark.parametrize("norm", [LayerNorm(64), LayerNorm(64, bias=False), RMSNorm(64, eps=1e-6)], ids=str)
@pytest.mark.parametrize("twice", [False, True])
def test_a_sum_and_its_norm_as_one_are_the_two(norm, twice):
    torch.nn.init.normal_(norm.weight)
    found = []
    for together in (True, False):
        x, branch = (tensor.requires_grad_() for tensor in inputs((2, 7, 64), torch.float32)[:2])
        if together:
            bias = getattr(norm, "bias", None)
            total, y, *z = add_norm(x, branch, norm.weight, bias, norm.eps, isinstance(norm, LayerNorm), twice)
        else:
            total = x + branch
            y = norm(total)
            z = [y] if twice else []
        loss = total.sin() + y.cos() + sum(z, torch.zeros(())).exp()
        parameters = [x, branch, *norm.parameters()]
        found.append((total, y, *torch.autograd.grad(loss.sum(), parameters)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-18, atol=2.0**-16)


@pytest.mark.parametrize("norm", [LayerNorm(64), RMSNorm(64, eps=1e-6)], ids=str)
@pytest.mark.parametrize("twice", [False, True])
def test_a_norm_that_is_codes_has_the_gradients_of_one_that_is_values(norm, twice):
    """Its values are NaN: whoever read them by mistake would know."""
    torch.nn.init.normal_(norm.weight)
    found = []
    for codes in (True, False):
        x, branch = (tensor.requires_grad_() for tensor in inputs((2, 7, 64), torch.float32)[:2])
        given = (x, branch, norm.weight, getattr(norm, "bias", None), norm.eps, isinstance(norm, LayerNorm), twice)
        if codes:
            maximum = torch.zeros(1, 1)
            scale = torch.full((1, 1), 2.0**-6)
            total, *normals, matrix, transpose = add_norm_codes(*given, scale, maximum, str(RECIPES["fp8-delayed"]))
            assert matrix.shape == (14, 64) and transpose.shape == (64, 14) and float(maximum) > 0
            assert not matrix.requires_grad and all(bool(y.isnan().all()) for y in normals)
        else:
            total, *normals = add_norm(*given)
        grads = [torch.ones_like(total), *(torch.full((2, 7, 64), 2.0**-i) for i, _ in enumerate(normals))]
        parameters = [x, branch, *norm.parameters()]
        found.append((total, *torch.autograd.grad([total, *normals], parameters, grads)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-18, atol=2.0**-16)


def test_what_the_kernel_does_not_take_is_named():
    assert kernel.why_not(torch.empty(3, 64)) == ""
    assert "float64" in kernel.why_not(torch.empty(3, 64, dtype=torch.float64))
    assert "8193" in kernel.why_not(torch.empty(3, 8193)) and kernel.why_not(torch.empty(0, 64)) == "no rows"
