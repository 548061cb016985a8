"""Reads a Chrome trace of training steps, as torch's profiler writes it, and says where the time went.

On CUDA the time of a part is that of its kernels on the device; gaps are what is left between the first kernel and the
last. On a CPU it is the own time of operators; the host's time between them counts as gaps. Milliseconds a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fewbits.ranges import PREFIX, STEP
from fewbits.train.attribution import (
    GAPS,
    MATMUL,
    PARTS,
    UNKNOWN,
    kernel_part,
    multiplied,
    operand_format,
    operator_part,
)

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_TOP = 25  # kernels that are listed


@dataclass
class Breakdown:
    """Where the time of a step went; all times in milliseconds a step."""

    steps: int
    """Steps in the trace."""
    on: str
    """"cuda" or "cpu": what the times are of."""
    ms: float
    """The whole, gaps included, under the profiler, which slows the host."""
    parts: dict[str, float] = field(default_factory=dict)
    """By part, in the order of PARTS, "unknown" last; those that took no time are left out."""
    matmul_formats: dict[str, float] = field(default_factory=dict)
    """Time of matmuls by the format of their operands."""
    tensor_cores: float | None = None
    """Share of the matmul time that ran on tensor cores; None on a CPU and without matmuls."""
    tensor_cores_unknown: float = 0.0
    """Share of the matmul time of kernels whose names do not say."""
    stages: dict[str, float] = field(default_factory=dict)
    """By range of ours: the device time that was launched in it, or on a CPU its duration."""
    kernels: list[dict[str, Any]] = field(default_factory=list)
    """The longest: name, part, ms, calls a step."""
    unknown: list[str] = field(default_factory=list)
    """Names that no rule knows."""

    @property
    def busy(self) -> float:
        """Everything but gaps."""
        return sum(value for part, value in self.parts.items() if part != GAPS)

    @property
    def attributed(self) -> float:
        """Share of the busy time that a rule knows; 1 when nothing ran."""
        return 1.0 - self.parts.get(UNKNOWN, 0.0) / self.busy if self.busy else 1.0

    def to_json(self) -> dict[str, Any]:
        """As plain values, with what is derived."""
        return {**asdict(self), "busy": self.busy, "attributed": self.attributed}


class _Tally:
    """Microseconds by part, format, stage and name."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self.formats: dict[str, float] = defaultdict(float)
        self.cores: dict[bool | None, float] = defaultdict(float)
        self.stages: dict[str, float] = defaultdict(float)
        self.names: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])

    def add(self, name: str, part: str, time: float, format: str = "?", cores: bool | None = None) -> None:
        self.parts[part] += time
        entry = self.names[name, part]
        entry[0] += time
        entry[1] += 1
        if part == MATMUL:
            self.formats[format] += time
            self.cores[cores] += time

    def breakdown(self, steps: int, on: str, total: float) -> Breakdown:
        per = 1e-3 / steps
        known = {part: self.parts[part] * per for part in (*PARTS, UNKNOWN) if self.parts.get(part)}
        matmul = self.parts.get(MATMUL, 0.0)
        longest = sorted(self.names.items(), key=lambda item: -item[1][0])
        return Breakdown(
            steps,
            on,
            total * per,
            known,
            {name: time * per for name, time in sorted(self.formats.items(), key=lambda item: -item[1])},
            self.cores[True] / matmul if matmul and on == "cuda" else None,
            self.cores[None] / matmul if matmul and on == "cuda" else 0.0,
            {name: time * per for name, time in self.stages.items()},
            [
                {"name": name, "part": part, "ms": time * per, "calls": calls / steps}
                for (name, part), (time, calls) in longest[:_TOP]
                if part != GAPS
            ],
            [name for (name, part), _ in longest if part == UNKNOWN],
        )


def read_trace(trace: Mapping[str, Any]) -> Breakdown:
    """The breakdown of a Chrome trace that holds ranges of ours named "step", at least one."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    ranges = [event for event in events if event.get("cat") == "user_annotation" and _is_ours(event)]
    steps = max(1, sum(_short(event) == STEP for event in ranges))
    device = [event for event in events if event.get("cat") in _ON_DEVICE]
    return _of_device(events, device, ranges, steps) if device else _of_host(events, ranges, steps)


def _is_ours(event: Mapping[str, Any]) -> bool:
    return str(event["name"]).startswith(PREFIX)


def _short(event: Mapping[str, Any]) -> str:
    return str(event["name"]).removeprefix(PREFIX)


def _of_device(
    events: Sequence[Mapping[str, Any]],
    device: Sequence[Mapping[str, Any]],
    ranges: Sequence[Mapping[str, Any]],
    steps: int,
) -> Breakdown:
    """Kernels, each in the ranges that were open on the host when it was launched (on any thread: backward has its own)."""
    launched = {
        event["args"]["correlation"]: float(event["ts"])
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    at = [launched.get(event.get("args", {}).get("correlation"), -1.0) for event in device]
    inside = _enclosing(at, ranges)
    tally = _Tally()
    for event, names in zip(device, inside, strict=True):
        name, time = str(event["name"]), float(event["dur"])
        part = kernel_part(name, names)
        tally.add(name, part, time, *multiplied(name))
        for stage in dict.fromkeys(names):
            tally.stages[stage] += time
    begin = min(float(event["ts"]) for event in device)
    end = max(float(event["ts"]) + float(event["dur"]) for event in device)
    tally.parts[GAPS] = (end - begin) - _covered(device)
    return tally.breakdown(steps, "cuda", end - begin)


def _enclosing(times: Sequence[float], ranges: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each time, the names of the ranges that hold it, outermost first. One sweep over both, sorted."""
    opening = sorted(ranges, key=lambda event: (float(event["ts"]), -float(event["dur"])))
    found: list[list[str]] = [[] for _ in times]
    stack: list[tuple[float, str]] = []
    position = 0
    for index in sorted(range(len(times)), key=lambda i: times[i]):
        time = times[index]
        while position < len(opening) and float(opening[position]["ts"]) <= time:
            event = opening[position]
            stack.append((float(event["ts"]) + float(event["dur"]), _short(event)))
            position += 1
        stack = [entry for entry in stack if entry[0] >= time]
        found[index] = [name for _, name in stack]
    return found


def _covered(events: Iterable[Mapping[str, Any]]) -> float:
    """Microseconds in which at least one of the events runs."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in events):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _of_host(events: Sequence[Mapping[str, Any]], ranges: Sequence[Mapping[str, Any]], steps: int) -> Breakdown:
    """Operators of the threads that run steps, each with its own time: its duration less that of what it calls."""
    tally = _Tally()
    for event in ranges:
        tally.stages[_short(event)] += float(event["dur"])
    threads = {event["tid"] for event in ranges}
    total = 0.0
    for thread in threads:
        mine = [e for e in events if e.get("tid") == thread and e.get("cat") in ("cpu_op", "user_annotation")]
        for event, own, ancestors in _own_times(mine):
            if STEP not in ancestors and _short(event) != STEP:
                continue
            total += own
            types = event.get("args", {}).get("Input type") or ()
            part = operator_part(_short(event), ancestors)
            tally.add(_short(event), part, own, operand_format(types, _short(event)))
    return tally.breakdown(steps, "cpu", total)


def _own_times(events: Sequence[Mapping[str, Any]]) -> Iterable[tuple[Mapping[str, Any], float, list[str]]]:
    """(event, microseconds of its own, names of the events around it) for the properly nested events of one thread."""
    ordered = sorted(events, key=lambda event: (float(event["ts"]), -float(event["dur"])))
    children = [0.0] * len(ordered)
    stack: list[tuple[float, int]] = []
    around: list[list[str]] = []
    for index, event in enumerate(ordered):
        begin, duration = float(event["ts"]), float(event["dur"])
        while stack and stack[-1][0] <= begin:
            stack.pop()
        around.append([_short(ordered[i]) for _, i in stack])
        if stack:
            children[stack[-1][1]] += duration
        stack.append((begin + duration, index))
    return [
        (event, max(0.0, float(event["dur"]) - inner), names)
        for event, inner, names in zip(ordered, children, around, strict=True)
    ]
