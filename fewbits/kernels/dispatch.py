"""The one place that decides which twin runs, each time with a reason that can be recorded and replayed."""

from __future__ import annotations

import torch

from fewbits.choice import Choice
from fewbits.formats import Format
from fewbits.precision.hardware import describe, native

_choices: dict[tuple[str, str], Choice] = {}


def matmul_execution(format: Format, device: torch.device) -> Choice:
    """Native where the device multiplies `format` itself at a useful speed, else emulated (rounded, fp32 products).

    The first answer for a format and kind of device stands for the life of the process: what runs must not change in
    the middle of a training.
    """
    key = (format.name, device.type)
    if key not in _choices:
        answer = native(format, describe(device))
        _choices[key] = Choice("native" if answer.value else "emulated", answer.reason)
    return _choices[key]


def emulated(format_name: str, device_type: str) -> bool:
    """Whether matmuls of the named format are emulated there. Ask once before compiling: a compiler cannot time anything."""
    key = (format_name, device_type)
    if key not in _choices:
        matmul_execution(Format.parse(format_name), torch.device(device_type))
    return bool(_choices[key].value == "emulated")


def recorded() -> dict[str, list[str]]:
    """Every choice made so far as JSON values, for the state of a run."""
    return {f"{name} on {device}": [choice.value, choice.reason] for (name, device), choice in _choices.items()}


def replay(choices: dict[str, list[str]]) -> None:
    """Takes over choices that `recorded` wrote: a resumed run never times again."""
    for key, (value, reason) in choices.items():
        name, device = key.split(" on ")
        _choices[name, device] = Choice(value, reason)
