"""What layers=auto decided: for every linear layer its way of multiplying, why, and what that is worth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.nn.candidates import BF16, Shape, matmuls_of
from fewbits.nn.timing import Interval, Times, paired

MARGIN = 0.02
"""What a way of multiplying must win over bf16, at the slow end of its interval, to take its place."""
_EVEN = Interval(1.0, 1.0, 1.0)
_WHAT = "layers "


@dataclass(frozen=True)
class LayerGroup:
    """The linear layers of one shape. choice: canonical recipe text, or "bf16", and why. bf16_ms: milliseconds a step of
    one such layer in bf16, 0 where there was nothing to time. ratio: time of what was chosen over that of bf16."""

    shape: Shape
    names: tuple[str, ...]
    choice: Choice
    bf16_ms: float
    ratio: Interval = _EVEN


def pick(shape: Shape, names: Iterable[str], times: Times) -> LayerGroup:
    """The fastest candidate of those that win at least MARGIN over bf16 with 95 %; else bf16. Raises FewbitsError when
    bf16 was not timed."""
    if not times.get(BF16):
        raise FewbitsError(f"The timing of a {shape} layer has no bf16 to compare with; time it beside the others.")
    base = times[BF16]
    ratios = {text: paired(found, base) for text, found in times.items() if text != BF16 and len(found)}
    bf16_ms = sorted(base)[len(base) // 2]
    if not ratios:
        return LayerGroup(shape, tuple(names), Choice(BF16, "nothing else ran here"), bf16_ms)
    fitting = {text: ratio for text, ratio in ratios.items() if ratio.high <= 1 - MARGIN}
    if not fitting:
        closest = min(ratios, key=lambda text: ratios[text].median)
        return LayerGroup(shape, tuple(names), Choice(BF16, _why_bf16(closest, ratios[closest])), bf16_ms)
    best = min(fitting, key=lambda text: fitting[text].median)
    reason = f"{_speed(fitting[best])} as fast as bf16 in {matmuls_of(best)}"
    return LayerGroup(shape, tuple(names), Choice(best, reason), bf16_ms, fitting[best])


def _why_bf16(text: str, ratio: Interval) -> str:
    how = f"{_speed(ratio)} with {matmuls_of(text)} in few bits"
    if ratio.low > 1:
        return f"bf16 is faster: {how}"
    return f"bf16 is as fast: {how}, and {100 * MARGIN:g} % must be won"


def _speed(ratio: Interval) -> str:
    """Times as fast, with its interval: the reciprocal of the ratio of times."""
    if not math.isfinite(ratio.high):
        return f"{1 / ratio.median:.2f}x in too few rounds"
    return f"{1 / ratio.median:.2f}x ({1 / ratio.high:.2f} to {1 / ratio.low:.2f})"


@dataclass(frozen=True)
class Layers(Mapping[str, Choice]):
    """Layer name -> its recipe (canonical text, or "bf16") and why; what `prepare` takes as `layers`. By shape in `groups`."""

    groups: tuple[LayerGroup, ...] = ()

    def __getitem__(self, name: str) -> Choice:
        for group in self.groups:
            if name in group.names:
                return group.choice
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for group in self.groups for name in group.names)

    def __len__(self) -> int:
        return sum(len(group.names) for group in self.groups)

    @property
    def lowbit(self) -> bool:
        """Whether any layer multiplies in few bits."""
        return any(group.choice.value != BF16 for group in self.groups)

    @property
    def bf16_ms(self) -> float:
        """Milliseconds a step of all these layers in bf16."""
        return sum(len(group.names) * group.bf16_ms for group in self.groups)

    @property
    def ms(self) -> Interval:
        """Milliseconds a step of all these layers as chosen. The ends of the shapes' intervals are added, which encloses
        the sum with more than 95 %."""
        parts = [(len(group.names) * group.bf16_ms, group.ratio) for group in self.groups]
        return Interval(*(sum(ms * ratio[i] for ms, ratio in parts) for i in range(3)))

    def __str__(self) -> str:
        """One line: what was chosen for how many layers, and what it is worth."""
        counts: dict[str, int] = {}
        for group in sorted(self.groups, key=lambda group: len(group.choice.value), reverse=True):
            how = matmuls_of(group.choice.value)
            counts[how] = counts.get(how, 0) + len(group.names)
        low = [f"{count} of {len(self)} in {how}" for how, count in counts.items() if how]
        if not low:
            reasons = {group.choice.reason for group in self.groups}
            why = reasons.pop() if len(reasons) == 1 else "it is as fast here, or faster"
            return f"all {len(self)} linear layers stay in bf16: {why}"
        rest = [f"{counts['']} in bf16"] if "" in counts else []
        ms, base = self.ms, self.bf16_ms
        return (
            f"linear layers: {', '.join([*low, *rest])}; {ms.median:.4g} ms a step in them instead of {base:.4g}, saves "
            f"{base - ms.median:.3g} ms ({base - ms.high:.3g} to {base - ms.low:.3g}), "
            f"{_speed(Interval(*(part / base for part in ms)))}"
        )

    def to_json(self) -> list[dict[str, Any]]:
        """One {"what", "value", "reason", ...} for each shape, as choices are recorded."""
        return [
            {
                "what": f"{_WHAT}{group.shape}",
                "value": group.choice.value,
                "reason": group.choice.reason,
                "shape": list(group.shape),
                "names": list(group.names),
                "bf16_ms": group.bf16_ms,
                "ratio": list(group.ratio),
            }
            for group in self.groups
        ]

    @classmethod
    def from_json(cls, entries: Iterable[Mapping[str, Any]]) -> Layers:
        """The inverse of `to_json`; entries of other kinds are passed over. Raises FewbitsError."""
        try:
            return cls(
                tuple(
                    LayerGroup(
                        Shape(*entry["shape"]),
                        tuple(entry["names"]),
                        Choice(entry["value"], entry["reason"]),
                        entry["bf16_ms"],
                        Interval(*entry["ratio"]),
                    )
                    for entry in entries
                    if is_layers(entry)
                )
            )
        except (KeyError, TypeError):
            raise FewbitsError("The recorded choices of layers are not those of this version of fewbits.") from None


def is_layers(entry: Mapping[str, Any]) -> bool:
    """Whether a recorded choice is one of layers of a shape."""
    return str(entry.get("what", "")).startswith(_WHAT)
