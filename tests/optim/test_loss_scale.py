"""Loss scales against a plain model of what they should do."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.errors import FewbitsError
from fewbits.optim.loss_scale import DynamicScale, LossScale, NoScale, StaticScale, parse
from fewbits.precision.loss_scale import DYNAMIC

YES, NO = torch.tensor(True), torch.tensor(False)


def plain_model(
    finite: list[bool], initial: float, interval: int, floor: float, ceiling: float, hysteresis: int
) -> list[float]:
    """The scale after every step, written out with Python numbers."""
    value, good, overflows, values = initial, 0, 0, []
    for ok in finite:
        if ok:
            good += 1
            if good == interval:
                value, good, overflows = min(value * 2, ceiling), 0, 0
        else:
            good, overflows = 0, overflows + 1
            if overflows >= hysteresis:
                value = max(value / 2, floor)
        values.append(value)
    return values


@settings(max_examples=60, deadline=None)
@given(
    finite=st.lists(st.booleans(), max_size=60),
    powers=st.tuples(st.integers(-3, 4), st.integers(0, 6), st.integers(0, 6)),
    interval=st.integers(1, 7),
    hysteresis=st.integers(1, 4),
    cut=st.integers(0, 60),
)
def test_dynamic_scale_follows_the_plain_model_also_across_a_save(
    finite: list[bool], powers: tuple[int, int, int], interval: int, hysteresis: int, cut: int
):
    low, more, most = powers
    options: dict[str, Any] = {
        "initial": 2.0 ** (low + more),
        "interval": interval,
        "floor": 2.0**low,
        "ceiling": 2.0 ** (low + more + most),
        "hysteresis": hysteresis,
    }
    scale, address = DynamicScale(**options), 0
    address = scale.value.data_ptr()
    values = []
    for index, ok in enumerate(finite):
        if index == cut:
            saved = json.loads(json.dumps(scale.state_dict()))
            scale = DynamicScale(**options)
            address = scale.value.data_ptr()
            scale.load_state_dict(saved)
        scale.update_(torch.tensor(ok))
        values.append(scale.value.item())
        assert bool(scale.can_cure()) == (values[-1] > options["floor"])
        assert scale.value.data_ptr() == address
    assert values == plain_model(finite, **options)


def test_defaults_are_those_of_mixed_precision_training():
    scale = DynamicScale()
    assert scale.value.item() == 65536
    for _ in range(1999):
        scale.update_(YES)
    assert scale.value.item() == 65536
    scale.update_(YES)
    assert scale.value.item() == 131072
    scale.update_(NO)
    assert scale.value.item() == 65536


def test_text_and_signature_have_the_same_defaults():
    signature = inspect.signature(DynamicScale).parameters
    assert {name: parameter.default for name, parameter in signature.items()} == DYNAMIC


def test_held_steps_change_nothing():
    scale = DynamicScale(initial=8, interval=1)
    before = scale.state_dict()
    for finite in (YES, NO):
        scale.update_(finite, hold=YES)
        assert scale.state_dict() == before
    scale.update_(YES, hold=NO)
    assert scale.value.item() == 16


def test_scale_neither_sinks_below_the_floor_nor_grows_beyond_the_ceiling():
    scale = DynamicScale(initial=4, floor=2, ceiling=8, interval=1)
    for _ in range(5):
        scale.update_(NO)
    assert scale.value.item() == 2 and not scale.can_cure()
    for _ in range(200):
        scale.update_(YES)
    assert scale.value.item() == 8 and scale.can_cure()


def test_fixed_scales_stay_and_cannot_cure():
    for scale, value in ((NoScale(), 1.0), (StaticScale(1024), 1024.0)):
        scale.update_(NO)
        scale.update_(YES)
        assert scale.value.item() == value and scale.value.dtype == torch.float32
        assert not scale.can_cure()
        twin = parse(str(scale))
        twin.load_state_dict(scale.state_dict())
        assert twin.value.item() == value


def test_init_moves_the_buffers_and_keeps_their_values():
    scale = DynamicScale(initial=8)
    scale.update_(NO)
    scale.init("cpu")
    assert scale.value.item() == 4
    scale.init("meta")
    assert scale.value.device.type == "meta" and scale.can_cure().device.type == "meta"


@pytest.mark.parametrize(
    "text", ["none", "static:1024", "static:0.25", "dynamic", "dynamic:initial=1024,interval=100,hysteresis=2"]
)
def test_text_gives_the_scale_and_the_scale_its_text(text: str):
    assert str(parse(text)) == text


def test_text_may_say_powers_and_spaces():
    scale = parse("dynamic: initial = 2**10, ceiling=2^12")
    assert isinstance(scale, DynamicScale)
    assert (scale.initial, scale.ceiling) == (1024, 4096)
    assert str(parse("dynamic:initial=65536,interval=2000")) == "dynamic"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: StaticScale(1000), "power of two"),
        (lambda: StaticScale(0), "power of two"),
        (lambda: StaticScale(float("inf")), "power of two"),
        (lambda: StaticScale(-2), "power of two"),
        (lambda: DynamicScale(initial=3), "power of two"),
        (lambda: DynamicScale(growth=1.5), "power of two"),
        (lambda: DynamicScale(backoff=2.0), "backoff below 1"),
        (lambda: DynamicScale(growth=0.5), "growth of at least 1"),
        (lambda: DynamicScale(initial=1, floor=2), "outside"),
        (lambda: DynamicScale(interval=0), "interval=0"),
        (lambda: DynamicScale(hysteresis=1.5), "hysteresis=1.5"),  # type: ignore[arg-type]
        (lambda: parse("dinamic"), "Did you mean 'dynamic'"),
        (lambda: parse("static"), "static:1024"),
        (lambda: parse("static:many"), "not a number"),
        (lambda: parse("none:3"), "takes no value"),
        (lambda: parse("dynamic:intervall=3"), "Did you mean 'interval'"),
        (lambda: parse("dynamic:interval"), "no option"),
    ],
)
def test_scales_that_do_not_fit_are_refused_in_one_sentence(make: Any, message: str):
    with pytest.raises(FewbitsError, match=message):
        make()


def test_state_of_another_scale_is_refused():
    scale: LossScale = DynamicScale()
    with pytest.raises(FewbitsError, match="'static'"):
        scale.load_state_dict(StaticScale(2).state_dict())
    with pytest.raises(FewbitsError, match="good_steps"):
        scale.load_state_dict({"kind": "dynamic", "value": 2.0})
    with pytest.raises(FewbitsError, match="power of two"):
        scale.load_state_dict({**scale.state_dict(), "value": 3.0})
