"""The text of a loss scale and what its numbers must be, in one place: "none", "static:1024", "dynamic:interval=500".

Numbers may be powers such as 2**16 or 2^16. What a loss scale does with them is `fewbits.optim.loss_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fewbits.errors import FewbitsError, nearest

KINDS = ("none", "static", "dynamic")
DYNAMIC: dict[str, float] = {
    "initial": 2.0**16,
    "growth": 2.0,
    "backoff": 0.5,
    "interval": 2000,
    "floor": 1.0,
    "ceiling": 2.0**24,
    "hysteresis": 1,
}
"""The options of a dynamic scale and their defaults: Micikevicius et al. 2018 and torch.amp, plus floor and ceiling."""
COUNTS = ("interval", "hysteresis")
"""The options that count steps; the others are powers of two."""


def read(text: str) -> tuple[str, dict[str, float]]:
    """(kind, numbers): ("none", {}), ("static", {"value": 1024.0}) or ("dynamic", all seven options).

    Raises FewbitsError for text that is no loss scale, and for numbers that do not fit.

    >>> read("static: 2**10")
    ('static', {'value': 1024.0})
    """
    kind, colon, rest = text.replace(" ", "").lower().partition(":")
    if kind not in KINDS:
        raise FewbitsError(f"'{text}' is no loss scale; use none, static:1024 or dynamic.{nearest(kind, KINDS)}")
    if kind == "none":
        if colon:
            raise FewbitsError(f"loss scale '{text}': none takes no value; use none, or static:1024.")
        return kind, {}
    if kind == "static":
        if not rest:
            raise FewbitsError(f"loss scale '{text}' lacks its value; use one such as static:1024.")
        return kind, {"value": power_of_two("static", _number("static", rest))}
    given: dict[str, float] = {}
    for item in filter(None, rest.split(",")):
        name, equals, value = item.partition("=")
        if not equals or name not in DYNAMIC:
            raise FewbitsError(
                f"loss scale '{text}': '{item}' is no option of dynamic; use {', '.join(DYNAMIC)} as name=value."
                f"{nearest(name, DYNAMIC)}"
            )
        given[name] = _number(name, value)
    return kind, dynamic(given)


def write(kind: str, numbers: Mapping[str, float]) -> str:
    """The one spelling of a loss scale; `read` takes it back. Options at their defaults are left out.

    >>> write(*read("dynamic: initial=2^10, interval=2000"))
    'dynamic:initial=1024'
    """
    if kind == "static":
        return f"static:{_shown(numbers['value'])}"
    given = [f"{name}={_shown(numbers[name])}" for name in DYNAMIC if numbers.get(name, DYNAMIC[name]) != DYNAMIC[name]]
    return f"{kind}:{','.join(given)}" if given else kind


def dynamic(given: Mapping[str, float]) -> dict[str, float]:
    """All seven options of a dynamic scale, defaults filled in. Raises FewbitsError where they do not fit together."""
    numbers = {**DYNAMIC, **given}
    found = {name: _count(name, x) if name in COUNTS else power_of_two(name, x) for name, x in numbers.items()}
    if not (found["growth"] >= 1 and found["backoff"] < 1):
        raise FewbitsError(
            f"growth={found['growth']:g} and backoff={found['backoff']:g} do not fit; use growth of at least 1 (2 is "
            "usual) and a backoff below 1 (0.5)."
        )
    if not found["floor"] <= found["initial"] <= found["ceiling"]:
        raise FewbitsError(
            f"initial={found['initial']:g} lies outside floor={found['floor']:g} to ceiling={found['ceiling']:g}; "
            "move one of them."
        )
    return found


def power_of_two(name: str, value: float) -> float:
    """`value` if it is a power of two in the normal range of fp32; FewbitsError naming it otherwise."""
    value = float(value)
    if not (math.isfinite(value) and value > 0 and math.frexp(value)[0] == 0.5 and -126 <= math.log2(value) <= 127):
        raise FewbitsError(
            f"{name}={value:g} is not a power of two from 2^-126 to 2^127, so unscaling would not be exact; "
            "use one such as 1024 or 65536."
        )
    return value


def _count(name: str, value: float) -> int:
    if not math.isfinite(value) or int(value) != value or value < 1:
        raise FewbitsError(f"{name}={value!r} does not fit; use a whole number of steps, 1 or more.")
    return int(value)


def _number(name: str, text: str) -> float:
    base, power, exponent = text.replace("**", "^").partition("^")
    try:
        return float(base) ** int(exponent) if power else float(base)
    except (ValueError, OverflowError, ZeroDivisionError):
        raise FewbitsError(f"loss scale: {name}={text!r} is not a number; use one such as 1024 or 2**16.") from None


def _shown(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
