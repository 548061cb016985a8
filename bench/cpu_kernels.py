"""Every C++ kernel of a CPU beside its definition: processor time of one thread, so that neighbours hardly show.

    python bench/cpu_kernels.py [--repeats 9] [--only AdamW] [--name cpu_kernels]

Shapes are those of a step of the nano recipe, of attention and int8 products those of GPT with 28M parameters. Updates,
attention and int8 products stand beside torch's operators, which run where the kernels do not. Writes bench/results/NAME.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from blocks import save
from torch.nn.functional import scaled_dot_product_attention

from fewbits.kernels import attention_cpu, fused_cpu, int8_matmul_cpu, quantize_cpu, update_cpu
from fewbits.kernels.heap import keep_freed_memory
from fewbits.numerics import activation, attention, loss, norm
from fewbits.numerics import quantize as definition
from fewbits.numerics.update import adamw_
from fewbits.optim import engine, master
from fewbits.optim.adamw import _fused

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


def updating() -> dict[str, Pair]:
    """(kernel, torch's fused operators in pieces) of an update of 2^21 weights, gradients of their dtype."""
    group = {"betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
    fused = _fused("_fused_adamw_", group, 1e-4, 10)
    assert fused is not None
    scalars = torch.tensor([1 - 1e-5, 0.1, 0.1, 0.95, 0.05, 0.63, 1e-8, 1.5e-4])
    found: dict[str, Pair] = {}
    for name, kind, dtype in (
        ("split", "split", torch.bfloat16),
        ("fp32", "fp32", torch.bfloat16),
        ("no", "none", torch.float32),
    ):

        def run(rule: Any, kind: str = kind, dtype: torch.dtype = dtype) -> Callable[[], Any]:
            working, kept = master.rounded(kind, torch.randn(1 << 21), dtype)
            moments = (torch.zeros(1 << 21), torch.zeros(1 << 21))
            item = engine.Item(working.clone(), torch.randn(1 << 21).to(dtype), kept, moments)
            settings = engine.Settings(rule, kind, torch.tensor(0.5), None, None, scalars)
            return lambda: engine.run([item], settings, False)

        found[f"AdamW, {name} master of {str(dtype).removeprefix('torch.')}"] = run(adamw_), run(fused)
    return found


def multiplying() -> dict[str, Pair]:
    """(kernel, torch's operators) of int8 products [2048, K] x [N, K] that are rescaled to bf16, and of attention forward and
    backward over 8 windows of 256 tokens with 8 heads of 64."""
    found: dict[str, Pair] = {}
    for K, N in ((512, 1536), (512, 2048), (2048, 512)):
        left, right = (torch.randint(-127, 128, (rows, K), dtype=torch.int8) for rows in (2048, N))
        rows, columns, out = torch.rand(2048), torch.rand(N), torch.empty(2048, N, dtype=torch.bfloat16)
        given = (left, right, rows, columns, None, torch.bfloat16)
        found[f"int8 product [2048, {K}] x [{N}, {K}]"] = (
            lambda given=given: int8_matmul_cpu.scaled_int8_matmul(*given),
            lambda g=given, out=out: quantize_cpu.rescale(torch._int_mm(g[0], g[1].t()), g[2], g[3], None, out),
        )

    def attending(attend: Callable[..., Any], dtype: torch.dtype) -> Callable[[], Any]:
        qkv, grad = torch.randn(8, 256, 3, 8, 64).to(dtype).requires_grad_(), torch.randn(8, 8, 256, 64).to(dtype)
        parts = [part.transpose(1, 2) for part in qkv.unbind(2)]
        return lambda: torch.autograd.grad(attend(*parts), qkv, grad, retain_graph=True)

    for dtype in (torch.float32, torch.bfloat16):
        found[f"attention and its gradient, {str(dtype).removeprefix('torch.')}"] = (
            attending(lambda q, k, v: attention_cpu.attention(q, k, v, None), dtype),
            attending(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True), dtype),
        )
    return found


def main() -> None:
    """Times every pair in turn and saves the least of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="")
    parser.add_argument("--name", default="cpu_kernels")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for module in (quantize_cpu, fused_cpu, update_cpu, attention_cpu, int8_matmul_cpu):
        if module.library().value is None:
            raise SystemExit(module.library().reason)
    results = {}
    for name, pair in {**quantizing(), **between_matmuls(), **updating(), **multiplying()}.items():
        if given.only not in name:
            continue
        times: list[list[float]] = [[], []]
        for _ in range(given.repeats):
            for taken, work in zip(times, pair, strict=True):
                began = time.process_time()
                work()
                taken.append(1e3 * (time.process_time() - began))
        ours, theirs = (min(taken[1:]) for taken in times)
        results[name] = {"kernel_ms": round(ours, 3), "definition_ms": round(theirs, 3)}
        print(f"{name:46s} {ours:8.2f} ms  definition {theirs:8.2f} ms  x{theirs / ours:.1f}", flush=True)
    save(given.name, {"threads": 1, "clock": "processor time", "results": results})


if __name__ == "__main__":
    main()
