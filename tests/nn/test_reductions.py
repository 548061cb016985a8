"""Sums over tokens are at least fp32 inside, whatever the storage format."""

from __future__ import annotations

import pytest
import torch

import fewbits
from fewbits.nn.attention import attend
from fewbits.nn.embedding import Embedding
from fewbits.nn.linear import Linear
from fewbits.nn.norm import LayerNorm, RMSNorm
from fewbits.numerics import loss
from fewbits.numerics.loss import gradient_factor, linear_cross_entropy, piece_rows, softmax_gradient

ROWS = 32_768
# One rounding to the format (half an ulp, 2^-9 of the value in bf16, 2^-12 in fp16) plus an fp32 sum of 32k terms, whose
# error stays below 2^-12 of the sum of magnitudes; a 16-bit sum would be off by 10 % and more.
HALF_ULP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def gradient(module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    module(x).backward(grad)
    return {name: p.grad.double() for name, p in module.named_parameters()}


def close(narrow: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    scale = exact.abs().clamp(min=exact.abs().mean())
    assert float(((narrow - exact) / scale).abs().max()) < 2 * HALF_ULP[dtype] + 2.0**-11


@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm, Linear], ids=lambda k: k.__name__)
def test_weight_gradients_over_32k_rows_equal_fp64_up_to_one_rounding(kind, dtype):
    torch.manual_seed(0)
    module = (kind(16, 16) if kind is Linear else kind(16)).to(dtype)
    # a mean that is not zero, so that the sums grow and a 16-bit sum would stop growing
    x, grad = (torch.randn(ROWS, 16) + 0.5).to(dtype), (0.01 * torch.rand(ROWS, 16)).to(dtype)
    exact = (torch.nn.Linear(16, 16) if kind is Linear else kind.__mro__[1](16)).double()
    exact.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    if kind is RMSNorm:
        exact.eps = torch.finfo(torch.float32).eps
    narrow, wide = gradient(module, x, grad), gradient(exact, x.double(), grad.double())
    for name in wide:
        close(narrow[name], wide[name], dtype)


@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_embedding_gradient_of_5000_ones_is_5000_rounded_once(dtype):
    table = Embedding(4, 3).to(dtype)
    table(torch.zeros(5000, dtype=torch.int64)).backward(torch.ones(5000, 3, dtype=dtype))
    assert torch.equal(table.weight.grad[0], torch.full((3,), 5000.0).to(dtype))
    assert torch.equal(table.weight.grad[1:], torch.zeros(3, 3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF_ULP], ids=str)
def test_norms_equal_torch_in_every_dtype(dtype):
    torch.manual_seed(1)
    x = torch.randn(7, 5, 32)
    for ours, theirs in (
        (LayerNorm(32), torch.nn.LayerNorm(32)),
        (RMSNorm(32, eps=1e-5), torch.nn.RMSNorm(32, eps=1e-5)),
    ):
        a, b = x.to(dtype, copy=True).requires_grad_(), x.to(dtype).double().requires_grad_()
        ours.to(dtype)(a).sum().backward()
        theirs.double()(b).sum().backward()
        torch.testing.assert_close(ours(a).double(), theirs(b), rtol=2 * HALF_ULP.get(dtype, 1e-6), atol=1e-6)
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=0.02, atol=0.01 if dtype in HALF_ULP else 1e-5)


def test_scores_are_scaled_before_they_overflow_fp16():
    # q = k = 40 at 64 wide: the product is 102,400, beyond fp16; scaled it is 12,800
    q = torch.full((1, 1, 4, 64), 40.0, dtype=torch.float16)
    v = torch.randn(1, 1, 4, 64).half()
    y = attend(q, q, v, None, 0.0)
    assert torch.isfinite(y).all()
    assert torch.equal(y[:, :, 0], v[:, :, 0])


def exact_loss(hidden, weight, labels):
    return torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF_ULP], ids=str)
def test_loss_in_pieces_equals_the_whole_in_fp64(dtype, native):
    torch.manual_seed(2)
    hidden, weight = torch.randn(300, 16).to(dtype), (0.3 * torch.randn(50, 16)).to(dtype)
    labels = torch.randint(50, (300,))
    labels[::7] = -100
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    c, d = hidden.double().requires_grad_(), weight.double().requires_grad_()
    factor = torch.tensor(1 / 256, dtype=torch.float64)
    with gradient_factor(factor):
        total = linear_cross_entropy(a, b, labels, native_bf16=native)
    (total * factor.to(total.dtype)).backward()
    exact = exact_loss(c, d, labels)
    (exact * factor).backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * HALF_ULP.get(dtype, 0))
    torch.testing.assert_close(total.double(), exact, rtol=min(tolerance, 1e-5), atol=0)
    for narrow, wide in ((a, c), (b, d)):
        torch.testing.assert_close(
            narrow.grad.double(), wide.grad, rtol=tolerance, atol=tolerance * float(wide.grad.abs().max())
        )
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(a, b, labels, native_bf16=native).double(), exact, rtol=min(tolerance, 1e-5), atol=0
        )


def test_a_negative_label_that_is_not_the_ignored_one_is_an_error_and_not_token_0():
    # -1 is what others ignore; counting it as token 0 would train on it without a word
    hidden = torch.randn(2, 4, requires_grad=True)
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, torch.randn(3, 4), torch.tensor([1, -1]))


def test_gradients_are_right_when_no_factor_was_announced():
    torch.manual_seed(3)
    hidden, weight, labels = torch.randn(70, 8), torch.randn(11, 8), torch.randint(11, (70,))
    a, b = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    (linear_cross_entropy(a, weight, labels) / 70).backward()
    (exact_loss(b, weight, labels) / 70).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def scaled_in_backward(monkeypatch):
    """How often the head's backward had to ask for the ratio of what arrived and what was announced."""
    asked = []
    same = loss._same
    monkeypatch.setattr(loss, "_same", lambda grad, factor: same(grad, factor) or asked.append(1) or False)
    return asked


def test_the_announced_number_itself_is_known_when_it_arrives(monkeypatch):
    asked = scaled_in_backward(monkeypatch)
    hidden, weight, labels = torch.randn(70, 8), torch.randn(11, 8), torch.randint(11, (70,))
    factor = torch.tensor(3.0)
    found = []
    for backward in (
        lambda total: total.backward(factor),
        lambda total: total.backward(factor.expand_as(total)),
        lambda total: (total + 5).backward(factor),
        lambda total: (total * factor).backward(),
        lambda total: (3 * total).backward(),
    ):
        a = hidden.clone().requires_grad_()
        with gradient_factor(factor):
            backward(linear_cross_entropy(a, weight, labels))
        found.append(a.grad)
    assert all(torch.equal(other, found[0]) for other in found)
    assert len(asked) == 2  # whoever multiplies the loss himself


def test_a_step_announces_the_very_number_that_arrives(monkeypatch):
    asked = scaled_in_backward(monkeypatch)
    model = fewbits.prepare(
        fewbits.Transformer(fewbits.ModelConfig(vocab_size=64, context=8, n_layer=1, n_head=1, n_embd=16)), "bf16"
    )
    step = fewbits.Step(model, fewbits.AdamW(model.parameters(), lr=1e-3), "bf16")
    ids = torch.randint(64, (2, 8))
    step([{"input_ids": ids, "labels": ids}] * 2)
    assert not asked


@pytest.mark.parametrize("logits", HALF_ULP, ids=str)
def test_logits_in_16_bits_are_rounded_once_and_only_for_gradients(logits):
    hidden, weight, labels = torch.randn(70, 8).bfloat16(), torch.randn(11, 8).bfloat16(), torch.randint(11, (70,))
    rounded = (hidden.float() @ weight.float().t()).to(logits).double()
    exact = torch.nn.functional.cross_entropy(rounded, labels, reduction="sum")
    a = hidden.clone().requires_grad_()
    torch.testing.assert_close(
        linear_cross_entropy(a, weight, labels, logits=logits).double(), exact, rtol=1e-6, atol=0
    )
    with torch.no_grad():
        found = linear_cross_entropy(a, weight, labels, logits=logits).double()
    torch.testing.assert_close(found, exact_loss(hidden.double(), weight.double(), labels), rtol=1e-6, atol=0)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("kept", [0, 16 << 20])
def test_head_gradient_of_a_large_vocabulary_is_summed_in_fp32_over_pieces(monkeypatch, native, kept):
    # 4,096 rows that all push one row of the weight by 2^-9: a bf16 sum over 64 pieces would round at every piece
    hidden = torch.ones(4096, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(300, 4, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(300, (4096,), generator=torch.Generator().manual_seed(0))
    assert piece_rows(4096, 300, "cpu") < 4096
    monkeypatch.setattr(loss, "_GRADIENT_BYTES", kept)
    linear_cross_entropy(hidden, weight, labels, native_bf16=native).backward()
    count = torch.bincount(labels, minlength=300).double()
    p = torch.full((), 1 / 300).bfloat16().double()  # what a row that is no target receives, rounded as the gradient is
    q = torch.tensor(1 / 300 - 1).bfloat16().double()
    exact = (count * q + (4096 - count) * p).unsqueeze(1).expand(300, 4)
    torch.testing.assert_close(weight.grad.double(), exact, rtol=2.0**-8, atol=2.0**-10)


def test_a_target_that_the_softmax_rounds_to_zero_has_its_loss_all_the_same():
    logits = torch.tensor([[0.0, 1000.0], [3.0, -2.0], [-500.0, 400.0]])
    labels = torch.tensor([0, 0, 1])
    losses, gradient = softmax_gradient(logits.clone(), labels, torch.ones(()), torch.float32)
    exact = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(losses.double(), exact, rtol=2.0**-22, atol=2.0**-22)
    torch.testing.assert_close(gradient[0], torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize(("kept", "pieces"), [(128 * 40 * 2 - 1, 2), (128 * 40 * 2, 0)])
def test_gradients_of_all_logits_are_kept_in_bf16_up_to_a_bound_only(monkeypatch, kept, pieces):
    sums = []
    add_ = loss._Product.add_
    monkeypatch.setattr(loss._Product, "add_", lambda self, *tensors: sums.append(add_(self, *tensors)))
    monkeypatch.setattr(loss, "_GRADIENT_BYTES", kept)
    hidden, weight = torch.randn(128, 8).bfloat16().requires_grad_(), torch.randn(40, 8).bfloat16()
    linear_cross_entropy(hidden, weight, torch.randint(40, (128,)), native_bf16=True)
    assert len(sums) == pieces


def test_the_logits_of_the_whole_batch_never_exist(monkeypatch):
    seen = []

    def spy(logits, labels, factor, dtype):
        seen.append(logits.shape[0])
        return softmax_gradient(logits, labels, factor, dtype)

    hidden = torch.randn(1024, 8, requires_grad=True)
    linear_cross_entropy(hidden, torch.randn(64, 8), torch.randint(64, (1024,)), pieces=spy)
    assert max(seen) <= 256 and sum(seen) == 1024
