"""Every C++ kernel of a CPU beside its definition: processor time of one thread, so that neighbours hardly show.

    python bench/cpu_kernels.py [--repeats 9]

Shapes are those of a step of the nano recipe. Writes bench/results/cpu_kernels.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from blocks import save

from fewbits.kernels import fused_cpu, quantize_cpu
from fewbits.kernels.heap import keep_freed_memory
from fewbits.numerics import activation, attention, loss, norm
from fewbits.numerics import quantize as definition

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def quantizing() -> dict[str, Pair]:
    """(kernel, definition) of quantization and back, [2048, 1024] bf16."""
    x = torch.randn(2048, 1024).bfloat16()
    found: dict[str, Pair] = {}
    for name, view, format, granularity, rounding in (
        ("int8 rows", x, "int8", "row", "nearest-even"),
        ("int8 rows, stochastic", x, "int8", "row", "stochastic"),
        ("int8 columns, stochastic", x.t(), "int8", "row", "stochastic"),
        ("e4m3 tensor", x, "fp8_e4m3", "tensor", "nearest-even"),
        ("e5m2 tensor", x, "fp8_e5m2", "tensor", "nearest-even"),
        ("e4m3 block(1x128)", x, "fp8_e4m3", "block(1x128)", "nearest-even"),
    ):
        given = (view, format, granularity, rounding, 7)
        found[f"quantize {name}"] = (
            lambda given=given: quantize_cpu.quantize(*given),
            lambda given=given: definition.quantize(*given),
        )
    q = definition.quantize(x, "fp8_e4m3", "tensor")
    found["dequantize e4m3 tensor"] = (
        lambda: quantize_cpu.decode(q.codes, q.scale, q.granularity, torch.bfloat16),
        lambda: q.dequantize(torch.bfloat16),
    )
    return found


def between_matmuls() -> dict[str, Pair]:
    """(kernel, definition) of what a step does between its matmuls, bf16."""
    wide, grad = torch.randn(2, 2048, 1024).bfloat16()
    x, grad_x = torch.randn(2, 2048, 256).bfloat16()
    x.requires_grad_()
    weight, bias = (torch.ones(256, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    ys = [module.layer_norm(x, weight, bias, 1e-5) for module in (fused_cpu, norm)]
    logits, labels, one = torch.randn(512, 4096), torch.randint(4096, (512,)), torch.ones(())
    scores, P = torch.randn(32, 64, 256), torch.empty(8, 4, 256, 256, dtype=torch.bfloat16)
    flat, rows = P.view(32, 256, 256), slice(192, 256)

    def backward(y: torch.Tensor) -> Callable[[], Any]:
        return lambda: y.backward(grad_x, retain_graph=True)

    def pair(function: str, *given: Any) -> Pair:
        modules = (fused_cpu, attention)
        ours, theirs = (getattr(module, function) for module in modules)
        return lambda: ours(*(g() if callable(g) else g for g in given)), lambda: theirs(
            *(g() if callable(g) else g for g in given)
        )

    return {
        "GELU [2048, 1024]": (lambda: fused_cpu.gelu(wide), lambda: activation.gelu(wide)),
        "LayerNorm [2048, 256]": (
            lambda: fused_cpu.layer_norm(x, weight, bias, 1e-5),
            lambda: norm.layer_norm(x, weight, bias, 1e-5),
        ),
        "LayerNorm backward": (backward(ys[0]), backward(ys[1])),
        "column sums [2048, 1024]": (lambda: fused_cpu.column_sums(grad), lambda: grad.float().sum(0)),
        "softmax and gradient of logits [512, 4096]": (
            lambda: fused_cpu.softmax_gradient(logits, labels, one, torch.bfloat16),
            lambda: loss.softmax_gradient(logits, labels, one, torch.bfloat16),
        ),
        "attention softmax": pair("write_softmax", P, scores.clone, rows, 0.125, None),
        "attention softmax backward": pair(
            "write_gradient", lambda: torch.empty_like(flat), scores.clone, flat, rows, 0.1
        ),
    }


def main() -> None:
    """Times every pair in turn and saves the least of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    keep_freed_memory()
    for library in (quantize_cpu.library(), fused_cpu.library()):
        if library.value is None:
            raise SystemExit(library.reason)
    results = {}
    for name, pair in {**quantizing(), **between_matmuls()}.items():
        times: list[list[float]] = [[], []]
        for _ in range(repeats):
            for taken, work in zip(times, pair, strict=True):
                began = time.process_time()
                work()
                taken.append(1e3 * (time.process_time() - began))
        ours, theirs = (min(taken[1:]) for taken in times)
        results[name] = {"kernel_ms": round(ours, 3), "definition_ms": round(theirs, 3)}
        print(f"{name:46s} {ours:8.2f} ms  definition {theirs:8.2f} ms  x{theirs / ours:.1f}", flush=True)
    save("cpu_kernels", {"threads": 1, "clock": "processor time", "results": results})


if __name__ == "__main__":
    main()
