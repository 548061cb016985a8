"""A precision parses, prints and parses back; what contradicts itself is one sentence."""

from __future__ import annotations

import json

import pytest

from fewbits.errors import FewbitsError
from fewbits.precision.precision import ALIASES, PRECISIONS, Precision

TEXTS = [
    *PRECISIONS,
    "bf16-mixed, master=fp32",
    "bf16-mixed, master=none",
    "fp16-mixed, loss_scale=none",
    "fp16-true, loss_scale=static:1024",
    "bf16-mixed, logits=fp16",
    "fp16-mixed, logits=fp32",
    "fp8, logits=bf16",
    "fp8-delayed, head=fp8",
    "bf16-mixed, master=fp32, loss_scale=dynamic:initial=1024,interval=100,floor=0.5",
]


@pytest.mark.parametrize("text", TEXTS)
def test_what_it_prints_parses_back(text):
    precision = Precision.parse(text)
    assert str(precision) == text
    assert Precision.parse(str(precision)) == precision
    assert Precision.from_json(precision.to_json()) == precision
    assert Precision.from_json(json.dumps(precision.to_json())) == precision
    assert hash(Precision.parse(text)) == hash(precision)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("16-mixed", "fp16-mixed"),
        ("bf16", "bf16-mixed"),
        ("fp16", "fp16-mixed"),
        ("32-true", "fp32"),
        ("16-true", "fp16-true"),
        ("no", "fp32"),
        ("BF16_Mixed", "bf16-mixed"),
        ("float32", "fp32"),
        ("torch.bfloat16", "bf16-mixed"),
    ],
)
def test_the_names_people_type_are_accepted(alias, name):
    assert Precision.parse(alias) == PRECISIONS[name]
    assert str(Precision.parse(alias)) == name


def test_every_alias_names_a_precision():
    assert set(ALIASES.values()) <= set(PRECISIONS)


@pytest.mark.parametrize(
    ("name", "working", "operand", "reduction", "master", "loss_scale"),
    [
        ("fp64", "fp64", "fp64", "fp64", "none", "none"),
        ("fp32", "fp32", "fp32", "fp32", "none", "none"),
        ("tf32", "fp32", "tf32", "fp32", "none", "none"),
        ("fp16-mixed", "fp16", "fp16", "fp32", "fp32", "dynamic"),
        ("bf16-mixed", "bf16", "bf16", "fp32", "split", "none"),
        ("fp16-true", "fp16", "fp16", "fp32", "none", "dynamic"),
        ("bf16-true", "bf16", "bf16", "fp32", "none", "none"),
    ],
)
def test_each_name_has_its_formats(name, working, operand, reduction, master, loss_scale):
    p = Precision.parse(name)
    assert (p.working.name, p.operand.name, p.gradient.name, p.reduction.name) == (working, operand, working, reduction)
    assert (p.resolved_master().value, p.loss_scale) == (master, loss_scale)
    assert p.moments == ("fp64" if name == "fp64" else "fp32")


def test_a_master_kind_that_is_asked_for_is_used():
    assert Precision.parse("bf16-mixed, master=fp32").resolved_master().value == "fp32"
    assert Precision.parse("bf16-mixed, master=none").resolved_master().value == "none"
    assert Precision.parse("fp32, master=fp32").resolved_master().value == "none"  # the weight is its own master


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16-mixd", "Did you mean 'bf16-mixed'"),
        ("", "no precision ''"),
        ("fp8_e4m3", "Did you mean 'fp8"),
        ("bf16, mastr=fp32", "Did you mean 'master'"),
        ("bf16, fp32", "not an override"),
        ("bf16, master=fp32, master=split", "master is given twice"),
        ("output=e4m3/row, output=e5m2/row", "output is given twice"),
        ("bf16, master=kahan", "not in this version"),
        ("bf16, master=spilt", "Did you mean 'split'"),
        ("fp16, master=split", "use master=fp32"),
        ("fp32, master=split", "use master=auto"),
        ("fp64, master=fp32", "use master=auto"),
        ("bf16-true, master=fp32", "use bf16-mixed"),
        ("bf16, moments=bf16", "in fp32"),
        ("bf16, update_rounding=stochastic", "'nearest' in this version"),
        ("fp16, loss_scale=static:1000", "power of two"),
        ("fp16, loss_scale=static:-1024", "power of two"),
        ("fp16, loss_scale=static:nan", "power of two"),
        ("fp16, loss_scale=static", "static:1024"),
        ("bf16, logits=fp61", "Did you mean 'fp16'"),
        ("fp32, logits=fp16", "16-bit working weights"),
        ("fp64, logits=fp32", "fp64 logits"),
        ("bf16, head=fp16", "no head 'fp16'"),
        ("fp32, head=fp8", "16-bit working weights"),
        ("fp16, logits=bf16", "use logits=fp16"),
        ("fp16, loss_scale=dynamc", "Did you mean 'dynamic'"),
        ("fp16, loss_scale=dynamic:intervall=5", "Did you mean 'interval'"),
        ("fp16, loss_scale=dynamic:interval=0", "1 or more"),
        ("fp16, loss_scale=dynamic:initial=1,floor=2", "outside"),
    ],
)
def test_a_mistake_is_one_sentence_that_helps(text, message):
    with pytest.raises(FewbitsError, match=message):
        Precision.parse(text)


def test_equal_loss_scales_have_one_spelling():
    assert Precision.parse("fp16, loss_scale=static:2**10") == Precision.parse("fp16, loss_scale=static: 1024.0")
    assert Precision.parse("bf16, loss_scale=dynamic:initial=2^10").loss_scale == "dynamic:initial=1024"
    assert Precision.parse("fp16, loss_scale=dynamic:interval=2000") == Precision.parse("fp16")


@pytest.mark.parametrize(
    "stored",
    ["", "[]", "nonsense", {}, {"schema": "fewbits.precision/9"}, {**PRECISIONS["fp32"].to_json(), "working": "bf16"},
     {**PRECISIONS["fp32"].to_json(), "master": 3}],
)  # fmt: skip
def test_a_stored_precision_that_is_none_is_refused(stored):
    with pytest.raises(FewbitsError):
        Precision.from_json(stored)


def test_what_earlier_versions_stored_is_read():
    for name in ("bf16-mixed", "fp32", "fp16-true", "fp8"):
        stored = {k: v for k, v in PRECISIONS[name].to_json().items() if k not in ("layers", "logits", "head")}
        assert Precision.from_json({**stored, "schema": "fewbits.precision/2"}) == PRECISIONS[name]
        third = {**stored, "layers": "all", "logits": "auto", "schema": "fewbits.precision/3"}
        assert Precision.from_json(third) == PRECISIONS[name]
        if name != "fp8":
            del stored["recipe"]
            assert Precision.from_json({**stored, "schema": "fewbits.precision/1"}) == PRECISIONS[name]


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("fp8-auto", "fp8, layers=auto"),
        ("fp8-rowwise-auto", "fp8-row, layers=auto"),
        ("INT8_auto", "int8, layers=auto"),
        ("fp8, layers=all", "fp8"),
        ("fp8-auto, grad_weight=bf16", "fp8, grad_weight=bf16, layers=auto"),
        ("output=e4m3/row, layers=auto", "output=e4m3/row x e4m3/row, layers=auto"),
    ],
)
def test_layers_of_a_recipe_may_be_chosen_by_timing(text, printed):
    p = Precision.parse(text)
    assert str(p) == printed and Precision.parse(printed) == p and Precision.from_json(p.to_json()) == p
    assert ("layers          auto" in p.table()) == (p.layers == "auto")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bf16-auto", "bf16-mixed has no recipe .* fp8-auto"),
        ("fp32, layers=auto", "fp32 has no recipe"),
        ("int4-qat-auto", "quantized checkpoint"),
        ("fp8, layers=some", "use all or auto"),
        ("fp9-auto", "no precision 'fp9-auto'"),
    ],
)
def test_layers_that_cannot_be_chosen_are_refused(text, message):
    with pytest.raises(FewbitsError, match=message):
        Precision.parse(text)


def test_replace_gives_another_value():
    p = Precision.parse("bf16")
    assert str(p.replace(master="fp32")) == "bf16-mixed, master=fp32"
    assert p.master == "auto"
    with pytest.raises(FewbitsError):
        p.replace(master="nothing")
