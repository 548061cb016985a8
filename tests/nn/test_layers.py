"""layers=auto: what is timed, which way of multiplying wins, and what prepare makes of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import nn

import fewbits
from fewbits import Choice, FewbitsError, Precision
from fewbits.nn.candidates import BF16, Shape, candidates, matmuls_of, shapes
from fewbits.nn.layers import MARGIN, Layers, pick
from fewbits.nn.timing import LEAST_ROUNDS, Interval, LayerTimer, median_interval, paired, race
from fewbits.precision.recipe import RECIPES, Recipe

SHAPE = Shape(512, 64, 256, True)
FP8 = candidates(RECIPES["fp8"], SHAPE)


def model() -> nn.Sequential:
    """Two shapes of layers that a recipe takes, two of the first, and one that no recipe takes."""
    return nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 256), nn.Linear(256, 10))


def steady(**ratios: float) -> dict[str, list[float]]:
    """Ten rounds in which candidate number i of FP8 takes ratios["wayI"] of bf16's 2 ms, within 0.1 %."""
    wobble = [1 + 1e-3 * (i % 3 - 1) for i in range(10)]
    times = {BF16: [2.0] * 10}
    return {**times, **{FP8[int(name[-1])]: [2.0 * ratio * w for w in wobble] for name, ratio in ratios.items()}}


@pytest.mark.parametrize("name", RECIPES)
def test_candidates_are_canonical_begin_with_bf16_and_the_recipe_and_use_nothing_else(name: str) -> None:
    recipe = RECIPES[name]
    if recipe.fake:
        return
    for shape in (SHAPE, SHAPE._replace(inputs=256, outputs=64)):
        first, second, *rest = candidates(recipe, shape)
        assert (first, second) == (BF16, str(recipe))
        for text in (second, *rest):
            part = Recipe.parse(text)
            assert str(part) == text
            assert all(mine in (None, whole) for mine, whole in zip(part.matmuls, recipe.matmuls, strict=True))


def test_the_matmul_that_is_timed_alone_quantizes_the_smaller_of_the_large_operands() -> None:
    wide, narrow = candidates(RECIPES["fp8"], SHAPE), candidates(RECIPES["fp8"], Shape(512, 256, 64, False))
    assert [matmuls_of(text) for text in wide] == ["", "all three matmuls", "output and grad_input", "output"]
    assert [matmuls_of(text) for text in narrow][-1] == "grad_input"


def test_a_recipe_of_one_matmul_has_one_way() -> None:
    assert candidates(Recipe.parse("output=e4m3/row"), SHAPE) == (BF16, str(Recipe.parse("output=e4m3/row")))


def test_layers_of_one_shape_are_timed_once() -> None:
    found = shapes(model(), Precision.parse("fp8-auto"), 512)
    assert found == {SHAPE: ["0", "2"], Shape(512, 256, 64, True): ["1"]}
    with pytest.raises(FewbitsError, match="would change nothing"):
        shapes(nn.Sequential(nn.Linear(10, 10)), Precision.parse("fp8-auto"), 512)


@pytest.mark.parametrize(
    ("ratios", "wins"),
    [
        ({"way1": 0.7, "way2": 0.8, "way3": 0.9}, 1),
        ({"way1": 0.9, "way2": 0.8, "way3": 0.7}, 3),
        ({"way1": 1.2, "way2": 0.9, "way3": 1.1}, 2),
        ({"way1": 1.2, "way2": 1.01, "way3": 1.1}, 0),
        ({"way1": 0.985, "way2": 1.1, "way3": 1.1}, 0),  # faster, but by less than the margin
        ({"way1": 0.975, "way2": 1.1, "way3": 1.1}, 1),
        ({"way2": 0.8}, 2),  # the others did not run
        ({}, 0),
    ],
)
def test_the_fastest_wins_if_it_wins_the_margin(ratios: dict[str, float], wins: int) -> None:
    group = pick(SHAPE, ["0"], steady(**ratios))
    assert group.choice.value == FP8[wins] and group.choice.reason
    assert group.ratio.median == pytest.approx(1.0 if wins == 0 else ratios[f"way{wins}"])
    assert group.ratio.high <= (1.0 if wins == 0 else 1 - MARGIN)


def test_a_way_that_is_faster_only_on_average_does_not_replace_bf16() -> None:
    # half of the rounds at 0.6, half at 1.2: the median lies below 1, its interval does not
    group = pick(SHAPE, ["0"], {BF16: [1.0] * 11, FP8[1]: [0.6] * 6 + [1.2] * 5})
    assert group.choice.value == BF16 and "1.67x (0.83 to 1.67)" in group.choice.reason


def test_what_is_kept_says_how_much_faster_bf16_is() -> None:
    assert pick(SHAPE, ["0"], steady(way1=1.25)).choice.reason.startswith("bf16 is faster: 0.80x (0.80 to 0.80)")
    with pytest.raises(FewbitsError, match="no bf16 to compare"):
        pick(SHAPE, ["0"], {})


@pytest.mark.parametrize("n", [6, 9, 15, 30, 100])
def test_the_interval_of_a_median_covers_with_95_per_cent_and_no_narrower_one_does(n: int) -> None:
    # of n independent values, the number below the true median is binomial(n, 1/2): its cumulative sums give the coverage
    _, low, high = median_interval([float(i) for i in range(n)])
    cut = int(low)
    assert int(high) == n - 1 - cut
    pascal = [1.0]
    for _ in range(n):
        pascal = [a + b for a, b in zip([0.0, *pascal], [*pascal, 0.0], strict=True)]

    def coverage(cut: int) -> float:
        return 1 - 2 * sum(pascal[: cut + 1]) / 2.0**n

    assert coverage(cut) >= 0.95 > coverage(cut + 1)


def test_too_few_values_bound_nothing() -> None:
    assert median_interval([1.0] * (LEAST_ROUNDS - 1)).high == float("inf")
    assert median_interval([1.0] * LEAST_ROUNDS) == Interval(1.0, 1.0, 1.0)


def clock(times: Iterator[float], log: list[str], name: str) -> Callable[[], float]:
    def call() -> float:
        log.append(name)
        return next(times)

    return call


def test_a_race_takes_turns_and_drops_what_has_lost() -> None:
    log: list[str] = []
    calls = {name: clock(itertools.repeat(t), log, name) for name, t in (("base", 1.0), ("quick", 0.5), ("slow", 2.0))}
    times = race(calls, "base", rounds=9, budget_s=60.0, hopeless=1.0)
    assert [len(times[name]) for name in calls] == [9, 9, LEAST_ROUNDS]
    whole = log[: 3 * LEAST_ROUNDS]
    assert all(sorted(whole[i : i + 3]) == sorted(calls) for i in range(0, len(whole), 3)), "a round asks each once"
    after = {name: {a for a, b in itertools.pairwise(log) if b == name} for name in ("base", "quick")}
    assert all(len(before) > 1 for before in after.values()), "nobody always follows the same one"
    assert paired(times["quick"], times["base"]) == Interval(0.5, 0.5, 0.5)


def test_drift_of_the_machine_cancels_in_pairs() -> None:
    drift = [1.0 + i for i in range(9)]  # the machine becomes ten times slower meanwhile
    assert paired([0.5 * d for d in drift], drift) == Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize("recipe", ["fp8", "int8", "fp8-delayed"])
def test_the_timer_times_real_layers_of_every_way_and_draws_nothing_from_torchs_generator(recipe: str) -> None:
    shape = Shape(32, 64, 64, True)
    ways = candidates(RECIPES[recipe], shape)
    before = torch.get_rng_state()
    times = LayerTimer(torch.device("cpu"), micro_batches=2, rounds=LEAST_ROUNDS)(shape, ways)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(times) == list(ways)
    assert all(len(found) == LEAST_ROUNDS and min(found) > 0 for found in times.values())


def test_a_way_that_does_not_run_is_left_out_and_a_mode_that_is_none_refused() -> None:
    times = LayerTimer(torch.device("cpu"), rounds=LEAST_ROUNDS)(
        Shape(32, 64, 64, False), (BF16, "output=e4m3/nonsense")
    )
    assert list(times) == [BF16]
    with pytest.raises(FewbitsError, match="eager or compiled"):
        LayerTimer(torch.device("cpu"), mode="fast")
    with pytest.raises(FewbitsError, match="the device is cpu"):
        LayerTimer(torch.device("cpu"), graph=True)


def chosen(*picks: int) -> Layers:
    """The layers of `model()`: for each of its two shapes the number of the candidate that is fastest."""

    def group(shape: Shape, names: Sequence[str], number: int) -> object:
        ways = candidates(RECIPES["fp8"], shape)
        return pick(shape, names, {BF16: [2.0] * 9, **({ways[number]: [1.0] * 9} if number else {})})

    found = shapes(model(), Precision.parse("fp8-auto"), 512).items()
    return Layers(tuple(group(shape, names, n) for (shape, names), n in zip(found, picks, strict=True)))  # type: ignore[misc]


def test_prepare_gives_every_layer_what_was_chosen_and_reports_it() -> None:
    prepared = fewbits.prepare(model(), "fp8-auto", layers=chosen(2, 0))
    whole = RECIPES["fp8"]
    assert prepared[0].recipe == prepared[2].recipe == str(Recipe(whole.output, whole.grad_input))
    assert prepared[1].recipe == prepared[3].recipe == ""
    rows = {row[0]: row[2:] for row in prepared.fewbits_report.rows}
    assert rows["0"] == ("fp8, grad_weight=bf16", "2.00x (2.00 to 2.00) as fast as bf16 in output and grad_input")
    assert rows["1"] == ("kept in bf16", "nothing else ran here") and rows["3"][0] == "kept in bf16"
    assert "fp8, grad_weight=bf16" in Precision.parse("fp8-auto").table(prepared.fewbits_report)
    assert str(prepared.fewbits_precision) == "fp8, layers=auto"
    assert fewbits.unprepare(prepared)[0].__dict__.get("recipe", "") == ""


def test_the_whole_recipe_everywhere_is_the_recipe_itself_bit_for_bit() -> None:
    torch.manual_seed(0)
    x, grads = torch.randn(32, 64), []
    for precision, layers in (("fp8", None), ("fp8-auto", chosen(1, 1))):
        torch.manual_seed(1)
        prepared = fewbits.prepare(model(), precision, layers=layers)
        prepared(x).sum().backward()
        grads.append([p.grad for p in prepared.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_one_line_says_what_was_chosen_and_what_it_is_worth() -> None:
    assert str(chosen(2, 0)) == (
        "linear layers: 2 of 3 in output and grad_input, 1 in bf16; 4 ms a step in them instead of 6, saves 2 ms (2 to 2), "
        "1.50x (1.50 to 1.50)"
    )
    assert str(chosen(0, 0)) == "all 3 linear layers that the recipe takes stay in bf16: nothing else ran here"
    assert (chosen(2, 0).ms, chosen(2, 0).bf16_ms, chosen(2, 0).lowbit) == (Interval(4.0, 4.0, 4.0), 6.0, True)


def test_choices_of_layers_survive_being_recorded() -> None:
    layers = chosen(1, 3)
    assert Layers.from_json([{"what": "device", "value": "cpu", "reason": ""}, *layers.to_json()]) == layers
    with pytest.raises(FewbitsError, match="not those of this version"):
        Layers.from_json([{"what": "layers 1 x 2 x 3", "value": BF16, "reason": ""}])


@pytest.mark.parametrize(
    ("precision", "layers", "said"),
    [
        ("fp8-auto", None, r"layers=fewbits\.choose_layers\(model, 'fp8, layers=auto', tokens="),
        ("fp8-auto", {"0": Choice(BF16, "")}, "'1' is taken, and has no choice"),
        ("fp8", {name: Choice(BF16, "") for name in "0123"}, "'3' is no linear layer that the recipe takes"),
        ("fp8-auto", {name: Choice("output=nonsense", "") for name in "012"}, "nonsense"),
        ("bf16-mixed", {"0": Choice(BF16, "")}, "'0' is no linear layer that the recipe takes"),
    ],
)
def test_choices_that_do_not_belong_are_refused_and_the_model_is_unchanged(
    precision: str, layers: dict[str, Choice] | None, said: str
) -> None:
    untouched = model()
    with pytest.raises(FewbitsError, match=said):
        fewbits.prepare(untouched, precision, layers=layers)
    assert type(untouched[0]) is nn.Linear and untouched[0].weight.dtype == torch.float32
