"""Loss scales: none, static, dynamic. One interface, so that a step reads the same with and without one.

The scale and its counters are 0-d tensors that live on the device at fixed addresses; `update_` never waits for the
device. Scales are powers of two: multiplying and dividing by them is exact within a format's normal range.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.precision.loss_scale import dynamic, power_of_two, read, write


class LossScale:
    """What every loss scale can do. The names without a leading underscore are the whole interface."""

    kind = ""
    value: Tensor
    """0-d fp32 on the device: what multiplies the loss. Its address never changes after `init`."""

    def init(self, device: torch.device | str) -> None:
        """Moves the state to `device`, its values kept."""
        for name, buffer in self._buffers().items():
            setattr(self, name, buffer.to(device))

    def update_(self, finite: Tensor, hold: Tensor | None = None) -> None:
        """After a step, its gradients unscaled. Both are 0-d bool on the device.

        finite: whether all gradients were. hold: where true nothing moves or counts: a latched step says nothing about
        the scale.
        """

    def can_cure(self) -> Tensor:
        """0-d bool: could a later, lower scale still make an overflowing gradient finite?"""
        return torch.zeros((), dtype=torch.bool, device=self.value.device)

    def state_dict(self) -> dict[str, Any]:
        """The exact state as plain numbers, ready for JSON (waits for the device)."""
        return {"kind": self.kind, **{name: buffer.item() for name, buffer in self._buffers().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, exactly, into the same buffers."""
        buffers = self._buffers()
        if state.get("kind") != self.kind:
            raise FewbitsError(
                f"the saved loss scale is {state.get('kind')!r} and this one is {self.kind!r}; "
                "resume with the loss scale of the run."
            )
        if set(state) != {"kind", *buffers}:
            raise FewbitsError(
                f"the saved {self.kind} loss scale has {', '.join(sorted(state))}; "
                f"expected {', '.join(sorted(['kind', *buffers]))}."
            )
        power_of_two("the saved loss scale", state["value"])
        for name, buffer in buffers.items():
            buffer.fill_(state[name])

    def _buffers(self) -> dict[str, Tensor]:
        return {"value": self.value}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"


class NoScale(LossScale):
    """No loss scale: 1, always."""

    kind = "none"

    def __init__(self) -> None:
        self.value = torch.ones(())

    def __str__(self) -> str:
        return "none"


class StaticScale(LossScale):
    """One power of two for the whole training."""

    kind = "static"

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(power_of_two("the static loss scale", value))

    def __str__(self) -> str:
        return write(self.kind, {"value": self.value.item()})


class DynamicScale(LossScale):
    """Backs off when a gradient overflows, grows after `interval` finite steps in a row, between `floor` and `ceiling`.

    `hysteresis` h: the first h - 1 overflows since the last growth only restart the count of finite steps; from the
    h-th on each one backs off (as Megatron-LM and Apex do; 1 backs off at once, as torch.amp.GradScaler does).
    Defaults: Micikevicius et al. 2018 and torch.amp, plus a floor (a scale that sinks below 1 cures nothing) and a
    ceiling. Raises FewbitsError for numbers that do not fit together.
    """

    kind = "dynamic"

    def __init__(
        self,
        initial: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        floor: float = 1.0,
        ceiling: float = 2.0**24,
        hysteresis: int = 1,
    ) -> None:
        powers = {"initial": initial, "growth": growth, "backoff": backoff, "floor": floor, "ceiling": ceiling}
        self.options = options = dynamic({**powers, "interval": interval, "hysteresis": hysteresis})
        self.initial, self.growth, self.backoff = options["initial"], options["growth"], options["backoff"]
        self.floor, self.ceiling = options["floor"], options["ceiling"]
        self.interval, self.hysteresis = int(options["interval"]), int(options["hysteresis"])
        self.value = torch.tensor(self.initial)
        self.good_steps = torch.zeros((), dtype=torch.int64)
        self.hysteresis_left = torch.tensor(self.hysteresis, dtype=torch.int64)

    def update_(self, finite: Tensor, hold: Tensor | None = None) -> None:
        good = torch.where(finite, self.good_steps + 1, 0)
        grow = good >= self.interval
        left = torch.where(finite, self.hysteresis_left, (self.hysteresis_left - 1).clamp_(min=0))
        back_off = ~finite & (left == 0)
        higher, lower = (
            (self.value * self.growth).clamp_(max=self.ceiling),
            (self.value * self.backoff).clamp_(min=self.floor),
        )
        moved = (
            (self.value, torch.where(grow, higher, torch.where(back_off, lower, self.value))),
            (self.good_steps, torch.where(grow, 0, good)),
            (self.hysteresis_left, torch.where(grow, self.hysteresis, left)),
        )
        for buffer, new in moved:
            buffer.copy_(new if hold is None else torch.where(hold, buffer, new))

    def can_cure(self) -> Tensor:
        return self.value > self.floor

    def _buffers(self) -> dict[str, Tensor]:
        return {"value": self.value, "good_steps": self.good_steps, "hysteresis_left": self.hysteresis_left}

    def __str__(self) -> str:
        return write(self.kind, self.options)


def parse(text: str) -> LossScale:
    """A loss scale from its text: "none", "static:1024", "dynamic", "dynamic:initial=65536,interval=2000".

    str() of the loss scale gives the text back.

    >>> parse("dynamic:initial=1024, interval=100")
    DynamicScale(dynamic:initial=1024,interval=100)
    """
    kind, numbers = read(text)
    if kind == "none":
        return NoScale()
    if kind == "static":
        return StaticScale(numbers["value"])
    return DynamicScale(**numbers)  # type: ignore[arg-type]  # interval and hysteresis are whole
