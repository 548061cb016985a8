"""The fused CPU twins compute what their definitions do: held to fp64, within what fp32 and the last rounding allow."""

import math

import pytest
import torch
from rounded_once import DTYPES, FP32, assert_close, assert_threads_do_not_show, exact_gradients
from torch import Tensor

from fewbits.kernels import dispatch, fused_cpu
from fewbits.numerics import attention, loss

pytestmark = pytest.mark.skipif(fused_cpu.library().value is None, reason=fused_cpu.library().reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_and_its_derivative_are_rounded_once(dtype):
    x = torch.cat((torch.randn(4000) * 3, torch.tensor([0.0, -0.0, 1e-30, -40.0, 40.0, 3e4, -3e4]))).to(dtype)
    x.requires_grad_()
    y = fused_cpu.gelu(x)
    grad = torch.ones_like(y)
    y.backward(grad)
    exact, (slope,) = exact_gradients(lambda v: torch.nn.functional.gelu(v, approximate="tanh"), x, grad=grad)
    # the sigmoid of z is off by its rounding times z e^-|z| < 0.37, and the products by a few units in the last place
    assert_close(y.detach(), exact, FP32 * exact.abs() + FP32 * x.detach().double().abs() * 2.0**-3)
    assert_close(x.grad, slope, 2 * FP32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 7, 64, 300])
def test_layer_norm_and_its_gradients_are_rounded_once(dtype, D):
    x, weight, bias, grad = torch.randn(5, 9, D) * 2 + 1, torch.randn(D), torch.randn(D), torch.randn(5, 9, D)
    x, weight, bias, grad = (tensor.to(dtype) for tensor in (x, weight, bias, grad))
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = fused_cpu.layer_norm(*inputs, 1e-5)
    y.backward(grad)
    exact, gradients = exact_gradients(
        lambda a, w, b: torch.nn.functional.layer_norm(a, [D], w, b, 1e-5), *inputs, grad=grad
    )
    # x - mean loses what the two have in common: |x| up to some 10 against a deviation of 2, or sqrt(eps) where D is 1
    spread = x.detach().double().std(-1, correction=0, keepdim=True).clamp(min=1e-5**0.5)
    lost = FP32 * (1 + x.detach().double().abs().amax(-1, keepdim=True) / spread)
    assert_close(y.detach(), exact, lost * (weight.detach().double().abs() + bias.detach().double().abs() + 1))
    along = (grad.double() * weight.detach().double()).abs().amax(-1, keepdim=True)
    assert_close(x.grad, gradients[0], 8 * lost * along / spread)
    terms = grad.double().abs().flatten(0, 1).sum(0)
    assert_close(weight.grad, gradients[1], 8 * terms * lost.amax())
    assert_close(bias.grad, gradients[2], FP32 * terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_and_its_gradients_are_rounded_once(dtype):
    x, weight, grad = (torch.randn(shape).to(dtype) for shape in ((40, 70), (70,), (40, 70)))
    x.requires_grad_(), weight.requires_grad_()
    y = fused_cpu.rms_norm(x, weight, 1e-6)
    y.backward(grad)
    exact, gradients = exact_gradients(
        lambda a, w: torch.nn.functional.rms_norm(a, [70], w, 1e-6), x, weight, grad=grad
    )
    assert_close(y.detach(), exact, FP32 * exact.abs())
    size = x.detach().double().square().mean(-1, keepdim=True).sqrt()
    along = (grad.double() * weight.detach().double()).abs().amax(-1, keepdim=True)
    assert_close(x.grad, gradients[0], 16 * FP32 * along / size)
    assert_close(weight.grad, gradients[1], 16 * FP32 * grad.double().abs().sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_sums_are_fp32_however_many_rows(dtype):
    ones = torch.ones(5001, 37, dtype=dtype)
    assert torch.equal(fused_cpu.column_sums(ones), torch.full((37,), 5001.0))
    x = torch.randn(1000, 74).to(dtype)[:, ::2]
    sums = x.double().sum(0)
    assert (
        (fused_cpu.column_sums(x).double() - sums).abs() <= 2.0**-17 * x.double().abs().sum(0)
    ).all()  # 128 additions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [5, 64, 1000])
def test_losses_and_gradients_of_logits_are_those_of_the_softmax(dtype, V):
    logits, labels, factor = torch.randn(33, V) * 5, torch.randint(V, (33,)), torch.tensor(0.25)
    labels[3] = loss.IGNORE
    losses, gradient = fused_cpu.softmax_gradient(logits.clone(), labels, factor, dtype)
    wide = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide, labels, ignore_index=loss.IGNORE, reduction="none")
    (wanted,) = torch.autograd.grad((exact * factor).sum(), wide)
    assert_close(losses, exact.detach(), FP32 * (exact.detach().abs() + logits.abs().amax(1) + math.log(V)))
    p = torch.softmax(logits.double(), 1)
    near = FP32 * (1 + 2 * logits.double().abs().amax(1, keepdim=True))  # an exponent is off by its own rounding
    assert_close(gradient, wanted, 0.25 * (p * near + 2.0**-24 * (wanted != 0) + 2.0**-126))
    assert not gradient[3].any()
    assert losses[3] == 0


def test_a_label_that_is_no_token_is_an_error():
    for label in (7, -1):
        with pytest.raises(IndexError, match=f"label {label} is out of bounds"):
            fused_cpu.softmax_gradient(torch.zeros(2, 7), torch.tensor([0, label]), torch.tensor(1.0), torch.float32)


def test_a_logit_that_is_not_finite_shows():
    logits = torch.zeros(2, 40)
    logits[1, 30] = math.nan
    losses, gradient = fused_cpu.softmax_gradient(logits, torch.tensor([0, 0]), torch.tensor(1.0), torch.bfloat16)
    assert losses.isnan().tolist() == [False, True]
    assert gradient[1].isnan().all()
    assert gradient[0].isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_passes_are_those_of_the_definition(masked, dtype):
    B, H, T, rows = 2, 3, 150, slice(64, 128)
    seen = T if masked else rows.stop
    documents = torch.arange(T).div(40, rounding_mode="floor").expand(B, T)
    tril = torch.ones(T, T, dtype=torch.bool).tril()
    mask = (documents.unsqueeze(2) == documents.unsqueeze(1)).logical_and(tril).unsqueeze(1) if masked else None
    scores, dP = torch.randn(B * H, 64, seen) * 4, torch.randn(B * H, 64, seen)
    ours, theirs = (torch.full((B, H, T, T), 7.0, dtype=d) for d in (dtype, torch.float64))
    fused_cpu.write_softmax(ours, scores.clone(), rows, 0.125, mask)
    attention.write_softmax(theirs, scores.double(), rows, 0.125, mask)
    assert_close(ours, theirs, 8 * FP32 * theirs)
    assert torch.equal(ours == 0, theirs.to(dtype) == 0)
    slopes, exact = (torch.full((B * H, T, T), 7.0, dtype=d) for d in (dtype, torch.float64))
    flat = ours.view(B * H, T, T)
    fused_cpu.write_gradient(slopes, dP, flat, rows, 0.125)
    attention.write_gradient(exact, dP.double(), flat.double(), rows, 0.125)
    assert_close(slopes, exact, 8 * FP32 * flat.double())


def test_results_do_not_depend_on_the_number_of_threads():
    def all_of_it() -> list[Tensor]:
        torch.manual_seed(0)
        x, weight, bias = (torch.randn(s).bfloat16().requires_grad_() for s in ((500, 96), (96,), (96,)))
        y = fused_cpu.gelu(fused_cpu.layer_norm(x, weight, bias, 1e-5))
        y.backward(torch.randn(500, 96).bfloat16())
        parts = fused_cpu.softmax_gradient(
            torch.randn(500, 300), torch.randint(300, (500,)), torch.tensor(1.0), torch.bfloat16
        )
        return [y.detach(), x.grad, weight.grad, bias.grad, *parts, fused_cpu.column_sums(y.detach())]

    assert_threads_do_not_show(all_of_it)


def test_the_twins_run_in_eager_code_on_a_cpu_and_say_why():
    assert dispatch.fused_execution(torch.device("cpu")).value == "kernel"
    assert dispatch.fused(torch.zeros(3)) is fused_cpu
    assert dispatch.fused(torch.zeros(3).double()) is None
    assert dispatch.fused(torch.zeros(3, device="meta")) is None
