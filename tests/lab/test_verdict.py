"""The verdict: what three words may be said about a set of paired differences, and when none may."""

from __future__ import annotations

import math
import random

import pytest

from fewbits.errors import FewbitsError
from fewbits.lab.student import incomplete_beta, t_quantile, t_upper_tail
from fewbits.lab.verdict import MOST_SEEDS, half_width, seeds_that_decide, verdict


def closed_form_quantile(p: float, degrees: int) -> float:
    """Exact quantiles for 1, 2 and 4 degrees of freedom (Shaw 2006): no table, no rounding."""
    a = 4.0 * p * (1.0 - p)
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return 2.0 * (p - 0.5) * math.sqrt(2.0 / a)
    q = math.cos(math.acos(math.sqrt(a)) / 3.0) / math.sqrt(a)
    return math.copysign(2.0 * math.sqrt(q - 1.0), p - 0.5)


@pytest.mark.parametrize("degrees", [1, 2, 4])
@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.995, 0.9999, 0.025])
def test_t_quantile_equals_its_closed_form(degrees: int, p: float) -> None:
    # 1e-8 relative is what the verdict needs; the closed forms themselves are good to about 1e-13
    assert t_quantile(p, degrees) == pytest.approx(closed_form_quantile(p, degrees), rel=1e-8)


@pytest.mark.parametrize(
    ("degrees", "published"),
    # two-sided 95 % points to ten decimals, as R's qt(0.975, df) prints them
    [(1, 12.7062047362), (2, 4.3026527297), (3, 3.1824463053), (5, 2.5705818356), (9, 2.2621571628), (30, 2.0422724563),
     (100, 1.9839715185)],
)  # fmt: skip
def test_t_quantile_equals_published_values(degrees: int, published: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(published, abs=1e-8)


def test_t_quantile_tends_to_the_normal_one() -> None:
    # t = z + (z^3 + z) / (4 df) + O(df^-2): at df = 1e6 the rest is below 1e-11
    z, df = 1.959963984540054, 1e6
    assert t_quantile(0.975, df) == pytest.approx(z + (z**3 + z) / (4 * df), abs=1e-8)


def test_quantile_and_tail_invert_each_other() -> None:
    rng = random.Random(0)
    for _ in range(50):
        p, degrees = rng.uniform(0.501, 0.9999), rng.randint(1, 500)
        assert t_upper_tail(t_quantile(p, degrees), degrees) == pytest.approx(1.0 - p, rel=1e-9)


def test_incomplete_beta_is_symmetric() -> None:
    for a, b, x in [(0.5, 3.0, 0.2), (10.0, 0.5, 0.9), (4.0, 4.0, 0.5)]:
        assert incomplete_beta(a, b, x) + incomplete_beta(b, a, 1 - x) == pytest.approx(1.0, abs=1e-13)


def test_the_interval_is_the_paired_t_interval() -> None:
    # by hand: mean 0.01, s = 0.01, n = 3: half width = 4.3026527297 * 0.01 / sqrt(3)
    result = verdict([0.0, 0.01, 0.02])
    half = 4.3026527297 * 0.01 / math.sqrt(3)
    assert result.interval == pytest.approx((0.01 - half, 0.01 + half), abs=1e-10)


@pytest.mark.parametrize(
    ("differences", "kind"),
    [
        ([0.0, 0.0, 0.0], "same"),
        ([0.001, 0.0012, 0.0011], "same"),
        ([0.02, 0.021, 0.022], "worse"),
        ([-0.02, -0.021, -0.022], "better"),
        ([0.004, 0.006, 0.005], "not shown"),
        ([0.02, -0.02, 0.0], "not shown"),
        ([0.0, float("nan"), 0.0], "diverged"),
        ([0.0, float("inf"), 0.0], "diverged"),
    ],
)
def test_verdict_kinds(differences: list[float], kind: str) -> None:
    assert verdict(differences).kind == kind


def test_what_is_not_shown_to_be_the_same_may_be_shown_to_lose_nothing() -> None:
    better, worse = verdict([-0.008, -0.002, -0.005]), verdict([0.008, 0.002, 0.005])  # -0.5 % +- 0.745 %
    assert better.kind == worse.kind == "not shown"
    assert better.reason.startswith("no more than 0.5 % worse; ") and "worse" not in worse.reason
    assert "no more than 1 % worse" in verdict([-0.016, -0.004, -0.010], 0.01).reason


@pytest.mark.parametrize("differences", [[], [0.0], [0.5], [0.0, 0.0], [0.5, 0.5]])
def test_fewer_than_three_seeds_are_never_a_verdict(differences: list[float]) -> None:
    result = verdict(differences)
    assert result.kind == "not shown" and "never a verdict" in result.reason
    assert result.seeds_needed is not None and result.seeds_needed >= 3


def test_mirrored_differences_give_the_mirrored_verdict() -> None:
    swap = {"worse": "better", "better": "worse"}
    rng = random.Random(1)
    for _ in range(200):
        values = [rng.gauss(0.005, 0.004) for _ in range(4)]
        one, other = verdict(values), verdict([-v for v in values])
        assert other.kind == swap.get(one.kind, one.kind)
        assert one.seeds_needed == other.seeds_needed


def test_a_wider_margin_never_turns_same_into_something_else() -> None:
    rng = random.Random(2)
    for _ in range(200):
        values = [rng.gauss(0.0, 0.002) for _ in range(3)]
        if verdict(values, 0.005).kind == "same":
            assert verdict(values, 0.01).kind == "same"


def test_the_seeds_that_would_decide_do_decide_and_one_fewer_does_not() -> None:
    mean, spread, margin = 0.002, 0.01, 0.005
    needed = seeds_that_decide(mean, spread, margin)
    assert needed is not None
    assert abs(mean) + half_width(spread, needed) <= margin < abs(mean) + half_width(spread, needed - 1)


def test_a_mean_on_the_edge_is_never_decided() -> None:
    assert seeds_that_decide(0.005, 0.01, 0.005) is None
    result = verdict([0.004, 0.006, 0.005])
    assert result.seeds_needed is None and str(MOST_SEEDS) in result.reason


def test_a_true_no_difference_is_called_worse_or_better_in_at_most_five_per_cent() -> None:
    # A mean of exactly +margin is the hardest case for `worse`: the one-sided error is 2.5 %; 2,000 draws have a
    # standard deviation of 0.35 %, so 4 sigma is 2.5 % + 1.4 %.
    rng = random.Random(3)
    draws = 2000
    worse = sum(verdict([rng.gauss(0.005, 0.003) for _ in range(4)]).kind == "worse" for _ in range(draws))
    assert worse / draws < 0.039


@pytest.mark.parametrize("margin", [0.0, -0.1, 1.0, float("nan"), 50])
def test_a_margin_that_is_no_fraction_is_refused(margin: float) -> None:
    with pytest.raises(FewbitsError, match="margin"):
        verdict([0.0, 0.0, 0.0], margin)
