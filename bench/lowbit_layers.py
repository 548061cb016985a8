"""What fp8 costs beside its matmuls: layers behind their producers, the codes of all weights, whole steps, by path.

    OUT=/tmp/out python bench/lowbit_layers.py --only check,steps      # on an H100 or H200, about 90 s each line
    OUT=/tmp/out python bench/lowbit_layers.py --only check,hold,layers
    python bench/lowbit_layers.py --smoke                              # tiny shapes, any machine, writes nothing

    OUT=/tmp/out python bench/lowbit_layers.py --only mlps             # feed-forward layers, and the kernels of each

Paths: "kernel" writes both layouts of the codes in one reading, "definition" leaves quantization to the compiler and the
weights to be quantized one by one (`layouts_execution`). "layered" leaves GELU and SwiGLU to the compiler, where "kernel"
has them hand over their maximum or codes (`activation_execution`). A layer is timed forward and backward, compiled together
with what makes its input (a norm, GELU, SwiGLU), between CUDA events and behind a sleep, so that the host does not show. A
step is timed both waited for one by one and enqueued ahead. Writes OUT/lowbit_layers-PARTS.json; what fails is noted there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blocks import header
from matmul_formats import COPIES, median_ms

import fewbits
from fewbits.choice import Choice
from fewbits.formats import Format
from fewbits.kernels import dispatch, layouts
from fewbits.nn.lowbit import held_weights
from fewbits.nn.transformer import MLP
from fewbits.numerics import quantize as definition
from fewbits.numerics.activation import gelu
from fewbits.numerics.scaling import Granularity

LAYERS = {  # name -> (tokens, contraction K, outputs O, bias, producer), in the order of worth
    "gpt2 down": (32768, 3072, 768, True, "gelu"),
    "llama down": (16384, 5632, 2048, False, "swiglu"),
    "gpt2 up": (32768, 768, 3072, True, "layernorm"),
    "llama up": (16384, 2048, 5632, False, "rmsnorm"),
    "gpt2 qkv": (32768, 768, 2304, True, "layernorm"),
    "llama qkv": (16384, 2048, 2560, False, "rmsnorm"),
    "gpt2 output": (32768, 768, 768, True, "none"),
    "llama output": (16384, 2048, 2048, False, "none"),
}
SMOKE = {"smoke down": (256, 128, 64, True, "gelu"), "smoke up": (256, 64, 128, False, "swiglu")}
FEED_FORWARDS = {  # name -> (tokens, width, inner width, activation)
    "gpt2 mlp": (32768, 768, 3072, "gelu"),
    "llama mlp": (16384, 2048, 5632, "swiglu"),
}
SMOKE_FEED_FORWARDS = {"smoke gelu": (256, 64, 128, "gelu"), "smoke swiglu": (256, 64, 128, "swiglu")}
PATHS = {  # name -> (precision, path)
    "bf16": ("bf16-mixed", "kernel"),
    "fp8 definition": ("fp8", "definition"),
    "fp8 layered": ("fp8", "layered"),
    "fp8-delayed layered": ("fp8-delayed", "layered"),
    "fp8": ("fp8", "kernel"),
    "fp8-delayed": ("fp8-delayed", "kernel"),
    "fp8-row": ("fp8-row", "kernel"),
}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def take(path: str) -> None:
    """Forces the path of what is compiled from now on; "kernel" is the choice of dispatch itself."""
    torch._dynamo.reset()
    forced = {"definition": "both layouts of fp8 codes", "layered": "activations between low-bit layers"}
    for what in forced.values():
        dispatch._choices.pop((what, DEVICE.type), None)
    if path in forced:
        dispatch.replay({f"{forced[path]} on {DEVICE.type}": ["definition", "asked for by a bench"]})


class Layer(torch.nn.Module):
    """A linear layer and what makes its input."""

    def __init__(self, K: int, O: int, bias: bool, producer: str):  # noqa: E741
        super().__init__()
        norms = {"layernorm": torch.nn.LayerNorm, "rmsnorm": torch.nn.RMSNorm}
        self.norm = norms[producer](K) if producer in norms else None
        self.linear = torch.nn.Linear(K, O, bias=bias)
        self.producer = producer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, K], or [N, 2 K] for swiglu."""
        if self.norm is not None:
            x = self.norm(x)
        elif self.producer == "gelu":
            x = gelu(x)
        elif self.producer == "swiglu":
            gate, up = x.chunk(2, -1)
            x = torch.nn.functional.silu(gate) * up
        return self.linear(x)  # type: ignore[no-any-return]


def check() -> dict[str, Any]:
    """Codes and scales of both paths, compiled and together, against the definition in eager code: all bit for bit."""
    found = {}
    for format, shape in itertools.product(("fp8_e4m3", "fp8_e5m2"), ((2048, 768), (129, 257))):
        fmt = Format.parse(format)
        x = (torch.randn(shape, device=DEVICE) * torch.randn(shape, device=DEVICE).mul(4).exp()).bfloat16()
        wanted = definition.quantize(x, fmt)
        cases: dict[str, Any] = {}
        for path in ("definition", "kernel") if CUDA else ("definition",):
            take(path)

            def work(x: torch.Tensor, fmt: Any = fmt) -> Any:
                q, t, _ = dispatch.quantize_both([x], fmt, Granularity(), "nearest-even", 0, "power-of-two", True)
                return q.codes, t.codes, q.scale

            torch.compiler.allow_in_graph(work)
            cases[path] = torch.compile(lambda x, work=work: work(x), dynamic=False)(x)
        if CUDA:
            held, _ = layouts.encode_all([x, x[:16].contiguous()], fmt)
            cases["together"] = held[0]
        for name, (codes, codes_t, scale) in cases.items():
            same = all(
                torch.equal(a.contiguous().view(torch.uint8), wanted.codes.view(torch.uint8))
                for a in (codes, codes_t.t())
            )
            found[f"{format} {shape} {name}"] = same and torch.equal(scale, wanted.scale)
    take("kernel")
    print("codes are those of the definition:", found, flush=True)
    return found


def passes(
    run: Callable[[Any], Any], model: torch.nn.Module, leaves: list[torch.Tensor], grads: list[torch.Tensor]
) -> Callable[[int], Callable[[], None]]:
    """Number -> forward and backward on the inputs of that number."""

    def make(i: int) -> Callable[[], None]:
        def call() -> None:
            leaves[i].grad = None
            model.zero_grad(set_to_none=True)
            run(leaves[i]).backward(grads[i])

        return call

    return make


def layer_ms(precision: str, path: str, shape: tuple[int, int, int, bool, str], rounds: int) -> float:
    """Milliseconds of forward and backward, weights held as within a step."""
    take(path)
    tokens, K, O, bias, producer = shape  # noqa: E741
    torch.manual_seed(0)
    model = fewbits.prepare(Layer(K, O, bias, producer), precision).to(DEVICE)
    run = torch.compile(model, dynamic=False) if CUDA else model
    width = 2 * K if producer == "swiglu" else K
    leaves = [torch.randn(tokens, width, device=DEVICE).bfloat16().requires_grad_() for _ in range(COPIES)]
    grads = [(torch.randn(tokens, O, device=DEVICE) * 1e-3).bfloat16() for _ in range(COPIES)]

    make = passes(run, model, leaves, grads)
    for _ in range(3 if precision == "fp8-delayed" else 0):  # its scales look back, and are known to after two steps
        with held_weights(model):
            make(0)()
    with held_weights(model):
        return median_ms(make, CUDA, rounds)


def mlp_row(precision: str, path: str, shape: tuple[int, int, int, str], options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of forward and backward of a feed-forward layer, and the kernels of one call but for its matmuls."""
    take(path)
    tokens, width, inner, activation = shape
    config = fewbits.ModelConfig(
        vocab_size=64, context=16, n_layer=1, n_head=2, n_embd=width, n_ff=inner, activation=activation,
        bias=activation == "gelu",
    )  # fmt: skip
    model = fewbits.prepare(Alone(MLP(config)), precision).to(DEVICE)
    run = torch.compile(model.mlp, dynamic=False) if CUDA else model.mlp
    leaves = [torch.randn(tokens, width, device=DEVICE).bfloat16().requires_grad_() for _ in range(COPIES)]
    grads = [(torch.randn(tokens, width, device=DEVICE) * 1e-3).bfloat16() for _ in range(COPIES)]

    make = passes(run, model, leaves, grads)
    for _ in range(3):  # delayed scales look back, and are known to after two steps
        with held_weights(model):
            make(0)()
    with held_weights(model):
        row: dict[str, Any] = {"ms": round(median_ms(make, CUDA, options.rounds), 4)}
        if CUDA:
            top = kernels(make(0), 24)["top"]
            row["kernels"] = {name: found for name, found in top.items() if "nvjet" not in name and "gemm" not in name}
    return row


class Alone(torch.nn.Module):
    """A feed-forward layer as a model."""

    def __init__(self, mlp: MLP):
        super().__init__()
        self.mlp = mlp


def mlps(options: argparse.Namespace, left: Callable[[], float]) -> dict[str, Any]:
    """Every feed-forward layer by every path, as long as there is time."""
    rows: dict[str, Any] = {}
    names = ("bf16", "fp8 layered", "fp8", "fp8-delayed layered", "fp8-delayed")
    for name, shape in (SMOKE_FEED_FORWARDS if options.smoke else FEED_FORWARDS).items():
        row = rows[name] = {}
        for path in names:
            if left() < 15 and not options.smoke:
                print(f"{name} {path}: not timed, the time is over", flush=True)
                continue
            row[path] = attempt(lambda p=path, s=shape: mlp_row(*PATHS[p], s, options))
            print(f"{name:12} {path:20}", row[path] if isinstance(row[path], str) else row[path]["ms"], flush=True)
            for kernel, (ms, count) in (row[path].get("kernels", {}) if isinstance(row[path], dict) else {}).items():
                print(f"  {ms:8.3f} ms {count:4.0f} x  {kernel}", flush=True)
    return rows


def layers(options: argparse.Namespace, left: Callable[[], float]) -> dict[str, Any]:
    """Every layer by every path, as long as there is time."""
    rows: dict[str, Any] = {}
    for name, shape in (SMOKE if options.smoke else LAYERS).items():
        if left() < 25 and not options.smoke:
            print(f"{name}: not timed, the time is over", flush=True)
            continue
        row: dict[str, Any] = {}
        for path, (precision, kind) in PATHS.items():
            if kind == "layered":  # one layer has nothing to hand over to
                continue
            row[path] = attempt(lambda p=precision, k=kind, s=shape: round(layer_ms(p, k, s, options.rounds), 4))
        rows[name] = row
        print(f"{name:14}", "  ".join(f"{path} {ms}" for path, ms in row.items()), flush=True)
    return rows


def gpt2(precision: str, smoke: bool) -> tuple[Any, Any, list[dict[str, torch.Tensor]]]:
    """gpt2-124m with its step and four batches, as bench/peers.py has them."""
    B, T = (2, 32) if smoke else (32, 1024)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 512} if smoke else {}
    torch.manual_seed(0)
    config = fewbits.ModelConfig(context=T, **shape)
    model = fewbits.prepare(fewbits.Transformer(config), precision).to(DEVICE)
    if CUDA:
        model.compile_blocks()
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    step = fewbits.Step(model, fewbits.AdamW(groups, lr=1e-4), precision)
    tokens = torch.randint(config.vocab_size, (4, B, T + 1), device=DEVICE)
    return model, step, [{"input_ids": t[:, :-1].contiguous(), "labels": t[:, 1:].contiguous()} for t in tokens]


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def hold_ms(precision: str, path: str, smoke: bool) -> dict[str, float]:
    """Entering and leaving `held_weights` of the whole model: what the host takes, and until the device is through."""
    take(path)
    model = gpt2(precision, smoke)[0]
    host, both = [], []
    for _ in range(12):
        wait()
        start = time.perf_counter()
        with held_weights(model):
            pass
        host.append(time.perf_counter() - start)
        wait()
        both.append(time.perf_counter() - start)
    return {"host_ms": 1e3 * statistics.median(host[2:]), "ms": 1e3 * statistics.median(both[2:])}


def step_ms(precision: str, path: str, options: argparse.Namespace) -> dict[str, Any]:
    """Steps of gpt2-124m waited for one by one, and enqueued ahead; the kernels that take most, for fp8."""
    take(path)
    _, step, batches = gpt2(precision, options.smoke)
    turn = itertools.cycle(batches)
    started = time.perf_counter()
    loss = [float(step([next(turn)]).loss) for _ in range(5)]
    first, waited = time.perf_counter() - started, []
    count = 2 if options.smoke else 12
    for _ in range(count):
        start = time.perf_counter()
        step([next(turn)])
        wait()
        waited.append(1e3 * (time.perf_counter() - start))
    start = time.perf_counter()
    for _ in range(count):
        step([next(turn)])
    host = 1e3 * (time.perf_counter() - start) / count
    wait()
    ahead = 1e3 * (time.perf_counter() - start) / count
    tokens = batches[0]["labels"].numel()
    row: dict[str, Any] = {"waited_ms": statistics.median(waited), "ahead_ms": ahead, "host_ms": host}
    row |= {"tokens_per_s": tokens / statistics.median(waited) * 1e3, "first_steps_s": first, "loss": loss[-1]}
    if CUDA and precision.startswith("fp8"):
        row["kernels"] = kernels(lambda: step([next(turn)]), 30 if path == "kernel" else 12)
    return row


def kernels(work: Callable[[], Any], most: int, calls: int = 3) -> dict[str, Any]:
    """Milliseconds a call on the device of the kernels that take most, how often each runs, and of all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            work()
        wait()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    top = {
        event.key[:110]: [round(event.self_device_time_total / calls / 1e3, 3), event.count / calls]
        for event in events[:most]
    }
    total = sum(event.self_device_time_total for event in events) / calls / 1e3
    return {"total_ms": round(total, 2), "launches": sum(e.count for e in events) / calls, "top": top}


def attempt(work: Callable[[], Any]) -> Any:
    """What `work` returns, or how it failed: one broken path must not hide the others."""
    try:
        return work()
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error)[:300]}"


def steps(options: argparse.Namespace, left: Callable[[], float]) -> dict[str, Any]:
    """Whole steps by every path but rows, as long as there is time."""
    rows: dict[str, Any] = {}
    order = ("fp8", "bf16", "fp8-delayed", "fp8 layered", "fp8-delayed layered", "fp8 definition")
    for name in (n for n in order if n in options.steps.split(",")):
        if left() < 20 and not options.smoke:
            print(f"step {name}: not timed, the time is over", flush=True)
            continue
        rows[name] = attempt(lambda n=name: step_ms(*PATHS[n], options))
        shown = rows[name]
        if isinstance(shown, dict):
            top = shown.get("kernels", {}).get("top", {})
            print(f"step {name:15}", {k: round(v, 2) for k, v in shown.items() if isinstance(v, float)}, flush=True)
            if top:
                print(f"  kernels {shown['kernels']['total_ms']} ms, {shown['kernels']['launches']:.0f} launches")
                for key, (ms, count) in list(top.items())[:12]:
                    print(f"  {ms:8.3f} ms {count:6.0f} x  {key}", flush=True)
        else:
            print(f"step {name}: {shown}", flush=True)
        if CUDA:
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Runs the parts that are asked for, prints as it goes, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, any device, nothing written")
    parser.add_argument("--only", default="check,hold,steps,layers")
    parser.add_argument("--steps", default="fp8,bf16,fp8-delayed,fp8 definition", help="which whole steps to time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=110, help="nothing further is compiled after this long")
    options = parser.parse_args()
    started = time.perf_counter()

    def left() -> float:
        return float(options.seconds - (time.perf_counter() - started))

    results: dict[str, Any] = {"header": header()}
    for part in options.only.split(","):
        if part == "check":
            results[part] = attempt(check)
        elif part == "hold":
            cases = {p: v for p, v in PATHS.items() if p.startswith("fp8")} | {
                "fp8-delayed definition": ("fp8-delayed", "definition")
            }
            results[part] = {p: attempt(lambda v=v: hold_ms(*v, options.smoke)) for p, v in cases.items()}
            print("hold", results[part], flush=True)
        else:
            results[part] = {"steps": steps, "layers": layers, "mlps": mlps}[part](options, left)
        results["seconds"] = round(time.perf_counter() - started, 1)
        results["choices"] = {key: list(Choice(*value)) for key, value in dispatch.recorded().items()}
        if not options.smoke:
            folder = Path(os.environ.get("OUT", "."))
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"lowbit_layers-{options.only.replace(',', '-')}.json"
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({"seconds": results["seconds"], "parts": options.only}))


if __name__ == "__main__":
    main()
