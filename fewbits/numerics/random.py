"""Random numbers keyed by (seed, attempt, micro-batch): nothing hangs on a generator's past."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def keyed_random(device: torch.device, *key: int) -> Iterator[None]:
    """Within, torch's default generators (the CPU's and that of `device`) start from `key` alone; their state of before
    comes back afterwards.

    Nothing hangs on a generator's past: a resumed run draws what the uninterrupted one drew. On CUDA the state of a
    generator is held by the host, so nothing waits.
    """
    mixed = 0
    for part in key:
        mixed = _mix(mixed ^ (part & _MASK))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # not torch.manual_seed, which would reseed every other GPU too and never put those back
        torch.default_generator.manual_seed(mixed >> 1)
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            torch.cuda.default_generators[index].manual_seed(mixed >> 1)
        yield


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """One round of splitmix64 (Steele et al. 2014): neighbouring keys give unrelated seeds."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
