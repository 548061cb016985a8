"""Quantization-aware training: what is multiplied is what a quantized checkpoint multiplies, now and after every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewbits
from fewbits.errors import FewbitsError
from fewbits.export.trained import convert, fake_layers, pack_trained, scheme_of
from fewbits.kernels.dispatch import emulated, replay
from fewbits.nn.fake import fake_linear, learned_scales, quantized_weight
from fewbits.nn.packed import PackedLinear, packed_layers
from fewbits.numerics.fake import fake_quantize
from fewbits.numerics.quantize import quantize
from fewbits.precision.precision import Precision
from fewbits.precision.recipe import RECIPES, Recipe

QAT = ("int8-qat", "int4-qat", "binary-qat", "fp8-qat")
LEARNED = (
    "int8-qat, output=int8/row/full-range x int8/row/learned",
    "int4-qat, output=bf16 x int4/block(1x32)/learned",
    "binary-qat, output=bf16 x binary/row/learned",
    "fp8-qat, output=e4m3/row x e4m3/row/learned",
)
CONFIG = fewbits.ModelConfig(vocab_size=96, context=24, n_layer=2, n_head=2, n_embd=64)


def build(precision: str, seed: int = 0) -> Any:
    return fewbits.prepare(fewbits.Transformer(CONFIG, seed=seed), precision)


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(96, (4, 25), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def trained(precision: str, steps: int = 3) -> Any:
    model = build(precision)
    step = fewbits.Step(model, fewbits.AdamW(model.parameters(), lr=3e-3), precision)
    for i in range(steps):
        step([batch(i)])
    return model


def operands(recipe: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 5, 64, generator=generator).bfloat16()
    weight = (torch.randn(48, 64, generator=generator) / 8).bfloat16()
    bias = torch.randn(48, generator=generator).bfloat16()
    return x, weight, bias, torch.randn(3, 5, 48, generator=generator).bfloat16()


@pytest.mark.parametrize("text", [*QAT, *LEARNED])
def test_a_precision_prints_and_parses_back(text: str) -> None:
    precision = Precision.parse(text)
    assert str(precision) == text and precision.recipe.fake
    assert Recipe.parse(str(precision.recipe)) == precision.recipe
    assert Precision.from_json(precision.to_json()) == precision


def test_a_fake_recipe_can_be_written_out() -> None:
    precision = Precision.parse("output=bf16 x int4/group:128/learned, fake")
    assert str(precision) == "output=bf16 x int4/block(1x128)/learned, fake"
    assert Precision.parse(str(precision)) == precision


@pytest.mark.parametrize("name", QAT)
def test_the_forward_is_the_product_of_the_rounded_values(name: str) -> None:
    recipe = RECIPES[name]
    x, weight, bias, _ = operands(name)
    y = fake_linear(x, weight, bias, None, None, None, str(recipe))
    assert recipe.output is not None
    left, q = recipe.output.left, quantized_weight(weight, None, str(recipe))
    rounded = x.double()
    if not left.wide:
        rounded = quantize(x, left.format, left.granularity, scales=left.scaling).dequantize(torch.float64)
    values = q.codes.double() * q.scale.double().repeat_interleave(64 // q.scale.shape[1], 1)
    if left.wide:
        values = values.float().bfloat16().double()  # a layer in bf16 multiplies the value rounded to bf16
    exact = rounded @ values.t() + bias.double()
    # 64 products in fp32, in any order, then one rounding to bf16 (2^-8 of the result)
    size = rounded.abs() @ values.abs().t() + bias.double().abs()
    assert bool(((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 66 * 2.0**-24 * size).all())


def test_int8_qat_multiplies_integers_and_its_sums_are_exact() -> None:
    x, weight, bias, _ = operands("int8-qat")
    y = fake_linear(x, weight, bias, None, None, None, str(RECIPES["int8-qat"]))
    q = quantized_weight(weight, None, str(RECIPES["int8-qat"]))
    largest = x.float().abs().amax(-1, keepdim=True)
    scale = largest / 127.5
    tokens = (x.float() / scale).round().clamp(-128, 127).to(torch.int32)
    sums = tokens.view(-1, 64) @ q.codes.to(torch.int32).t()
    real = (sums.float() * scale.view(-1, 1) * q.scale.t() + bias.float()).bfloat16().view_as(y)
    assert int(tokens.min()) == -128 or int(tokens.max()) == 127
    # int32 sums, or the same integers scaled first and summed in fp32: then one bf16 rounding may fall the other way
    assert bool(((y.float() - real.float()).abs() <= 2.0**-7 * real.float().abs() + 2.0**-12).all())
    if torch.equal(y, real):
        return
    from fewbits.kernels.dispatch import emulated

    assert emulated("int8", "cpu")


@pytest.mark.parametrize("text", [*QAT, *LEARNED])
def test_the_backward_multiplies_the_rounded_values_and_passes_the_rounding(text: str) -> None:
    output = Precision.parse(text).recipe.output
    assert output is not None
    x, weight, bias, grad = operands(text)
    learned = "learned" in text
    first = quantized_weight(weight, None, str(Precision.parse(text.partition(",")[0]).recipe)).scale
    log_scale = (first * 0.6).log2().flatten().requires_grad_() if learned else None
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = fake_linear(leaves[0], leaves[1], leaves[2], log_scale, None, None, str(Precision.parse(text).recipe))
    y.backward(grad)

    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    other = None if log_scale is None else log_scale.detach().clone().requires_grad_()
    scale = None if other is None else other.exp2().view(48, -1)
    scale = first if scale is None else scale + (scale.bfloat16().float() - scale).detach()
    plain = fake_quantize(wide[1], output.right.format, output.right.granularity, scale=scale)
    if not learned:
        plain = wide[1] + (plain - wide[1]).detach()
    tokens = wide[0]
    if not output.left.wide:
        kind = output.left.scaling
        tokens = fake_quantize(tokens, output.left.format, output.left.granularity, scales=kind)
    (tokens @ plain.t() + wide[2]).backward(grad.double())
    # values, gradients and results are rounded to bf16, 2^-8 each: three times relative to the sum of magnitudes
    N_sum = grad.double().abs().reshape(-1, 48)
    sizes = [
        (N_sum @ plain.detach().abs()).view_as(x),
        N_sum.t() @ tokens.detach().abs().reshape(-1, 64),
        N_sum.sum(0),
    ]
    for mine, reference, size in zip(leaves, wide, sizes, strict=True):
        assert mine.grad is not None and reference.grad is not None
        assert bool(((mine.grad.double() - reference.grad).abs() <= 3 * 2.0**-8 * size + 1e-6).all())
    if log_scale is not None and other is not None:
        assert log_scale.grad is not None and other.grad is not None
        # up to 64 terms a scale, each a bf16 gradient that is off by 2^-8 of its sum of magnitudes, independently
        assert float((log_scale.grad - other.grad).norm()) <= 2.0**-5 * float(other.grad.norm())
        assert float(other.grad.abs().max()) > 0


@pytest.mark.parametrize("text", [*QAT, *LEARNED])
def test_codes_follow_the_weight_after_every_step_and_every_change(text: str) -> None:
    model = build(text)
    step = fewbits.Step(model, fewbits.AdamW(model.parameters(), lr=1e-2), text)
    before = convert(model)
    logits = []
    for i in range(2):
        step([batch(i), batch(i + 5)])
        assert all(layer.held is None for layer in fake_layers(model).values())
        model.eval()
        with torch.no_grad():
            logits.append(model(batch()["input_ids"]))
        model.train()
    after = convert(model)
    changed = [n for n in before if not torch.equal(before[n].dequantize(), after[n].dequantize())]
    assert changed == list(before)
    assert not torch.equal(logits[0], logits[1])


def test_the_codes_of_a_step_are_made_once_for_all_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    import fewbits.nn.fake as module

    made: list[int] = []
    real = module.quantized_weight
    monkeypatch.setattr(module, "quantized_weight", lambda *a: made.append(1) or real(*a))
    model = build("int4-qat")
    fewbits.Step(model, fewbits.AdamW(model.parameters()), "int4-qat")([batch(i) for i in range(3)])
    assert len(made) == len(fake_layers(model)) == 8


@pytest.fixture
def integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides multiply int8 in integers, whatever a timing would choose here."""
    import fewbits.kernels.dispatch as dispatch

    monkeypatch.setattr(dispatch, "_choices", dict(dispatch._choices))
    replay({name: ["native", "a test"] for name in ("int8 on cpu", "bf16 on cpu")})
    replay({"int8 against bf16 on cpu": ["integers", "a test"]})


@pytest.mark.parametrize("text", [*QAT, *LEARNED])
def test_a_converted_model_gives_the_logits_of_the_fake_quantized_one(text: str, integers: None) -> None:
    model = trained(text).eval()
    ids = batch(9)["input_ids"]
    with torch.no_grad():
        fake = model(ids)
        codes = convert(model)
        done = pack_trained(model)
        real = model(ids)
    assert {q.codes.dtype for q in codes.values()} <= {torch.int8, torch.float8_e4m3fn}
    packed = packed_layers(model)
    assert set(packed) == set(codes) and len(done.layers) == 8 and not fake_layers(model)
    for name, layer in packed.items():
        assert torch.equal(layer.weight, codes[name].dequantize(torch.bfloat16)), name
    assert float(fake.std()) > 0
    if text != LEARNED[3]:
        assert torch.equal(fake, real)  # the same codes, scales, products and order of sums: nothing is left to round
        return
    # e4m3 with scales that are no powers of two: products are summed in fp32 in another order, so that one rounding to
    # bf16 (2^-8) in each of 8 layers may fall the other way; each moves the logits by less than its share of them
    assert float((fake - real).abs().max()) <= 8 * 2.0**-8 * float(fake.abs().max())


@pytest.mark.parametrize("name", QAT)
def test_a_packed_layer_is_the_fake_one_within_rounding_however_it_multiplies(name: str) -> None:
    x, weight, bias, _ = operands(name)
    recipe = RECIPES[name]
    y = fake_linear(x, weight, bias, None, None, None, str(recipe)).double()
    q = quantized_weight(weight, None, str(recipe))
    packed = PackedLinear.from_values(q.codes.float(), q.scale.bfloat16(), nn.Parameter(bias), scheme_of(recipe))
    real = packed(x).double()
    # the sums may be rounded to bf16 before the scales are applied (widened int8), and after: 2^-8 each, on both sides
    size = x.double().abs() @ q.dequantize(torch.float64).abs().t() + bias.double().abs()
    assert bool(((y - real).abs() <= 3 * 2.0**-8 * size).all())


def test_compiled_layers_give_the_outputs_and_gradients_of_eager_ones() -> None:
    """Also where the codes are made inside: a compiler drops the rounding of a scale that is not done on its bits."""
    torch._dynamo.reset()  # other tests compile the same layers; what they left must not decide
    name, found = "int4-qat", []
    x, _, _, _ = operands(name)
    for compiled in (False, True):
        model: Any = fewbits.prepare(small(), name)
        run = torch.compile(model, dynamic=False) if compiled else model
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.backward(torch.ones_like(y))
        found.append([y.detach(), leaf.grad, *(p.grad for p in model.parameters())])
    # Where bf16 is emulated, a compiler that forms values to widen them again does not round them between, 2^-9 of each.
    weight = (
        2.0**-9 * model[0].weight.detach().double().abs() if emulated("bf16", "cpu") else torch.zeros(96, 64).double()
    )
    unrounded = [x.double().abs() @ weight.t(), weight.sum(0), torch.zeros(()), torch.zeros(())]
    for eager, other, lost in zip(*found, unrounded, strict=True):
        # the same codes: sums in another order may round to neighbours in bf16, whose distance is up to 2^-7 of the value;
        # sums of 64 products that cancel differ by what fp32 loses of their terms, well below 2^-12
        off = (eager.double() - other.double()).abs()
        assert bool((off <= 2.0**-7 * eager.double().abs() + 2.0**-12 + lost).all())


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 96))


@pytest.mark.parametrize("name", QAT)
def test_the_graph_keeps_codes_and_copies_nothing(name: str) -> None:
    x, weight, bias, _ = operands(name)
    x.requires_grad_()
    weight.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_linear(x, weight, bias, None, None, None, str(RECIPES[name])).sum().backward()
    wide = {t.data_ptr() for t in saved if t.element_size() == 2}
    left = RECIPES[name].output.left  # type: ignore[union-attr]
    assert wide == ({x.data_ptr(), weight.data_ptr()} if left.wide else {weight.data_ptr()})
    assert {t.numel() for t in saved if t.element_size() == 1} == {weight.numel(), *([] if left.wide else [x.numel()])}


@pytest.mark.parametrize("text", QAT)
def test_training_lowers_the_loss_in_the_rounded_model(text: str) -> None:
    model = build(text)
    step = fewbits.Step(model, fewbits.AdamW(model.parameters(), lr=3e-3), text)
    losses = [float(step([batch()]).loss) for _ in range(15)]
    assert losses[-1] < losses[0] - 0.5


def test_a_learned_scale_is_trained_without_weight_decay_and_in_fp32() -> None:
    model = build(LEARNED[1])
    scales = learned_scales(model)
    assert len(scales) == 8 and all(p.ndim == 1 and p.dtype == torch.float32 for p in scales.values())
    before = {name: p.detach().clone() for name, p in scales.items()}
    step = fewbits.Step(model, fewbits.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), LEARNED[1])
    step([batch()])
    moved = torch.cat([(scales[name].detach() - before[name]).abs() for name in before])
    assert float((moved > 0).float().mean()) > 0.9
    assert float(moved.detach().max()) <= 0.0101  # one step of Adam is lr: at most 0.7 % of a scale, whatever its size


def test_unprepare_gives_the_model_back_without_scales() -> None:
    model = fewbits.Transformer(CONFIG)
    names = [name for name, _ in model.named_parameters()]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    fewbits.prepare(model, LEARNED[1])
    assert len(list(model.named_parameters())) > len(names)
    fewbits.unprepare(model)
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: torch.float32 for n in names}
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not fake_layers(model) and isinstance(fewbits.prepare(model, "int8-qat"), nn.Module)


def test_layers_that_a_checkpoint_could_not_hold_stay_out_and_say_why() -> None:
    model: Any = fewbits.prepare(nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 20)), "int4-qat")
    rows = {row[0]: row for row in model.fewbits_report.rows}
    assert "not divisible by the group of 32" in rows["0"][3]
    assert rows["1"][2] == "int4-qat"
    with pytest.raises(FewbitsError, match="would change nothing"):
        fewbits.prepare(nn.Sequential(nn.Linear(48, 64)), "int4-qat")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8-qat, grad_input=int8/row", "rounds the forward only"),
        ("int4-qat, output=int4/row x bf16", "leaves the weight as it is"),
        ("int4-qat, output=int8/row/learned x int4/row", "only weights learn"),
        ("int4-qat, output=int8/tensor x int4/row", "one scale a row"),
        ("int4-qat, output=bf16 x int4/row/stochastic", "nearest even"),
        ("int4-qat, output=bf16 x int4/tensor", "scales by row or group"),
        ("int4-qat, accumulate=14bit", "not modelled"),
        ("output=bf16 x int4/group:32/learned", "add 'fake'"),
        ("bf16-mixed, fake", "no recipe to change"),
        ("int4-qat, output=bf16", "all three matmuls in 16 bits"),
        ("output=e4m3/row/full-range", "for integers"),
        ("int4-qa", "Did you mean 'int4-qat'"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(text: str, message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        Precision.parse(text)


def test_a_model_that_was_not_trained_for_it_is_not_converted() -> None:
    with pytest.raises(FewbitsError, match="is not prepared"):
        convert(fewbits.Transformer(CONFIG))
    with pytest.raises(FewbitsError, match="prepared as bf16-mixed"):
        convert(build("bf16-mixed"))
    broken = build("int8-qat")
    with torch.no_grad():
        broken.blocks[1].mlp.up.weight[3, 4] = float("nan")
    with pytest.raises(FewbitsError, match=r"blocks\.1\.mlp\.up\.weight' holds NaN"):
        convert(broken)
    with pytest.raises(FewbitsError, match="no checkpoint holds it"):
        scheme_of(Precision.parse("output=int8/row x int8/row, fake").recipe)
