"""Attention that keeps its probabilities is attention: against fp64, and no worse in bf16 than torch's fused kernel."""

from __future__ import annotations

import pytest
import torch

from fewbits.nn.attention import attend
from fewbits.nn.documents import document_mask
from fewbits.numerics import attention
from fewbits.numerics.attention import short_attention


def tensors(dtype: torch.dtype, B: int = 3, H: int = 2, T: int = 33, d: int = 16) -> list[torch.Tensor]:
    """q, k, v and a gradient, heads and positions swapped in memory as a model has them."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, H, d, generator=generator).to(dtype).transpose(1, 2) for _ in range(4)]


def documents(B: int, T: int) -> torch.Tensor:
    return document_mask((torch.arange(T) + 3 * torch.arange(B).unsqueeze(1)) // 7)


def results(function, q, k, v, grad):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    y = function(*inputs)
    y.backward(grad)
    return [y.detach(), *(x.grad for x in inputs)]


def plain(mask):
    def function(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    return function


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("score_bytes", "queries"), [(8 << 20, 64), (1, 64), (1, 8)])
def test_in_fp64_it_equals_torch_causal_and_masked_in_one_piece_and_in_many(monkeypatch, masked, score_bytes, queries):
    monkeypatch.setattr(attention, "_SCORE_BYTES", score_bytes)
    monkeypatch.setattr(attention, "_QUERIES", queries)
    q, k, v, grad = tensors(torch.float64)
    mask = documents(3, 33) if masked else None
    found = results(lambda *qkv: short_attention(*qkv, mask), q, k, v, grad)
    for ours, theirs in zip(found, results(plain(mask), q, k, v, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
def test_in_bf16_it_is_no_further_from_fp64_than_the_fused_kernel(masked):
    q, k, v, grad = tensors(torch.bfloat16, B=4, H=4, T=64, d=32)
    mask = documents(4, 64) if masked else None
    exact = results(plain(mask), q.double(), k.double(), v.double(), grad.double())
    ours = results(lambda *qkv: short_attention(*qkv, mask, native_bf16=True), q, k, v, grad)
    fused = results(plain(mask), q, k, v, grad)
    for a, b, e in zip(ours, fused, exact, strict=True):
        # both round probabilities and results to bf16 once; the order of their sums differs
        assert float((a.double() - e).norm()) < max(1.5 * float((b.double() - e).norm()), 2.0**-8 * float(e.norm()))


def test_scores_are_not_rounded_to_bf16_before_the_softmax():
    # Scores of 256 and 257 differ by 1; bf16 has steps of 2 there and would make the two keys equal.
    q = torch.zeros(1, 1, 2, 64, dtype=torch.bfloat16)
    k, v = torch.zeros_like(q), torch.zeros_like(q)
    q[..., :2] = torch.tensor([64.0, 1.0])
    k[0, 0, 0, 0] = 32.0
    k[0, 0, 1, :2] = torch.tensor([32.0, 8.0])
    v[0, 0, 1] = 1.0
    weight = torch.sigmoid(torch.tensor(1.0)).bfloat16()
    assert torch.equal(short_attention(q, k, v, None, native_bf16=True)[0, 0, 1], weight.expand(64))


@pytest.mark.parametrize("T", [16, 64, 65])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_short_and_long_contexts_attend_alike(T, kv_heads):
    # 16 wide: contexts up to 64 keep their probabilities
    q, k, v, grad = tensors(torch.bfloat16, H=4, T=T)
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    found = results(lambda *qkv: attend(*qkv, None, 0.0), q, k, v, grad)
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    for ours, exact in zip(found, results(lambda *qkv: attend(*qkv, None, 0.0), q, k, v, grad), strict=True):
        assert float((ours.double() - exact).norm()) < 2.0**-7 * float(exact.norm())
