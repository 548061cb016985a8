"""What layers=auto decided: for every linear layer its way of multiplying, why, and what that is worth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.nn.candidates import BF16, Shape, matmuls_of
from fewbits.nn.stacks import PICKED, WHOLE, Stack
from fewbits.nn.timing import Interval, Times, paired
from fewbits.precision.recipe import Recipe

MARGIN = 0.02
"""What a way of multiplying must win over bf16, at the slow end of its interval, to take its place; and the whole recipe in
blocks over what layers alone chose."""
_EVEN = Interval(1.0, 1.0, 1.0)
_WHAT = "layers "


class InBlocks(NamedTuple):
    """What whole blocks showed: their time with the whole recipe over that with what their layers chose alone, which `over`
    names."""

    ratio: Interval
    over: str


@dataclass(frozen=True)
class LayerGroup:
    """Linear layers of one shape and one choice. choice: canonical recipe text, or "bf16", and why. bf16_ms: milliseconds a
    step of one such layer in bf16, 0 where there was nothing to time. ratio: time of what such a layer chose alone over that
    of bf16. blocks: where whole blocks decided, and not the layer alone, what they showed."""

    shape: Shape
    names: tuple[str, ...]
    choice: Choice
    bf16_ms: float
    ratio: Interval = _EVEN
    blocks: InBlocks | None = None


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
    return f"not shown to be faster: {how}, and {100 * MARGIN:g} % must be won"


def _speed(ratio: Interval) -> str:
    """Times as fast, with its interval: the reciprocal of the ratio of times."""
    if not math.isfinite(ratio.high):
        return f"{1 / ratio.median:.2f}x in too few rounds"
    return f"{1 / ratio.median:.2f}x ({1 / ratio.high:.2f} to {1 / ratio.low:.2f})"


def settle_in_blocks(layers: Layers, timed: Mapping[Stack, tuple[Sequence[str], Times]]) -> Layers:
    """`layers`, chosen alone, after whole blocks were timed: where they win at least MARGIN with 95 %, every layer that the
    recipe takes in them multiplies by all of it. timed: for each stack the blocks of the model that are so, and its times,
    empty where it was not timed. Reasons say what blocks showed.
    """
    settled: dict[str, tuple[Choice, InBlocks | None]] = {}
    for stack, (blocks, times) in timed.items():
        shown = None
        if times.get(WHOLE) and times.get(PICKED):
            ratio = paired(times[WHOLE], times[PICKED])
            shown = InBlocks(ratio, BF16 if stack.in_bf16 else "what layers alone chose")
        for name in (f"{block}.{layer}" for block in blocks for layer, value in stack.picks if value != stack.recipe):
            settled[name] = _settle(layers[name], stack.recipe, shown)
    if not _as_timed(layers, settled):
        why = "parts of the recipe remain in others, and codes are not handed on"
        settled = {name: (_also(layers[name], f"{choice.reason}, but {why}"), None) if blocks else (choice, None)
                   for name, (choice, blocks) in settled.items()}  # fmt: skip
    return Layers(tuple(part for group in layers.groups for part in _split(group, settled)))


def _settle(alone: Choice, recipe: str, shown: InBlocks | None) -> tuple[Choice, InBlocks | None]:
    if shown is None:
        return _also(alone, "whole blocks were not timed"), None
    how = f"{_speed(shown.ratio)} as fast as {shown.over} in whole blocks, with {matmuls_of(recipe)} in few bits"
    return (Choice(recipe, how), shown) if shown.ratio.high <= 1 - MARGIN else (_also(alone, how), None)


def _also(choice: Choice, reason: str) -> Choice:
    return Choice(choice.value, f"{choice.reason}; {reason}")


def _as_timed(layers: Layers, settled: Mapping[str, tuple[Choice, InBlocks | None]]) -> bool:
    """Whether blocks will run as they were timed: under delayed scales, all layers of a model that look back share a store,
    and codes are handed on only where all of them have the same recipe (`held_weights`)."""
    values = {(settled[name][0] if name in settled else choice).value for name, choice in layers.items()} - {BF16}
    raised = any(blocks for _, blocks in settled.values())
    return not raised or len(values) == 1 or not any(Recipe.parse(value).delayed for value in values)


def _split(group: LayerGroup, settled: Mapping[str, tuple[Choice, InBlocks | None]]) -> Iterator[LayerGroup]:
    """The layers of a group by what was settled for them, in their order."""
    parts: dict[tuple[Choice, InBlocks | None], list[str]] = {}
    for name in group.names:
        parts.setdefault(settled.get(name, (group.choice, group.blocks)), []).append(name)
    for (choice, blocks), names in parts.items():
        yield replace(group, names=tuple(names), choice=choice, blocks=blocks)


@dataclass(frozen=True)
class Layers(Mapping[str, Choice]):
    """Layer name -> its recipe (canonical text, or "bf16") and why; what `prepare` takes as `layers`. By shape and choice in
    `groups`."""

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
    def alone(self) -> tuple[LayerGroup, ...]:
        """Those that were decided by timing them alone."""
        return tuple(group for group in self.groups if group.blocks is None)

    @property
    def bf16_ms(self) -> float:
        """Milliseconds a step of the layers that were decided alone, in bf16."""
        return sum(len(group.names) * group.bf16_ms for group in self.alone)

    @property
    def ms(self) -> Interval:
        """Milliseconds a step of the layers that were decided alone, as chosen. The ends of the shapes' intervals are added,
        which encloses the sum with more than 95 %."""
        parts = [(len(group.names) * group.bf16_ms, group.ratio) for group in self.alone]
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
            why = reasons.pop() if len(reasons) == 1 else "nothing was shown to be faster"
            return f"all {len(self)} linear layers that the recipe takes stay in bf16: {why}"
        rest = [f"{counts['']} in bf16"] if "" in counts else []
        return "; ".join([f"linear layers: {', '.join([*low, *rest])}", *self._worth_in_blocks(), *self._worth_alone()])

    def _worth_in_blocks(self) -> Iterator[str]:
        counts: dict[InBlocks, int] = {}
        for group in self.groups:
            if group.blocks is not None:
                counts[group.blocks] = counts.get(group.blocks, 0) + len(group.names)
        for (ratio, over), count in counts.items():
            yield f"whole blocks decided for {count}, {_speed(ratio)} as fast as {over}"

    def _worth_alone(self) -> Iterator[str]:
        """What layers are worth by their own times, which say nothing of those that blocks decided."""
        alone = self.alone
        if all(group.choice.value == BF16 for group in alone):
            return
        ms, base, count = self.ms, self.bf16_ms, sum(len(group.names) for group in alone)
        where = "them" if count == len(self) else f"the other {count}"
        yield (
            f"{ms.median:.4g} ms a step in {where} instead of {base:.4g}, saves "
            f"{base - ms.median:.3g} ms ({base - ms.high:.3g} to {base - ms.low:.3g}), "
            f"{_speed(Interval(*(part / base for part in ms)))}"
        )

    def to_json(self) -> list[dict[str, Any]]:
        """One {"what", "value", "reason", ...} for each group, as choices are recorded."""
        return [
            {
                "what": f"{_WHAT}{group.shape}",
                "value": group.choice.value,
                "reason": group.choice.reason,
                "shape": list(group.shape),
                "names": list(group.names),
                "bf16_ms": group.bf16_ms,
                "ratio": list(group.ratio),
                **(
                    {}
                    if group.blocks is None
                    else {"blocks": {"ratio": list(group.blocks.ratio), "over": group.blocks.over}}
                ),
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
                        _blocks_of(entry.get("blocks")),
                    )
                    for entry in entries
                    if is_layers(entry)
                )
            )
        except (KeyError, TypeError):
            raise FewbitsError("The recorded choices of layers are not those of this version of fewbits.") from None


def _blocks_of(entry: Mapping[str, Any] | None) -> InBlocks | None:
    """None for what layers alone decided, and in runs from before blocks were timed."""
    return None if entry is None else InBlocks(Interval(*entry["ratio"]), entry["over"])


def is_layers(entry: Mapping[str, Any]) -> bool:
    """Whether a recorded choice is one of layers of a shape."""
    return str(entry.get("what", "")).startswith(_WHAT)
