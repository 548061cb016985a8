"""Attention by a kernel on a CPU computes what its definition does: held to fp64, and taken only where it can."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from rounded_once import DTYPES, FP32, assert_close, assert_threads_do_not_show, exact_gradients
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewbits.choice import Choice
from fewbits.kernels import attention_cpu, dispatch
from fewbits.nn.attention import Attention, attend
from fewbits.numerics import attention

pytestmark = pytest.mark.skipif(attention_cpu.library().value is None, reason=attention_cpu.library().reason)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 64, 64), (1, 2, 70, 20), (2, 1, 5, 7), (1, 1, 1, 1), (1, 2, 33, 80), (1, 1, 150, 8)], ids=str
)
def test_attention_and_its_gradients_are_rounded_once(shape, dtype, masked):
    B, H, T, d = shape
    mask = (torch.rand(B, 1, T, T) < 0.5) | torch.eye(T, dtype=torch.bool) if masked else None
    qkv, grad = torch.randn(B, T, 3, H, d).to(dtype).requires_grad_(), torch.randn(B, T, H, d).to(dtype)
    y = attention_cpu.attention(*(x.transpose(1, 2) for x in qkv.unbind(2)), mask)
    y.backward(grad.transpose(1, 2))
    exact, (slopes,) = exact_gradients(
        lambda x: attention.attention(*(part.transpose(1, 2) for part in x.unbind(2)), mask),
        qkv,
        grad=grad.transpose(1, 2),
    )
    assert y.transpose(1, 2).is_contiguous()
    # scores and products with the gradient are sums of d numbers, gradients of k and v of T times as many: each off by its
    # roundings times the largest number that it is made of
    largest = qkv.detach().double().abs().max() ** 2 * d**0.5 + 1
    assert_close(y.detach(), exact, FP32 * largest * 4)
    assert_close(qkv.grad, slopes, FP32 * largest * 4 * max(1.0, float(grad.abs().max())) * T**0.5)


def test_attention_reads_any_strides():
    wide = torch.randn(2, 3, 40, 24)
    views = [wide[..., i : i + 8] for i in (0, 8)] + [wide[..., 0::3]]  # the last with gaps between its elements
    ours = attention_cpu.attention(*views, None)
    assert torch.equal(ours, attention_cpu.attention(*(view.contiguous() for view in views), None))


def test_scores_that_are_not_finite_show_in_attention():
    q, k, v = torch.randn(3, 1, 1, 40, 16)
    q[0, 0, 35, 3] = math.nan
    y = attention_cpu.attention(q, k, v, None)
    assert y[0, 0, 35].isnan().all() and y[0, 0, :35].isfinite().all()


def test_where_amx_multiplies_bf16_attention_stays_with_operators(monkeypatch):
    hardware, cpu = dispatch.describe(torch.device("cpu")), torch.device("cpu")
    for features, dtype, value in (
        ({"avx512_bf16"}, torch.bfloat16, "kernel"),
        ({"amx_bf16"}, torch.bfloat16, "operators"),
        ({"amx_bf16"}, torch.float32, "kernel"),
    ):
        monkeypatch.setattr(dispatch, "_choices", {})
        monkeypatch.setattr(dispatch, "describe", lambda _, f=features: replace(hardware, cpu_features=frozenset(f)))
        assert dispatch.attention_execution(cpu, dtype).value == value
        q = torch.zeros(1, 1, 128, 8, dtype=dtype)
        assert (dispatch.attention_by_kernel(q, q, q, None) is attention_cpu) == (value == "kernel")


def test_results_do_not_depend_on_the_number_of_threads():
    def all_of_it() -> list[Tensor]:
        q = torch.randn(2, 3, 70, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = attention_cpu.attention(q, q, q, None)
        y.sum().backward()
        return [y.detach(), q.grad]

    assert_threads_do_not_show(all_of_it)


def test_a_query_that_may_see_nothing_has_zeros_and_no_gradient():
    qkv = torch.randn(3, 1, 2, 130, 8).requires_grad_()
    mask = torch.ones(1, 1, 130, 130, dtype=torch.bool).tril()
    mask[:, :, 40] = False
    mask[:, :, 96:] = False  # whole blocks of queries
    y = attention_cpu.attention(*qkv, mask)
    y.sum().backward()
    blind = ~mask[0, 0].any(1)
    assert not y[:, :, blind].any() and y[:, :, ~blind].all() and qkv.grad.isfinite().all()
    assert not qkv.grad[0][:, :, blind].any()
    exact = scaled_dot_product_attention(*qkv.detach().double(), attn_mask=mask)
    assert torch.allclose(y.double(), exact, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 1, 130, 130), (1, 1, 130, 130), (130, 130), (2, 3, 130, 130)], ids=str)
def test_masks_of_every_shape_that_broadcasts_give_the_same(shape):
    q, k, v = torch.randn(3, 2, 3, 130, 16)
    mask = torch.rand(shape) < 0.5
    mask |= torch.eye(130, dtype=torch.bool)
    exact = scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=mask)
    assert torch.allclose(attend(q, k, v, mask, 0.0).double(), exact, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_heads_and_their_gradients_are_those_of_operators(masked):
    q, k, v = torch.randn(2, 6, 130, 16), torch.randn(2, 2, 130, 16), torch.randn(2, 2, 130, 16)
    mask = (torch.rand(2, 1, 130, 130) < 0.5) | torch.eye(130, dtype=torch.bool) if masked else None
    assert dispatch.attention_by_kernel(q, k, v, mask) is attention_cpu
    ours, exact = ([x.to(dtype).requires_grad_() for x in (q, k, v)] for dtype in (torch.float32, torch.float64))
    y = attend(*ours, mask, 0.0)
    wide = scaled_dot_product_attention(*exact, attn_mask=mask, is_causal=not masked, enable_gqa=True)
    grad = torch.randn(y.shape)
    # sums of 130 products of numbers of about 1, gradients of k and v of three heads: fp32 within 2^-18 of the largest
    assert torch.allclose(y.double(), wide, atol=2.0**-18, rtol=0)
    for found, wanted in zip(
        torch.autograd.grad(y, ours, grad), torch.autograd.grad(wide, exact, grad.double()), strict=True
    ):
        assert torch.allclose(found.double(), wanted, atol=2.0**-18 * float(wanted.abs().max()), rtol=0)


def test_what_does_not_fit_the_kernel_stays_with_operators():
    q = torch.randn(2, 3, 130, 16)
    mask = torch.ones(2, 1, 130, 130, dtype=torch.bool)
    taken = dispatch.attention_by_kernel
    assert taken(q, q, q, None) is attention_cpu is taken(q, q[:, :1], q[:, :1], mask)
    assert taken(q, q, q.bfloat16(), None) is None  # would be read past its end
    assert taken(q, q, q[..., :8], None) is None
    assert taken(q, q, q, mask.float()) is None
    assert taken(q, q, q, mask[:, 0]) is None
    short, long = torch.randn(1, 1, 127, 8), torch.empty(1, 1, dispatch.LONGEST + 1, 8)
    assert taken(short, short, short, None) is None is taken(long, long, long, None)
    assert torch.func.grad(lambda x: attend(x, q, q, None, 0.0).sum())(q).shape == q.shape


def test_a_cpu_without_the_instructions_or_threads_keeps_operators_and_says_why(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch.cpp, "spreads", lambda: False)
    assert "OpenMP" in dispatch.attention_execution(cpu, torch.float32).reason
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(attention_cpu, "library", lambda: Choice(None, "this CPU has no FMA"))
    found = dispatch.attention_execution(cpu, torch.float32)
    assert (found.value, found.reason) == ("operators", "this CPU has no FMA")


def test_an_empty_batch_has_empty_gradients():
    layer, x = Attention(48, 3, 3, True, False, 1e-5, 0.0), torch.empty(0, 130, 48).requires_grad_()
    layer(x, None, None).sum().backward()
    assert x.grad.shape == x.shape and not layer.qkv.weight.grad.any()
