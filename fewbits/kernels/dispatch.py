"""The one place that decides which twin runs, each time with a reason that can be recorded and replayed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import reduce
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fewbits.choice import Choice
from fewbits.formats import Format
from fewbits.kernels import attention_cpu, cpp, fused_cpu, int8_matmul_cpu, layouts
from fewbits.kernels import quantize as cuda_twin
from fewbits.kernels import quantize_cpu as cpu_twin
from fewbits.kernels import update as update_twin
from fewbits.kernels import update_cpu as update_cpu_twin
from fewbits.kernels.int8_matmul import int8_matmul
from fewbits.numerics import quantize as definition
from fewbits.numerics.quantize import Both, Key, Quantized
from fewbits.numerics.scaling import Granularity, block_amax, scale_of
from fewbits.precision.hardware import describe, native, wait
from fewbits.ranges import QUANTIZE, span

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

    In compiled code it is the definition, which the compiler fuses with what comes before, but for `layouts_execution`.
    """
    key = ("quantize", device.type)
    if key not in _choices:
        if device.type == "cpu":
            why_not = cpu_twin.library().reason if cpu_twin.library().value is None else ""
        elif device.type == "cuda":
            why_not = _no_triton(device)
        else:
            why_not = f"the kernels are for CUDA and CPUs; this is {device.type}"
        one_reading = "one reading of the matrix in eager code, where the definition takes a dozen"
        _choices[key] = _kernel(why_not, one_reading)
    return _choices[key]


def _kernel(why_not: str, why: str) -> Choice:
    return Choice("definition", why_not) if why_not else Choice("kernel", why)


def _no_triton(device: torch.device) -> str:
    """What keeps kernels in Triton from `device`, or ""."""
    if device.type != "cuda":
        return f"the kernel is for CUDA; this is {device.type}"
    return "" if cuda_twin.installed() else "triton is not installed"


def loss_execution(device: torch.device) -> Choice:
    """What makes losses and gradients of logits on a device: the Triton "kernel" or the "definition" (compiled where the
    model is), which agree up to the order of sums."""
    key = ("loss", device.type)
    if key not in _choices:
        _choices[key] = _kernel(_no_triton(device), "two readings of the logits, and the gradient written over them")
    return _choices[key]


def logits_format(asked: str, weight: torch.dtype, device: torch.device) -> Choice:
    """The format of the logits that gradients are made from: what a precision asks for, "auto" where it leaves it open."""
    if asked != "auto":
        return Choice(asked, "asked for")
    working = Format.parse(weight)
    key = (f"logits of {working}", device.type)
    if key not in _choices:
        if device.type == "cuda" and working.bits == 16:
            reason = "half the bytes of fp32, 11 significant bits: a logit of 8 to 16 is off by 2^-8 at most"
            _choices[key] = Choice("fp16", reason)
        else:
            wide = "fp64" if working.name == "fp64" else "fp32"
            _choices[key] = Choice(wide, "as their sums are; 16 bits pay on CUDA with 16-bit weights")
    return _choices[key]


def quantize(x: Tensor, format: Format, granularity: Granularity, rounding: str, seed: Key, scales: str) -> Quantized:
    """`quantize` of a matrix by the twin that runs where it lies; codes and scales do not depend on which."""
    if _traced(x):
        return definition.quantize(x, format, granularity, rounding, seed, scales)
    twin = _twin(x, format, rounding, scales)
    quantize = definition.quantize if twin is None else twin.quantize
    with span(QUANTIZE):
        return quantize(x, format, granularity, rounding, seed, scales)


def dequantize(q: Quantized, dtype: torch.dtype) -> Tensor:
    """`q.dequantize(dtype)` by the twin that runs where its codes lie; the values do not depend on which."""
    known = q.codes.dtype.itemsize == 1 and q.codes.ndim == 2 and q.codes.numel() > 0 and dtype != torch.float64
    if known and by_cpu_kernel(q.codes):
        with span(QUANTIZE):
            return cpu_twin.decode(q.codes, q.scale, q.granularity, dtype)
    return q.dequantize(dtype)


def by_cpu_kernel(x: Tensor) -> bool:
    """Whether eager code works on `x` by the C++ of quantize_cpu (a choice that was replayed needs its library, too)."""
    return x.device.type == "cpu" and not _by_definition(x) and cpu_twin.library().value is not None


def _twin(x: Tensor, format: Format, rounding: str, scales: str) -> ModuleType | None:
    """The module that quantizes `x` in eager code; None where the definition does."""
    if _by_definition(x) or scales == "full-range":
        return None
    twin = {"cpu": cpu_twin, "cuda": cuda_twin}.get(x.device.type)
    return None if twin is None or twin.why_not(x, format, rounding) else twin


def fused_execution(device: torch.device) -> Choice:
    """What does the work between the matmuls of a training step (norms, GELU, softmax) in eager code on a device: the
    C++ "kernel" on a CPU, or the "definition"; they agree up to the order of sums."""
    key = ("work between matmuls", device.type)
    if key not in _choices:
        if device.type != "cpu":
            why_not = f"the kernels are for CPUs; this is {device.type}"
        else:
            why_not = fused_cpu.library().reason if fused_cpu.library().value is None else ""
        _choices[key] = _kernel(why_not, "one reading of each tensor, where torch's operations take several")
    return _choices[key]


def fused(x: Tensor) -> ModuleType | None:
    """The module of fused twins (kernels/fused_cpu.py) where they work on `x` now, else None: the definitions do."""
    fits = x.device.type == "cpu" and x.dtype in cpp.FORMATS and type(x) in (Tensor, torch.nn.Parameter) and x.numel()
    if not fits or torch.compiler.is_compiling() or fused_execution(x.device).value == "definition":
        return None
    return fused_cpu if fused_cpu.library().value is not None else None


LONGEST = 1024
"""Tokens up to which attention is the kernel's: of 2,048 a head no longer fits the second cache level, as fast as torch's
kernel and slower beyond."""


def attention_execution(device: torch.device, dtype: torch.dtype) -> Choice:
    """What makes attention over contexts up to `LONGEST` in eager code: the C++ "kernel" on a CPU, or torch's "operators".
    They agree up to the order of sums and the rounding of probabilities to 16 bits, which the kernel does without."""
    key = (f"attention in {Format.parse(dtype)}", device.type)
    if key not in _choices:
        found = fused_execution(device)
        why_not = "" if found.value == "kernel" else found.reason
        if not why_not and attention_cpu.library().value is None:
            why_not = attention_cpu.library().reason
        elif not why_not and not cpp.spreads():
            why_not = "torch has no OpenMP runtime here that would spread it over threads"
        elif not why_not and dtype == torch.bfloat16 and "amx_bf16" in describe(device).cpu_features:
            why_not = "AMX multiplies bf16 many times as fast as the kernel fp32; not timed beside it"
        one_head = "a head at a time, from memory that stays in a cache, in fp32"
        _choices[key] = Choice("operators", why_not) if why_not else Choice("kernel", one_head)
    return _choices[key]


def attention_by_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> ModuleType | None:
    """The module whose `attention` takes q [B, H, T, d], k and v [B, G, T, d] and a mask bool [B or 1, 1, T, T] now, else None:
    also below 64 tokens in 16 bits and 128 in fp32, of which torch's operators make less work than a launch takes."""
    B, _, T, _ = q.shape
    if fused(q) is None or not (64 if q.dtype.itemsize == 2 else 128) <= T <= LONGEST:
        return None
    alike = k.shape == v.shape and k.shape[0] == B and k.shape[2:] == q.shape[2:]
    alike = alike and all(type(x) is type(q) and x.dtype == q.dtype and x.device == q.device for x in (k, v))
    masked = mask is None or (mask.dtype == torch.bool and mask.shape in ((B, 1, T, T), (1, 1, T, T)))
    if not alike or not masked or torch._C._are_functorch_transforms_active():
        return None
    return attention_cpu if attention_execution(q.device, q.dtype).value == "kernel" else None


def _by_definition(x: Tensor) -> bool:
    return _traced(x) or quantize_execution(x.device).value == "definition"


def layouts_execution(device: torch.device) -> Choice:
    """What makes both layouts of fp8 codes with one scale a tensor in compiled code, and the codes of all weights of a
    step: the Triton "kernel" or the "definition", which give the same codes."""
    key = ("both layouts of fp8 codes", device.type)
    if key not in _choices:
        why_not = _no_triton(device)
        if not why_not and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9)):
            why_not = "this GPU has no instruction for fp8 codes that is used here; NVIDIA's of sm_89 and newer have"
        _choices[key] = _kernel(why_not, "one reading writes both layouts; a compiler transposes codes in a pass more")
    return _choices[key]


def quantize_both(
    parts: Sequence[Tensor], format: Format, granularity: Granularity, rounding: str, seed: Key, scales: str,
    sums: bool = False, amax: Tensor | None = None,
) -> Both:  # fmt: skip
    """`quantize` of a matrix and of its transpose in the same codes: each row by row where a kernel makes them, else views of
    one another. parts: matrices side by side, more than one where `in_layouts` says so. sums: the sums of the columns too,
    where they come with the reading. amax: the largest magnitude, fp32 [1, 1], of one who knows it, where the granularity is
    that of the tensor."""
    x = parts[0]
    if len(parts) > 1 or _traced(x) or amax is not None:
        if in_layouts(parts, format, granularity, rounding, scales):
            scale = scale_of(largest(parts, granularity) if amax is None else amax, format, scales)
            return encode_noting(parts, scale, format, granularity, scales, sums)
    elif (twin := _twin(x, format, rounding, scales)) is not None:
        with span(QUANTIZE):
            return Both(*twin.quantize_both(x, format, granularity, rounding, seed, scales))
    (x,) = parts
    return Both.of(quantize(x, format, granularity, rounding, seed, scales))


def encode_both(
    parts: Sequence[Tensor], scale: Tensor, format: Format, granularity: Granularity, rounding: str, seed: Key,
    scales: str, sums: bool = False,
) -> Both:  # fmt: skip
    """`quantize_both` under a given scale."""
    if in_layouts(parts, format, granularity, rounding, scales):
        return encode_noting(parts, scale, format, granularity, scales, sums)
    (x,) = parts
    codes = definition.encode(x, scale, format, granularity, rounding, seed, scales)
    return Both.of(Quantized(codes, scale, format, granularity, scales))


def encode_noting(
    parts: Sequence[Tensor], scale: Tensor, format: Format, granularity: Granularity, scales: str, sums: bool,
    maximum: Tensor | None = None,
) -> Both:  # fmt: skip
    """`encode_both` of what `in_layouts` allows, with `maximum`, if there is one, raised to the largest magnitude by the same
    reading; what is not finite has the code NaN."""
    codes, codes_t, found = layouts.encode_both(parts, scale, format, sums, maximum)
    return Both.of(Quantized(codes, scale, format, granularity, scales), codes_t, found)


def turn_into(codes_t: Tensor, codes: Tensor) -> None:
    """Writes the transpose of a matrix of fp8 codes into a matrix of rows that may lie further apart."""
    if layouts_execution(codes.device).value == "kernel":
        layouts.turn_into(codes_t, codes)
    else:
        codes_t.view(torch.uint8).copy_(codes.view(torch.uint8).t())


def largest(parts: Sequence[Tensor], granularity: Granularity) -> Tensor:
    """`block_amax` of a matrix, or of matrices side by side, more than one where the granularity is that of the tensor."""
    if parts[0].is_cuda and not _by_definition(parts[0]):
        return reduce(torch.maximum, (cuda_twin.block_amax(part, granularity) for part in parts))
    if len(parts) == 1:
        return block_amax(parts[0], granularity)
    # row by row over all of them, so that a compiler has one kernel for parts of one width, and one number to find at the end
    return reduce(torch.maximum, (part.abs().amax(1) for part in parts)).amax().float().view(1, 1)


def in_layouts(
    parts: Sequence[Tensor], format: Format, granularity: Granularity, rounding: str, scales: str
) -> bool:  # fmt: skip
    """Whether the kernels of layouts.py make the codes of a matrix, or of matrices side by side, in compiled code or together
    with others."""
    # the classes of a compiler have plain memory behind them, others (shards of a tensor) may not
    plain = all(
        type(x) in (Tensor, torch.nn.Parameter) or type(x).__name__ in ("FakeTensor", "FunctionalTensor") for x in parts
    )
    kernel = plain and layouts_execution(parts[0].device).value == "kernel"
    return kernel and not any(layouts.why_not(x, format, granularity, rounding, scales) for x in parts)


def activation_execution(device: torch.device) -> Choice:
    """What makes the activations and their gradients between linear layers of few bits: the Triton "kernel", which hands
    over their largest magnitude or their codes, or the "definition", which a compiler fuses; they agree within fp32."""
    key = ("activations between low-bit layers", device.type)
    if key not in _choices:
        found = layouts_execution(device)
        reason = "one pass also finds the largest magnitude, at half the time of a compiler's reduction"
        _choices[key] = found if found.value == "definition" else Choice("kernel", reason)
    return _choices[key]


def norm_execution(device: torch.device) -> Choice:
    """What makes the backward pass of residual sums with their norms in compiled code, and writes norms before layers of few
    bits as codes: the Triton "kernel", or the compiler from the "definition"; they agree up to the order of sums."""
    key = ("gradients of norms", device.type)  # as runs have recorded it
    if key not in _choices:
        _choices[key] = _kernel(_no_triton(device), "a compiler adds up the gradients of weights in four kernels more")
    return _choices[key]


def _traced(x: Tensor) -> bool:
    """Whether a compiler looks at what happens to x: what it traces with is a class of its own."""
    return type(x) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling()


def update_execution(device: torch.device) -> Choice:
    """What updates the weights on a device: the Triton "kernel", the definition "compiled", or the definition "eager".

    The kernel is tried on a few numbers, once a process; where it fails, the reason says how.
    """
    if device.type != "cuda":
        how = "in one pass of C++ or in cache-sized pieces"  # `one_pass_execution`
        return Choice("eager", f"on a {device.type} the update runs {how}, and torch.compile takes seconds")
    if not torch.cuda.is_available():
        return Choice("eager", "torch finds no CUDA device here")
    if not update_twin.installed():
        return Choice("eager", "Triton is not installed, and neither kernel nor torch.compile run on CUDA without")
    key = ("update", device.type)
    if key not in _choices:
        with torch.no_grad(), _disable_current_modes():
            reason = update_twin.failure(device)
        _choices[key] = (
            Choice("compiled", reason)
            if reason
            else Choice("kernel", "one launch over all tensors, one pass over memory")
        )
    return _choices[key]


def one_pass_execution() -> Choice:
    """What updates weights on a CPU in eager code: the C++ "kernel", which has the bits of the definition, or torch's own
    fused operators in cache-sized "pieces", which are within rounding of it."""
    key = ("update in one pass", "cpu")
    if key not in _choices:
        found = update_cpu_twin.library()
        why = "one pass over memory, masters with it"
        _choices[key] = Choice("pieces", found.reason) if found.value is None else Choice("kernel", why)
    return _choices[key]


def updates_in_one_pass(rule: Callable[..., None], working: Tensor, gradient: Tensor) -> bool:
    """Whether kernels/update_cpu.py updates such a weight."""
    if (
        working.device.type != "cpu"
        or one_pass_execution().value != "kernel"
        or update_cpu_twin.library().value is None
    ):
        return False
    return not update_cpu_twin.why_not(rule, working.dtype, gradient.dtype)


def int8_product_execution() -> Choice:
    """What multiplies int8 codes in eager code on a CPU: the C++ "kernel", which rescales sums before it writes them, or
    torch's "operator" with a pass behind it. They give the same bits."""
    key = ("int8 products", "cpu")
    if key not in _choices:
        found, hardware = int8_matmul_cpu.library(), describe(torch.device("cpu"))
        why_not = found.reason if found.value is None else ""
        if not why_not and "avx512_vnni" not in hardware.cpu_features:
            limit = hardware.onednn_max_isa
            why_not = (
                f"ONEDNN_MAX_CPU_ISA={limit} leaves no avx512_vnni" if limit else "torch finds no avx512_vnni here"
            )
        elif not why_not and "amx_int8" in hardware.cpu_features:
            why_not = "torch's operator uses AMX, which makes eight times as many products a cycle"
        one_pass = "rescaled in registers, where torch's operator writes 32-bit sums"
        _choices[key] = Choice("operator", why_not) if why_not else Choice("kernel", one_pass)
    return _choices[key]


def rescales_in_registers() -> bool:
    """Whether kernels/int8_matmul_cpu.py multiplies int8 codes in eager code on a CPU."""
    return int8_product_execution().value == "kernel" and int8_matmul_cpu.library().value is not None


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
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def recorded() -> dict[str, list[str]]:
    """Every choice made so far as JSON values, for the state of a run."""
    return {f"{name} on {device}": [choice.value, choice.reason] for (name, device), choice in _choices.items()}


def replay(choices: dict[str, list[str]]) -> None:
    """Takes over choices that `recorded` wrote: a resumed run never times again."""
    for key, (value, reason) in choices.items():
        name, device = key.split(" on ")
        _choices[name, device] = Choice(value, reason)
