"""A recipe is a value, and text that parses back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits import FewbitsError, Precision, Recipe
from fewbits.precision.hardware import Hardware, native_matmul
from fewbits.precision.recipe import ACCUMULATORS, RECIPES, ROUNDINGS, Operand

HOPPER, ADA = Hardware("cuda", "NVIDIA H100", (9, 0)), Hardware("cuda", "NVIDIA L4", (8, 9))
VNNI = Hardware("cpu", "a CPU", cpu_features=frozenset({"avx512_vnni"}))

formats = st.sampled_from(["e4m3", "e5m2", "int8", "fp4_e2m1", "fp6_e2m3", "int4", "e3m4"])
granularities = st.sampled_from(["tensor", "row", "block(1x128)", "group:32", "block(16x16)"])
operands = st.builds(lambda f, g, r: f"{f}/{g}/{r}", formats, granularities, st.sampled_from(ROUNDINGS))
matmuls = st.one_of(st.just("bf16"), operands, st.builds(lambda a, b: f"{a} x {b}", operands, operands))


@settings(max_examples=200, deadline=None)
@given(matmuls, matmuls, matmuls, st.sampled_from(ACCUMULATORS))
def test_any_recipe_prints_as_it_parses(output, grad_input, grad_weight, accumulate):
    text = f"output={output}, grad_input={grad_input}, grad_weight={grad_weight}, accumulate={accumulate}"
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe
    if recipe:
        precision = Precision.parse(text)
        assert precision.recipe == recipe
        assert Precision.parse(str(precision)) == precision == Precision.from_json(precision.to_json())


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_is_a_precision_and_its_matmuls_can_be_changed(name):
    precision = Precision.parse(name)
    assert str(precision) == name and precision.recipe == RECIPES[name]
    kept = Precision.parse(f"{name}, grad_weight=bf16, master=fp32")
    assert kept.recipe.grad_weight is None and kept.recipe.output == precision.recipe.output
    assert Precision.parse(str(kept)) == kept
    assert (
        "grad_weight=bf16" in str(kept)
    ) != precision.recipe.fake  # the backward of a fake recipe is in 16 bits anyway


def test_one_operand_stands_for_the_one_of_the_role():
    recipe = Recipe.parse("output=e4m3/row, grad_input=e5m2/tensor, grad_weight=e5m2/tensor")
    assert str(recipe.grad_input) == "e5m2/tensor x e4m3/tensor" == str(recipe.grad_weight)
    assert str(recipe.output) == "e4m3/row x e4m3/row"
    assert str(Operand.parse("int8/row")) == "int8/row" and Operand.parse("int8/row").scaling == "exact"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output=e4m3/rwo", "Did you mean 'row'"),
        ("output=fp32/row", "at most 16 bits"),
        ("output=e8m0", "signed"),
        ("output=e4m3 x e4m3 x e4m3", "a matmul has two"),
        ("outptu=e4m3", "is not an override|no part of a recipe|no precision"),
        ("output=bf16", "leaves all three matmuls in 16 bits"),
        ("output=e4m3/row/delayed", "one scale a tensor"),
        ("output=e4m3/row/hadamard x e4m3/row", "one operand only"),
        ("fp8, accumulate=12bit", "Did you mean '14bit'"),
        ("fp8, accumulate=fast|fast", "three of them"),
        ("bf16-mixed, output=e4m3", "no recipe to change"),
        ("fp8, master=split8", "not in this version"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence(text, message):
    with pytest.raises(FewbitsError, match=message):
        Precision.parse(text)


def test_hardware_says_what_it_multiplies_and_why_not():
    fp8, row, block, mx, nv, int8 = (
        RECIPES[n].output for n in ("fp8", "fp8-row", "fp8-block", "mxfp8", "nvfp4", "int8")
    )
    assert all(native_matmul(m, HOPPER).value for m in (fp8, row, block, int8) if m)
    assert not any(native_matmul(m, HOPPER).value for m in (mx, nv) if m)
    assert native_matmul(fp8, ADA).value and not native_matmul(block, ADA).value
    assert "no CPU multiplies fp8_e4m3" in native_matmul(fp8, VNNI).reason
    assert native_matmul(int8, VNNI).value
    modelled = Recipe.parse("output=e4m3/row, accumulate=14bit").output
    assert modelled is not None and "modelled" in native_matmul(modelled, HOPPER).reason


def test_only_recipes_that_draw_numbers_are_stochastic():
    assert {name for name, recipe in RECIPES.items() if recipe.stochastic} >= {"nvfp4", "int8"}
    assert not RECIPES["fp8"].stochastic and not RECIPES["mxfp8"].stochastic
    assert RECIPES["fp8-delayed"].delayed and not RECIPES["fp8"].delayed
