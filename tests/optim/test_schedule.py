"""Schedules as pure functions of the number of applied steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.optim.schedule import Schedule


def test_warm_up_moves_from_the_first_step_and_is_full_right_after_it():
    schedule = Schedule("cosine", warmup_steps=4, total_steps=20)
    assert [schedule.factor(t) for t in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_cosine_and_linear_pass_their_middle_and_end_at_min_ratio():
    for kind in ("cosine", "linear"):
        schedule = Schedule(kind, warmup_steps=10, total_steps=110, min_ratio=0.1)
        assert schedule.factor(10) == 1.0
        assert schedule.factor(60) == pytest.approx(0.55)
        assert schedule.factor(110) == pytest.approx(0.1)
    assert Schedule("cosine", total_steps=4).factor(1) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_wsd_is_flat_until_its_decay():
    schedule = Schedule("wsd", warmup_steps=2, total_steps=20, decay_steps=10, min_ratio=0.0)
    assert all(schedule.factor(t) == 1.0 for t in range(2, 11))
    assert [schedule.factor(t) for t in (15, 20)] == [0.5, 0.0]


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_table_is_the_function_and_its_last_value_holds_beyond_the_end(kind: str):
    schedule = Schedule(kind, warmup_steps=3, total_steps=12, decay_steps=4 if kind == "wsd" else 0, min_ratio=0.2)
    table = schedule.table()
    assert table.dtype == torch.float64 and table.shape == (13,)
    assert table.tolist() == [schedule.factor(t) for t in range(13)]
    assert schedule.factor(10_000) == table[-1]
    assert all(0.2 <= value <= 1.0 for value in table.tolist()[3:])


def test_a_constant_rate_needs_no_horizon():
    assert Schedule().factor(10**9) == 1.0
    assert Schedule(warmup_steps=3).table().tolist() == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "cosinus"}, "Did you mean 'cosine'"),
        ({"kind": "cosine"}, "needs total_steps"),
        ({"kind": "linear", "total_steps": 5, "warmup_steps": 6}, "exceed"),
        ({"kind": "wsd", "total_steps": 5}, "needs decay_steps"),
        ({"kind": "wsd", "total_steps": 5, "warmup_steps": 3, "decay_steps": 3}, "exceed"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"total_steps": 1.5}, "total_steps=1.5"),
        ({"min_ratio": 1.5}, "min_ratio"),
        ({"min_ratio": float("nan")}, "min_ratio"),
    ],
)
def test_schedules_that_do_not_fit_are_refused_in_one_sentence(options: dict[str, Any], message: str):
    with pytest.raises(FewbitsError, match=message):
        Schedule(**options)
