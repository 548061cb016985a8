"""One process at a time on the device, while others compile beside it: what is timed by a compiler must not be disturbed.

Compilers choose kernels by timing them and keep the choice on disk. Processes that build side by side therefore take turns
at the device, through a lock on the file that FEWBITS_TURN names; without the variable nothing is locked.
"""

from __future__ import annotations

import fcntl
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_held = 0


@contextmanager
def turn() -> Iterator[None]:
    """Within, no other process is within; entering again inside is free."""
    global _held
    path = os.environ.get("FEWBITS_TURN")
    if not path or _held:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, and when the process dies
        _held += 1
        try:
            yield
        finally:
            _held -= 1


def in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, called within `turn`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with turn():
            return function(*args, **kwargs)

    return call


def time_kernels_in_turn() -> None:
    """Has inductor's and Triton's timings of kernels take turns."""
    if not os.environ.get("FEWBITS_TURN"):
        return
    with suppress(ImportError):
        benchmarking = importlib.import_module("torch._inductor.runtime.benchmarking")
        for kind in vars(benchmarking).values():
            if isinstance(kind, type) and "benchmark_gpu" in vars(kind):
                kind.benchmark_gpu = in_turn(kind.benchmark_gpu)  # type: ignore[attr-defined]
    with suppress(ImportError):
        testing = importlib.import_module("triton.testing")
        testing.do_bench = in_turn(testing.do_bench)
