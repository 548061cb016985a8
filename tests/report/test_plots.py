"""Charts: well-formed SVG that shows what is there, however odd the numbers."""

from __future__ import annotations

import math
import random
import re
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fewbits.report.plots import (
    Chart,
    Series,
    bar_chart,
    interval_chart,
    line_chart,
    log_ticks,
    nice_ticks,
    running_mean,
    thin,
)

ODD = [float("nan"), float("inf"), -float("inf"), 0.0, 5e-324, 1e-300, 1e300, -5.0]


def numbers_in(svg: str) -> list[float]:
    """Every coordinate of every path."""
    ElementTree.fromstring(svg)
    return [float(n) for d in re.findall(r' d="([^"]*)"', svg) for n in re.findall(r"-?\d+\.?\d*", d)]


@given(st.lists(st.floats(-1e12, 1e12) | st.sampled_from(ODD[:6]), max_size=60), st.booleans())
@settings(max_examples=60, deadline=None)
@example(y=[5e-324], log=True)
@example(y=[1.0, 5e-324], log=True)
@example(y=[5e-324], log=False)
def test_any_series_gives_well_formed_svg_inside_its_box(y: list[float], log: bool) -> None:
    chart = Chart("t", "x", "y", log_y=log, width=640, height=260)
    coordinates = numbers_in(line_chart([Series("s", list(range(len(y))), y, points=True)], chart))
    assert all(-0.1 <= c <= 640.1 for c in coordinates)


@pytest.mark.parametrize("y", [[], [float("nan")], [float("inf"), -float("inf")], [0.0, -1.0]])
def test_a_chart_without_anything_to_draw_says_so(y: list[float]) -> None:
    svg = line_chart([Series("s", list(range(len(y))), y)], Chart("t", log_y=True))
    assert "nothing finite" in svg


def test_a_value_that_is_not_finite_breaks_the_line() -> None:
    svg = line_chart([Series("s", [1, 2, 3, 4], [1.0, float("nan"), 2.0, 3.0])], Chart("t"))
    path = next(d for d in re.findall(r' d="([^"]*)" fill="none"', svg))
    assert path.count("M") == 2


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
@settings(max_examples=100, deadline=None)
def test_ticks_cover_the_range_and_are_few(low: float, span: float) -> None:
    high = low + span
    ticks = nice_ticks(low, high)
    # ticks are rounded to 12 digits: as far as they may fall short
    slack = 1e-9 * max(abs(low), abs(high), span)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack and 2 <= len(ticks) <= 9


@pytest.mark.parametrize(("low", "high"), [(0.5, 30.0), (1e-9, 1e9), (3.0, 3.5), (1.0, 1e3), (7e-5, 7e-4)])
@pytest.mark.parametrize("base", [2.0, 10.0])
def test_log_ticks_cover_the_range_and_are_few(low: float, high: float, base: float) -> None:
    ticks = log_ticks(low, high, base)
    assert ticks[0] <= low * 1.001 and ticks[-1] >= high * 0.999 and 2 <= len(ticks) <= 9


def test_thinning_keeps_spikes_ends_and_gaps() -> None:
    rng = random.Random(0)
    y = [rng.random() for _ in range(20_000)]
    y[12_345], y[777] = 99.0, float("nan")
    x, kept = thin(list(range(len(y))), y)
    assert len(x) < 800 and 99.0 in kept and any(math.isnan(v) for v in kept)
    assert (x[0], x[-1]) == (0, 19_999) and x == sorted(x)


def test_the_running_mean_skips_what_is_not_finite() -> None:
    assert running_mean([1.0, float("inf"), 3.0, 5.0], 2) == [1.0, float("inf"), 2.0, 4.0]


def test_names_are_escaped() -> None:
    evil = '<script>alert(1)</script>&"'
    for svg in (
        line_chart([Series(evil, [0, 1], [0, 1])], Chart(evil, evil, evil)),
        bar_chart(evil, [evil], [(evil, [1.0]), ("b", [2.0])], [evil]),
        interval_chart(evil, [(evil, 1, (0.0, 0.1), [(evil, 0.01)])], 0.005),
    ):
        ElementTree.fromstring(svg)
        assert "<script" not in svg


def test_stacked_bars_end_where_their_sum_ends() -> None:
    svg = bar_chart("t", ["a", "b"], [("p", [1.0, 2.0]), ("q", [3.0, 2.0])], ["4", "4"])
    rectangles = [e for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("rect") and e.get("height") == "20"]
    ends = [float(e.get("x", "")) + float(e.get("width", "")) for e in rectangles]
    assert ends[1] == pytest.approx(ends[3], abs=0.11)  # coordinates are written with one decimal
