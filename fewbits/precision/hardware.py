"""What a device multiplies natively, and why not. Every answer is a function of a `Hardware` value, so tests fake them.

A flag is not enough on a CPU: torch accepts bf16 and fp16 matmuls everywhere, and where the instruction set does not
multiply them they run 20 to 1,000 times slower than fp32. So flags are read first, and then a matmul is timed.
"""

from __future__ import annotations

import math
import os
import platform
import re
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.formats import FORMATS, Format
from fewbits.numerics.scaling import Granularity

if TYPE_CHECKING:
    from fewbits.precision.precision import Precision
    from fewbits.precision.recipe import Matmul

WORTH = 1.2
"""A 16-bit format is native on a CPU when its matmul runs at least this many times as fast as fp32. At 1.0 the casts
around the matmul would already make the step slower than fp32."""

# format -> (capability from which its tensor-core matmul exists, name of that generation)
_CUDA_SINCE = {
    "fp64": ((0, 0), "any CUDA device"),
    "fp32": ((0, 0), "any CUDA device"),
    "fp16": ((7, 0), "Volta"),
    "int8": ((7, 5), "Turing"),
    "bf16": ((8, 0), "Ampere"),
    "tf32": ((8, 0), "Ampere"),
    "fp8_e4m3": ((8, 9), "Ada"),
    "fp8_e5m2": ((8, 9), "Ada"),
    "e8m0": ((10, 0), "Blackwell"),
    "fp4_e2m1": ((10, 0), "Blackwell"),
}
# format -> CPU features any of which multiplies it
_CPU_FEATURES = {
    "bf16": ("avx512_bf16", "amx_bf16", "arm_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "arm_fp16"),
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8"),
}
_CPU_WORDS = {"bf16": "avx512_bf16 or AMX", "fp16": "avx512_fp16 or AMX", "int8": "VNNI or AMX"}
# ONEDNN_MAX_CPU_ISA values in ascending order -> what each adds to the features oneDNN may use
_ONEDNN_ISA = {
    "SSE41": (),
    "AVX": (),
    "AVX2": (),
    "AVX2_VNNI": ("avx_vnni",),
    "AVX2_VNNI_2": (),
    "AVX512_CORE": (),
    "AVX512_CORE_VNNI": ("avx512_vnni",),
    "AVX512_CORE_BF16": ("avx512_bf16",),
    "AVX512_CORE_FP16": ("avx512_fp16",),
    "AVX512_CORE_AMX": ("amx_bf16", "amx_int8"),
    "AVX512_CORE_AMX_FP16": ("amx_fp16",),
}
_SAME_ISA = {"AVX10_1_512": "AVX512_CORE_FP16", "AVX10_1_512_AMX": "AVX512_CORE_AMX"}


def _peaks(
    fp16: float, fp32: float, tf32: float = 0, int8: float = 0, fp8: float = 0, fp4: float = 0, fp64: float = 0
) -> dict[str, float]:
    given = {"fp16": fp16, "fp32": fp32, "tf32": tf32, "int8": int8, "fp8": fp8, "fp4": fp4, "fp64": fp64}
    return {name: peak for name, peak in given.items() if peak}


PEAKS = (
    (r"\bGB200\b", _peaks(2500, 80, 1250, 5000, 5000, 10000, 40)),
    (r"\bB200\b", _peaks(2250, 75, 1125, 4500, 4500, 9000, 37)),
    (r"\bB100\b", _peaks(1750, 60, 875, 3500, 3500, 7000, 30)),
    (r"\bH200 NVL\b", _peaks(835.5, 60, 417.5, 1671, 1671, fp64=60)),
    (r"\bH100 NVL\b", _peaks(835.5, 60, 417.5, 1671, 1671, fp64=60)),
    (r"\bH100 PCIe\b", _peaks(756, 51.2, 378, 1513, 1513, fp64=51.2)),
    (r"\b(H100|H200|GH200)\b", _peaks(989.4, 66.9, 494.7, 1978.9, 1978.9, fp64=66.9)),
    (r"\bA(100|800)\b", _peaks(312, 19.5, 156, 624, fp64=19.5)),
    (r"\bA30\b", _peaks(165, 10.3, 82, 330, fp64=10.3)),
    (r"\bA40\b", _peaks(149.7, 37.4, 74.8, 299.3)),
    (r"\bRTX A6000\b", _peaks(154.8, 38.7, 77.4, 309.7)),
    (r"\bA10G\b", _peaks(70, 35, 35, 140)),
    (r"\bA10\b", _peaks(125, 31.2, 62.5, 250)),
    (r"\bL40S\b", _peaks(362, 91.6, 183, 733, 733)),
    (r"\bL40\b", _peaks(181, 90.5, 90.5, 362, 362)),
    (r"\bL4\b", _peaks(121, 30.3, 60, 242, 242)),
    (r"\bRTX 5090$", _peaks(209.5, 104.8, 104.8, 838, 419, 1676)),
    (r"\bRTX 4090$", _peaks(165.2, 82.6, 82.6, 660.6, 330.3)),
    (r"\bRTX 3090$", _peaks(71, 35.6, 35.6, 284)),
    (r"\bT4$", _peaks(65, 8.1, int8=130)),
    (r"\bV100S", _peaks(130, 16.4, fp64=8.2)),
    (r"\bV100-(PCIE|FHHL)", _peaks(112, 14, fp64=7)),
    (r"\bV100", _peaks(125, 15.7, fp64=7.8)),
)
"""(what the name of a GPU contains, peak dense TFLOP/s by format; "fp16" is bf16's too). The first that fits counts."""


@dataclass(frozen=True)
class Hardware:
    """A device as far as precision is concerned.

    kind: "cuda", "cpu", "mps", "rocm" or "xpu".
    name: what the driver or the operating system calls it.
    capability: CUDA compute capability, (9, 0) for sm_90; None elsewhere.
    cpu_features: of _CPU_FEATURES, those the processor has and torch may use.
    onednn_max_isa: ONEDNN_MAX_CPU_ISA when it takes features away, else "".
    measured: (format name, GFLOP/s) of a matmul timed on one thread of this CPU, "fp32" among them.
    """

    kind: str
    name: str
    capability: tuple[int, int] | None = None
    cpu_features: frozenset[str] = frozenset()
    onednn_max_isa: str = ""
    measured: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]})" if self.capability else self.name

    def gflops(self, name: str) -> float | None:
        """Measured GFLOP/s of the named format, or None."""
        return dict(self.measured).get(name)


def describe(device: torch.device | str) -> Hardware:
    """The hardware of a torch device. A CPU is timed once per process: about a fifth of a second.

    Raises FewbitsError for a device that this machine lacks.
    """
    try:
        device = torch.device(device)
    except RuntimeError:
        raise FewbitsError(f"There is no device '{device}'; use cpu, cuda or cuda:0.") from None
    if device.type == "cpu":
        return _describe_cpu(os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise FewbitsError(
                "Device 'cuda' is not there: torch sees no GPU. Use cpu, or install a driver and a CUDA torch."
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise FewbitsError(f"Device '{device}' is not there: this machine has {torch.cuda.device_count()} GPUs.")
        name = torch.cuda.get_device_name(index)
        if torch.version.hip:
            return Hardware("rocm", name)
        return Hardware("cuda", name, torch.cuda.get_device_capability(index))
    return Hardware(device.type, device.type.upper())


def native(format: Format | str, hardware: Hardware) -> Choice:
    """Whether this hardware multiplies a format natively and usefully: Choice(bool, reason)."""
    name = Format.parse(format).name
    if hardware.kind == "cuda":
        return _native_cuda(name, hardware)
    if hardware.kind == "cpu":
        return _native_cpu(name, hardware)
    return Choice(False, _unsupported(hardware))


def native_matmul(matmul: Matmul, hardware: Hardware) -> Choice:
    """Whether this hardware multiplies the two operands of a recipe's matmul as they are: Choice(bool, reason). What it
    does not is multiplied on the exact values of its codes, in bf16 or fp32: right numbers, without the speed."""
    left, right = matmul.left, matmul.right
    if matmul.accumulator not in ("fp32", "fast"):
        return Choice(
            False, f"no hardware sums as {matmul.accumulator} does; it is modelled, at a small part of the speed"
        )
    names = {left.format.name, right.format.name}
    fp8 = names <= {"fp8_e4m3", "fp8_e5m2"}
    if not fp8 and names != {"int8"}:
        shown = " by ".join(sorted(names))
        return Choice(False, f"nothing here multiplies {shown}; the values of its codes are exact in bf16")
    answer = native(left.format, hardware)
    if not answer.value:
        return Choice(False, f"{answer.reason}; the values of its codes are exact in bf16" if fp8 else answer.reason)
    pair = (left.granularity, right.granularity)
    if pair not in native_granularities(matmul, hardware):
        return Choice(
            False, f"no instruction of {hardware} takes scales of {pair[0]} x {pair[1]}; the values are exact in bf16"
        )
    return answer


def native_granularities(matmul: Matmul, hardware: Hardware) -> set[tuple[Granularity, Granularity]]:
    """The pairs of granularities, left and right, that the instruction for a matmul's formats takes."""
    tensor, row, group = Granularity(), Granularity(1, 0), Granularity(1, 128)
    if matmul.left.format.name == "int8":  # sums are int32: the scales of rows and columns come afterwards
        return {(a, b) for a in (tensor, row) for b in (tensor, row)}
    if matmul.left.format.name == matmul.right.format.name == "fp8_e5m2":
        return set()  # cuBLAS has no product of two e5m2
    found = {(tensor, tensor)}
    if matmul.left.format.name == matmul.right.format.name == "fp8_e4m3":
        found.add((row, row))
        if hardware.capability is not None and hardware.capability[0] == 9:  # cuBLAS has these for Hopper alone
            found |= {(group, Granularity(128, 128)), (group, group)}
    return found


def check(precision: Precision, hardware: Hardware) -> None:
    """Raises FewbitsError, naming what would work, when this hardware cannot run a precision. A CPU runs them all."""
    if hardware.kind not in ("cpu", "cuda"):
        raise FewbitsError(_unsupported(hardware))
    if hardware.kind == "cpu":
        return
    answer = native(precision.operand, hardware)
    if not answer.value:
        fits = "fp16-mixed" if native("fp16", hardware).value and precision.operand.bits == 16 else "fp32"
        raise FewbitsError(
            f"{precision.name} does not run on {hardware}: {answer.reason}. Use {fits}, or --device cpu."
        )


def peak_flops(hardware: Hardware, format: Format | str) -> float | None:
    """Peak dense matmul rate in FLOP/s of a known GPU for operands of a format, with fp32 accumulation; else None.

    From NVIDIA's data sheets, without sparsity, at the boost clock of the full card: None for a laptop GPU, a MIG slice
    and every CPU, whose peaks their names do not tell.
    """
    if hardware.kind != "cuda" or re.search(r"laptop|max-q|\bMIG\b", hardware.name, re.IGNORECASE):
        return None
    name = Format.parse(format).name
    column = {"bf16": "fp16", "fp8_e5m2": "fp8", "fp8_e4m3": "fp8", "fp4_e2m1": "fp4"}.get(name, name)
    for pattern, peaks in PEAKS:
        if re.search(pattern, hardware.name):
            answer = peaks.get(column) if native(name, hardware).value else None
            return None if answer is None else answer * 1e12
    return None


def _unsupported(hardware: Hardware) -> str:
    names = {"mps": "Apple GPUs (MPS)", "rocm": "AMD GPUs (ROCm)", "xpu": "Intel GPUs (XPU)"}
    what = names.get(hardware.kind, f"'{hardware.kind}' devices")
    return f"{what} are not supported: nothing here was ever measured on one; use --device cpu or a CUDA GPU"


def _native_cuda(name: str, hardware: Hardware) -> Choice:
    capability = hardware.capability or (0, 0)
    sm = f"sm_{capability[0]}{capability[1]}"
    if name not in _CUDA_SINCE:
        return Choice(False, f"torch has no {name} matmul on CUDA")
    since, generation = _CUDA_SINCE[name]
    if capability < since:
        return Choice(False, f"{sm} has no {name} tensor cores; they came with {generation} (sm_{since[0]}{since[1]})")
    return Choice(True, f"{sm} multiplies {name} natively")


def _native_cpu(name: str, hardware: Hardware) -> Choice:
    if name in ("fp32", "fp64"):
        return Choice(True, f"every CPU multiplies {name}")
    if name not in _CPU_FEATURES:
        return Choice(False, f"no CPU multiplies {name}")
    features = _CPU_FEATURES[name]
    have = [feature for feature in features if feature in hardware.cpu_features]
    figures = _figures(name, hardware)
    if not have:
        wanted = f"instructions that multiply {name} ({_CPU_WORDS[name]})"
        why = f"this CPU has no {wanted}"
        if hardware.onednn_max_isa:
            why = f"ONEDNN_MAX_CPU_ISA={hardware.onednn_max_isa} leaves no {wanted}"
        return Choice(False, f"{why}{figures}")
    fp32, this = hardware.gflops("fp32"), hardware.gflops(name)
    if name == "int8" or fp32 is None or this is None:  # int8 matmuls have their own timing where they are used
        return Choice(name != "fp16", f"this CPU has {have[0]}" + (", not timed" if name != "int8" else ""))
    if this < WORTH * fp32:
        return Choice(False, f"this CPU has {have[0]}, but it does not pay{figures}")
    return Choice(True, f"this CPU has {have[0]}{figures}")


def _figures(name: str, hardware: Hardware) -> str:
    fp32, this = hardware.gflops("fp32"), hardware.gflops(name)
    if fp32 is None or this is None:
        return ""
    ratio = f"{this / fp32:.1f} times as fast as" if this >= fp32 else f"{fp32 / this:.0f} times slower than"
    if fp32 / 1.5 < this < fp32:
        ratio = f"{this / fp32:.2f} times as fast as"
    return f"; timed: {name} {this:.3g} GFLOP/s, {ratio} fp32 at {fp32:.3g} on one thread"


@cache
def _describe_cpu(max_isa: str) -> Hardware:
    present = cpu_features()
    allowed = _allowed(present, max_isa)
    limit = max_isa.upper() if allowed != present else ""
    return Hardware("cpu", cpu_name(), None, allowed, limit, time_cpu(("bf16", "fp16")))


def _allowed(features: frozenset[str], max_isa: str) -> frozenset[str]:
    """The features that oneDNN may use under ONEDNN_MAX_CPU_ISA; unknown values and DEFAULT take nothing away."""
    isa = _SAME_ISA.get(max_isa.upper(), max_isa.upper())
    if isa not in _ONEDNN_ISA:
        return features
    order = list(_ONEDNN_ISA)
    taken = {feature for name in order[order.index(isa) + 1 :] for feature in _ONEDNN_ISA[name]}
    return features - taken


def cpu_features() -> frozenset[str]:
    """Of the features that multiply few bits, those that torch reports for this processor."""
    wanted = {feature for features in _CPU_FEATURES.values() for feature in features}
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        found = {key for key, value in capabilities().items() if value is True}
        arm = platform.machine().lower() in ("aarch64", "arm64")
        found |= {f"arm_{key}" for key in ("bf16", "fp16") if arm and key in found}
        return frozenset(found & wanted)
    probes = {
        "avx512_bf16": "_is_avx512_bf16_supported",
        "avx512_vnni": "_is_vnni_supported",
        "amx_bf16": "_is_amx_tile_supported",
        "amx_int8": "_is_amx_tile_supported",
        "amx_fp16": "_is_amx_fp16_supported",
    }
    return frozenset(name for name, probe in probes.items() if getattr(torch.cpu, probe, lambda: False)())


def cpu_name() -> str:
    """What the operating system calls the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine() or "CPU"


@cache
def time_cpu(names: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    """(format name, GFLOP/s of one thread) for "fp32" and the named 16-bit formats, once per process.

    One thread, because threads that wait for each other on a shared machine measure the waiting: on 16 cores of a
    container bf16 with avx512_bf16 and fp32 both came out at 34 GFLOP/s. A small matmul first, so that a format 1,000
    times slower than fp32 costs milliseconds; what keeps up is timed again at a size where the arithmetic dominates.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # whatever the caller is inside of (autocast, emulation, a default device) must not change what is timed
        with torch.no_grad(), torch.autocast("cpu", enabled=False), _disable_current_modes():
            rates = _rates(("fp32", *names), size=128, rounds=3)
            close = tuple(name for name in names if rates[name] > rates["fp32"] / 3)
            if close:
                rates |= _rates(("fp32", *close), size=512, rounds=9)
    finally:
        torch.set_num_threads(threads)
    return tuple(rates.items())


def wait(device: torch.device) -> None:
    """Until `device` has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rates(names: tuple[str, ...], size: int, rounds: int) -> dict[str, float]:
    """GFLOP/s by format: the best round of each, the formats taking turns, so that a busy neighbour favours none."""
    operands = {name: torch.full((size, size), 0.5, dtype=FORMATS[name].dtype, device="cpu") for name in names}
    best = dict.fromkeys(names, math.inf)
    for turn in range(rounds + 1):
        for name, x in operands.items():
            start = time.perf_counter()
            torch.mm(x, x)
            if turn:  # the first turn makes the kernels
                best[name] = min(best[name], time.perf_counter() - start)
    return {name: 2e-9 * size**3 / taken for name, taken in best.items()}
