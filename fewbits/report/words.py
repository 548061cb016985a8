"""Quantities as people read them: bytes, durations, counts, ratios. One place, so that page and terminal agree."""

from __future__ import annotations

import math
from typing import Any

from fewbits.report.plots import number

__all__ = ["count", "duration", "flat", "number", "of_bytes", "percent", "ratio", "settings", "value_text"]


def of_bytes(size: float | None) -> str:
    """A size in binary units, as allocators count them.

    >>> of_bytes(1536), of_bytes(3 * 2**30), of_bytes(None)
    ('1.5 KiB', '3 GiB', '-')
    """
    if size is None or not math.isfinite(size):
        return "-"
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def duration(seconds: float | None) -> str:
    """A duration with its two largest units.

    >>> duration(0.0123), duration(75.2), duration(3 * 3600 + 125), duration(None)
    ('12.3 ms', '1 min 15 s', '3 h 2 min', '-')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"


def count(value: float | None) -> str:
    """A count: exact below a million, three digits above.

    >>> count(12345), count(3_456_789)
    ('12,345', '3.46M')
    """
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) < 1e6 else number(value)


def percent(fraction: float | None, signed: bool = False) -> str:
    """A fraction in per cent, two or three digits.

    >>> percent(0.0123, signed=True), percent(0.4), percent(-0.00002, signed=True), percent(-0.0)
    ('+1.23 %', '40.00 %', '-0.002 %', '0 %')
    """
    if fraction is None or not math.isfinite(fraction):
        return "-"
    digits = 3 if signed and abs(fraction) < 0.01 else 2  # differences of precisions are often below 0.01 %
    shown = f"{100 * fraction:{'+' if signed else ''}.{digits}f}"
    return "0 %" if float(shown) == 0 else f"{shown} %"


def ratio(value: float | None) -> str:
    """A ratio to the first row.

    >>> ratio(1.847)
    '1.85x'
    """
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}x"


def value_text(value: object, digits: int = 4) -> str:
    """Any recorded value: floats with some digits, the rest as it stands; None is a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.{digits}g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested dict as rows of dotted name and text; empty values are left out.

    >>> flat({"torch": "2.13", "gpu": None, "versions": {"numpy": "2.4"}})
    [('torch', '2.13'), ('versions.numpy', '2.4')]
    """
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            rows.extend(flat(item, f"{prefix}{key}."))
        elif item is not None and item != "":
            rows.append((prefix + key, str(item)))
    return rows


def settings(values: dict[str, Any]) -> str:
    """Options as one line, numbers as people type them; empty ones are left out.

    >>> settings({"lr": 3e-3, "rope_theta": 10000.0, "bias": True, "cache": ""})
    'lr 0.003, rope_theta 10000, bias yes'
    """
    shown = {k: f"{v:g}" if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in values.items()}
    return ", ".join(f"{k} {value_text(v)}" for k, v in shown.items() if v not in ("", None))
