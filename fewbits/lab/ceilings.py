"""What a device can do at best, measured: bytes a second of a copy, and FLOP/s of a large matmul by format."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.formats import FORMATS
from fewbits.precision.hardware import Hardware, native, wait
from fewbits.precision.precision import Precision
from fewbits.precision.switches import torch_switches

FORMATS_TIMED = ("fp32", "tf32", "bf16", "fp16", "fp8_e4m3", "int8")
_SIZES = {"cuda": (4096, 8192), "cpu": (1024, 2048)}  # the best of these counts
_SLOW_SIZES = {"cuda": (4096,), "cpu": (1024, 2048)}  # fp32 on CUDA: 8192 would take 20 ms a product and is no faster
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
_ROUNDS, _CALLS = 4, {"cuda": 8, "cpu": 2}


@dataclass(frozen=True)
class Ceilings:
    """Rates that nothing on this device exceeds by much."""

    copy: float
    """Bytes a second of a copy in the device's memory, what is read and what is written counted."""
    matmul: dict[str, float]
    """FLOP/s of a large square matmul by format, the formats that the device multiplies natively."""
    left_out: dict[str, str]
    """Formats that were not timed, with the reason."""

    def better(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements of everything: a busy neighbour can only lower one."""
        rates = {name: max(rate, other.matmul.get(name, 0.0)) for name, rate in self.matmul.items()}
        return Ceilings(max(self.copy, other.copy), rates, self.left_out)

    def matmul_rate(self, format: str) -> float:
        """FLOP/s of a format; e5m2 is e4m3's, and what was not timed is multiplied in fp32."""
        name = "fp8_e4m3" if format == "fp8_e5m2" else format
        return self.matmul.get(name, self.matmul["fp32"])


def measure_ceilings(device: torch.device, hardware: Hardware) -> Ceilings:
    """Times a copy and a matmul of every native format; a few seconds."""
    rates: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name in FORMATS_TIMED:
        answer = native(name, hardware)
        if not answer.value:
            left_out[name] = answer.reason
            continue
        try:
            rates[name] = _matmul_rate(name, device)
        except (RuntimeError, NotImplementedError, AttributeError) as error:  # a build of torch without it
            left_out[name] = f"torch refused it: {str(error).splitlines()[0][:120]}"
    return Ceilings(_copy_rate(device), rates, left_out)


def _copy_rate(device: torch.device) -> float:
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: target.copy_(source), device)


def _matmul_rate(name: str, device: torch.device) -> float:
    slow = name in ("fp32", "fp64")
    sizes = (_SLOW_SIZES if slow else _SIZES)[device.type]
    precision = Precision.parse("tf32" if name == "tf32" else "fp32")
    with torch.no_grad(), torch_switches(precision, device):
        return max(2.0 * size**3 / _best(_product(name, size, device), device) for size in sizes)


def _product(name: str, size: int, device: torch.device) -> Callable[[], Tensor]:
    """A product of two square matrices of a format, the right one transposed as weights are."""
    dtype = torch.float32 if name == "tf32" else FORMATS[name].dtype
    if dtype is None:
        raise NotImplementedError(f"{name} has no dtype in torch")
    # not all alike: constant operands draw less power, and a GPU clocks higher on them than it does in a training
    values = torch.randn(size, size, device=device)
    if name == "int8":
        left = (values * 40).clamp(-127, 127).to(dtype)
        return lambda: torch._int_mm(left, left.t())
    left = values.to(dtype)
    if name.startswith("fp8"):
        one = torch.ones((), device=device)
        scaled: Any = torch._scaled_mm
        return lambda: scaled(left, left.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return lambda: left @ left.t()


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the best of a few rounds of calls, after a round of warm-up."""
    calls, best = _CALLS[device.type], float("inf")
    for number in range(_ROUNDS + 1):
        wait(device)
        began = time.perf_counter()
        for _ in range(calls):
            work()
        wait(device)
        if number:
            best = min(best, (time.perf_counter() - began) / calls)
    return best
