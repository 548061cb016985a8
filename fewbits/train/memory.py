"""Memory of a training by role, in bytes.

On CUDA the peak is the allocator's. On a CPU it is the peak of live tensor bytes: what rests between steps (weights,
masters, moments) plus the highest sum of allocations less frees within one real step, as the profiler of torch reports
them. Activations are what is left of the peak after the other roles: kept for backward, or temporary.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fewbits.graph import StepGraph

Result = TypeVar("Result")

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind `tensors`, each storage counted once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), storage.nbytes()] = storage.nbytes()
    return sum(storages.values())


def resting(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes between steps of the roles that live there: working weights, master weights, moments, buffers."""
    parameters = list(model.parameters())
    states = [optimizer.state[parameter] for parameter in parameters if parameter in optimizer.state]
    masters = [state["master"] for state in states if isinstance(state.get("master"), Tensor)]
    waiting = list(getattr(model, "fewbits_remainders", {}).values()) if not states else []
    return {
        "working weights": live_bytes(parameters),
        "master weights": live_bytes([*masters, *waiting]),
        "moments": live_bytes(state[key] for state in states for key in MOMENTS if isinstance(state.get(key), Tensor)),
        "buffers": live_bytes(model.buffers()),
    }


def gradient_bytes(model: nn.Module, accumulated: bool) -> int:
    """Bytes of all gradients at their fullest; with accumulation, fp32 accumulators stand beside those of 16 bits."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            beside = 4 if accumulated and parameter.element_size() < 4 else 0
            total += parameter.numel() * (parameter.element_size() + beside)
    return total


def by_role(peak: int, rest: dict[str, int], gradients: int) -> dict[str, int]:
    """The peak of a step divided among the roles; their sum is the peak.

    >>> by_role(100, {"working weights": 40, "moments": 20}, 10)
    {'working weights': 40, 'moments': 20, 'gradients': 10, 'activations': 30}
    """
    above = max(0, peak - sum(rest.values()))
    return {**rest, "gradients": min(gradients, above), "activations": above - min(gradients, above)}


def highest(changes: Iterable[int]) -> int:
    """The largest running sum of allocations (positive) and frees (negative), at least 0.

    >>> highest([100, 50, -50, 20])
    150
    """
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


def peak_within(run: Callable[[], Result]) -> tuple[Result, int | None]:
    """The result of `run()` and the peak of CPU tensor bytes it allocates above what was there; None if unknown."""
    with quiet_profiler():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            result = run()
        peak = highest(_changes(profiled))
    return result, peak or None


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Within, torch's profiler does not write lines of its own to stderr."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
        else:
            os.environ["KINETO_LOG_LEVEL"] = before


def _changes(profiled: Any) -> list[int]:
    events = profiled.profiler.kineto_results.events()
    return [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"]


def resident_bytes() -> int | None:
    """Largest resident size of this process so far, or None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


class MemoryMeter:
    """Peak memory of a training on one device: `measure` wraps one real step, `peak()` may be asked at any time."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        micro_batches: int,
        graph: StepGraph | None = None,
    ):
        self._model, self._optimizer, self._device, self._graph = model, optimizer, device, graph
        self._accumulated = micro_batches > 1
        self._cpu_peak: int | None = None
        self.measured = device.type == "cuda"  # the allocator of CUDA measures by itself
        if self.measured:
            torch.cuda.reset_peak_memory_stats(device)

    def measure(self, run: Callable[[], Result]) -> Result:
        """Runs one step and notes its peak. Call it when the optimizer has its state: the second step or later."""
        rest = sum(resting(self._model, self._optimizer).values())
        result, above = peak_within(run)
        self._cpu_peak = None if above is None else rest + above
        self.measured = True
        return result

    def peak(self) -> int | None:
        """Peak bytes so far, or None before anything was measured."""
        if self._device.type == "cuda":
            recorded = 0 if self._graph is None else self._graph.peak
            return max(recorded, torch.cuda.max_memory_allocated(self._device))
        return self._cpu_peak

    def roles(self) -> dict[str, int] | None:
        """The peak by role, or None before anything was measured."""
        peak = self.peak()
        if peak is None:
            return None
        rest = resting(self._model, self._optimizer)
        return by_role(peak, rest, gradient_bytes(self._model, self._accumulated))
