"""The Triton twin of the loss head gives what the definition gives (in Triton's interpreter)."""

import pytest
import torch
from interpreter import INTERPRETED

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.kernels import loss as kernel
from fewbits.kernels import loss_triton
from fewbits.kernels.head import fp8_gradients
from fewbits.numerics import loss as definition
from fewbits.numerics.loss import gradient_factor, linear_cross_entropy
from fewbits.numerics.quantize import quantize

pytestmark = INTERPRETED

# Relative error of a gradient: one rounding to its dtype (an ulp, because the interpreter cuts bf16 off), and in fp32 the
# exponential of a difference of up to 32, whose last bit is 2^-19 after its multiplication by log2(e).
ULP = {torch.float32: 2.0**-19, torch.float16: 2.0**-10 + 2.0**-19, torch.bfloat16: 2.0**-7}


def case(dtype, rows=9, V=300, spread=3.0, pad=0):
    wide = torch.empty(rows, V + pad).fill_(float("nan")).to(dtype)  # what lies beside the logits is not looked at
    logits = wide[:, :V]
    logits.copy_(torch.randn(rows, V) * spread)
    labels = torch.randint(V, (rows,))
    labels[::4] = -100
    labels[1], labels[2] = 0, V - 1
    return logits, labels


def assert_same(logits, labels, factor, dtype, block=128):
    losses, gradient = definition.softmax_gradient(logits.double(), labels, factor.double(), torch.float64)
    ours, mine = kernel.softmax_gradient(logits, labels, factor, dtype, block=block)
    torch.testing.assert_close(
        ours.double(), losses, rtol=2.0**-20, atol=2.0**-18
    )  # a difference of two numbers near 16
    # below the smallest normal number of fp16 an ulp is 2^-24
    least = 2.0**-24 if dtype == torch.float16 else float(factor) * 2.0**-22
    torch.testing.assert_close(mine.double(), gradient, rtol=ULP[dtype], atol=least)
    assert mine.dtype == dtype
    return mine


@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("logits_dtype", ULP, ids=str)
def test_losses_and_gradients_are_those_of_the_definition_in_fp64(logits_dtype, dtype):
    for V, block in ((300, 128), (256, 128), (7, 128), (129, 64), (1, 64)):
        logits, labels = (
            case(logits_dtype, V=V) if V > 1 else (torch.ones(3, 1).to(logits_dtype), torch.tensor([0, -100, 0]))
        )
        assert_same(logits, labels, torch.tensor(0.37), dtype, block)


def test_the_gradient_takes_the_memory_of_logits_that_are_as_wide():
    for logits_dtype, dtype, same in (
        (torch.float16, torch.bfloat16, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
    ):
        logits, labels = case(logits_dtype, pad=20)
        place = logits.data_ptr()
        gradient = assert_same(logits, labels, torch.tensor(2.0**-5), dtype)
        assert (gradient.data_ptr() == place) == same
        assert gradient.stride(0) == 320


def test_columns_beside_the_logits_are_neither_read_nor_written():
    logits, labels = case(torch.float16, V=300, pad=20)
    whole = logits.as_strided((9, 320), (320, 1))
    assert_same(logits, labels, torch.tensor(1.0), torch.float16)
    assert whole[:, 300:].isnan().all()


def test_ignored_rows_have_no_loss_and_no_gradient():
    logits, labels = case(torch.float16)
    losses, gradient = kernel.softmax_gradient(logits, labels, torch.tensor(1.0), torch.float16, block=128)
    ignored = labels == -100
    assert ignored.any()
    assert torch.equal(losses[ignored], torch.zeros(int(ignored.sum())))
    assert not gradient[ignored].any() and gradient[~ignored].any(1).all()


def test_equal_logits_have_the_exact_gradient():
    # p = 2^-8 is exact, and so is its product with a power of two in every dtype
    for dtype in ULP:
        for value in (0.0, 5.0, -60000.0):
            logits = torch.full((2, 256), value).to(dtype)
            losses, gradient = kernel.softmax_gradient(
                logits, torch.tensor([3, 255]), torch.tensor(2.0**16), torch.float32, block=64
            )
            exact = torch.full((2, 256), 2.0**8)
            exact[0, 3] = exact[1, 255] = 2.0**8 - 2.0**16
            assert torch.equal(gradient, exact)
            torch.testing.assert_close(losses, torch.full((2,), 256.0).log(), rtol=2.0**-23, atol=0)


def test_extreme_logits_neither_overflow_nor_vanish():
    for dtype in (torch.float16, torch.float32):
        logits = torch.tensor([[60000.0, -60000.0, 0.0], [-60000.0, -60000.0, -59990.0], [0.0, 1000.0, 0.0]]).to(dtype)
        labels = torch.tensor([1, 2, 1])
        losses, gradient = kernel.softmax_gradient(logits.clone(), labels, torch.tensor(1.0), torch.float32, block=64)
        exact = definition.softmax_gradient(logits.double(), labels, torch.tensor(1.0).double(), torch.float64)
        torch.testing.assert_close(losses.double(), exact[0], rtol=2.0**-22, atol=2.0**-22)
        torch.testing.assert_close(gradient.double(), exact[1], rtol=2.0**-20, atol=2.0**-22)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
def test_a_logit_that_is_not_finite_makes_a_loss_that_is_not(bad):
    logits, labels = case(torch.float16)
    logits[1, 250] = bad
    losses, _ = kernel.softmax_gradient(logits, labels, torch.tensor(1.0), torch.float16, block=128)
    assert not losses[1].isfinite() and losses[2:].isfinite().all()


def test_minus_infinity_is_a_token_that_cannot_be():
    logits, labels = case(torch.float32)
    logits[:, :128] = -torch.inf  # a whole block, the first
    labels[labels >= 0] = 200
    losses, gradient = definition.softmax_gradient(logits.clone(), labels, torch.tensor(1.0), torch.float32)
    ours, mine = kernel.softmax_gradient(logits, labels, torch.tensor(1.0), torch.float32, block=128)
    torch.testing.assert_close(ours, losses, rtol=2.0**-20, atol=2.0**-18)
    torch.testing.assert_close(mine, gradient, rtol=2.0**-18, atol=2.0**-22)


def test_a_label_that_is_no_token_makes_a_loss_of_nan_and_reads_nothing():
    for label in (-1, 300, 2**40):
        logits, labels = case(torch.float16)
        labels[3] = label
        fmt, one = Format.parse("fp8_e5m2"), torch.tensor(1.0)
        _, _, apart = kernel.softmax_codes(logits.clone(), labels, one, definition.gradient_scale(one, fmt), fmt)
        assert apart[3] == 0 and apart[1] != 0  # so that no row of a weight is looked up
        losses, _ = kernel.softmax_gradient(logits, labels, one, torch.float16, block=128)
        assert losses[3].isnan() and losses[1].isfinite()


def test_a_factor_of_two_to_the_16_scales_and_changes_nothing_else():
    logits, labels = case(torch.float32)
    _, one = kernel.softmax_gradient(logits.clone(), labels, torch.tensor(1.0), torch.float32, block=128)
    _, scaled = kernel.softmax_gradient(logits.clone(), labels, torch.tensor(2.0**16), torch.float32, block=128)
    assert torch.equal(scaled, one * 2**16)
    _, narrow = kernel.softmax_gradient(logits.clone(), labels, torch.tensor(2.0**17), torch.float16, block=128)
    assert narrow.isinf().any()  # what fp16 cannot hold shows, so that the scale backs off


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_codes_of_a_gradient_are_those_of_the_definition(name):
    fmt, factor = Format.parse(name), torch.tensor(0.37)
    scale = definition.gradient_scale(factor, fmt)
    for logits_dtype, V in ((torch.float16, 300), (torch.float32, 129), (torch.float16, 256)):
        logits, labels = case(logits_dtype, V=V, pad=20)
        labels[3] = logits[3].argmax()  # one that is expected
        logits[3, labels[3]] += 9.0
        losses, codes, apart = definition.softmax_codes(logits.clone(), labels, factor, scale, fmt)
        ours, mine, ours_apart = kernel.softmax_codes(logits, labels, factor, scale, fmt)
        # 300 codes of 3 significant bits over some 10 octaves add up in any order within 2^-24 of the sum each
        torch.testing.assert_close(ours_apart, apart, rtol=2.0**-20, atol=0)
        assert 0 < apart[3] < 0.1 * factor < 0.9 * factor < apart[1] and not apart[labels < 0].any()
        torch.testing.assert_close(ours, losses, rtol=2.0**-20, atol=2.0**-18)
        assert mine.dtype == fmt.dtype and mine.stride(0) % 64 == 0
        wide = mine.as_strided((9, mine.stride(0)), (mine.stride(0), 1))
        assert not wide[:, V:].float().any()
        # fp32 values that are 2^-19 apart round to different codes once in 2^19 / 2^mantissa times: never, in 3,000
        assert torch.equal(mine.float(), codes.float())  # of two zeros either


def test_codes_of_equal_logits_are_exact():
    fmt, factor = Format.parse("fp8_e5m2"), torch.tensor(2.0**16)
    scale = definition.gradient_scale(factor, fmt)
    logits = torch.zeros(3, 256)
    logits[2, :2] = 60.0  # the only two that there are
    _, codes, apart = kernel.softmax_codes(logits, torch.tensor([3, -100, 1]), factor, scale, fmt)
    exact = torch.full((3, 256), 2.0**8)
    exact[0, 3] = 0.0  # the target's is taken apart
    exact[1:] = 0.0
    exact[2, 0] = 2.0**15
    assert torch.equal(codes.float() * scale, exact) and apart.tolist() == [255 * 2.0**8, 0.0, 2.0**15]


def targets():
    """Codes of hidden states and of a weight, labels of which some name one token and some none, and what is taken apart."""
    generator = torch.Generator().manual_seed(0)
    N, V, D = 37, 11, 1100
    hidden, weight = (quantize(torch.randn(rows, D, generator=generator), "fp8_e4m3") for rows in (N, V))
    hidden.codes[0, :256] = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)  # every code there is
    hidden.codes[0, [0x7F, 0xFF]] = 0.0  # but for the two that are no number
    weight.codes[:, :256] = hidden.codes[0, :256]
    labels = torch.randint(V, (N,), generator=generator)
    labels[::5] = definition.IGNORE
    apart = torch.where(torch.rand(N, generator=generator) < 0.5, 2.0**-9, 0.0)
    return hidden, weight, labels, apart.where(labels != definition.IGNORE, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_targets_are_taken_from_the_gradient_of_hidden_states_in_one_rounding(dtype):
    _, weight, labels, apart = targets()
    product = torch.randn(37, 1100, generator=torch.Generator().manual_seed(1)) * 2.0**-9
    found, wanted = torch.empty(2, 37, 1100, dtype=dtype)
    kernel.hidden_less_targets(product, weight, labels, apart, found)
    definition.hidden_less_targets(product, weight, labels, apart, wanted)
    if dtype == torch.bfloat16:  # to which the interpreter cuts instead of rounding
        torch.testing.assert_close(found, wanted, rtol=2.0**-7, atol=0)
    else:
        assert torch.equal(found, wanted)
    kernel.hidden_less_targets(product[:0], weight, labels[:0], apart[:0], found[:0])


@pytest.mark.parametrize("deterministic", [False, True])
def test_targets_are_taken_from_the_gradient_of_the_weight_row_by_row(deterministic, monkeypatch):
    hidden, _, labels, apart = targets()
    wide = torch.randn(16, 1100, generator=torch.Generator().manual_seed(1)) * 2.0**-9
    found, wanted = wide.clone(), wide.double()
    if deterministic:  # its additions come in any order
        monkeypatch.setattr(loss_triton, "weight_less_targets_kernel", None)
    torch.use_deterministic_algorithms(deterministic)
    try:
        kernel.weight_less_targets_(found, hidden, labels, apart)
    finally:
        torch.use_deterministic_algorithms(False)
    definition.weight_less_targets_(wanted, hidden, labels, apart.double())
    # 37 additions at most to numbers of 2^-9 times 5, each off by 2^-24 of the sum
    assert float((found - wanted).abs().max()) < 37 * 2.0**-24 * 40 * 2.0**-9
    assert torch.equal(found[11:], wide[11:])


@pytest.mark.parametrize("turned", ["", "hidden", "weight"])
def test_gradients_of_an_fp8_head_are_those_of_the_definition_wherever_its_operands_lie(turned):
    hidden, weight, labels = head_case(torch.float16, 32, 64, 48)
    given = hidden, weight, labels, torch.tensor(2.0**-5)
    wanted = fp8_gradients(*given, logits=torch.float16, kernel=False)
    place = {"": slice(0), "hidden": slice(0, 1), "weight": slice(1, 2)}[turned]
    moved = list(given)
    moved[place] = [x.t().contiguous().t() for x in given[place]]  # column by column
    found = fp8_gradients(*moved, logits=torch.float16, kernel=True)
    for one, other in zip(found, wanted, strict=True):
        assert float((one.float() - other.float()).norm()) < 2.0**-8 * float(other.float().norm())


def test_losses_alone_are_the_same():
    for dtype in ULP:
        logits, labels = case(dtype)
        alone = kernel.softmax_losses(logits, labels)
        torch.testing.assert_close(alone, definition.softmax_losses(logits, labels), rtol=2.0**-20, atol=2.0**-18)
        assert torch.equal(alone, kernel.softmax_gradient(logits, labels, torch.tensor(1.0), torch.float32)[0])


def test_what_does_not_fit_is_named():
    labels, one = torch.zeros(4, dtype=torch.int64), torch.ones(())
    for logits, word in (
        (torch.zeros(4, 4).double(), "float64"),
        (torch.zeros(4, 4).t()[:, ::2], "strides"),
        (one, "shape"),
    ):
        with pytest.raises(FewbitsError, match=word):
            kernel.softmax_gradient(logits, labels, one, torch.float32)


def head_case(dtype, N=200, V=70, D=16):
    hidden, weight = torch.randn(N, D).to(dtype), (0.3 * torch.randn(V, D)).to(dtype)
    labels = torch.randint(V, (N,))
    labels[::7] = -100
    return hidden, weight, labels


def gradients(hidden, weight, labels, factor, **how):
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with gradient_factor(factor):
        total = linear_cross_entropy(a, b, labels, **how)
    total.backward(factor.to(total.dtype))
    return total.detach().double(), a.grad.double(), b.grad.double()


@pytest.mark.parametrize("piece_bytes", [1 << 30, 1 << 14], ids=["one piece", "many"])
@pytest.mark.parametrize(
    ("dtype", "logits"),
    [(torch.bfloat16, torch.float16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
     (torch.float16, torch.float16), (torch.float32, torch.float32)],
    ids=str,
)  # fmt: skip
def test_the_head_of_a_device_has_the_gradients_of_fp64(monkeypatch, dtype, logits, piece_bytes):
    monkeypatch.setitem(definition._PIECE_BYTES, "cuda", piece_bytes)
    hidden, weight, labels = head_case(dtype)
    factor = torch.tensor(1 / 128)
    ours = gradients(hidden, weight, labels, factor, twin=kernel.DeviceHead(logits))
    exact = gradients(hidden.double(), weight.double(), labels, factor.double())
    # logits reach 8 here: half an ulp of 4 to 8 is 2^-9 in fp16 and 2^-6 in bf16, and moves a probability by as much;
    # the gradient is rounded too (cut off in bf16 by the interpreter, 2^-7), and so is its product
    rounding = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6, torch.float32: 0}[logits]
    tolerance = rounding + {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float32: 2.0**-17}[dtype]
    assert abs(ours[0] - exact[0]) < (rounding + 2.0**-20) * len(labels) / 4
    for mine, other in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_an_evaluation_rounds_no_logits():
    hidden, weight, labels = head_case(torch.bfloat16)
    with torch.no_grad():
        ours = linear_cross_entropy(hidden, weight, labels, twin=kernel.DeviceHead(torch.float16))
        exact = linear_cross_entropy(hidden.double(), weight.double(), labels)
    torch.testing.assert_close(ours.double(), exact, rtol=2.0**-20, atol=0)


def test_without_the_kernel_the_same_matmuls_go_with_the_definition():
    hidden, weight, labels = head_case(torch.bfloat16)
    factor = torch.tensor(1 / 128)
    ours = gradients(hidden, weight, labels, factor, twin=kernel.DeviceHead(torch.float16, kernel=False))
    theirs = gradients(hidden, weight, labels, factor, twin=kernel.DeviceHead(torch.float16))
    torch.testing.assert_close(ours[0], theirs[0], rtol=2.0**-20, atol=0)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, other, rtol=2.0**-6, atol=2.0**-6 * float(other.abs().max()))
