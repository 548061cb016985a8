"""How long the ways of multiplying take in a linear layer: side by side, in turns, and what the times show.

A call does what one training step asks of the layer: the weight's codes made once, forward and backward for each
micro-batch, eager or compiled as the run will be. Wall time over a queue of calls counts, so that a layer which waits for
the host is as slow here as it is in a step. That a norm or an activation before it may write its codes anyway does not count
here: block_timing.py times whole blocks.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.kernels.dispatch import emulated
from fewbits.kernels.heap import keep_freed_memory
from fewbits.kernels.recording import recording
from fewbits.nn.candidates import BF16, Shape
from fewbits.nn.lowbit import held_weights
from fewbits.nn.own_code import own_code
from fewbits.nn.prepare import prepare
from fewbits.numerics.keys import step_key
from fewbits.precision.hardware import wait
from fewbits.precision.precision import Precision
from fewbits.precision.switches import torch_switches

MODES = ("eager", "compiled")
LEAST_ROUNDS = 6  # the fewest whose smallest and largest ratio enclose the median with 95 %
ROUNDS = 15
BUDGET_S = 10.0  # of one shape; a round that began is finished
# Of one shape: ways that are not compiled by then are left out. One takes some 4 s on a free CPU core.
WARMUP_S = 12.0
WARM = 3  # calls before a recording, and before any timing: compilers compile and caches fill in them
SAMPLE_MS = 3.0  # calls are queued until they last so long: the clock and the wait for the device cost some 0.02
MOST_CALLS = 32
MOST_PARTS = 4  # micro-batches of a call; in more of them the weight's codes would cost even less
_FLOPS = {"cpu": 3e10, "cuda": 2e13}  # of a call; larger layers are timed on fewer tokens, which favours bf16 a little


class Interval(NamedTuple):
    """A median of paired ratios and where it lies with 95 %."""

    median: float
    low: float
    high: float


Times = Mapping[str, Sequence[float]]
"""Milliseconds of one layer and step by candidate, round by round; what did not run is missing."""
Measure = Callable[[Shape, Sequence[str]], Times]
"""What times the candidates of a shape."""


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median of independent values and an interval that covers the true one with at least `confidence`: two of the
    ordered values, by the binomial distribution (distribution-free). With fewer than 6 values it is infinite.

    >>> median_interval([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    Interval(median=3.5, low=1.0, high=6.0)
    """
    ordered, n = sorted(values), len(values)
    if not n:
        return Interval(math.nan, -math.inf, math.inf)
    below, cut = 0.0, 0
    while cut <= n // 2:
        below += math.comb(n, cut) / 2.0**n  # P(at most `cut` of n values lie below the median)
        if 2 * below > 1 - confidence:
            break
        cut += 1
    if not cut:
        return Interval(statistics.median(ordered), -math.inf, math.inf)
    return Interval(statistics.median(ordered), ordered[cut - 1], ordered[n - cut])


def paired(times: Sequence[float], base: Sequence[float], confidence: float = 0.95) -> Interval:
    """Time over the base's time of the same round: its median and interval; below 1 is faster."""
    return median_interval([a / b for a, b in zip(times, base, strict=False)], confidence)


def race(
    calls: Mapping[str, Callable[[], float]],
    base: str,
    rounds: int = ROUNDS,
    budget_s: float = BUDGET_S,
    hopeless: float = math.inf,
    seed: int = 0,
) -> dict[str, list[float]]:
    """What each call returns (a time) over rounds in which all take turns, in an order drawn from `seed` for each
    round: going round in a circle, each would always find caches and heap as the same neighbour left them.

    From LEAST_ROUNDS on, a call whose ratio to `base` lies above `hopeless` with its whole interval drops out; it ends when
    only the base is left, after `rounds`, or at the first round (of those) that begins after `budget_s` seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    racing, began, order = list(calls), time.perf_counter(), random.Random(seed)
    for number in range(rounds):
        for name in order.sample(racing, len(racing)):
            times[name].append(calls[name]())
        if number + 1 < LEAST_ROUNDS:
            continue
        racing = [name for name in racing if name == base or paired(times[name], times[base]).low <= hopeless]
        if racing == [base] or time.perf_counter() - began > budget_s:
            break
    return times


@dataclass(frozen=True)
class LayerTimer:
    """The `Measure` that times on a device.

    mode: "eager" or "compiled". micro_batches: of a step. hopeless: see `race`. graph: whether the step will be recorded as a
    CUDA graph, so that nothing waits for the host.

    Raises FewbitsError for a mode that is none, or a graph without CUDA.
    """

    device: torch.device
    mode: str = "eager"
    micro_batches: int = 1
    hopeless: float = 1.0
    rounds: int = ROUNDS
    graph: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise FewbitsError(f"mode is {self.mode!r}; it must be eager or compiled, as the run will be.")
        if self.graph and self.device.type != "cuda":
            raise FewbitsError(f"graph=True records CUDA graphs, and the device is {self.device}; leave it out.")

    def __call__(self, shape: Shape, candidates: Sequence[str]) -> Times:
        """Milliseconds a step of one layer by candidate; what cannot run here is left out, unless it is bf16. The first
        two candidates are timed however long they take to compile."""
        parts = min(self.micro_batches, MOST_PARTS)
        tokens = self._tokens(shape, parts)
        whole = self.micro_batches * shape.tokens / (parts * tokens)
        if self.device.type == "cpu":
            keep_freed_memory()
        precision = Precision.parse("bf16-mixed")
        with own_random_numbers(self.device), torch_switches(precision, self.device):
            x, grad = (
                torch.randn(tokens, side, device=self.device).mul_(size).to(torch.bfloat16)
                for side, size in ((shape.inputs, 1.0), (shape.outputs, 1e-3))
            )
            steps: dict[str, Callable[[], None]] = {}
            began = time.perf_counter()
            for text in candidates:
                if self.mode == "compiled" and len(steps) > 1 and time.perf_counter() - began > WARMUP_S:
                    break
                try:
                    step = self._step(text, shape, x, grad, parts)
                    for _ in range(WARM):
                        step()
                    step = recorded(step, self.device) if self.graph else step
                except Exception:  # whatever a compiler or a library throws: bf16 is always there
                    if text == BF16:
                        raise
                    continue
                steps[text] = step
            calls = calls_for(steps[BF16], self.device)
            clocks = {text: clock(step, calls, self.device) for text, step in steps.items()}
            times = race(clocks, BF16, self.rounds, hopeless=self.hopeless)
        steps.clear()
        clocks.clear()
        free(self.device)
        return {text: [whole * ms for ms in found] for text, found in times.items()}

    def _tokens(self, shape: Shape, parts: int) -> int:
        limit, tokens = flops_limit(self.device), shape.tokens
        while 6 * parts * tokens * shape.inputs * shape.outputs > limit and tokens % 2 == 0 and tokens >= 512:
            tokens //= 2
        return tokens

    def _step(self, text: str, shape: Shape, x: Tensor, grad: Tensor, parts: int) -> Callable[[], None]:
        """What a training step does in one layer."""
        with torch.device(self.device):
            model = nn.Sequential(nn.Linear(shape.inputs, shape.outputs, bias=shape.bias))
        prepare(model, "bf16-mixed" if text == BF16 else text)
        drop_copies(model)
        emulated("bf16", self.device.type)  # asked before a compiler comes: it cannot time anything
        layer = model[0]  # without what `prepare` hangs on a whole model
        run = compiled(layer) if self.mode == "compiled" else layer
        return training_step(model, run, x, grad, parts)


def training_step(
    model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, parts: int
) -> Callable[[], None]:
    """What a training step does with x in `model`, by `run`: its weights quantized once, forward and backward for each of
    `parts` micro-batches, its scale histories led on at the end."""
    parameters, leaf = list(model.parameters()), x.detach().requires_grad_()

    def step() -> None:
        with step_key(x.device, 0, 0, 0), held_weights(model):
            for _ in range(parts):
                leaf.grad = None
                for parameter in parameters:
                    parameter.grad = None
                run(leaf).backward(grad)  # type: ignore[no-untyped-call]

    return step


def own_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Within, what is drawn leaves torch's generators as they were."""
    own: AbstractContextManager[None] = torch.random.fork_rng([device] if device.type == "cuda" else [])
    return own


def flops_limit(device: torch.device) -> float:
    """FLOPs that a timed call should not exceed."""
    return _FLOPS.get(device.type, _FLOPS["cpu"])


def drop_copies(model: nn.Module) -> None:
    """Lets go of the copies of weights that `prepare` keeps for a training."""
    for name in ("fewbits_remainders", "fewbits_undo"):
        model.__dict__.pop(name)


def free(device: torch.device) -> None:
    """Gives back the memory of what is no longer held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def calls_for(step: Callable[[], None], device: torch.device) -> int:
    """How many calls of a warm step make a sample long enough for the clock."""
    clock(step, 3, device)()
    ms = clock(step, 3, device)()
    return max(1, min(MOST_CALLS, math.ceil(SAMPLE_MS / ms)))


def clock(step: Callable[[], None], calls: int, device: torch.device) -> Callable[[], float]:
    """What returns the milliseconds of a step, over `calls` of them in a queue."""

    def taken() -> float:
        wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            step()
        wait(device)
        return 1e3 * (time.perf_counter() - began) / calls

    return taken


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A warm step as a CUDA graph that is replayed; itself where it cannot be recorded, as the run's steps then stay."""
    graph = torch.cuda.CUDAGraph()
    try:
        with recording(graph, device) as kept:
            step()
    except RuntimeError:
        return step
    return _Replay(graph, step, kept)


@dataclass(frozen=True)
class _Replay:
    """A recorded step with what the graph reads: the tensors of `step`, and `kept`."""

    graph: Any
    step: Callable[[], None]
    kept: list[object]

    def __call__(self) -> None:
        self.graph.replay()


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """`model` compiled as a function of its own: a module's forward is shared by all of its class."""

    def forward(x: Tensor) -> Tensor:
        return model(x)  # type: ignore[no-any-return]

    found: Callable[[Tensor], Tensor] = torch.compile(own_code(forward), dynamic=False)
    return found
