"""Learning-rate schedules: pure functions of the number of applied steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import FewbitsError, nearest

SCHEDULE_KINDS = ("constant", "cosine", "linear", "wsd")


@dataclass(frozen=True)
class Schedule:
    """A factor in [0, 1] for the learning rate, by the number t of steps applied so far (0 before the first).

    Warm-up: (t + 1) / (warmup_steps + 1), so that the first step already moves and the step after the warm-up has the
    full rate. Then constant: 1. cosine and linear: from 1 down to `min_ratio` at t = total_steps. wsd
    (warmup-stable-decay): 1, and a straight line down to `min_ratio` over the last `decay_steps`. Beyond
    `total_steps` the last value holds.
    """

    kind: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    decay_steps: int = 0
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULE_KINDS:
            hint = nearest(self.kind, SCHEDULE_KINDS)
            raise FewbitsError(f"schedule {self.kind!r} is unknown; use {', '.join(SCHEDULE_KINDS)}.{hint}")
        for name in ("warmup_steps", "total_steps", "decay_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise FewbitsError(f"{name}={value!r} does not fit; use a whole number of steps, 0 or more.")
        if not 0.0 <= self.min_ratio <= 1.0:
            raise FewbitsError(
                f"min_ratio={self.min_ratio!r} does not fit; use a fraction of the learning rate from 0 to 1."
            )
        if self.kind != "constant" and self.total_steps == 0:
            raise FewbitsError(
                f"schedule {self.kind!r} needs total_steps; give the number of steps of the whole training."
            )
        if self.kind != "constant" and self.warmup_steps + self.decay_steps > self.total_steps:
            raise FewbitsError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} exceed "
                f"total_steps={self.total_steps}; shorten them."
            )
        if self.kind == "wsd" and self.decay_steps == 0:
            raise FewbitsError(
                "schedule 'wsd' needs decay_steps; give the length of the final descent, or use constant."
            )

    def factor(self, t: int) -> float:
        """The factor for the step taken after `t` applied steps, fp64."""
        if self.total_steps:
            t = min(t, self.total_steps)
        if t < self.warmup_steps:
            return (t + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return 1.0
        start = self.total_steps - self.decay_steps if self.kind == "wsd" else self.warmup_steps
        if t < start or self.total_steps == start:
            return 1.0
        progress = (t - start) / (self.total_steps - start)
        descent = (1 + math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else 1 - progress
        return self.min_ratio + (1 - self.min_ratio) * descent

    def table(self) -> Tensor:
        """`factor(0) .. factor(last)`, fp64 [total_steps + 1]; read the last entry for any later t.

        A constant schedule without total_steps ends with its warm-up: [warmup_steps + 1].
        """
        return torch.tensor(
            [self.factor(t) for t in range((self.total_steps or self.warmup_steps) + 1)], dtype=torch.float64
        )
