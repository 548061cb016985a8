"""A verdict at equal loss: same, better, worse, or not shown, with the interval that supports it.

Two variants trained from the same seeds give one relative difference of held-out loss a seed,
`(loss - reference_loss) / reference_loss`. Pairing removes what the seed itself does to the loss, which is usually much
more than what a number format does. From n differences with mean m and standard deviation s the 95 % interval is
`m ± t(0.975, n - 1) * s / sqrt(n)` (Student 1908), and with a margin (0.5 % unless told otherwise):

- `same`: the whole interval lies inside [-margin, +margin] (equivalence, not absence of evidence);
- `worse`, `better`: the whole interval lies above +margin, below -margin;
- `not shown`: it straddles an edge; `seeds_needed` says how many seeds would decide at this mean and spread, and the reason
  whether it is shown at least that nothing beyond the margin is lost (non-inferiority: the interval ends below +margin);
- `diverged`: some difference is not a number: a run of the variant left the finite numbers.

Fewer than three seeds are never a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import FewbitsError
from .student import t_quantile

Kind = Literal["same", "better", "worse", "not shown", "diverged"]

CONFIDENCE = 0.95
LEAST_SEEDS = 3  # two differences give t(0.975, 1) = 12.7: an interval that says nothing
MOST_SEEDS = 1000  # beyond this many, "how many would decide" is answered with None


@dataclass(frozen=True)
class Verdict:
    """What a set of paired differences supports. Differences, interval and margin are relative: 0.01 is 1 %."""

    kind: Kind
    mean: float | None
    """Mean relative difference to the reference; positive is a higher (worse) loss. None when nothing is finite."""
    interval: tuple[float, float] | None
    """The 95 % interval of the mean; None with fewer than two finite differences."""
    margin: float
    seeds: int
    seeds_needed: int | None = None
    """For `not shown`: how many seeds in all would decide, at this mean and spread. None: decided, or unknowable."""
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dict that json.dumps takes; the interval is a list."""
        return {**asdict(self), "interval": list(self.interval) if self.interval else None}

    def __str__(self) -> str:
        return f"{self.kind} ({self.reason})" if self.reason else self.kind


def verdict(differences: Sequence[float], margin: float = 0.005) -> Verdict:
    """Judge relative differences of held-out loss, paired by seed, against a margin.

    Raises FewbitsError for a margin that is not a positive fraction.

    >>> verdict([0.0001, -0.0002, 0.0003]).kind
    'same'
    >>> verdict([0.02, 0.021, 0.019]).kind
    'worse'
    >>> verdict([0.02, 0.021]).kind
    'not shown'
    """
    check_margin(margin)
    values = [float(d) for d in differences]
    finite = [d for d in values if math.isfinite(d)]
    n = len(values)
    mean = math.fsum(finite) / len(finite) if finite else None
    if len(finite) < n:
        return Verdict("diverged", mean, None, margin, n, None, f"{n - len(finite)} of {n} runs diverged")
    if n < 2 or mean is None:
        return Verdict("not shown", mean, None, margin, n, LEAST_SEEDS, few(n))
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in values) / (n - 1))
    half = half_width(spread, n)
    interval = (mean - half, mean + half)
    if n < LEAST_SEEDS:
        needed = max(LEAST_SEEDS, seeds_that_decide(mean, spread, margin) or LEAST_SEEDS)
        return Verdict("not shown", mean, interval, margin, n, needed, few(n))
    kind = _judge(interval, margin)
    if kind != "not shown":
        return Verdict(kind, mean, interval, margin, n)
    needed_seeds = seeds_that_decide(mean, spread, margin, least=n + 1)
    hint = f"about {needed_seeds} seeds would decide" if needed_seeds else f"over {MOST_SEEDS} seeds would be needed"
    if interval[1] <= margin:
        hint = f"no more than {100 * margin:g} % worse; {hint}"
    return Verdict("not shown", mean, interval, margin, n, needed_seeds, hint)


def few(n: int) -> str:
    """Why n seeds are not a verdict."""
    return f"{n} seed{'' if n == 1 else 's'}: fewer than {LEAST_SEEDS} is never a verdict"


def check_margin(margin: float) -> None:
    """Refuse a margin that is not a fraction between 0 and 1."""
    if not (isinstance(margin, float | int) and 0.0 < margin < 1.0):
        raise FewbitsError(f"margin={margin!r} is no fraction of the loss. Give one between 0 and 1: 0.005 is 0.5 %.")


def half_width(spread: float, n: int) -> float:
    """Half the 95 % interval of the mean of n differences with that standard deviation."""
    return t_quantile(0.5 + CONFIDENCE / 2.0, n - 1) * spread / math.sqrt(n)


def seeds_that_decide(mean: float, spread: float, margin: float, least: int = LEAST_SEEDS) -> int | None:
    """The fewest seeds (at least `least`) whose interval would decide at this mean and spread; None beyond MOST_SEEDS.

    The half width shrinks with every further seed, so a bisection finds it.
    """

    def decides(n: int) -> bool:
        half = half_width(spread, n)
        return _judge((mean - half, mean + half), margin) != "not shown"

    if decides(least):
        return least
    low, high = least, MOST_SEEDS
    if not decides(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high


def _judge(interval: tuple[float, float], margin: float) -> Kind:
    low, high = interval
    if -margin <= low and high <= margin:
        return "same"
    if low > margin:
        return "worse"
    return "better" if high < -margin else "not shown"
