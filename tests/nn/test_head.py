"""Which head runs where, and that choices which must not matter do not."""

from __future__ import annotations

import pytest
import torch

import fewbits
from fewbits import FewbitsError, ModelConfig, Transformer
from fewbits.kernels import dispatch, head
from fewbits.nn.head import loss_sum
from fewbits.numerics import loss as loss_definition
from fewbits.numerics.loss import gradient_factor
from fewbits.numerics.quantize import quantize

CPU = torch.device("cpu")


def test_a_cpu_runs_the_definition_on_logits_that_are_not_rounded(monkeypatch):
    monkeypatch.setattr(dispatch, "_choices", {})
    choice = dispatch.loss_execution(CPU)
    assert choice.value == "definition" and "CUDA" in choice.reason
    assert dispatch.logits_format("auto", torch.bfloat16, CPU).value == "fp32"
    assert dispatch.logits_format("auto", torch.float64, CPU).value == "fp64"
    assert dispatch.logits_format("fp16", torch.bfloat16, CPU) == ("fp16", "asked for")
    recorded = dispatch.recorded()
    assert {"loss on cpu", "logits of bf16 on cpu"} <= set(recorded)
    monkeypatch.setattr(dispatch, "_choices", {})
    dispatch.replay(recorded)
    assert dispatch.recorded() == recorded


def test_a_gpu_with_triton_runs_the_kernel_on_fp16_logits(monkeypatch):
    cuda = torch.device("cuda")
    for there, value in ((True, "kernel"), (False, "definition")):
        monkeypatch.setattr(dispatch, "_choices", {})
        monkeypatch.setattr(dispatch.cuda_twin, "installed", lambda there=there: there)
        assert dispatch.loss_execution(cuda).value == value
        assert dispatch.logits_format("auto", torch.bfloat16, cuda).value == "fp16"
        assert dispatch.logits_format("auto", torch.float32, cuda).value == "fp32"


def test_prepare_hands_the_logits_of_the_precision_to_the_model_and_unprepare_takes_them_back():
    from fewbits.nn.prepare import unprepare

    config = ModelConfig(vocab_size=61, context=16, n_layer=1, n_head=2, n_embd=16)
    ids = torch.randint(61, (2, 16))
    losses = {}
    for precision in ("bf16", "bf16, logits=fp32", "bf16, logits=fp16", "bf16, logits=bf16"):
        model = fewbits.prepare(Transformer(config), precision)
        losses[precision] = model.loss_sum({"input_ids": ids, "labels": ids}).item()
        with torch.no_grad():  # an evaluation is the same for all of them
            losses["evaluation"] = model.loss_sum({"input_ids": ids, "labels": ids}).item()
            assert losses["evaluation"] == pytest.approx(losses["bf16"], rel=1e-6)
    assert unprepare(model).logits == "auto"
    assert losses["bf16, logits=fp32"] == losses["bf16"]
    assert len(set(losses.values())) >= 3  # rounding shows, here already
    # 32 losses whose logits, under 1, are off by 2^-12 in fp16 and by 2^-9 in bf16 at most
    assert losses["bf16, logits=fp16"] == pytest.approx(losses["bf16"], abs=32 * 2 * 2.0**-12)
    assert losses["bf16, logits=bf16"] == pytest.approx(losses["bf16"], abs=32 * 2 * 2.0**-9)


def test_a_head_kept_in_fp32_takes_hidden_states_in_bf16():
    hidden, weight = torch.randn(2, 8, 16).bfloat16().requires_grad_(), torch.randn(30, 16, requires_grad=True)
    labels = torch.randint(30, (2, 8))
    loss_sum(hidden, weight, labels, False, None).backward()
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def gradients_of(head, hidden, weight, labels, factor=2.0**-5):
    """(loss sum, gradient of hidden, gradient of weight) in fp64, as a step announces its factor."""
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    factor = torch.tensor(factor)
    with gradient_factor(factor):
        total = loss_sum(a, b, labels, False, None, head=head)
    total.backward(factor)
    return total.detach().double(), a.grad.double(), b.grad.double()


def fp8_case(B=3, T=40, V=70, D=32):
    hidden, weight = torch.randn(B, T, D).bfloat16(), (0.3 * torch.randn(V, D)).bfloat16()
    labels = torch.randint(V, (B, T))
    labels[:, ::7] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("kept", [0, 3, 100], ids=["by one", "three by three", "all at once"])
def test_an_fp8_head_multiplies_the_codes_of_its_operands_in_pieces_of_which_some_are_kept(monkeypatch, kept):
    V = 70
    monkeypatch.setitem(loss_definition._PIECE_BYTES, "cpu", 1 << 12)  # 64 rows
    monkeypatch.setitem(head._KEPT_BYTES, "cpu", kept * 64 * V)
    hidden, weight, labels = fp8_case(T=150, V=V)  # 450 tokens: seven pieces and a part of one
    hidden[:, 1::5] *= 3  # some targets are expected
    labels[:, 1::5] = (hidden.float() @ weight.float().t()).argmax(-1)[:, 1::5]
    products, multiply = [], head.scaled_matmul
    monkeypatch.setattr(head, "scaled_matmul", lambda *given: products.append(given[0].codes.shape) or multiply(*given))
    found = gradients_of("fp8", hidden, weight, labels)
    wanted = {0: [64] * 7 + [16], 3: [192, 192, 80], 100: [464]}[kept]  # 450 tokens and what makes them sixteens
    assert [tokens for rows, tokens in products if rows == 128] == wanted  # codes [V, tokens], V padded
    x, w = (quantize(matrix.reshape(-1, 32), "fp8_e4m3").dequantize(torch.float64) for matrix in (hidden, weight))
    flat, factor = labels.reshape(-1), torch.tensor(2.0**-5).double()
    losses, gradient = loss_definition.softmax_gradient(x @ w.t(), flat, factor, torch.float64)
    # the target's entry is minus the sum of the codes of the others, which are at most 2^-5: exactly 2^15 of what codes hold
    target = torch.zeros_like(gradient).scatter_(1, flat.clamp(min=0).unsqueeze(1), 1.0).bool()
    codes = (gradient.masked_fill(target, 0.0).float() * 2.0**20).to(torch.float8_e5m2).double() * 2.0**-20
    exact = codes - target * codes.sum(1, keepdim=True)
    assert float(found[0]) == pytest.approx(float(losses.sum()), rel=1e-6)
    # fp32 sums of 70 and of 450 products; and a code of a gradient whose fp32 value is an ulp off may be its neighbour
    # (2^-2), which happens to one of 10^5: none here. Then gradients are rounded to bf16, 2^-9.
    torch.testing.assert_close(found[1].view(-1, 32), exact @ w, rtol=2.0**-8, atol=1e-7)
    torch.testing.assert_close(found[2], exact.t() @ x, rtol=2.0**-8, atol=1e-7)
    assert not torch.equal(found[2], gradients_of("working", hidden, weight, labels)[2])


def test_the_gradients_of_an_fp8_head_push_no_token_and_all_of_them_nowhere():
    """A softmax does not see what all logits are raised by, so the rows of the weight gradient add up to zero."""
    hidden, weight, labels = fp8_case()
    hidden = (hidden + 1.0).float()  # something that all hidden states share is what would push all rows one way
    _, _, grad = gradients_of("fp8", hidden, weight.float(), labels)
    # fp32 sums of 120 products, each within 2^-24 of the largest
    assert float(grad.sum(0).norm()) < 120 * 2.0**-24 * float(grad.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_an_fp8_head_are_rounded_as_asked(dtype):
    hidden, weight, labels = fp8_case()
    x, w = (quantize(matrix.reshape(-1, 32), "fp8_e4m3").dequantize() for matrix in (hidden, weight))
    losses = loss_definition.softmax_losses((x @ w.t()).to(dtype), labels.reshape(-1))
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    found, others = (
        loss_sum(hidden, weight.requires_grad_(), labels, False, None, logits, "fp8").item()
        for logits in (name, "fp32")
    )
    # sums of 32 products in another order move one logit in thousands to the next number of its format
    assert abs(found - float(losses.sum())) < 0.1 * abs(found - others)


def test_an_fp8_head_is_the_working_one_within_its_formats():
    hidden, weight, labels = fp8_case(8, 128, 509, 64)
    exact, found = (gradients_of(head, hidden, weight, labels) for head in ("working", "fp8"))
    assert float(found[0]) == pytest.approx(float(exact[0]), rel=2e-3)
    for mine, other in zip(found[1:], exact[1:], strict=True):
        # e4m3 rounds by up to 2^-4, evenly spread by 2.5 % in the mean; the targets' part, which is the largest, not at all
        assert float((mine - other).norm() / other.norm()) < 0.05


def test_an_announced_factor_scales_the_gradients_of_an_fp8_head_and_changes_nothing_else():
    hidden, weight, labels = fp8_case()
    one = gradients_of("fp8", hidden, weight, labels, 2.0**-5)
    for times in (2.0**16, -1.0):
        scaled = gradients_of("fp8", hidden, weight, labels, times * 2.0**-5)
        assert scaled[0] == one[0] and all(torch.equal(times * one[i], scaled[i]) for i in (1, 2))


@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
def test_a_factor_that_is_not_finite_leaves_no_finite_gradient_that_a_step_could_apply(factor):
    found = gradients_of("fp8", *fp8_case(), factor)
    assert found[0].isfinite() and not found[1].isfinite().any() and not found[2].isfinite().any()


def test_an_overflowing_loss_scale_withholds_a_step_through_an_fp8_head():
    model = Transformer(ModelConfig(vocab_size=61, context=16, n_layer=1, n_head=2, n_embd=16))
    fewbits.prepare(model, "fp16-mixed, head=fp8, loss_scale=dynamic:initial=16777216,hysteresis=1")
    step = fewbits.Step(model, fewbits.AdamW(model.named_parameters(), lr=1e-3), model.fewbits_precision)
    ids = torch.arange(16).view(1, 16) % 3  # one label in three: gradients of 2^24 / 3 and more, beyond fp16
    before = model.embed.weight.detach().clone()
    for i in range(10):
        result = step([{"input_ids": ids, "labels": ids}])
        assert float(result.loss_scale) == 2.0 ** (24 - i) and result.loss.isfinite()
        if result.applied:
            break
        assert torch.equal(model.embed.weight, before)
    assert 2 < i < 10 and result.applied and not torch.equal(model.embed.weight, before)


@pytest.mark.parametrize("bad", ["hidden", "weight"])
def test_an_operand_that_is_not_finite_makes_a_loss_of_an_fp8_head_that_is_not(bad):
    hidden, weight, labels = fp8_case()
    (hidden if bad == "hidden" else weight).view(-1)[5] = torch.inf
    assert not gradients_of("fp8", hidden, weight, labels)[0].isfinite()


@pytest.mark.parametrize("kept", [120, 112, 33, 1])
def test_an_fp8_head_has_whole_sixteens_of_tokens_multiplied_whatever_their_number(monkeypatch, kept):
    rows, multiply = [], head.scaled_matmul

    def spy(left, right, *rest):
        rows.append((left.codes.shape, right.codes.shape))
        return multiply(left, right, *rest)

    monkeypatch.setattr(head, "scaled_matmul", spy)
    hidden, weight, labels = fp8_case()
    given = hidden.view(-1, 32)[:kept], weight, labels.view(-1)[:kept], torch.tensor(2.0**-5)
    losses, grad_hidden, grad_weight = head.fp8_gradients(*given, logits=torch.float32, kernel=False)
    assert losses.shape == (kept,) and grad_hidden.shape == (kept, 32) and grad_weight.shape == weight.shape
    assert all(side % 16 == 0 for shapes in rows for shape in shapes for side in shape)
    more = torch.full((16,), -100)  # tokens without labels change nothing, their hidden states as large as others
    padded = torch.cat((given[0], given[0][:1].expand(16, -1))), weight, torch.cat((given[2], more)), given[3]
    others = head.fp8_gradients(*padded, logits=torch.float32, kernel=False)
    assert torch.equal(losses, others[0][:kept]) and torch.equal(grad_hidden, others[1][:kept])
    torch.testing.assert_close(grad_weight, others[2], rtol=2.0**-8, atol=2.0**-20)  # fp32 sums in another order


def test_tokens_without_labels_have_no_gradient_in_fp8():
    hidden, weight, labels = fp8_case()
    _, grad_hidden, grad_weight = gradients_of("fp8", hidden, weight, torch.full_like(labels, -100))
    assert not grad_hidden.any() and not grad_weight.any()


def test_prepare_hands_the_head_of_the_precision_to_the_model_and_says_so():
    from fewbits.nn.prepare import unprepare

    for tied in (True, False):
        config = ModelConfig(vocab_size=61, context=16, n_layer=1, n_head=2, n_embd=16, tied=tied)
        ids = torch.randint(61, (2, 16))
        batch = {"input_ids": ids, "labels": ids}
        plain, model = (fewbits.prepare(Transformer(config), p) for p in ("bf16", "bf16, head=fp8"))
        assert model.loss_sum(batch).item() != plain.loss_sum(batch).item()
        with torch.no_grad():  # evaluation takes the working format
            assert model.loss_sum(batch).item() == plain.loss_sum(batch).item()
        row = ("matmuls of the loss head", "Transformer", "fp8", "asked for; bf16 in evaluation")
        assert row in model.fewbits_report.rows
        assert unprepare(model).head_format == "working"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["bf16, head=fp8", "fp8, head=fp8"])
def test_an_fp8_head_that_keep_names_is_refused(precision, tied):
    """In a precision with a recipe too, where a name alone says that something stays in the working format."""
    config = ModelConfig(vocab_size=61, context=16, n_layer=1, n_head=2, n_embd=64, tied=tied)
    name = "embed" if tied else "head"
    for pattern in (name, f"{name}=fp32", f"{name[:2]}*"):
        with pytest.raises(FewbitsError, match=f"contradicts a keep that names '{name}'"):
            fewbits.prepare(Transformer(config), precision, keep=[pattern])
    assert fewbits.prepare(Transformer(config), precision, keep=["blocks.0.mlp"]).head_format == "fp8"


def test_a_report_does_not_say_that_an_fp8_head_stays_out():
    config = ModelConfig(vocab_size=61, context=16, n_layer=1, n_head=2, n_embd=64, tied=False)
    report = fewbits.prepare(Transformer(config), "fp8, head=fp8").fewbits_report
    assert not any(row[0] == "head" for row in report.kept)
    shown = " ".join(report.precision.table(report).split())
    assert "; head in bf16; matmuls of the loss head in fp8;" in shown


def test_an_fp8_head_of_a_width_that_no_device_multiplies_is_refused():
    with pytest.raises(FewbitsError, match="n_embd=40 is not divisible by 16"):
        config = ModelConfig(vocab_size=61, context=16, n_layer=1, n_head=2, n_embd=40)
        fewbits.prepare(Transformer(config), "bf16, head=fp8")


def test_a_recipe_that_takes_no_layer_names_the_precision_that_keeps_the_fp8_head():
    with pytest.raises(FewbitsError, match="Use 'bf16-mixed, head=fp8'"):
        config = ModelConfig(vocab_size=61, context=16, n_layer=1, n_head=2, n_embd=16)
        fewbits.prepare(Transformer(config), "fp8, head=fp8")


def test_a_model_that_makes_its_own_logits_is_refused_an_fp8_head_and_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    with pytest.raises(FewbitsError, match="Sequential makes its logits itself"):
        fewbits.prepare(model, "bf16, head=fp8")
    assert type(model[0]) is torch.nn.Linear and model[0].weight.dtype == torch.float32
