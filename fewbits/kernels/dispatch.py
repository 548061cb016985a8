"""The one place that decides which twin runs, each time with a reason that can be recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fewbits.choice import Choice
from fewbits.formats import Format
from fewbits.kernels import quantize as twin
from fewbits.numerics import quantize as definition
from fewbits.numerics.quantize import Key, Quantized
from fewbits.numerics.scaling import Granularity
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


def quantize_execution(device: torch.device) -> Choice:
    """What quantizes in eager code on a device: the Triton "kernel" or the "definition", which give the same codes.

    In compiled code it is always the definition: the compiler fuses it with what comes before.
    """
    key = ("quantize", device.type)
    if key not in _choices:
        if device.type != "cuda":
            _choices[key] = Choice("definition", f"the kernel is for CUDA; this is {device.type}")
        elif not twin.installed():
            _choices[key] = Choice("definition", "triton is not installed")
        else:
            _choices[key] = Choice(
                "kernel", "one reading of the matrix in eager code, where the definition takes a dozen"
            )
    return _choices[key]


def quantize(x: Tensor, format: Format, granularity: Granularity, rounding: str, seed: Key, scales: str) -> Quantized:
    """`quantize` of a matrix by the twin that runs where it lies; codes and scales do not depend on which."""
    traced = type(x) not in (Tensor, torch.nn.Parameter)  # what a compiler traces with is a class of its own
    if traced or torch.compiler.is_compiling() or quantize_execution(x.device).value == "definition":
        return definition.quantize(x, format, granularity, rounding, seed, scales)
    if twin.why_not(x, format, rounding):
        return definition.quantize(x, format, granularity, rounding, seed, scales)
    return twin.quantize(x, format, granularity, rounding, seed, scales)


def probed(name: str, device: torch.device, probe: Callable[[], str]) -> Choice:
    """Native where `probe()` returns "", else emulated with what it returns as the reason; asked once a process.

    It runs outside of whatever is traced or counted: a compiler that asks gets the answer of the device.
    """
    key = (name, device.type)
    if key not in _choices:
        with torch.no_grad(), _disable_current_modes():
            reason = probe()
        _choices[key] = Choice(
            "emulated" if reason else "native", reason or f"{name} gave the right product when tried"
        )
    return _choices[key]


def recorded() -> dict[str, list[str]]:
    """Every choice made so far as JSON values, for the state of a run."""
    return {f"{name} on {device}": [choice.value, choice.reason] for (name, device), choice in _choices.items()}


def replay(choices: dict[str, list[str]]) -> None:
    """Takes over choices that `recorded` wrote: a resumed run never times again."""
    for key, (value, reason) in choices.items():
        name, device = key.split(" on ")
        _choices[name, device] = Choice(value, reason)
