"""Steps whose results are still on the device: the host reads several at a time, since reading waits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.step import StepResult


class Arrived(NamedTuple):
    """The result of one step as numbers of the host; latched: no later step applies anything."""

    number: int
    loss: float
    grad_norm: float
    loss_scale: float
    applied: bool
    latched: bool


class Waiting:
    """The steps that nobody has read yet, in order."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, tuple[Tensor, ...]]] = []

    def add(self, number: int, result: StepResult, latched: Tensor) -> None:
        """latched: 0-d bool after that step; a copy is taken."""
        self._steps.append((number, (*result, latched.clone())))

    def read(self, *counters: Tensor) -> tuple[list[Arrived], list[int]]:
        """All of them and 0-d counters as they are now, in one transfer; nothing waits any more."""
        values = [value.double() for _, result in self._steps for value in result]
        numbers = torch.stack([*values, *(counter.double() for counter in counters)]).tolist()
        found = []
        for i, (number, _) in enumerate(self._steps):
            loss, grad_norm, loss_scale, applied, latched = numbers[5 * i : 5 * i + 5]
            found.append(Arrived(number, loss, grad_norm, loss_scale, bool(applied), bool(latched)))
        self._steps.clear()
        return found, [int(count) for count in numbers[len(values) :]]
