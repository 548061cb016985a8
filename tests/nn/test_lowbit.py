"""The linear layer in few bits: codes are what is kept, a weight is quantized once a step, and a step repeats."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fewbits
from fewbits import AdamW, ModelConfig, Step, Transformer
from fewbits.choice import Choice
from fewbits.kernels import dispatch
from fewbits.nn.linear import Linear
from fewbits.nn.lowbit import beside, held_weights, hold, limits, recipe_of
from fewbits.nn.scale_history import (
    ACTIVATION,
    GRADIENT,
    ScaleHistory,
    ScaleStore,
    load_scale_history,
    scale_history,
    scales_known,
)
from fewbits.precision.recipe import RECIPES, Recipe

CONFIG = ModelConfig(
    vocab_size=61, context=16, n_layer=1, n_head=2, n_embd=64, norm="rmsnorm", activation="swiglu", positions="rope",
    bias=False,
)  # fmt: skip
STOCHASTIC = [name for name, recipe in RECIPES.items() if recipe.stochastic]


def batch(i: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(i))
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def layer(precision: str) -> tuple[torch.nn.Module, Linear]:
    model = fewbits.prepare(torch.nn.Sequential(torch.nn.Linear(128, 256)), precision)
    found = model[0]
    assert isinstance(found, Linear)
    return model, found


def build(precision: str) -> tuple[Transformer, Step]:
    model = fewbits.prepare(Transformer(CONFIG), precision)
    return model, Step(model, AdamW(model.named_parameters(), lr=1e-2), precision)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if not recipe.fake])
def test_the_graph_keeps_codes_and_no_16_bit_copy_of_the_activation(name):
    model, linear = layer(name)
    saved: list[torch.Tensor] = []
    with held_weights(model), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
        y = model(x)
    codes = [t for t in saved if t.numel() >= x.numel()]
    assert sorted(t.numel() for t in codes) == [x.numel(), linear.weight.numel()]
    assert {t.element_size() for t in codes} == {1}
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["fp8", "fp8-row", "fp8-block", "mxfp8", "int8"])
def test_the_gradients_are_those_of_the_exact_layer_up_to_the_format(name):
    """A code is within 2^-4 of its value in e4m3, 2^-3 in e5m2 and 1/254 of the largest of its row in int8; errors of
    the 64 terms and more of a sum are independent, so that the error of a gradient tensor stays near that of one code."""
    model, linear = layer(name)
    x, grad = torch.randn(64, 128), torch.randn(64, 256)
    exact = linear.weight.detach().double()
    a = x.to(torch.bfloat16).requires_grad_()
    y = model(a)
    y.backward(grad.to(torch.bfloat16))
    for found, wanted in (
        (y - linear.bias, x.double() @ exact.t()),
        (a.grad, grad.double() @ exact),
        (linear.weight.grad, grad.double().t() @ x.double()),
        (linear.bias.grad, grad.double().sum(0)),
    ):
        assert found is not None
        assert float((found.detach().double() - wanted).norm()) < 2.0**-3 * float(wanted.norm())


@torch.no_grad()
def test_matrices_that_lie_side_by_side_are_put_together_without_a_copy():
    whole = torch.randn(5, 3, 8)
    parts = [part.reshape(5, -1) for part in whole.split((1, 2), 1)]
    found = beside(parts)
    assert torch.equal(found, torch.cat(parts, 1)) and found.data_ptr() == whole.data_ptr()
    for others in (
        [parts[0], parts[1].clone()],
        [parts[0], parts[0]],  # the same place twice
        [parts[1], parts[0]],  # the wrong order
        list(torch.randn(2, 5, 8)),  # one behind the other
        [part.reshape(5, -1).t() for part in torch.randn(4, 2, 5)],  # columns lie apart
    ):
        found = beside(others)
        assert torch.equal(found, torch.cat(others, 1)) and found.data_ptr() != others[0].data_ptr()


def test_matrices_side_by_side_keep_the_graph_of_each_for_second_derivatives():
    x = torch.randn(5, 6, requires_grad=True)
    parts = (2 * x).split(2, 1)
    (grad,) = torch.autograd.grad(beside(parts).sum(), x)
    assert torch.equal(grad, torch.full((5, 6), 2.0))


def test_a_weight_is_quantized_once_a_step_whatever_the_number_of_micro_batches(monkeypatch):
    model, step = build("fp8")
    counted: list[int] = []

    def counting(weight: torch.Tensor, *rest: Any) -> Any:
        counted.append(id(weight))
        return hold(weight, *rest)

    for place in (
        "fewbits.nn.linear.hold",
        "fewbits.nn.lowbit.hold",
    ):  # by the step, and by a layer that finds nothing held
        monkeypatch.setattr(place, counting)
    layers = [m for m in model.modules() if getattr(m, "recipe", "")]
    step([batch(0), batch(1), batch(2)])
    assert sorted(counted) == sorted(id(m.weight) for m in layers)
    assert all(m.held is None for m in layers)


def test_held_codes_are_never_older_than_the_weight():
    model, step = build("fp8")
    layers = [m for m in model.modules() if getattr(m, "recipe", "")]
    before = [m.weight.detach().clone() for m in layers]
    for i in range(3):
        step([batch(i)])
        with held_weights(model):
            for module in layers:
                fresh = hold(module.weight, recipe_of(module.recipe))
                assert torch.equal(module.held.output_codes.float(), fresh.output_codes.float())
                assert torch.equal(module.held.output_scale, fresh.output_scale)
    assert not any(torch.equal(m.weight, old) for m, old in zip(layers, before, strict=True))


def test_a_step_that_breaks_off_lets_go_of_the_codes():
    model, _ = build("fp8")
    layers = [m for m in model.modules() if getattr(m, "recipe", "")]
    with pytest.raises(RuntimeError, match="on purpose"), held_weights(model):
        raise RuntimeError("on purpose")
    assert all(m.held is None for m in layers)


@pytest.mark.parametrize("name", ["fp8-block", "int8", "nvfp4", "fp8-delayed"])
def test_accumulated_micro_batches_use_the_codes_of_one_weight(name):
    """Held or quantized at every call: the same codes, so the same outputs."""
    model, _ = layer(name)
    x = torch.randn(32, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        loose = model(x)
        with held_weights(model):
            assert torch.equal(model(x), loose)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_2n_steps_with_random_rounding_equal_n_save_load_n(name):
    whole_model, whole = build(name)
    for i in range(4):
        whole([batch(2 * i), batch(2 * i + 1)])
    first_model, first = build(name)
    for i in range(2):
        first([batch(2 * i), batch(2 * i + 1)])
    names = list(first_model.named_parameters())
    weights = {n: first.optimizer.exact_weight(p).clone() for n, p in names}
    state, counters = first.optimizer.named_state(names), first.state_dict()
    second_model, second = build(name)
    names = list(second_model.named_parameters())
    for n, p in names:
        second.optimizer.load_exact(p, weights[n])
    second.optimizer.load_named_state(names, state)
    second.load_state_dict(counters)
    for i in range(2, 4):
        second([batch(2 * i), batch(2 * i + 1)])
    for a, b in zip(whole_model.parameters(), second_model.parameters(), strict=True):
        assert torch.equal(whole.optimizer.exact_weight(a), second.optimizer.exact_weight(b))
    assert int(whole.optimizer.applied_steps) == 4


@pytest.mark.parametrize("name", ["fp8-block"])
def test_compiled_layers_give_the_outputs_and_gradients_of_eager_ones(name):
    """The same codes are multiplied; only the order of fp32 sums may differ, and their one rounding to bf16."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, linear = layer(name)
        run = torch.compile(model, dynamic=False) if compiled else model
        x = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
        y = run(x)
        y.backward(torch.randn(64, 256).to(torch.bfloat16))
        results.append([y.detach(), x.grad, linear.weight.grad, linear.bias.grad])
    for eager, other in zip(*results, strict=True):
        assert float((eager.double() - other.double()).norm()) <= 2.0**-8 * float(eager.double().norm())


def delayed_histories(model: torch.nn.Module) -> list[Any]:
    return [m.history for m in model.modules() if getattr(m, "history", None) is not None]


def test_the_histories_of_all_layers_begin_and_end_a_step_as_each_would_alone():
    """Maxima that are not finite keep the largest of the window, and each layer notes in its own row."""
    model, step = build("fp8-delayed")
    step([batch(0)])
    histories = delayed_histories(model)
    store = histories[0].store
    assert len(histories) > 1 and all(h.store is store for h in histories)
    before = store.window.clone()
    noted = torch.rand(len(histories), 3)
    noted[0, 1], noted[-1, 2] = float("nan"), float("inf")
    with held_weights(model):
        for i, history in enumerate(histories):
            assert torch.equal(history.largest, before[i].amax(1))
            for place, value in zip(history.maxima, noted[i], strict=True):
                place.fill_(value)
    for i, history in enumerate(histories):
        newest = torch.where(noted[i].isfinite(), noted[i], before[i].amax(1))
        assert torch.equal(history.window, torch.cat((before[i, :, 1:], newest.view(3, 1)), 1))
    assert scale_history(model) == {
        name: m.history.window.tolist() for name, m in model.named_modules() if getattr(m, "history", None) is not None
    }


def test_saved_histories_load_into_the_tensors_of_a_running_model():
    """A recorded step reads them where they are."""
    model, step = build("fp8-delayed")
    step([batch(0)])
    saved, store = scale_history(model), delayed_histories(model)[0].store
    step([batch(1)])
    assert scale_history(model) != saved
    load_scale_history(model, saved)
    assert scale_history(model) == saved
    with held_weights(model):
        assert all(h.store is store for h in delayed_histories(model))


def test_a_copied_model_looks_back_on_its_own():
    model, step = build("fp8-delayed")
    step([batch(0)])
    other = copy.deepcopy(model)
    assert scale_history(other) == scale_history(model)
    step([batch(1)])
    assert scale_history(other) != scale_history(model)


def test_layers_of_a_part_of_a_model_get_a_store_of_their_own_with_their_windows():
    model, step = build("fp8-delayed")
    step([batch(0)])
    before = scale_history(model)
    with held_weights(model.blocks[0].mlp):
        pass
    after = scale_history(model)
    for name, window in before.items():
        assert [row[1:] for row in window] == [row[:-1] for row in after[name]] or "mlp" not in name
        assert after[name] == window or "mlp" in name
    with held_weights(model):  # all together again, from where each is
        pass
    assert all([row[1:] for row in w] == [row[:-1] for row in scale_history(model)[name]] for name, w in after.items())


FP8 = (448.0, 448.0, 57344.0)


def take_step(store: ScaleStore, *maxima: float) -> None:
    store.begin()
    for history, value in zip(store.histories, maxima, strict=True):
        for place in history.maxima:
            place.fill_(value)
    store.end()


def test_a_role_that_is_zero_or_not_finite_for_longer_than_the_window_keeps_its_scale():
    for nothing in (0.0, float("inf"), float("nan")):
        store = ScaleStore.of([ScaleHistory(), ScaleHistory()], torch.device("cpu"))
        take_step(store, 3.0, 0.0)
        for _ in range(2 * ScaleHistory.STEPS):
            take_step(store, nothing, 0.0)
        assert float(store.histories[0].window.min()) == 3.0
        assert float(store.histories[1].window.max()) == 0.0


def test_scales_are_known_two_steps_late_for_good_and_a_recorded_step_is_told(monkeypatch):
    """A step that is replayed looks at nothing itself: what its graph depends on is asked for before, and changes once."""
    monkeypatch.setitem(dispatch._choices, ("both layouts of fp8 codes", "cpu"), Choice("kernel", "a test"))
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    for module in model:
        module.history = ScaleHistory(limits=FP8)
    store = ScaleStore.of([module.history for module in model], torch.device("cpu"))
    told = []
    for i in range(24):
        told += scales_known(model)
        if i in range(4, 8):  # replayed
            store.window.copy_(torch.cat((store.window[:, :, 1:], torch.ones(2, 3, 1) * (i >= 5)), 2))
        else:
            take_step(store, 2.0 * (i < 20), 1.0 if 5 <= i < 20 else 0.0)
        assert {h.known for h in store.histories} == {told[-1]}
    assert told == [False] * 7 + [True] * 17
    load_scale_history(model, {name: ScaleHistory().window.tolist() for name in ("0", "1")})
    assert scales_known(model) == [False]


def test_a_resumed_run_knows_its_scales_at_the_step_at_which_the_whole_one_does(monkeypatch):
    monkeypatch.setitem(dispatch._choices, ("both layouts of fp8 codes", "cpu"), Choice("kernel", "a test"))
    for stop in range(5):
        store = ScaleStore.of([ScaleHistory(limits=FP8)], torch.device("cpu"))
        seen = []
        for i in range(6):
            if i == stop:
                store = ScaleStore.of([ScaleHistory(store.window[0].clone(), FP8)], torch.device("cpu"))
            take_step(store, 1.0 * (i > 0))
            seen.append(store.known)
        assert seen == [False] * 3 + [True] * 3, stop


def test_known_scales_are_those_of_the_largest_of_the_window_in_the_format_of_each_role(monkeypatch):
    monkeypatch.setitem(dispatch._choices, ("both layouts of fp8 codes", "cpu"), Choice("kernel", "a test"))
    store = ScaleStore.of([ScaleHistory(limits=FP8), ScaleHistory(limits=(6.0, 448.0, 448.0))], torch.device("cpu"))
    for i in range(5):
        for history in store.histories:
            scales, maxima = ((places[ACTIVATION], places[GRADIENT]) for places in (history.scales, history.maxima))
            wanted = (*maxima, *((None, *scales) if store.known else (history.largest, None, None)))
            assert all(one is other for one, other in zip(history.delayed, wanted, strict=True))
        take_step(store, 3.0 - i / 8, 1000.0)
    first, second = store.histories
    assert first.known
    for history, wanted in ((first, [2.0**-7, 2.0**-7, 2.0**-14]), (second, [2.0**8, 2.0**2, 2.0**2])):
        assert [scale.tolist() for scale in history.scales] == [[[one]] for one in wanted]  # 3 / 448 and 3 / 57,344, up
        # where compiled graphs take them without a copy
        for place in (*history.scales, *history.maxima):
            assert place.data_ptr() % 16 == 0 and place.storage_offset() == 0 and place.untyped_storage().nbytes() == 4


def test_limits_are_the_largest_numbers_of_the_formats_of_the_roles():
    assert limits(RECIPES["fp8-delayed"]) == FP8
    mixed = "output=e4m3/tensor/delayed, grad_input=e5m2/tensor/delayed x e4m3/tensor/delayed, grad_weight=e4m3/tensor/delayed"
    assert limits(Recipe.parse(mixed)) == (448.0, 448.0, 0.0)
    activations = mixed.replace("grad_weight=e4m3", "grad_weight=e5m2/tensor/delayed x e5m2")
    assert limits(Recipe.parse(activations)) == (0.0, 448.0, 57344.0)
    assert limits(Recipe.parse("output=e5m2/tensor/delayed")) == (57344.0, 57344.0, 0.0)


def test_prepared_layers_and_their_copies_can_know_their_scales():
    """Without limits they would train alike, by launches that a step with known scales spares."""
    model = fewbits.prepare(Transformer(CONFIG), "fp8-delayed")
    for one in (model, copy.deepcopy(model)):
        histories = [layer.history for layer in one.modules() if getattr(layer, "history", None) is not None]
        assert len(histories) == 5 and all(history.limits == FP8 for history in histories)


def test_scales_of_a_role_in_two_formats_are_worked_out_where_they_are_used(monkeypatch):
    monkeypatch.setitem(dispatch._choices, ("both layouts of fp8 codes", "cpu"), Choice("kernel", "a test"))
    store = ScaleStore.of([ScaleHistory(limits=(448.0, 448.0, 0.0))], torch.device("cpu"))
    for _ in range(5):
        take_step(store, 1.0)
    assert not store.known and store.histories[0].delayed.largest is store.histories[0].largest
