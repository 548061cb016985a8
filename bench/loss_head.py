"""The loss head, linear layer and cross entropy with both gradients: what it costs, in parts and whole, and what it errs.

    python bench/loss_head.py                 # on an H100, under 90 seconds: bench/results/loss_head.json
    python bench/loss_head.py --only kernels  # or matmuls, whole, errors
    python bench/loss_head.py --smoke         # tiny shapes, any machine (TRITON_INTERPRET=1 without a GPU), writes nothing

kernels: the softmax kernel over one piece of logits, by how many columns it reads at a time and with how many warps, against
the compiled definition; GB/s counts every logit read once and every gradient written once. matmuls: logits in fp32, fp16
and bf16, and the two products of gradients, tight, with rows that lie 64 elements apart, or padded to 64 columns; the sum of
the weight gradient over pieces in three ways. whole: forward and backward as Step calls them, fp32 logits with gradients
of their own ("before") against fp16, bf16 and fp32 logits and several sizes of a piece, with the memory that it takes
besides its inputs. errors: the mean loss and the gradients against fp64.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from blocks import save
from torch import Tensor

from fewbits.formats import Format
from fewbits.kernels import head as fp8
from fewbits.kernels import loss as kernel
from fewbits.kernels.dispatch import logits_format, loss_execution, recorded
from fewbits.kernels.loss import DeviceHead, aligned_rows, multiply
from fewbits.numerics import loss as definition
from fewbits.numerics.loss import gradient_factor, linear_cross_entropy

MODELS = {  # tokens of a step, width, vocabulary
    "gpt2-124m": (32768, 768, 50304),
    "gpt2-124m, 50257 tokens": (32768, 768, 50257),
    "llama-1b": (16384, 2048, 32000),
    "minimind": (32768, 768, 6400),
}
SMOKE = {"smoke": (16, 32, 300)}
SHAPES = [
    (block, warps) for block in (2048, 4096, 8192, 16384) for warps in (4, 8, 16, 32) if 8 <= block / warps / 32 <= 64
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E5M2 = Format.parse("fp8_e5m2")
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def median_ms(call: Callable[[], Any], calls: int = 10) -> float:
    """Median milliseconds between CUDA events, enqueued behind a sleep; after three calls that do not count."""
    if not CUDA:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda._sleep(10_000_000)
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def tried(found: dict[str, Any], name: str, work: Callable[[], dict[str, Any]]) -> None:
    """One case into `found`; one that fails says why and the others go on."""
    try:
        found[name] = work()
    except Exception as error:
        found[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
    shown = found[name].get("error") or ", ".join(f"{key} {value}" for key, value in found[name].items())
    print(f"  {name:<64} {shown}", flush=True)
    if CUDA:
        torch.cuda.empty_cache()


def inputs(N: int, D: int, V: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels whose logits have deviation 3 and reach about 16; labels drawn from their softmax
    (every eighth of them) or at random."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, device=DEVICE).to(dtype)
    weight = (torch.randn(V, D, generator=generator, device=DEVICE) * (3 / math.sqrt(D))).to(dtype)
    labels = torch.randint(V, (N,), generator=generator, device=DEVICE)
    some = slice(0, N, 8)
    p = torch.softmax(hidden[some].float() @ weight.float().t(), 1)
    labels[some] = torch.multinomial(p, 1, generator=generator).squeeze(1)
    return hidden, weight, labels


def rate(call: Callable[[], Any], amount: float, unit: str) -> dict[str, Any]:
    """Milliseconds, and the amount (bytes or operations) over them in 1e9 (gb) or 1e12 (tflops) a second."""
    ms = median_ms(call)
    return {"ms": round(ms, 4), unit: round(amount / ms / (1e6 if unit == "gb_per_s" else 1e9), 1)}


def kernels(found: dict[str, Any], model: str, N: int, _D: int, V: int) -> None:
    """The softmax kernel alone."""
    rows = min(N, definition.piece_rows(N, V, "cuda", 2))
    factor, labels = torch.tensor(1 / N, device=DEVICE), torch.randint(V, (rows,), device=DEVICE)
    logits = aligned_rows(rows, V, FP32, DEVICE).copy_(torch.randn(rows, V, device=DEVICE).mul_(3))
    narrow = aligned_rows(rows, V, FP16, DEVICE).copy_(logits)
    head = f"{model}, {rows} rows"
    scale = definition.gradient_scale(factor, E5M2)
    few = [(2048, 4), (4096, 8), (4096, 16), (8192, 16), (8192, 32)]
    for block, warps in few if "50257" in model else [*few, (4096, 32)]:
        call = partial(kernel.softmax_codes, narrow, labels, factor, scale, E5M2, block=block, warps=warps)
        tried(found, f"{head}, fp16 -> e5m2, {block} x {warps} warps", partial(rate, call, 3 * rows * V, "gb_per_s"))
    for block, warps in SHAPES if model == "gpt2-124m" else few:
        call = partial(kernel.softmax_gradient, narrow, labels, factor, BF16, block=block, warps=warps)
        tried(found, f"{head}, fp16 -> bf16, {block} x {warps} warps", partial(rate, call, 4 * rows * V, "gb_per_s"))
    cases: dict[str, tuple[Callable[[], Any], int]] = {
        "fp32 -> bf16": (partial(kernel.softmax_gradient, logits, labels, factor, BF16), 6),
        "fp16 losses only": (partial(kernel.softmax_losses, narrow, labels), 2),
        "fp32 losses only": (partial(kernel.softmax_losses, logits, labels), 4),
    }
    if CUDA and model == "gpt2-124m":
        softmax = torch.compile(definition.softmax_gradient, dynamic=False)
        cases["fp32 -> fp32 compiled definition, then bf16"] = (
            lambda: softmax(logits, labels, factor, FP32)[1].to(BF16),
            6,
        )
        cases["fp32 -> bf16 compiled definition"] = (partial(softmax, logits, labels, factor, BF16), 6)
    for name, (call, each) in cases.items():
        tried(found, f"{head}, {name}", partial(rate, call, each * rows * V, "gb_per_s"))


def matmuls(found: dict[str, Any], model: str, N: int, D: int, V: int) -> None:
    """Logits by format, and the products of gradients, by how rows lie."""
    rows = min(N, definition.piece_rows(N, V, "cuda", 2))
    hidden = torch.randn(rows, D, device=DEVICE).to(BF16)
    grad_hidden = torch.empty_like(hidden)
    for layout in ["tight", "64 apart", "padded"] if V % 64 else ["tight"]:
        W = -(-V // 64) * 64 if layout == "padded" else V
        empty = partial(aligned_rows, rows, W, device=DEVICE)
        if layout == "tight":
            empty = partial(torch.empty, (rows, W), device=DEVICE)
        weight, total = torch.randn(W, D, device=DEVICE).to(BF16), torch.zeros(W, D, device=DEVICE)
        narrow = torch.empty_like(weight)
        gradient = empty(dtype=BF16).copy_(torch.randn(rows, W, device=DEVICE).mul_(1e-3))
        turned = gradient.t()
        cases: dict[str, Callable[[], Any]] = {
            f"logits of {short(a)} in {short(out)}": partial(multiply, hidden.to(a), weight.to(a).t(), empty(dtype=out))
            for a, out in ((BF16, FP32), (FP16, FP16), (BF16, BF16))
        }
        cases["to hidden"] = partial(multiply, gradient, weight, grad_hidden)
        cases["to weight, bf16"] = partial(multiply, turned, hidden, narrow)
        cases["to weight, fp32 written"] = partial(multiply, turned, hidden, total)
        cases["to weight, fp32 in place"] = partial(kernel._in_place, turned, hidden, total, True)
        cases["to weight, fp32 then added"] = partial(kernel._added, turned, hidden, total, True)
        for name, call in cases.items():
            tried(found, f"{model}, {rows} rows {layout}, {name}", partial(rate, call, 2 * rows * D * V, "tflops"))
    tried(found, f"{model}, weight copied to fp16", partial(rate, partial(weight.to, FP16), 4 * V * D, "gb_per_s"))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Before:
    """fp32 logits and a gradient of its own in fp32, then rounded: as the head was."""

    def __init__(self, compiled: bool = CUDA) -> None:
        self.softmax: Any = definition.softmax_gradient
        if compiled:
            self.softmax = torch.compile(definition.softmax_gradient, dynamic=False)

    def gradients(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        (N, D), V = hidden.shape, weight.shape[0]
        rows = max(64, min((1 << 30) // (4 * V) // 64 * 64, -(-N // 4)))
        losses, grad_hidden = torch.empty(N, device=DEVICE), torch.empty_like(hidden)
        grad_weight = torch.zeros(V, D, device=DEVICE)
        for start in range(0, N, rows):
            piece = slice(start, start + rows)
            logits = multiply(hidden[piece], weight.t(), torch.empty(len(hidden[piece]), V, device=DEVICE))
            losses[piece], wide = self.softmax(logits, labels[piece], factor, FP32)
            gradient = wide.to(hidden.dtype)
            del wide
            grad_hidden[piece] = gradient @ weight
            grad_weight += multiply(gradient.t(), hidden[piece], torch.empty_like(grad_weight))
        return losses, grad_hidden, grad_weight.to(weight.dtype)


def once(
    twin: Any, hidden: Tensor, weight: Tensor, labels: Tensor, factor: Tensor, known: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward; `known`: the factor that was announced arrives itself, else its product with the loss."""
    a, b = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with gradient_factor(factor):
        total = linear_cross_entropy(a, b, labels, twin=twin)
    total.backward(factor) if known else (total * factor).backward()
    assert a.grad is not None and b.grad is not None
    return total.detach(), a.grad, b.grad


class Fp8Head:
    """The head in fp8. kept: bytes of codes of pieces that are multiplied with hidden states at once."""

    def __init__(self, kept: int):
        self.kept = kept

    def gradients(self, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before, fp8._KEPT_BYTES["cuda"] = fp8._KEPT_BYTES["cuda"], self.kept
        try:
            return fp8.fp8_gradients(*given, logits=FP16, kernel=CUDA)
        finally:
            fp8._KEPT_BYTES["cuda"] = before


def heads() -> dict[str, tuple[Any, bool, int]]:
    """Name -> (twin, whether the ratio is known to be 1, bytes of a piece in MiB)."""
    return {
        "before": (Before(), False, 1024),
        "fp16 logits": (DeviceHead(FP16), True, 1024),
        "fp16 logits, ratio multiplied": (DeviceHead(FP16), False, 1024),
        "fp16 logits, pieces of 512 MiB": (DeviceHead(FP16), True, 512),
        "fp16 logits, pieces of 2 GiB": (DeviceHead(FP16), True, 2048),
        "fp16 logits, one piece": (DeviceHead(FP16), True, 8192),
        "bf16 logits": (DeviceHead(BF16), True, 1024),
        "fp32 logits": (DeviceHead(FP32), True, 1024),
        "fp32 logits, pieces of 64 MiB, about the cache": (DeviceHead(FP32), True, 64),
        "fp32 logits, pieces of 4 GiB": (DeviceHead(FP32), True, 4096),
        "fp8": (Fp8Head(1 << 30), True, 1024),
        "fp8, pieces of 512 MiB": (Fp8Head(1 << 30), True, 512),
        "fp8, a weight gradient a piece": (Fp8Head(0), True, 1024),
        "fp8, one weight gradient": (Fp8Head(8 << 30), True, 1024),
    }


def forward_backward(work: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of a head, and the memory that it takes at most besides what was there."""
    work()
    if not CUDA:
        return {"ran": True}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    work()
    peak = torch.cuda.max_memory_allocated() - held
    return {"ms": round(median_ms(work, 8), 3), "peak_mib": round(peak / 2**20, 1)}


def whole(found: dict[str, Any], model: str, N: int, D: int, V: int) -> None:
    """Forward and backward of the head."""
    data, factor, before = inputs(N, D, V), torch.tensor(1 / N, device=DEVICE), definition._PIECE_BYTES["cuda"]
    for name, (twin, known, mebibytes) in heads().items():
        definition._PIECE_BYTES["cuda"] = mebibytes << 20
        tried(found, f"{model}, {name}", partial(forward_backward, partial(once, twin, *data, factor, known)))
    definition._PIECE_BYTES["cuda"] = before


def off(twin: Any, data: tuple[Tensor, ...], factor: Tensor, exact: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """How far losses and gradients are from exact ones."""
    losses, *gradients = twin.gradients(*data, factor)
    difference, mean = losses.double() - exact[0], float(exact[0].mean())
    relative = [float((g.double() - e).norm() / e.norm()) for g, e in zip(gradients, exact[1:], strict=True)]
    return {
        "loss": round(mean, 4),
        "relative_bias": float(difference.mean()) / mean,
        "standard_error": float(difference.std()) / math.sqrt(len(difference)) / mean,
        "grad_hidden": relative[0],
        "grad_weight": relative[1],
    }


def errors(found: dict[str, Any], model: str, N: int, D: int, V: int) -> None:
    """Loss and gradients of 2,048 tokens against fp64: bias of the mean loss, relative to it, with the standard error of the
    rounding's part in it, and the norm of the difference over the norm."""
    if model not in ("gpt2-124m", "smoke"):
        return
    data = inputs(min(N, 2048), D, V)
    factor = torch.tensor(1 / len(data[2]), device=DEVICE)
    c, d = (x.double().requires_grad_() for x in data[:2])
    losses = torch.nn.functional.cross_entropy(c @ d.t(), data[2], reduction="none")
    losses.mean().backward()
    assert c.grad is not None and d.grad is not None
    exact = (losses.detach(), c.grad, d.grad)
    twins = {"before": Before(compiled=False), **{f"{short(t)} logits": DeviceHead(t) for t in (FP16, BF16, FP32)}}
    for name, twin in twins.items():
        tried(found, f"{model}, {name}", partial(off, twin, data, factor, exact))


PARTS = {"kernels": kernels, "matmuls": matmuls, "whole": whole, "errors": errors}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--name", default="loss_head")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name in arguments.only or PARTS:
        print(name, flush=True)
        started = time.time()
        results[name] = {}
        for model, shape in (SMOKE if arguments.smoke else MODELS).items():
            PARTS[name](results[name], model, *shape)
        print(f"  ({time.time() - started:.0f} s)", flush=True)
    choices = {"loss": loss_execution(DEVICE), "logits": logits_format("auto", BF16, DEVICE)}
    results["choices"] = {**{name: list(choice) for name, choice in choices.items()}, **recorded()}
    if not arguments.smoke:
        save(arguments.name, results)


if __name__ == "__main__":
    main()
