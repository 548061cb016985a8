"""layers=auto in whole blocks: what a stack of a model's blocks is, how it is timed, and what its times decide."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fewbits
from fewbits import Choice, ModelConfig, Precision, Transformer
from fewbits.nn import block_timing
from fewbits.nn.block_timing import BlockTimer, block_step, prepared, size
from fewbits.nn.candidates import BF16, Shape, candidates, shapes
from fewbits.nn.layers import MARGIN, InBlocks, LayerGroup, Layers, settle_in_blocks
from fewbits.nn.stacks import PICKED, WHOLE, NoTimes, Stack, stacks
from fewbits.nn.timing import LEAST_ROUNDS, MOST_PARTS, Interval, LayerTimer, Times, flops_limit
from fewbits.precision.recipe import RECIPES, Recipe

GPT = ModelConfig(vocab_size=61, context=16, n_layer=3, n_head=2, n_embd=64)
LLAMA = dataclasses.replace(GPT, n_kv_head=1, norm="rmsnorm", activation="swiglu", positions="rope", bias=False)
CPU = torch.device("cpu")
WAYS = candidates(RECIPES["fp8"], Shape(32, 64, 192, True))  # bf16, the recipe, without grad_weight, output alone
DELAYED = candidates(RECIPES["fp8-delayed"], Shape(32, 64, 192, True))
EVERY = ["attention.qkv", "attention.output", "mlp.up", "mlp.down"]


def outline(config: ModelConfig = GPT) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def alone(model: Transformer, keep: tuple[str, ...] = (), values: Mapping[str, str] | None = None) -> Layers:
    """What layers chose alone: bf16, or the value of the last part of their name."""
    groups = []
    for shape, names in shapes(model, Precision.parse("fp8"), 32, keep).items():
        value = (values or {}).get(names[0].rpartition(".")[2], BF16)
        ratio = Interval(1.0, 1.0, 1.0) if value == BF16 else Interval(0.5, 0.5, 0.5)
        groups.append(LayerGroup(shape, tuple(names), Choice(value, "alone"), 2.0, ratio))
    return Layers(tuple(groups))


def timed(ratio: float, wobble: float = 1e-3) -> Times:
    """Ten rounds in which the whole recipe takes `ratio` of what was picked, within `wobble`."""
    return {PICKED: [2.0] * 10, WHOLE: [2.0 * ratio * (1 + wobble * (i % 3 - 1)) for i in range(10)]}


def settled(layers: Layers, ratio: float, keep: tuple[str, ...] = (), recipe: str = "fp8") -> Layers:
    found = stacks(outline(), Precision.parse(recipe), 32, keep, layers)
    return settle_in_blocks(layers, {stack: (blocks, timed(ratio)) for stack, blocks in found.items()})


def test_a_stack_is_two_blocks_of_the_models_shape_on_the_rows_of_a_call() -> None:
    model = outline(dataclasses.replace(LLAMA, tied=False, rope_theta=5e5, norm_eps=1e-6))
    ((stack, blocks),) = stacks(model, Precision.parse("fp8"), 8, (), alone(model)).items()
    assert blocks == ["blocks.0", "blocks.1", "blocks.2"] and stack.tokens == 8 and stack.at_once
    config = stack.config
    assert (config.n_layer, config.context, config.n_embd, config.kv_heads, config.ff) == (2, 8, 64, 1, 192)
    assert dict(stack.picks) == dict.fromkeys(
        ["attention.qkv", "attention.output", "mlp.up", "mlp.gate", "mlp.down"], BF16
    )
    # what costs no time is no part of it, so that it is found in a cache
    plain = outline(dataclasses.replace(LLAMA, n_layer=5, vocab_size=99, context=32))
    assert list(stacks(plain, Precision.parse("fp8"), 8, (), alone(plain))) == [stack]
    deep = outline(dataclasses.replace(LLAMA, n_layer=13))
    assert not next(iter(stacks(deep, Precision.parse("fp8"), 8, (), alone(deep)))).at_once
    one = outline(dataclasses.replace(LLAMA, n_layer=1))
    assert next(iter(stacks(one, Precision.parse("fp8"), 8, (), alone(one)))).config.n_layer == 1


def test_blocks_are_one_stack_where_the_recipe_takes_the_same_of_them() -> None:
    keep = ("blocks.0.mlp", "blocks.2.norm1=fp32")
    found = stacks(outline(), Precision.parse("fp8"), 32, keep, alone(outline(), keep))
    assert list(found.values()) == [["blocks.0"], ["blocks.1"], ["blocks.2"]]
    first, second, third = found
    assert list(dict(first.picks)) == EVERY[:2] and list(dict(second.picks)) == list(dict(third.picks)) == EVERY
    assert (first.formats, second.formats, third.formats) == ((), (), (("norm1", "fp32"),))
    kept = ("blocks.0",)  # nothing is left of it
    assert list(stacks(outline(), Precision.parse("fp8"), 32, kept, alone(outline(), kept)).values()) == [
        ["blocks.1", "blocks.2"]
    ]


def test_there_is_nothing_to_time_where_all_chose_the_recipe_or_the_model_is_not_just_ours() -> None:
    whole = alone(outline(), values=dict.fromkeys(["qkv", "output", "up", "down"], WAYS[1]))
    assert not stacks(outline(), Precision.parse("fp8"), 32, (), whole)

    class Own(Transformer):
        pass

    with torch.device("meta"):
        models = [Own(GPT), outline(), outline(), outline(), outline()]
        models[4].blocks[0].mlp.up = type(models[4].blocks[0].mlp.up)(64, 192)  # of another width than the config's
        models[1].blocks[1].mlp = torch.nn.Identity()
        models[2].blocks[1].norm1 = torch.nn.LayerNorm(64)
        models[3].blocks[2].mlp.up.register_forward_hook(lambda *_: None)
    for model in models:
        assert not stacks(model, Precision.parse("fp8"), 32, (), alone(model))


@pytest.mark.parametrize(
    ("ratio", "wins"), [(0.8, True), (1 - MARGIN - 0.002, True), (1 - MARGIN, False), (0.99, False), (1.2, False)]
)
def test_the_whole_recipe_takes_the_place_of_picks_if_blocks_win_the_margin(ratio: float, wins: bool) -> None:
    layers = alone(outline(), values={"up": WAYS[3]})
    found = settled(layers, ratio)
    assert list(found) == list(layers)
    assert all(found[name].value == (WAYS[1] if wins else layers[name].value) for name in layers)
    assert all(
        "what layers alone chose in whole blocks, with all three matmuls in few bits" in c.reason
        for c in found.values()
    )
    assert all(c.reason.startswith("alone; ") != wins for c in found.values()), (
        "what is kept says why it was chosen first"
    )
    assert all((group.blocks is not None) == wins for group in found.groups)


def test_blocks_that_are_faster_only_on_average_decide_nothing() -> None:
    layers = alone(outline())
    ((stack, blocks),) = stacks(outline(), Precision.parse("fp8"), 32, (), layers).items()
    times = {PICKED: [1.0] * 11, WHOLE: [0.6] * 6 + [1.2] * 5}  # the median wins, its interval does not
    found = settle_in_blocks(layers, {stack: (blocks, times)})
    assert (
        not found.lowbit and "1.67x (0.83 to 1.67) as fast as bf16 in whole blocks" in found["blocks.0.mlp.up"].reason
    )


@pytest.mark.parametrize("times", [{}, {PICKED: [1.0] * 9}, {WHOLE: [1.0] * 9, PICKED: []}])
def test_blocks_that_did_not_run_leave_the_picks(times: Times) -> None:
    layers = alone(outline(), values={"up": WAYS[2]})
    found = stacks(outline(), Precision.parse("fp8"), 32, (), layers)
    kept = settle_in_blocks(layers, {stack: (blocks, times) for stack, blocks in found.items()})
    for name, choice in layers.items():
        assert kept[name] == Choice(choice.value, f"{choice.reason}; whole blocks were not timed")


def test_kinds_of_blocks_are_decided_each_by_its_own_times_and_layers_that_had_the_recipe_keep_their_reason() -> None:
    keep = ("blocks.0.mlp",)
    layers = alone(outline(), keep, {"qkv": WAYS[1]})
    first, others = stacks(outline(), Precision.parse("fp8"), 32, keep, layers).items()
    found = settle_in_blocks(layers, {first[0]: (first[1], timed(1.1)), others[0]: (others[1], timed(0.5))})
    assert found["blocks.0.attention.output"].value == BF16
    assert {found[f"blocks.{i}.{name}"].value for i in (1, 2) for name in EVERY} == {WAYS[1]}
    assert found["blocks.1.attention.qkv"] == Choice(WAYS[1], "alone")
    assert [len(group.names) for group in found.groups] == [3, 1, 2, 2, 2]
    assert str(found) == (
        "linear layers: 9 of 10 in all three matmuls, 1 in bf16; whole blocks decided for 6, 2.00x (2.00 to 2.00) as fast as "
        "what layers alone chose; 5 ms a step in the other 4 instead of 8, saves 3 ms (3 to 3), 1.60x (1.60 to 1.60)"
    )


def test_under_delayed_scales_blocks_decide_only_where_no_layer_has_a_part_of_the_recipe() -> None:
    """Codes are handed on where all layers that look back have one recipe: else blocks would not run as they were timed."""
    keep = ("blocks.0.mlp",)
    for value, wins in ((DELAYED[3], False), (BF16, True)):
        layers = alone(outline(), keep, {"output": value})
        first, others = stacks(outline(), Precision.parse("fp8-delayed"), 32, keep, layers).items()
        found = settle_in_blocks(layers, {first[0]: (first[1], timed(1.1)), others[0]: (others[1], timed(0.5))})
        assert (found["blocks.1.mlp.up"].value == DELAYED[1]) == wins
        assert found["blocks.0.attention.output"].value == value
        assert ("2.00x (2.00 to 2.00) as fast" in found["blocks.1.mlp.up"].reason) and (
            found["blocks.1.mlp.up"].reason.endswith(
                "but parts of the recipe remain in others, and codes are not handed on"
            )
        ) != wins
    layers = alone(outline(), values={"output": DELAYED[3]})
    assert {choice.value for choice in settled(layers, 0.5, recipe="fp8-delayed").values()} == {DELAYED[1]}


def test_prepare_takes_what_blocks_decided_and_the_line_says_what_they_are_worth() -> None:
    found = settled(alone(outline()), 0.8)
    assert str(found) == (
        "linear layers: 12 of 12 in all three matmuls; whole blocks decided for 12, 1.25x (1.25 to 1.25) as fast as bf16"
    )
    model = fewbits.prepare(Transformer(GPT), "fp8-auto", layers=found)
    assert {model.get_submodule(name).recipe for name in found} == {WAYS[1]}
    rows = {row[0]: row[2:] for row in model.fewbits_report.rows}
    assert rows["blocks.0.mlp.up"] == (
        "fp8, layers=auto", "1.25x (1.25 to 1.25) as fast as bf16 in whole blocks, with all three matmuls in few bits"
    )  # fmt: skip


def test_what_blocks_decided_survives_being_recorded_and_older_records_are_read() -> None:
    found = settled(alone(outline(), ("blocks.0",), {"up": WAYS[1]}), 0.8, ("blocks.0",))
    assert {group.blocks for group in found.groups} == {
        None,
        InBlocks(Interval(0.8, 0.8 * 0.999, 0.8 * 1.001), "what layers alone chose"),
    }
    assert Layers.from_json(found.to_json()) == found
    older = alone(outline()).to_json()
    assert not any("blocks" in entry for entry in older), "as it was before blocks were timed"
    assert Layers.from_json(older) == alone(outline())
    with pytest.raises(fewbits.FewbitsError, match="not those of this version"):
        Layers.from_json([{**older[0], "blocks": {"ratio": [1.0, 1.0, 1.0]}}])


def stack_of(recipe: str, config: ModelConfig = GPT, keep: tuple[str, ...] = (), tokens: int = 32) -> Stack:
    """The last stack of a model whose layers chose bf16, but for `up`, which chose output alone."""
    ways = candidates(RECIPES[recipe], Shape(32, 64, 192, True))
    model = outline(config)
    return list(stacks(model, Precision.parse(recipe), tokens, keep, alone(model, keep, {"up": ways[3]})))[-1]


@pytest.mark.parametrize(("recipe", "config"), [("fp8-delayed", GPT), ("int8", LLAMA)])
def test_the_timer_times_both_ways_and_draws_nothing_from_torchs_generator(
    recipe: str, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Mapping[str, str]] = []
    within: list[Precision] = []

    @contextmanager
    def switches(precision: Precision, device: torch.device) -> Iterator[None]:
        within.append(precision)
        yield
        within.pop()

    def watched(*way: Any) -> Transformer:
        assert within == [Precision.parse("bf16-mixed")], "the numerics of torch are those of a training"
        given.append(way[1])
        return prepared(*way)

    monkeypatch.setattr(block_timing, "torch_switches", switches)
    monkeypatch.setattr(block_timing, "prepared", watched)
    before = torch.get_rng_state()
    config = dataclasses.replace(config, dropout=0.1)
    timer = BlockTimer(LayerTimer(CPU, micro_batches=2, rounds=LEAST_ROUNDS, hopeless=9.0))
    stack = stack_of(recipe, config, ("blocks.2.norm1=fp32",))
    times = timer(stack)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(times) == [PICKED, WHOLE]
    assert given == [dict(stack.picks), dict.fromkeys(dict(stack.picks), str(RECIPES[recipe]))]
    assert all(len(found) == LEAST_ROUNDS and min(found) > 0 for found in times.values())


def test_a_failure_of_whatever_kind_gives_no_times_and_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a compiler")

    before = torch.get_rng_state(), torch.get_float32_matmul_precision()
    for what in ("prepared", "block_step", "recorded", "race"):
        with monkeypatch.context() as patch:
            patch.setattr(block_timing, what, fails)
            patch.setattr(LayerTimer, "__post_init__", lambda _: None)
            with pytest.raises(NoTimes):
                BlockTimer(LayerTimer(CPU, graph=True, rounds=LEAST_ROUNDS))(stack_of("fp8"))
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_float32_matmul_precision() == before[1]


def test_a_stack_has_in_each_way_what_was_chosen_and_keeps_what_keep_names() -> None:
    stack = stack_of("fp8", keep=("blocks.*.mlp.down", "blocks.*.norm2=fp32"))
    whole = str(RECIPES["fp8"])
    for values in (dict(stack.picks), dict.fromkeys(dict(stack.picks), whole)):
        model = prepared(stack, values, CPU, "eager")
        for i in range(2):
            recipes = {name: model.blocks[i].get_submodule(name).recipe for name in EVERY}
            named = {name: "" if value == BF16 else value for name, value in values.items()}
            assert recipes == {**named, "mlp.down": ""}
            assert model.blocks[i].norm2.weight.dtype == torch.float32
            assert model.blocks[i].mlp.down.weight.dtype == torch.bfloat16
        assert model._run_joining is None
    assert Recipe.parse(dict(stack.picks)["mlp.up"]).grad_weight is None


def test_a_step_of_a_stack_is_that_of_a_training_and_leads_histories_on() -> None:
    """The gradients of the blocks are those of the whole model where it has the same weights; nothing adds up over calls."""
    config = dataclasses.replace(GPT, n_layer=2)
    stack = stack_of("fp8-delayed", config)
    model = prepared(stack, dict.fromkeys(dict(stack.picks), stack.recipe), CPU, "eager")
    other = copy.deepcopy(model)
    x, grad = torch.randn(2, 2, 16, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    step = block_step(model, x, grad, 2)
    for _ in range(3):
        step()
    histories = [module.history for module in model.modules() if getattr(module, "history", None) is not None]
    assert len(histories) == 8
    assert all(int((history.window > 0).sum()) == 3 * 3 for history in histories), "a maximum a step by role"
    step = block_step(other, x, grad, 1)
    for _ in range(3):
        step()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(*(m.blocks.parameters() for m in (model, other)), strict=True)
    )


def test_a_compiled_stack_in_bf16_is_one_graph_where_the_model_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    on_gpu = torch.nn.Parameter(torch.empty(0)).as_subclass(OnGPU)  # type: ignore[arg-type]
    monkeypatch.setattr(Transformer, "head_weight", property(lambda _: on_gpu))
    bf16 = dict.fromkeys(EVERY, BF16)
    for depth, values, whole in (
        (3, bf16, True),
        (13, bf16, False),
        (3, bf16 | {"mlp.up": str(RECIPES["fp8"])}, False),
    ):
        stack = stack_of("fp8", dataclasses.replace(GPT, n_layer=depth))
        assert (prepared(stack, values, CPU, "compiled")._run_stack is not None) == whole
    for depth, whole in ((12, True), (13, False)):
        model = Transformer(dataclasses.replace(GPT, n_layer=depth))
        model.compile_blocks()
        assert (model._run_stack is not None) == whole


class OnGPU(torch.nn.Parameter):
    """What says that it lies on a GPU."""

    is_cuda = True


def test_a_step_that_is_too_large_has_fewer_sequences_and_then_fewer_micro_batches() -> None:
    stack = stack_of("fp8")
    assert size(dataclasses.replace(stack, tokens=35), 9, CPU) == (MOST_PARTS, 2)
    assert size(dataclasses.replace(stack, tokens=16), 2, CPU) == (2, 1)
    flops = stack.config.flops_per_token() * 16
    large = 64 * int(flops_limit(CPU) / flops / 64) * 16
    parts, sequences = size(dataclasses.replace(stack, tokens=8 * large), 4, CPU)
    assert parts == 4 and 0.5 <= parts * sequences * flops / flops_limit(CPU) <= 1
    wide = dataclasses.replace(stack, config=dataclasses.replace(GPT, n_embd=4096, n_layer=2), tokens=64)
    assert size(wide, 4, CPU) == (1, 1)
