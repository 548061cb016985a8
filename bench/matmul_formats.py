"""Every matmul of the linear layers of llama-1b and gpt2-124m in bf16 and in every native format, and what quantizing costs.

    python bench/matmul_formats.py            # on an H100, under 90 seconds: bench/results/matmul_formats_h100.json
    python bench/matmul_formats.py --smoke    # tiny shapes, any machine, writes nothing

For each of output, grad_input and grad_weight: the product of codes that are there already, the quantization of either
operand by the eager twin (a weight is quantized once a step, the others every time), and their sum against bf16. Then
whole layers, forward and backward, compiled as a training compiles them, with held weights: what is shared between the
matmuls, and what the compiler fuses, counts there. Times are medians over calls between CUDA events, enqueued behind a
sleep so that the host does not show, on inputs that take turns so that the cache does not either. A ratio is bf16's
time over the format's: above 1 the format is faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from blocks import header, save

import fewbits
from fewbits.kernels.dispatch import quantize, recorded
from fewbits.kernels.matmul import native_kind, scaled_matmul
from fewbits.nn.lowbit import held_weights
from fewbits.precision.recipe import MATMULS, RECIPES, Operand

FORMATS = ("fp8", "fp8-row", "fp8-block", "int8")
LAYERS = {  # model -> tokens of a step, then layer -> (contraction K, outputs O) of its weight
    "llama-1b": (16384, {"qkv": (2048, 2560), "output": (2048, 2048), "up": (2048, 5632), "down": (5632, 2048)}),
    "gpt2-124m": (32768, {"qkv": (768, 2304), "output": (768, 768), "up": (768, 3072), "down": (3072, 768)}),
}
SMOKE = {"smoke": (256, {"up": (128, 256), "down": (256, 128)})}
COPIES = 3  # of every input: each is larger than what is left of the cache by the other two
SLEEP = 8_000_000  # clock cycles, about 5 ms: longer than the host takes to enqueue a round

Maker = Callable[[int], Callable[[], Any]]
"""From the number of a copy to the call that is timed on it."""


def median_ms(make: Maker, cuda: bool, rounds: int, calls: int = 8) -> float:
    """Median milliseconds of a call, over `rounds` rounds of `calls`, after two warm-up calls on every copy."""
    runs = [make(copy) for copy in range(COPIES)]
    for run in runs * 2:
        run()
    times = []
    for _ in range(rounds):
        if not cuda:
            start = time.perf_counter()
            runs[0]()
            times.append((time.perf_counter() - start) * 1e3)
            continue
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        torch.cuda._sleep(SLEEP)
        for call in range(calls):
            events[call].record()
            runs[call % COPIES]()
        events[calls].record()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return statistics.median(times)


def matrices(name: str, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """left and right of a matmul, left @ right.T, as views."""
    return {"output": (x, weight), "grad_input": (grad, weight.t()), "grad_weight": (grad.t(), x.t())}[name]


def quantized(matrix: torch.Tensor, operand: Operand, key: torch.Tensor) -> Any:
    return quantize(matrix, operand.format, operand.granularity, operand.rounding, key, operand.scaling)


def time_matmuls(model: str, layer: str, tensors: list[tuple[torch.Tensor, ...]], rounds: int) -> list[dict[str, Any]]:
    """One row a matmul and format."""
    cuda = tensors[0][0].is_cuda
    key = torch.tensor(1, device=tensors[0][0].device)
    rows = []
    for name in MATMULS:
        sides = [matrices(name, *copy) for copy in tensors]
        bf16 = median_ms(lambda i, s=sides: lambda: torch.mm(s[i][0], s[i][1].t()), cuda, rounds)
        for format in FORMATS:
            matmul = getattr(RECIPES[format], name)
            pairs = [(quantized(a, matmul.left, key), quantized(b, matmul.right, key)) for a, b in sides]
            kind = native_kind(*pairs[0], matmul.accumulator)

            def product(i: int, p: Any = pairs, m: Any = matmul) -> Callable[[], Any]:
                return lambda: scaled_matmul(*p[i], m.accumulator, torch.bfloat16)

            took = {
                "product_ms": median_ms(product, cuda, rounds),
                "quantize_left_ms": median_ms(
                    lambda i, s=sides, o=matmul.left: lambda: quantized(s[i][0], o, key), cuda, rounds
                ),
                "quantize_right_ms": median_ms(
                    lambda i, s=sides, o=matmul.right: lambda: quantized(s[i][1], o, key), cuda, rounds
                ),
            }
            total = sum(took.values())
            row = {"model": model, "layer": layer, "matmul": name, "format": format, "runs": kind or "emulated"}
            row |= {"bf16_ms": bf16, **took, "ratio_product": bf16 / took["product_ms"], "ratio": bf16 / total}
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def time_layer(format: str, tensors: list[tuple[torch.Tensor, ...]], rounds: int, compiled: bool) -> float:
    """Milliseconds of forward and backward of a linear layer without bias, weights held as within a step."""
    x, weight, _ = tensors[0]
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model = fewbits.prepare(torch.nn.Sequential(module), format).to(x.device)
    if compiled:
        torch._dynamo.reset()  # or the eighth layer would be the last one compiled
    run = torch.compile(model, dynamic=False) if compiled else model

    def make(i: int) -> Callable[[], Any]:
        leaf = tensors[i][0].detach().requires_grad_()

        def call() -> None:
            leaf.grad = module.weight.grad = None
            run(leaf).backward(tensors[i][2])

        return call

    with held_weights(model):
        return median_ms(make, x.is_cuda, rounds)


def table(rows: list[dict[str, Any]]) -> None:
    """A line a matmul: bf16's time, and for each format the ratio with (and in brackets without) quantization."""
    print(f"{'':34}{'bf16 ms':>9}  " + "  ".join(f"{name:>15}" for name in FORMATS))
    for first in rows[:: len(FORMATS)]:
        key = ("model", "layer", "matmul")
        same = [row for row in rows if all(row[k] == first[k] for k in key)]
        cells = [
            f"{r['ratio']:.2f} ({r['ratio_product']:.2f})" + ("" if r["runs"] != "emulated" else "e") for r in same
        ]
        name = " ".join(first[k] for k in key)
        print(f"{name:34}{first['bf16_ms']:9.3f}  " + "  ".join(f"{cell:>15}" for cell in cells))


def main() -> None:
    """Times everything, prints the tables, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any device, nothing written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=80, help="no further layer is compiled after this long")
    options = parser.parse_args()
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = SMOKE if options.smoke else LAYERS
    rows: list[dict[str, Any]] = []
    made: dict[tuple[str, str], list[tuple[torch.Tensor, ...]]] = {}
    torch.manual_seed(0)

    def inputs(tokens: int, K: int, O: int) -> list[tuple[torch.Tensor, ...]]:  # noqa: E741
        shapes = ((tokens, K, 1.0), (O, K, 0.02), (tokens, O, 1e-3))
        return [
            tuple(torch.randn(a, b, device=device).mul_(size).bfloat16() for a, b, size in shapes)
            for _ in range(COPIES)
        ]

    for model, (tokens, layers) in models.items():
        for layer, (K, O) in layers.items():  # noqa: E741
            tensors = inputs(tokens, K, O)
            rows += time_matmuls(model, layer, tensors, options.rounds)
            made[model, layer] = tensors if layer == "up" else []
    table(rows)
    whole: list[dict[str, Any]] = []
    order = [(m, layer) for layer in ("up", "down", "qkv", "output") for m in models if layer in models[m][1]]
    for model, layer in order:
        if time.perf_counter() - started > options.seconds:
            print(f"{model} {layer}: not compiled, {options.seconds:.0f} s are over")
            continue
        tensors = made[model, layer] or inputs(models[model][0], *models[model][1][layer])
        took = {f: time_layer(f, tensors, options.rounds, device.type == "cuda") for f in ("bf16-mixed", *FORMATS)}
        whole.append({"model": model, "layer": layer, **{f"{f}_ms": round(ms, 4) for f, ms in took.items()}})
        ratios = "  ".join(f"{f} {took['bf16-mixed'] / took[f]:.2f}" for f in FORMATS)
        print(f"{model} {layer}, forward and backward: bf16 {took['bf16-mixed']:.3f} ms, ratios {ratios}", flush=True)
        made[model, layer] = []
    spent = round(time.perf_counter() - started, 1)
    results = {"seconds": spent, "choices": recorded(), "matmuls": rows, "layers": whole}
    if options.smoke:
        print(json.dumps({**header(), "seconds": spent, "rows": len(rows)}))
    else:
        save("matmul_formats_h100", results)


if __name__ == "__main__":
    main()
