"""The key of the step that runs now, on the device: what stochastic rounding inside a model draws its bits from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fewbits.numerics.random import mix_key

_KEYS: dict[str, Tensor] = {}


def current_key(device: torch.device) -> Tensor:
    """The key of the running step, 0-d int64 on `device`: always the same tensor, so that compiled code reads it anew.

    Outside of `step_key` it is what the last one left, at first 0.
    """
    place = str(device)
    if place not in _KEYS:
        _KEYS[place] = torch.zeros((), dtype=torch.int64, device=device)
    return _KEYS[place]


@contextmanager
def step_key(device: torch.device, *key: int) -> Iterator[None]:
    """Within, `current_key(device)` is made of `key`: (seed, attempt, micro-batch). Nothing waits for the device."""
    current_key(device).fill_(mix_key(*key))
    yield


@contextmanager
def step_key_from(key: Tensor) -> Iterator[None]:
    """`step_key` from a mixed key that is on its device already, 0-d int64: for what is recorded and run again."""
    current_key(key.device).copy_(key)
    yield
