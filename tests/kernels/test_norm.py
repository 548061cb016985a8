"""The gradients of a norm by one kernel are those of the definition (in Triton's interpreter), and those of autograd."""

import pytest
import torch
from interpreter import INTERPRETED

from fewbits.kernels import norm as kernel
from fewbits.kernels import norm_triton
from fewbits.nn.norm import LayerNorm, RMSNorm, add_norm
from fewbits.numerics import norm as definition

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


def test_what_the_kernel_does_not_take_is_named():
    assert kernel.why_not(torch.empty(3, 64)) == ""
    assert "float64" in kernel.why_not(torch.empty(3, 64, dtype=torch.float64))
    assert "8193" in kernel.why_not(torch.empty(3, 8193)) and kernel.why_not(torch.empty(0, 64)) == "no rows"
