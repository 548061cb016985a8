"""layers=auto in a run: timed once for each shape and kind of block, kept in the cache, recorded, and refused in time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fewbits
from fewbits import ModelConfig, Transformer
from fewbits.checkpoint.load import load_checkpoint
from fewbits.checkpoint.save import save_checkpoint
from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.nn.block_timing import BlockTimer
from fewbits.nn.candidates import BF16, Shape
from fewbits.nn.layers import Layers
from fewbits.nn.stacks import PICKED, WHOLE, NoTimes, Stack
from fewbits.nn.timing import LayerTimer, Times
from fewbits.precision.recipe import RECIPES
from fewbits.train.build import Training, build_training, open_data
from fewbits.train.choices import Choices
from fewbits.train.config import Config
from fewbits.train.execution import choose_execution
from fewbits.train.layers import check_layers, choose_layers, recorded_layers
from fewbits.train.opened import open_model
from fewbits.train.resume import recorded_choices
from fewbits.train.state import collect, exact_weights, restore
from fewbits.train.trainer import train


class Clock:
    """A `Measure` that times nothing: by the number of outputs of a shape, the candidate that takes half of bf16's time."""

    def __init__(self, **fastest: int):
        self.fastest = {int(name.removeprefix("outputs")): number for name, number in fastest.items()}
        self.asked: list[Shape] = []

    def __call__(self, shape: Shape, candidates: Sequence[str]) -> Times:
        self.asked.append(shape)
        times = {text: [3.0] * 9 for text in candidates}
        times[BF16] = [2.0] * 9
        if (number := self.fastest.get(shape.outputs, 0)) and number < len(candidates):
            times[candidates[number]] = [1.0] * 9
        return times


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 256))


def test_one_timing_for_each_shape_and_none_when_it_is_in_the_cache(tmp_path: Path) -> None:
    clock = Clock(outputs256=1)
    first = choose_layers(model(), "fp8", 32, cache=tmp_path, measure=clock)
    assert clock.asked == [Shape(32, 64, 256, True), Shape(32, 256, 64, True)]
    assert [first[name].value != BF16 for name in ("0", "1", "2")] == [True, False, True]
    assert choose_layers(model(), "fp8-auto", 32, cache=tmp_path, measure=clock) == first
    assert len(clock.asked) == 2, "found in the cache"


@pytest.mark.parametrize(
    "changed", [{"tokens": 64}, {"mode": "compiled"}, {"micro_batches": 2}, {"graph": True}, {"precision": "fp8-row"}]
)
def test_what_changes_the_times_is_timed_anew(tmp_path: Path, changed: dict[str, object]) -> None:
    clock = Clock()
    options = {"precision": "fp8", "tokens": 32, "mode": "eager", "micro_batches": 1}
    choose_layers(model(), cache=tmp_path, measure=clock, **options)  # type: ignore[arg-type]
    choose_layers(model(), cache=tmp_path, measure=clock, **(options | changed))  # type: ignore[arg-type]
    assert len(clock.asked) == 4


@pytest.mark.parametrize("damage", ["", "{}", "nonsense", "changed"])
def test_a_damaged_cache_is_timed_again(tmp_path: Path, damage: str) -> None:
    clock = Clock(outputs256=1)
    first = choose_layers(model(), "fp8", 32, cache=tmp_path, measure=clock)
    manifests = list(tmp_path.glob("layers-*/manifest.json"))
    assert len(manifests) == 2
    for path in manifests:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("3.0", "0.1") if damage == "changed" else damage, encoding="utf-8")
    assert choose_layers(model(), "fp8", 32, cache=tmp_path, measure=clock) == first
    assert len(clock.asked) == 4
    assert choose_layers(model(), "fp8", 32, cache=tmp_path, measure=clock) == first
    assert len(clock.asked) == 4, "and is whole again"


class BlockClock:
    """A `MeasureBlocks` that times nothing: the whole recipe takes `ratio` of what was picked."""

    def __init__(self, ratio: float = 0.5):
        self.ratio = ratio
        self.asked: list[Stack] = []

    def __call__(self, stack: Stack) -> Times:
        self.asked.append(stack)
        return {PICKED: [1.0] * 9, WHOLE: [self.ratio] * 9}


def decoder(**options: object) -> Transformer:
    with torch.device("meta"):
        return Transformer(
            ModelConfig(**{"vocab_size": 97, "context": 16, "n_layer": 2, "n_head": 2, "n_embd": 64, **options})
        )  # type: ignore[arg-type]


def chosen(
    folder: Path, clock: Clock | None = None, blocks: BlockClock | None = None, **options: object
) -> tuple[Layers, list[tuple[int, int, str]]]:
    """What is chosen for a decoder, and the progress that was shown."""
    shown: list[tuple[int, int, str]] = []
    given = {"model": decoder(), "precision": "fp8", "tokens": 32, "cache": folder, "device": "cpu", **options}
    progress = lambda *units: shown.append(units)  # noqa: E731
    layers = choose_layers(measure=clock or Clock(), measure_blocks=blocks, progress=progress, **given)  # type: ignore[arg-type]
    return layers, shown


def test_blocks_are_timed_once_for_each_kind_and_not_when_they_are_in_the_cache(tmp_path: Path) -> None:
    blocks = BlockClock()
    first, shown = chosen(tmp_path, blocks=blocks, keep=iter(["blocks.0.mlp", "blocks.1.norm1=fp32"]))
    assert [(len(stack.picks), len(stack.formats)) for stack in blocks.asked] == [(2, 0), (4, 1)]
    assert {choice.value for choice in first.values()} == {str(RECIPES["fp8"])}
    assert shown == [
        *((i, 4, "timing linear layers") for i in range(5)),
        *((i, 2, "timing whole blocks") for i in range(3)),
    ]
    assert chosen(tmp_path, blocks=blocks, keep=["blocks.0.mlp", "blocks.1.norm1=fp32"])[0] == first
    deeper = decoder(n_layer=4, vocab_size=96, tied=False)
    chosen(tmp_path, blocks=blocks, keep=["blocks.0.mlp", "blocks.[123].norm1=fp32"], model=deeper)
    assert len(blocks.asked) == 2, "found in the cache, also for a model of such blocks"


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": 64},
        {"mode": "compiled"},
        {"micro_batches": 2},
        {"graph": True},
        {"precision": "fp8-row"},
        {"keep": ["blocks.*.norm1=fp32"]},
        {"clock": Clock(outputs64=2)},
        {"model": decoder(dropout=0.1)},
        {"model": decoder(n_layer=13)},
    ],
)
def test_what_changes_the_times_of_blocks_is_timed_anew(tmp_path: Path, changed: dict[str, object]) -> None:
    blocks = BlockClock(1.5)
    chosen(tmp_path, blocks=blocks)
    for path in tmp_path.glob("layers-*/manifest.json"):
        if '"shape"' in path.read_text(encoding="utf-8"):
            path.unlink()  # single layers are timed again, by the clock of this turn
    chosen(tmp_path, blocks=blocks, **changed)  # type: ignore[arg-type]
    assert len(blocks.asked) == 2


@pytest.mark.parametrize("damage", ["", "nonsense", "changed"])
def test_a_damaged_timing_of_blocks_is_made_again(tmp_path: Path, damage: str) -> None:
    blocks = BlockClock()
    first, _ = chosen(tmp_path, blocks=blocks)
    texts = {p: p.read_text(encoding="utf-8") for p in tmp_path.glob("layers-*/manifest.json")}
    (path,) = (path for path, text in texts.items() if PICKED in text)
    path.write_text(texts[path].replace("0.5", "1.5") if damage == "changed" else damage, encoding="utf-8")
    assert chosen(tmp_path, blocks=blocks)[0] == first
    assert len(blocks.asked) == 2


def test_no_block_is_timed_for_other_models_where_all_chose_the_recipe_or_where_only_single_layers_have_a_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = BlockClock()
    whole = Clock(outputs192=1, outputs64=1, outputs256=1)
    layers, shown = chosen(tmp_path, whole, blocks)
    assert {choice.value for choice in layers.values()} == {str(RECIPES["fp8"])} and shown[-1][
        2
    ] == "timing linear layers"
    chosen(tmp_path, Clock(), blocks, model=model())
    monkeypatch.setattr(BlockTimer, "__call__", lambda *_: pytest.fail("timed on the device"))
    assert not chosen(tmp_path / "two", Clock())[0].lowbit
    assert not choose_layers(decoder(), "fp8", 32, device="cpu", cache=tmp_path / "three", measure_blocks=blocks).lowbit
    assert not blocks.asked and not (tmp_path / "three").exists(), "nor where every product would be emulated"


def test_on_a_device_blocks_are_timed_in_the_way_of_the_run_and_a_failure_leaves_what_layers_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[LayerTimer] = []

    def fails(timer: BlockTimer, stack: Stack) -> Times:
        asked.append(timer.layers)
        raise RuntimeError("a compiler")

    monkeypatch.setattr(LayerTimer, "__call__", lambda _, shape, ways: Clock(outputs64=2)(shape, ways))
    monkeypatch.setattr(BlockTimer, "_times", fails)
    layers = choose_layers(decoder(), "int8", 32, mode="compiled", micro_batches=3, device="cpu", cache=tmp_path)
    assert asked == [LayerTimer(torch.device("cpu"), "compiled", 3)]
    alone = chosen(tmp_path / "alone", Clock(outputs64=2), precision="int8")[0]
    assert {name: choice.value for name, choice in layers.items()} == {n: c.value for n, c in alone.items()}
    assert layers.lowbit and all("whole blocks were not timed" in choice.reason for choice in layers.values())


def test_blocks_that_did_not_run_are_tried_again_and_time_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = BlockClock()
    monkeypatch.setattr(BlockClock, "__call__", lambda *_: (_ for _ in ()).throw(NoTimes("memory is full")))
    assert not chosen(tmp_path, blocks=blocks)[0].lowbit
    monkeypatch.undo()
    assert chosen(tmp_path, blocks=blocks)[0].lowbit and len(blocks.asked) == 1
    monkeypatch.setattr("fewbits.train.layers.BLOCKS_S", 0.0)
    assert chosen(tmp_path / "late", blocks=blocks)[0]["blocks.0.mlp.up"].reason.endswith("not timed")
    assert len(blocks.asked) == 1


def test_where_every_product_would_be_emulated_nothing_is_timed(tmp_path: Path) -> None:
    layers = choose_layers(model(), "mxfp8", 32, device="cpu", cache=tmp_path)
    assert not layers.lowbit and not list(tmp_path.iterdir())
    assert str(layers).startswith("all 3 linear layers that the recipe takes stay in bf16: nothing to win")
    prepared = fewbits.prepare(model(), "mxfp8-auto", layers=layers)
    assert {row[2] for row in prepared.fewbits_report.rows} == {"kept in bf16"}


def test_the_public_function_is_at_the_front_door_and_its_result_fits_prepare(tmp_path: Path) -> None:
    layers = fewbits.choose_layers(model(), "int8-auto", 32, cache=tmp_path, measure=Clock(outputs64=3))
    prepared = fewbits.prepare(model(), "int8-auto", layers=layers)
    assert [bool(layer.recipe) for layer in prepared] == [False, True, False]
    assert hasattr(prepared[1], "site") and not hasattr(prepared[0], "site")


@pytest.mark.parametrize(
    ("precision", "said"),
    [("bf16-mixed", "no recipe"), ("int8-qat", "quantized checkpoint"), ("fp8", "must be 1 or more")],
)
def test_what_cannot_be_chosen_is_refused(precision: str, said: str) -> None:
    with pytest.raises(FewbitsError, match=said):
        choose_layers(model(), precision, 0, measure=Clock())


def settled(config: Config, clock: Clock) -> Choices:
    """The choices of a run, timed by a clock of ours."""
    return choose_execution(config, measure=clock)


@pytest.fixture
def auto(tiny: Callable[..., Config], tmp_path: Path) -> Config:
    """A run whose layers are chosen: qkv, output, up and down have 192, 64, 256 and 64 outputs."""
    return tiny(precision="fp8-auto", n_embd=64, micro_batches=2, lr=0.01, cache=str(tmp_path / "cache"))


def test_a_run_times_the_rows_of_a_micro_batch_once_for_each_shape(auto: Config) -> None:
    clock = Clock(outputs192=1, outputs256=2)
    choices = settled(auto, clock)
    rows = auto.train.batch_size // 2 * auto.model.context
    assert [(shape.tokens, shape.inputs, shape.outputs) for shape in clock.asked] == [
        (rows, 64, 192), (rows, 64, 64), (rows, 64, 256), (rows, 256, 64),
    ]  # fmt: skip
    names = [name for name, choice in choices.layers.items() if choice.value != BF16]
    assert names == ["blocks.0.attention.qkv", "blocks.0.mlp.up"]
    assert choices.precision.value == "fp8-auto"


def test_2n_steps_equal_n_steps_saved_loaded_and_n_more_without_timing_again(auto: Config, tmp_path: Path) -> None:
    data = open_data(auto)
    whole = build_training(auto, settled(auto, Clock(outputs192=1, outputs256=2)), data)
    for _ in range(3):
        whole.take_step()
    saved = save_checkpoint(tmp_path / "checkpoints", 3, **collect(whole, {}), keep=1)
    for _ in range(3):
        whole.take_step()
    checkpoint = load_checkpoint(saved)
    again = recorded_choices(auto, checkpoint)  # takes no clock: it could not time if it wanted to
    assert again.layers == whole.choices.layers
    resumed: Training = build_training(auto, again, data)
    restore(resumed, checkpoint)
    for _ in range(3):
        resumed.take_step()
    left, right = (exact_weights(t.model, t.optimizer) for t in (whole, resumed))
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    recipes = [{n: m.recipe for n, m in t.model.named_modules() if getattr(m, "recipe", "")} for t in (whole, resumed)]
    assert recipes[0] == recipes[1] and len(recipes[0]) == 2


def test_a_trained_run_is_evaluated_and_opened_with_what_it_chose(auto: Config, tmp_path: Path) -> None:
    training = build_training(auto, settled(auto, Clock(outputs192=1)), open_data(auto))
    training.take_step()
    saved = save_checkpoint(tmp_path / "checkpoints", 1, **collect(training, {}), keep=1)
    opened, _, chosen, _ = open_model(saved, "cpu", "fp8-auto")
    lowbit = [name for name, module in opened.named_modules() if getattr(module, "recipe", "")]
    assert lowbit == ["blocks.0.attention.qkv"] and str(chosen) == "fp8, layers=auto"
    assert recorded_layers(saved, fewbits.Precision.parse("fp8")) is None
    plain = replace(auto, precision="bf16-mixed")
    other = build_training(
        plain, replace(training.choices, precision=Choice("bf16", ""), layers=Layers()), open_data(plain)
    )
    other.take_step()
    saved = save_checkpoint(tmp_path / "others", 1, **collect(other, {}), keep=1)
    with pytest.raises(FewbitsError, match=r"not trained with layers=auto.*'fp8'"):
        open_model(saved, "cpu", "fp8-auto")


def test_the_whole_trainer_records_shows_and_resumes_the_choice(
    auto: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(auto, train=replace(auto.train, max_steps=4, stop_at=2))
    summary = train(config)
    shown = capsys.readouterr().out
    assert shown.count("linear layers that the recipe takes stay in bf16") == 1, (
        "fp8 is emulated on a CPU: there is nothing to win"
    )
    entries = [entry for entry in summary["choices"] if entry["what"].startswith("layers")]
    assert len(entries) == 4 and {entry["value"] for entry in entries} == {BF16}
    out = Path(config.train.out_dir)
    event = json.loads((out / "events.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert Layers.from_json(event["choices"]) == Layers.from_json(summary["choices"])
    again = train(replace(config, train=replace(config.train, stop_at=0)), resume=out, quiet=True)
    assert again["steps"] == 4 and [e for e in again["choices"] if e["what"].startswith("layers")] == entries
    assert again["precision"] == "fp8, layers=auto"


def test_nothing_to_choose_is_refused_before_any_text_is_read(tiny: Callable[..., Config], tmp_path: Path) -> None:
    missing = {"data": str(tmp_path / "no such text"), "out": "refused"}
    for options, said in (
        ({"precision": "fp8-auto", "n_embd": 16}, "would change nothing"),
        ({"precision": "fp8-auto", "n_embd": 64, "keep": "blocks.*"}, "would change nothing"),
        ({"precision": "bf16-mixed, layers=auto"}, "no recipe"),
        ({"precision": "bf16-auto"}, "no recipe"),
        ({"precision": "int4-qat-auto"}, "quantized checkpoint"),
    ):
        with pytest.raises(FewbitsError, match=said):
            train(tiny(**missing, **options), quiet=True)
    assert not (tmp_path / "refused").exists()
    check_layers(tiny(precision="fp8-auto", n_embd=64))
    check_layers(tiny(precision="auto"))
