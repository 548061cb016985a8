"""Profiles a few steps of a training: a trace for Perfetto or chrome://tracing, and where the time went, in numbers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from fewbits.precision.hardware import wait
from fewbits.ranges import STEP, recording, span
from fewbits.train.memory import quiet_profiler
from fewbits.train.record import write_json
from fewbits.train.trace import Breakdown, read_trace

Result = TypeVar("Result")

WARMUP = 3  # steps before them: the first compiles and makes the optimizer's state, the second is measured for memory
TRACE, SUMMARY = "trace.json.gz", "profile.json"


class StepProfiler:
    """Runs `steps` steps under torch's profiler: `step(take)` for each, then `finish(folder)` once.

    The device is awaited when the first step begins and when the last has ended, so that the trace holds whole steps.
    """

    def __init__(self, device: torch.device, steps: int):
        self.device, self.steps, self.taken = device, steps, 0
        self._profile: Any = None
        self._stack = ExitStack()

    @property
    def complete(self) -> bool:
        """Whether all steps were taken."""
        return self.taken >= self.steps

    def step(self, take: Callable[[], Result]) -> Result:
        """One step, whatever `take` does, named as a step in the trace."""
        if self._profile is None:
            self._begin()
        with span(STEP):
            result = take()
        self.taken += 1
        return result

    def finish(self, folder: Path) -> Breakdown:
        """Ends the profile and writes trace.json.gz and profile.json into `folder`; the breakdown of the steps taken."""
        wait(self.device)
        traced, self._profile = self._profile, None
        self._stack.close()
        path = folder / TRACE
        traced.export_chrome_trace(str(path))
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            found = read_trace(json.load(file))
        write_json(folder / SUMMARY, found.to_json())
        return found

    def close(self) -> None:
        """Ends the profile without writing anything."""
        self._profile = None
        self._stack.close()

    def _begin(self) -> None:
        wait(self.device)
        cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        self._stack.enter_context(quiet_profiler())
        self._profile = self._stack.enter_context(
            profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=not cuda)  # dtypes: a CPU's formats
        )
        self._stack.enter_context(recording())


def profile_steps(take: Callable[[], object], device: torch.device, steps: int, folder: Path) -> Breakdown:
    """Profiles `steps` calls of `take` at once; see StepProfiler."""
    profiler = StepProfiler(device, steps)
    try:
        for _ in range(steps):
            profiler.step(take)
        return profiler.finish(folder)
    finally:
        profiler.close()


def describe(found: Breakdown) -> list[tuple[str, str]]:
    """The breakdown as (name, sentence) for people."""
    whole = sum(found.parts.values()) or 1.0
    shares = ", ".join(
        f"{part} {100 * time / whole:.0f} % ({time:.3g} ms)"
        for part, time in sorted(found.parts.items(), key=lambda item: -item[1])
    )
    where = "the device" if found.on == "cuda" else "the processor"
    lines = [("profile", f"{found.steps} steps of {found.ms:.4g} ms; time of {where}: {shares}")]
    matmul = sum(found.matmul_formats.values())
    if matmul:
        formats = ", ".join(f"{name} {100 * time / matmul:.0f} %" for name, time in found.matmul_formats.items())
        cores = "by the dtype of their operands"
        if found.tensor_cores is not None:
            cores = f"{100 * found.tensor_cores:.1f} % of their time on tensor cores"
            if found.tensor_cores_unknown > 0.005:
                cores += f", {100 * found.tensor_cores_unknown:.1f} % in kernels whose names do not say"
        lines.append(("matmuls", f"{formats}; {cores}"))
    if found.unknown:
        lines.append(("unknown", f"{100 * (1 - found.attributed):.1f} %: " + ", ".join(found.unknown[:5])))
    return lines
