"""The one place that decides which twin runs, each time with a reason that can be recorded and replayed."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fewbits.choice import Choice
from fewbits.formats import Format
from fewbits.kernels import cpp, fused_cpu
from fewbits.kernels import quantize as cuda_twin
from fewbits.kernels import quantize_cpu as cpu_twin
from fewbits.kernels.int8_matmul import int8_matmul
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
    """What quantizes in eager code on a device: the "kernel" (Triton on CUDA, C++ on a CPU) or the "definition", which
    give the same codes.

    In compiled code it is always the definition: the compiler fuses it with what comes before.
    """
    key = ("quantize", device.type)
    if key not in _choices:
        one_reading = "one reading of the matrix in eager code, where the definition takes a dozen"
        if device.type == "cpu":
            value, reason = cpu_twin.library()
            _choices[key] = Choice("definition", reason) if value is None else Choice("kernel", one_reading)
        elif device.type != "cuda":
            _choices[key] = Choice("definition", f"the kernels are for CUDA and CPUs; this is {device.type}")
        elif not cuda_twin.installed():
            _choices[key] = Choice("definition", "triton is not installed")
        else:
            _choices[key] = Choice("kernel", one_reading)
    return _choices[key]


def quantize(x: Tensor, format: Format, granularity: Granularity, rounding: str, seed: Key, scales: str) -> Quantized:
    """`quantize` of a matrix by the twin that runs where it lies; codes and scales do not depend on which."""
    if _by_definition(x) or scales == "full-range":
        return definition.quantize(x, format, granularity, rounding, seed, scales)
    if x.device.type == "cpu" and not cpu_twin.why_not(x, format, rounding):
        return cpu_twin.quantize(x, format, granularity, rounding, seed, scales)
    if x.device.type == "cuda" and not cuda_twin.why_not(x, format, rounding):
        return cuda_twin.quantize(x, format, granularity, rounding, seed, scales)
    return definition.quantize(x, format, granularity, rounding, seed, scales)


def dequantize(q: Quantized, dtype: torch.dtype) -> Tensor:
    """`q.dequantize(dtype)` by the twin that runs where its codes lie; the values do not depend on which."""
    known = q.codes.dtype.itemsize == 1 and q.codes.ndim == 2 and q.codes.numel() > 0 and dtype != torch.float64
    if known and by_cpu_kernel(q.codes):
        return cpu_twin.decode(q.codes, q.scale, q.granularity, dtype)
    return q.dequantize(dtype)


def by_cpu_kernel(x: Tensor) -> bool:
    """Whether eager code works on `x` by the C++ of quantize_cpu (a choice that was replayed needs its library, too)."""
    return x.device.type == "cpu" and not _by_definition(x) and cpu_twin.library().value is not None


def fused_execution(device: torch.device) -> Choice:
    """What does the work between the matmuls of a training step (norms, GELU, softmax) in eager code on a device: the
    C++ "kernel" on a CPU, or the "definition"; they agree up to the order of sums."""
    key = ("work between matmuls", device.type)
    if key not in _choices:
        if device.type != "cpu":
            _choices[key] = Choice("definition", f"the kernels are for CPUs; this is {device.type}")
        elif (found := fused_cpu.library()).value is None:
            _choices[key] = Choice("definition", found.reason)
        else:
            _choices[key] = Choice("kernel", "one reading of each tensor, where torch's operations take several")
    return _choices[key]


def fused(x: Tensor) -> ModuleType | None:
    """The module of fused twins (kernels/fused_cpu.py) where they work on `x` now, else None: the definitions do."""
    fits = x.device.type == "cpu" and x.dtype in cpp.FORMATS and type(x) in (Tensor, torch.nn.Parameter) and x.numel()
    if not fits or torch.compiler.is_compiling() or fused_execution(x.device).value == "definition":
        return None
    return fused_cpu if fused_cpu.library().value is not None else None


def _by_definition(x: Tensor) -> bool:
    traced = type(x) not in (Tensor, torch.nn.Parameter)  # what a compiler traces with is a class of its own
    return traced or torch.compiler.is_compiling() or quantize_execution(x.device).value == "definition"


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


def int8_execution(device: torch.device, dtype: torch.dtype) -> Choice:
    """How int8 operands are multiplied: "integers" (int8 products, int32 sums) or "widened" (in `dtype`).

    Whichever is faster in a matmul of 256 x 1,024 x 1,024 timed once, each several times in turn; at least 5 % must be
    won by widening, because integers are exact.
    """
    key = (f"int8 against {Format.parse(dtype)}", device.type)
    if key not in _choices:
        a, b = (torch.ones(rows, 1024, dtype=torch.int8, device=device) for rows in (256, 1024))
        times: dict[str, list[float]] = {"integers": [], "widened": []}
        with torch.no_grad(), _disable_current_modes():
            for _ in range(7):
                times["integers"].append(_seconds(lambda: int8_matmul(a, b), device))
                times["widened"].append(_seconds(lambda: a.to(dtype) @ b.to(dtype).t(), device))
        integers, widened = (1e3 * sorted(found)[len(found) // 2] for found in times.values())
        shown = (
            f"256 x 1,024 x 1,024 takes {integers:.2f} ms in int8 and {widened:.2f} ms in {Format.parse(dtype)} here"
        )
        _choices[key] = Choice("widened" if widened < 0.95 * integers else "integers", shown)
    return _choices[key]


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def recorded() -> dict[str, list[str]]:
    """Every choice made so far as JSON values, for the state of a run."""
    return {f"{name} on {device}": [choice.value, choice.reason] for (name, device), choice in _choices.items()}


def replay(choices: dict[str, list[str]]) -> None:
    """Takes over choices that `recorded` wrote: a resumed run never times again."""
    for key, (value, reason) in choices.items():
        name, device = key.split(" on ")
        _choices[name, device] = Choice(value, reason)
