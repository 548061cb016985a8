"""The methods: what each makes smaller, that gptq is its own definition, and that awq's folding changes no answer."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.export.calibration import Inputs, walk_blocks
from fewbits.export.folding import fold_block
from fewbits.export.methods import (
    Rounded,
    awq_channels,
    gptq,
    output_error,
    round_weight,
    scales,
)
from fewbits.export.options import QuantizeOptions
from fewbits.export.quantized import quantize_model
from fewbits.formats import Format
from fewbits.nn.packed import Scheme, packed_layers
from fewbits.nn.transformer import ModelConfig, Transformer
from fewbits.numerics.rounding import cast

INT4 = Format.parse("int4")
CONFIG = ModelConfig(vocab_size=50, context=16, n_layer=2, n_head=4, n_embd=32)
LLAMA = replace(CONFIG, norm="rmsnorm", activation="swiglu", positions="rope", bias=False, tied=False, n_ff=64)


def inputs(K: int = 64, tokens: int = 256) -> Tensor:
    """Inputs [N, K] whose channels are correlated and of very different size."""
    return torch.randn(tokens, K // 4) @ torch.randn(K // 4, K) * torch.logspace(-1, 1, K) + 0.05 * torch.randn(
        tokens, K
    )


def simple(weight: Tensor, granularity: str, search: bool, dtype: torch.dtype = torch.float32) -> Rounded:
    return round_weight(weight, scales(weight, INT4, granularity, dtype, search), INT4)


def textbook(weight: Tensor, hessian: Tensor, scale: Tensor, order: list[int], width: int) -> Tensor:
    """GPTQ as its paper derives it from Optimal Brain Surgeon: after each column the exact best update of all that are
    left, from the inverse of the Hessian of those alone. Fp64."""
    left, values, free = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64), list(order)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    while free:
        j = free[0]
        inverse = torch.linalg.inv(damped[free][:, free])
        step = scale[:, j // width].double()
        values[:, j] = cast((left[:, j] / step).float(), INT4).double()
        error = (left[:, j] - values[:, j] * step) / inverse[0, 0]
        left[:, free] -= error.unsqueeze(1) * inverse[0]
        free = free[1:]
    return values.float()


@pytest.mark.parametrize("columns", [64, 144])  # one block of columns that are rounded together, and more
@pytest.mark.parametrize(("granularity", "act_order"), [("row", True), ("row", False), ("group:16", True)])
def test_gptq_is_the_optimal_update_column_by_column(granularity, act_order, columns):
    x, weight = inputs(columns), torch.randn(24, columns)
    hessian = x.t() @ x / len(x)
    found = gptq(weight, hessian, INT4, granularity, torch.float32, act_order)
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(columns))
    expected = textbook(weight, hessian, found.scale, order, 16 if granularity == "group:16" else columns)
    # fp32 against fp64: a value near a tie may fall the other way, and what follows then answers to that
    assert (found.values != expected).float().mean() < 0.01


def test_from_left_to_right_the_scales_of_a_group_are_those_of_what_is_left_of_it():
    x, weight = inputs(), torch.randn(24, 64)
    hessian = x.t() @ x / len(x)
    found = gptq(weight, hessian, INT4, "group:16", torch.float32, act_order=False)
    before = scales(weight, INT4, "group:16", torch.float32, search=True)
    assert torch.equal(found.scale[:, 0], before[:, 0]) and not torch.equal(found.scale[:, 1], before[:, 1])
    largest = found.values.abs().reshape(24, 4, 16).amax(-1)
    assert (largest >= 5).all()  # the last groups have taken in the errors of the first, and still use their range


def test_importance_weighs_the_errors_of_the_inputs():
    weight, importance = torch.randn(24, 64), torch.logspace(0, 4, 64)

    def weighed(scale: Tensor) -> Tensor:
        return ((round_weight(weight, scale, INT4).dequantize() - weight).square() * importance).sum()

    plain = scales(weight, INT4, "row", torch.float32, search=True)
    assert weighed(scales(weight, INT4, "row", torch.float32, True, importance)) < 0.97 * weighed(plain)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("granularity", ["row", "group:16", "group:48"])
def test_gptq_makes_the_error_of_the_outputs_smaller(granularity, act_order):
    x, weight = inputs(192), torch.randn(24, 192)
    hessian = x.t() @ x / len(x)
    found = gptq(weight, hessian, INT4, granularity, torch.float32, act_order)
    plain = simple(weight, granularity, search=True)
    errors = [float(output_error(r.dequantize() - weight, hessian)) for r in (found, plain)]
    # the largest inputs come last: from left to right they have nothing left to make up for their errors
    assert errors[0] < (0.4 if act_order else 0.95) * errors[1]
    assert torch.equal(found.values, cast(found.values, INT4)) and found.scale.shape == plain.scale.shape


def test_gptq_without_correlations_rounds_to_nearest():
    weight = torch.randn(8, 32)
    for hessian in (torch.eye(32), torch.zeros(32, 32), torch.diag(torch.arange(32.0))):  # inputs that are always 0 too
        found = gptq(weight, hessian, INT4, "group:16", torch.float32)
        assert torch.equal(found.values, simple(weight, "group:16", search=True).values)


def test_codes_are_made_for_the_scale_that_is_stored():
    weight = torch.randn(16, 64)
    for dtype in (torch.bfloat16, torch.float16):
        found = simple(weight, "group:32", search=False, dtype=dtype)
        assert found.scale.dtype == dtype
        clipped = weight.reshape(16, 2, 32) / found.scale.float().unsqueeze(-1)
        # half a step where nothing is clipped: a scale rounded down clips the largest weight by less than 2^-8 of it
        error = (found.dequantize() - weight).abs().reshape(16, 2, 32) / found.scale.float().unsqueeze(-1)
        assert (error[clipped.abs() <= 7] <= 0.5001).all() and error.max() < 0.54
    assert bool((simple(torch.zeros(2, 8), "row", search=True).dequantize() == 0).all())
    tiny = simple(torch.full((1, 8), 1e-9), "row", search=False, dtype=torch.float16)
    assert bool(tiny.dequantize().isfinite().all())  # a scale below the range of fp16 becomes its smallest normal


def test_awq_takes_no_factor_when_none_helps_and_one_when_channels_differ():
    x, weight = inputs(), torch.randn(24, 64)
    hessian, magnitude = x.t() @ x / len(x), x.abs().mean(0)
    s, alpha = awq_channels([weight], hessian, magnitude, INT4, "row", torch.float32)
    assert alpha > 0 and float(s.max() * s.min()) == pytest.approx(1.0, rel=1e-4)
    scaled = simple(weight * s, "row", search=False).dequantize() / s
    plain = simple(weight, "row", search=False).dequantize()
    assert output_error(scaled - weight, hessian) < 0.9 * output_error(plain - weight, hessian)
    s, alpha = awq_channels([weight], torch.eye(64), torch.ones(64), INT4, "row", torch.float32)
    assert alpha == 0.0 and torch.equal(s, torch.ones(64))


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.randint(0, 50, (4, 16)), "labels": torch.randint(0, 50, (4, 16))} for _ in range(count)]


def model(config: ModelConfig) -> Transformer:
    """A model in which channels differ in size, as trained ones do."""
    made = Transformer(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if "norm" in name:
                parameter.mul_(torch.logspace(-0.5, 0.5, parameter.shape[0]))
    return made


@pytest.mark.parametrize("config", [CONFIG, LLAMA, replace(LLAMA, n_kv_head=2)], ids=["gpt2", "llama", "grouped"])
def test_folding_changes_the_weights_and_not_the_answers(config):
    made, data = model(config), batches()
    before, weights = made(data[0]["input_ids"]), copy.deepcopy(made.state_dict())
    names: list[str] = []

    def fold(i, block, seen):
        layers = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
        factors = fold_block(block, layers, seen, Scheme(INT4, "row"), torch.float32)
        for name, factor in factors.items():
            weight = layers[name].weight / factor.columns / factor.rows
            torch.testing.assert_close(weight, weights[f"blocks.{i}.{name}.weight"])
            names.extend([name] * (factor.alpha > 0))

    walk_blocks(made, data, fold)
    assert "attention.qkv" in names
    assert ("mlp.down" in names) == (config is not CONFIG)  # a GELU lets no factor through
    # factors of a few units, multiplied in and divided out again, each rounded in fp32
    torch.testing.assert_close(made(data[0]["input_ids"]), before, atol=2e-4, rtol=1e-4)


def test_calibration_sees_every_input_once_and_later_blocks_see_rounded_ones():
    made, data = model(CONFIG), batches(3)
    seen: dict[str, Inputs] = {}
    hooked: dict[str, list[Tensor]] = {}

    def visit(i, block, found):
        seen.update({f"{i}.{name}": value for name, value in found.items()})
        if i == 0:
            block.mlp.down.weight.data.zero_()  # whatever a visit changes is what the next block is fed from

    walk_blocks(made, data, visit)
    for i, block in enumerate(made.blocks):
        block.attention.qkv.register_forward_hook(
            lambda m, x, y, i=i: hooked.setdefault(f"{i}.attention.qkv", []).append(x[0])
        )
    for batch in data:
        made(batch["input_ids"])
    for name, tensors in hooked.items():
        x = torch.cat(tensors).flatten(0, 1)
        assert seen[name].tokens == len(x) == 3 * 64
        torch.testing.assert_close(seen[name].hessian, x.t() @ x / len(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen[name].magnitude, x.abs().mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("method", ["nearest", "mse", "gptq", "awq"])
def test_a_model_keeps_its_answers_within_what_its_layers_lost(config, method):
    made, data = model(config), batches()
    before = made(data[0]["input_ids"])
    small = copy.deepcopy(made)
    options = QuantizeOptions(format="int8", method=method, dtype="fp32")
    done = quantize_model(small, options, data)
    assert list(packed_layers(small)) == [row["layer"] for row in done.layers]
    assert all(row["sqnr_db"] > 30 and row["cosine"] > 0.999 and row["output_sqnr_db"] > 30 for row in done.layers)
    error = (small(data[0]["input_ids"]) - before).norm() / before.norm()
    assert error < 0.02  # int8 rows: errors of 0.7 % of each layer's output at most (43 dB), a dozen of them in a row


def test_sqnr_and_cosine_are_those_of_the_stored_weight():
    made = model(CONFIG)
    weight = made.blocks[0].mlp.up.weight.detach().clone()
    done = quantize_model(made, QuantizeOptions(format="int4", dtype="fp32"))
    row = next(row for row in done.layers if row["layer"] == "blocks.0.mlp.up")
    stored = packed_layers(made)["blocks.0.mlp.up"].weight
    noise = (stored - weight).square().sum()
    assert row["sqnr_db"] == pytest.approx(float(10 * torch.log10(weight.square().sum() / noise)), abs=1e-3)
    assert row["cosine"] == pytest.approx(
        float(torch.cosine_similarity(stored.flatten(), weight.flatten(), 0)), abs=1e-5
    )
    assert row["output_sqnr_db"] is None  # no text, no outputs
    assert str(done.scheme) == "int4 group:32" and done.granularity.value == "group:32"


def test_a_model_that_is_not_finite_misses_its_text_or_is_quantized_already_is_not_touched():
    made = model(CONFIG)
    with pytest.raises(FewbitsError, match="Method gptq needs a text to calibrate on"):
        quantize_model(made, QuantizeOptions(method="gptq"))
    with pytest.raises(FewbitsError, match="bf16 needs no codes"):
        quantize_model(made, QuantizeOptions(format="bf16"))
    made.blocks[1].norm2.bias.data[3] = float("inf")
    with pytest.raises(FewbitsError, match=r"'blocks.1.norm2.bias' holds inf at \[3\] \(1 in all\)"):
        quantize_model(made, QuantizeOptions())
    assert not packed_layers(made)
    small = model(CONFIG)
    quantize_model(small, QuantizeOptions())
    with pytest.raises(FewbitsError, match="cannot be quantized again"):
        quantize_model(small, QuantizeOptions())


def test_calibration_that_is_not_finite_is_refused():
    with pytest.raises(FewbitsError, match="not finite on the calibration text"):
        gptq(torch.ones(2, 4), torch.full((4, 4), float("nan")), INT4, "row", torch.float32)
