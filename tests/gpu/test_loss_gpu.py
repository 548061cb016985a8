"""The loss head on a GPU: the kernel against its definition, the whole head against fp64, logits in 16 bits."""

from __future__ import annotations

import math

import pytest
import torch

import fewbits
from fewbits.formats import Format
from fewbits.kernels import dispatch
from fewbits.kernels import loss as kernel
from fewbits.kernels.head import fp8_gradients
from fewbits.kernels.loss import DeviceHead, aligned_rows, multiply
from fewbits.nn.head import loss_sum
from fewbits.numerics import loss as definition
from fewbits.numerics.loss import gradient_factor, linear_cross_entropy
from fewbits.numerics.quantize import quantize

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Half an ulp of the gradient's dtype, and in fp32 (as part of the others too) the approximate exponential of a difference
# of up to 32, whose last bit is 2^-19 after its multiplication by log2(e).
HALF_ULP = {FP32: 2.0**-19, FP16: 2.0**-11 + 2.0**-19, BF16: 2.0**-8 + 2.0**-19}


@pytest.fixture(autouse=True)
def exact_fp32_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def case(dtype, rows=64, V=50257):
    logits = aligned_rows(rows, V, dtype, torch.device("cuda"))
    logits.copy_(torch.randn(rows, V, device="cuda") * 3)
    labels = torch.randint(V, (rows,), device="cuda")
    labels[::4] = -100
    labels[1], labels[2] = 0, V - 1
    return logits, labels


def test_the_kernel_is_what_runs():
    assert dispatch.loss_execution(torch.device("cuda")).value == "kernel"
    assert dispatch.logits_format("auto", BF16, torch.device("cuda")).value == "fp16"
    assert dispatch.logits_format("auto", FP32, torch.device("cuda")).value == "fp32"


@pytest.mark.parametrize("V", [50304, 50257, 6400, 300, 1], ids=str)
@pytest.mark.parametrize(
    ("logits_dtype", "dtype"), [(FP16, BF16), (FP32, BF16), (FP16, FP16), (BF16, BF16), (FP32, FP32)], ids=str
)
def test_the_kernel_is_the_definition_in_fp64(logits_dtype, dtype, V):
    logits, labels = case(logits_dtype, V=V)
    factor = torch.tensor(0.37, device="cuda")
    exact = definition.softmax_gradient(logits.double(), labels, factor.double(), torch.float64)
    alone = kernel.softmax_losses(logits, labels)
    losses, gradient = kernel.softmax_gradient(logits, labels, factor, dtype)
    # exponentials and logarithms of the device are good to about 2^-22, and so is a probability near 1, less 1
    for found in (losses, alone):
        torch.testing.assert_close(found.double(), exact[0], rtol=2.0**-20, atol=2.0**-19)
    least = 2.0**-21 * float(factor) + (2.0**-25 if dtype == FP16 else 0)  # and half of the smallest fp16
    torch.testing.assert_close(gradient.double(), exact[1], rtol=HALF_ULP[dtype], atol=least)


@pytest.mark.parametrize("V", [50304, 50257, 6400, 300], ids=str)
def test_codes_of_the_gradient_are_those_of_the_definition(V):
    logits, labels = case(FP16, V=V)
    fmt, factor = Format.parse("fp8_e5m2"), torch.tensor(0.37, device="cuda")
    scale = definition.gradient_scale(factor, fmt)
    losses, codes, _ = definition.softmax_codes(logits.clone(), labels, factor, scale, fmt)
    ours, mine, ours_apart = kernel.softmax_codes(logits, labels, factor, scale, fmt)
    torch.testing.assert_close(ours, losses, rtol=2.0**-20, atol=2.0**-19)
    # fp32 values that are 2^-19 apart have other codes when a boundary lies between them: one in 2^16, a step of 2^-2
    assert float((mine.float() != codes.float()).float().mean()) < 2.0**-14
    torch.testing.assert_close(mine.float(), codes.float(), rtol=2.0**-2, atol=fmt.smallest_subnormal)
    torch.testing.assert_close(ours_apart, mine.float().sum(1) * scale.view(()), rtol=2.0**-18, atol=0)


@pytest.mark.parametrize(("N", "V"), [(4096, 50257), (1024, 6400), (1000, 320)], ids=str)
def test_an_fp8_head_multiplies_the_codes_of_its_operands_in_fp8(N, V):
    hidden, weight = torch.randn(N, 256, device="cuda").to(BF16), (0.1 * torch.randn(V, 256, device="cuda")).to(BF16)
    labels = torch.randint(V, (N,), device="cuda")
    factor = torch.tensor(1 / N, device="cuda")
    found = fp8_gradients(hidden, weight, labels, factor, logits=FP16, kernel=True)
    x, w = (quantize(matrix, "fp8_e4m3").dequantize() for matrix in (hidden, weight))
    fmt = Format.parse("fp8_e5m2")
    scale = definition.gradient_scale(factor, fmt)
    losses, codes, apart = definition.softmax_codes((x @ w.t()).half(), labels, factor, scale, fmt)
    g = codes.float() * scale
    # logits to 8: half an ulp of fp16 is 2^-9, and Hopper's fast accumulation keeps 14 bits of a sum, 2^-11 of 8
    torch.testing.assert_close(found[0], losses, rtol=0, atol=2.0**-7)
    # a logit that is off by 2^-8 moves one code in 2^6 to its neighbour; in sums of hundreds that is 2^-8 of their norm
    from_hidden = (g.t() @ x).index_add_(0, labels, -apart.unsqueeze(1) * x)
    for mine, exact in ((found[1], g @ w - apart.unsqueeze(1) * w[labels]), (found[2], from_hidden)):
        assert float((mine.float() - exact).norm() / exact.norm()) < 2.0**-6


def test_targets_are_taken_from_both_gradients_as_defined():
    """Powers of two of bf16 are exact; the sums of a row come in any order."""
    N, V, D = 4000, 300, 1100
    hidden, weight = (quantize(torch.randn(rows, D, device="cuda"), "fp8_e4m3") for rows in (N, V))
    labels = torch.randint(V, (N,), device="cuda")
    labels[::5] = definition.IGNORE
    apart = torch.where((torch.rand(N, device="cuda") < 0.5) & (labels != definition.IGNORE), 2.0**-9, 0.0)
    product, total = (2.0**-9 * torch.randn(rows, D, device="cuda") for rows in (N, V))
    found, wanted = torch.empty(2, N, D, dtype=torch.bfloat16, device="cuda")
    kernel.hidden_less_targets(product, weight, labels, apart, found)
    definition.hidden_less_targets(product, weight, labels, apart, wanted)
    assert torch.equal(found, wanted)
    wide = total.double()
    kernel.weight_less_targets_(total, hidden, labels, apart)
    definition.weight_less_targets_(wide, hidden, labels, apart.double())
    assert float((total - wide).abs().max()) < 64 * 2.0**-24 * 64 * 2.0**-9  # some 7 additions to a few times 2^-9


@pytest.mark.parametrize("block", [2048, 16384])
def test_how_a_row_is_read_does_not_matter(block):
    logits, labels = case(FP16)
    factor = torch.tensor(2.0**16, device="cuda")
    ours = kernel.softmax_gradient(logits.clone(), labels, factor, BF16)
    theirs = kernel.softmax_gradient(logits.clone(), labels, factor, BF16, block=block, warps=4)
    torch.testing.assert_close(ours[0], theirs[0], rtol=2.0**-20, atol=0)
    torch.testing.assert_close(
        ours[1], theirs[1], rtol=2.0**-7, atol=0
    )  # sums in another order may round to the neighbour


def test_the_gradient_lies_over_the_logits_and_a_second_run_gives_the_same_bits():
    logits, labels = case(FP16, rows=2048)
    factor = torch.tensor(1.0, device="cuda")
    losses, gradient = kernel.softmax_gradient(logits.clone(), labels, factor, BF16)
    for _ in range(3):
        again = logits.clone()
        place = again.data_ptr()
        other, mine = kernel.softmax_gradient(again, labels, factor, BF16)
        assert mine.data_ptr() == place
        assert torch.equal(losses, other) and torch.equal(gradient, mine)


def test_logits_beyond_fp16_make_a_loss_that_is_not_finite_and_the_step_is_withheld():
    model = fewbits.prepare(
        fewbits.Transformer(fewbits.ModelConfig(vocab_size=512, n_layer=1, n_head=2, n_embd=64)), "bf16"
    )
    model = model.cuda()
    with torch.no_grad():
        model.norm.weight.fill_(2.0**18)
    step = fewbits.Step(model, fewbits.AdamW(model.parameters(), lr=1e-3), "bf16")
    before = model.embed.weight.clone()
    ids = torch.randint(512, (2, 64), device="cuda")
    result = step([{"input_ids": ids, "labels": ids}])
    assert not torch.isfinite(result.loss) and not result.applied
    assert torch.equal(model.embed.weight, before)


def head_case(dtype, N=4096, D=256, V=1000):
    hidden = torch.randn(N, D, device="cuda").to(dtype)
    weight = (torch.randn(V, D, device="cuda") * (3 / math.sqrt(D))).to(dtype)
    labels = torch.randint(V, (N,), device="cuda")
    labels[::7] = -100
    return hidden, weight, labels


def gradients(hidden, weight, labels, factor, known=True, **how):
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with gradient_factor(factor):
        total = linear_cross_entropy(a, b, labels, **how)
    total.backward(factor.to(total.dtype)) if known else (total * factor.to(total.dtype)).backward()
    return total.detach().double(), a.grad.double(), b.grad.double()


def relative(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("V", [1000, 1024], ids=str)
@pytest.mark.parametrize("piece_bytes", [1 << 30, 1 << 20], ids=["one piece", "many"])
@pytest.mark.parametrize(
    ("dtype", "logits"), [(BF16, FP16), (BF16, FP32), (BF16, BF16), (FP16, FP16), (FP16, FP32), (FP32, FP32)], ids=str
)
def test_the_head_has_the_gradients_of_fp64(monkeypatch, dtype, logits, piece_bytes, V):
    monkeypatch.setitem(definition._PIECE_BYTES, "cuda", piece_bytes)
    data = head_case(dtype, V=V)
    factor = torch.tensor(16.0, device="cuda")  # as with a loss scale: fp16 gradients of 1e-7 would be subnormal
    ours = gradients(*data, factor, twin=DeviceHead(logits))
    exact = gradients(data[0].double(), data[1].double(), data[2], factor.double())
    # Logits of 4 to 8 are off by half an ulp at most (2^-9 in fp16, 2^-6 in bf16), those of 8 to 16 by twice that; a
    # probability by as much relatively. Then one rounding of the logits' gradient and one of the product, and errors that
    # are independent: their norm stays below the sum of the bounds.
    rounding = {FP16: 2.0**-8, BF16: 2.0**-5, FP32: 0.0}[logits]
    for mine, other in zip(ours[1:], exact[1:], strict=True):
        assert relative(mine, other) < rounding + 2 * HALF_ULP[dtype]
    assert abs(float(ours[0] - exact[0])) < (rounding / 10 + 2.0**-20) * float(exact[0])


def test_fp16_logits_do_not_bias_the_loss():
    # Rounding a logit x adds noise of variance ulp(x)^2 / 12 and mean 0. Half of the variance, weighted by probability, is
    # what the mean loss gains: below (2^-7)^2 / 24 = 2.6e-6 nats for logits under 16. The mean over N tokens scatters by
    # the deviation of the target's and the sum's noise, at most 2^-7 sqrt(2 / 12 / N) = 7e-5 here; four of those.
    N = 2048
    hidden, weight, labels = head_case(BF16, N=N, D=768, V=50304)
    labels[:] = torch.randint(50304, (N,), device="cuda")
    assert float((hidden.float() @ weight.float().t()).amax()) < 32
    exact = linear_cross_entropy(hidden.double(), weight.double(), labels) / N
    found = DeviceHead(FP16).gradients(hidden, weight, labels, torch.tensor(1.0, device="cuda"))[0].double().mean()
    assert abs(float(found - exact)) < 2.6e-6 + 4 * 2.0**-7 * math.sqrt(2 / 12 / N)


def test_who_multiplies_the_loss_himself_gets_the_same_gradients():
    data = head_case(BF16)
    factor = torch.tensor(2.0**-12, device="cuda")
    ours = gradients(*data, factor, twin=DeviceHead(FP16))
    theirs = gradients(*data, factor, known=False, twin=DeviceHead(FP16))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    unannounced = [x.clone().requires_grad_() for x in data[:2]]
    (loss_sum(unannounced[0].unsqueeze(0), unannounced[1], data[2], False, None) * factor).backward()
    for mine, other in zip((x.grad.double() for x in unannounced), ours[1:], strict=True):
        assert relative(mine, other) < 2 * HALF_ULP[BF16]


@pytest.mark.parametrize("kernel_runs", [True, False])
def test_a_vocabulary_that_is_no_multiple_of_64_learns_as_the_padded_one(kernel_runs):
    hidden, weight, labels = head_case(BF16, V=1001)
    padded = torch.cat((weight, torch.zeros(23, weight.shape[1], device="cuda", dtype=BF16)))
    factor = torch.tensor(1 / 4096, device="cuda")
    ours = DeviceHead(FP16, kernel_runs).gradients(hidden, weight, labels, factor)
    # the padded tokens have logits of 0 and take their share of the softmax: compare with the definition over them instead
    logits = multiply(hidden.half(), padded.half().t(), torch.empty(4096, 1024, dtype=FP16, device="cuda"))
    logits[:, 1001:] = -torch.inf
    losses, gradient = definition.softmax_gradient(logits, labels, factor, BF16)
    assert not gradient[:, 1001:].any()
    torch.testing.assert_close(ours[0], losses, rtol=2.0**-18, atol=2.0**-18)
    assert relative(ours[1].double(), gradient.double() @ padded.double()) < 2 * HALF_ULP[BF16]
    assert relative(ours[2].double(), (gradient.double().t() @ hidden.double())[:1001]) < 2 * HALF_ULP[BF16]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "bf16, logits=fp32", "bf16, logits=bf16"])
def test_an_evaluation_takes_fp32_logits(precision):
    config = fewbits.ModelConfig(vocab_size=1001, context=64, n_layer=1, n_head=2, n_embd=64)
    model = fewbits.prepare(fewbits.Transformer(config), precision).cuda().eval()
    ids = torch.randint(1001, (4, 64), device="cuda")
    with torch.no_grad():
        found = model.loss_sum({"input_ids": ids, "labels": ids})
        hidden = model.hidden(ids).double().flatten(0, 1)
        exact = linear_cross_entropy(hidden, model.head_weight.double(), ids.flatten())
    assert float(found) == pytest.approx(float(exact), rel=2.0**-18)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("way", [kernel._in_place, kernel._added], ids=lambda way: way.__name__)
def test_fp32_sums_of_16_bit_products_are_added_exactly(dtype, way):
    # integers below 2^24 in every order: exact, and strided as the head has them
    a = aligned_rows(512, 300, dtype, torch.device("cuda")).copy_(torch.randint(-8, 9, (512, 300), device="cuda"))
    b = torch.randint(-8, 9, (512, 128), device="cuda").to(dtype)
    total = torch.full((300, 128), float("nan"), device="cuda")
    for index in range(3):
        way(a.t(), b, total, index > 0)
    assert torch.equal(total.double(), 3 * (a.double().t() @ b.double()))


@pytest.mark.parametrize("beside", [float("nan"), float("inf")], ids=str)
def test_what_lies_beside_the_logits_enters_no_product(beside):
    wide = torch.full((256, 1024), beside, dtype=BF16, device="cuda")
    gradient = wide[:, :1001].copy_(torch.randn(256, 1001, device="cuda"))
    weight, hidden = torch.randn(1001, 64, device="cuda").to(BF16), torch.randn(256, 64, device="cuda").to(BF16)
    assert multiply(gradient, weight, torch.empty(256, 64, dtype=BF16, device="cuda")).isfinite().all()
    assert multiply(gradient.t(), hidden, torch.empty(1001, 64, device="cuda")).isfinite().all()


def test_the_head_takes_less_memory_than_one_copy_of_fp32_logits():
    hidden, weight, labels = head_case(BF16, N=8192, D=64, V=50304)
    factor = torch.tensor(1.0, device="cuda")
    DeviceHead(FP16).gradients(hidden, weight, labels, factor)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    DeviceHead(FP16).gradients(hidden, weight, labels, factor)
    assert torch.cuda.max_memory_allocated() - held < 0.6 * 4 * 8192 * 50304
