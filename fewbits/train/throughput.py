"""Speed of a training, honestly: tokens over wall time, milliseconds a step, and model FLOPs utilization.

MFU is the FLOPs that the model needs (not those that ran: recomputation and emulation do not count) over the dense peak
of the device for the format that was multiplied. Where the peak is not known it is null, never a guess.
"""

from __future__ import annotations

import time

import torch

from fewbits.formats import Format
from fewbits.kernels.dispatch import matmul_execution
from fewbits.precision.hardware import describe, native_matmul, peak_flops
from fewbits.precision.precision import Precision

FORMULA = "6 N + 6 L D T FLOPs a token: N multiplied weights, L layers, D wide, T tokens of causal context"
"""Where documents do not see each other, T is the mean of what a token may see of its window (`Batches.visible_context`)."""


def running_format(precision: Precision, device: torch.device) -> Format:
    """The format whose speed counts: what `output` multiplies, or what stands in for it where that is emulated."""
    matmul, hardware = precision.recipe.output, describe(device)
    if matmul is not None and native_matmul(matmul, hardware).value:
        return matmul.left.format
    native = matmul_execution(precision.operand, device).value == "native"
    return precision.operand if native else Format.parse("fp32")


def device_peak(precision: Precision, device: torch.device) -> float | None:
    """Dense peak of `device` in FLOP/s for the matmuls of `precision` as they run there, or None when it is not known."""
    return peak_flops(describe(device), running_format(precision, device))


def mfu(flops_per_token: float, tokens_per_second: float | None, peak: float | None) -> float | None:
    """Model FLOPs utilization as a fraction of the peak, or None when either is unknown.

    >>> mfu(1e9, 1e5, 1e15)
    0.1
    """
    if peak is None or not tokens_per_second:
        return None
    return flops_per_token * tokens_per_second / peak


class Stopwatch:
    """Time spent in steps: runs between `start` and `pause`, so that evaluation, samples and saving do not count."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._spent = 0.0

    def start(self) -> None:
        """Go on counting."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop counting until `start`."""
        if self._since is not None:
            self._spent += time.perf_counter() - self._since
            self._since = None

    def leave_out(self, seconds: float) -> None:
        """So many of the seconds counted since the last `take` were no steps: a compiler's work."""
        self._spent -= seconds

    def take(self) -> float:
        """Seconds counted since the last `take`."""
        now = time.perf_counter()
        spent = self._spent + (0.0 if self._since is None else now - self._since)
        self._spent = 0.0
        if self._since is not None:
            self._since = now
        return spent
