"""What the update alone costs: our AdamW with every master kind against torch's, on the shapes of a model.

    python bench/optimizer_step.py --model gpt2-124m --out bench/results/optimizer_step.json

Contestants take turns for `--rounds` rounds of `--steps` updates each, so that drift and neighbours hit all alike;
the median of the rounds counts. On CUDA the time is that of the device between two events; `host_ms` is what the host
needs to submit one update. `bytes` is what one update must at least read and write; GB/s is that over the time.
Gradients have the dtype of the weight.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits.optim.adamw import AdamW
from fewbits.optim.clip import coefficient, measure

MODELS = {  # vocabulary, context (learned positions), layers, width, feed-forward, kv width, biases
    "nano": (4096, 256, 4, 256, 1024, 256, True),
    "gpt2-124m": (50304, 1024, 12, 768, 3072, 768, True),
    "llama-1b": (32000, 0, 22, 2048, 5632, 256, False),
}


def shapes_of(model: str) -> list[tuple[int, ...]]:
    """The parameter shapes of a GPT-2 (biases, learned positions, tied head) or a Llama."""
    vocabulary, context, layers, width, inner, kv, bias = MODELS[model]
    block: list[tuple[int, ...]] = [
        (width, width),
        (kv, width),
        (kv, width),
        (width, width),
        (inner, width),
        (width, inner),
    ]
    block += [(width,), (width,)]
    if bias:
        block += [(width,)] * 7 + [(inner,)]
    else:
        block += [(inner, width)]
    rest: list[tuple[int, ...]] = [(vocabulary, width), (width,)]
    rest += [(context, width), (width,)] if bias else [(vocabulary, width)]
    return rest + block * layers


class Contestant:
    """One optimizer on weights of its own."""

    def __init__(
        self, name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str, make: Callable[..., Any]
    ):
        self.name, self.dtype = name, dtype
        self.parameters = [nn.Parameter(torch.randn(shape, device=device).mul_(0.02).to(dtype)) for shape in shapes]
        for parameter in self.parameters:
            parameter.grad = torch.randn_like(parameter).mul_(1e-3)
        self.optimizer = make(self.parameters)
        self.device_ms: list[float] = []
        self.host_ms: list[float] = []
        one = torch.ones((), device=device)
        self.given = {"factor": one, "lr_factor": one, "applied": torch.ones((), dtype=torch.bool, device=device)}

    def update(self) -> None:
        if isinstance(self.optimizer, AdamW):
            self.optimizer.apply(**self.given)
        else:
            self.optimizer.step()

    def bytes(self) -> int:
        """Read and write weight and state once, read the gradient once."""
        total = 0
        for parameter in self.parameters:
            state = [
                v for v in self.optimizer.state[parameter].values() if torch.is_tensor(v) and v.shape == parameter.shape
            ]
            total += (
                sum(2 * t.numel() * t.itemsize for t in [parameter, *state])
                + parameter.grad.numel() * parameter.grad.itemsize
            )
        return total


def timed(function: Callable[[], Any], steps: int, cuda: bool) -> tuple[float, float]:
    """(device ms, host ms) of one call, averaged over `steps` calls."""
    if not cuda:
        start = time.perf_counter()
        for _ in range(steps):
            function()
        spent = (time.perf_counter() - start) * 1000 / steps
        return spent, spent
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    for _ in range(steps):
        function()
    end.record()
    host = (time.perf_counter() - start) * 1000 / steps
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / steps, host


def contestants(shapes: list[tuple[int, ...]], device: str, compile: bool | str) -> list[Contestant]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

    def ours(master: str) -> Callable[..., AdamW]:
        return lambda p: AdamW(p, lr=1e-4, master=master, compile=compile)

    def torchs(**options: Any) -> Callable[..., torch.optim.AdamW]:
        return lambda p: torch.optim.AdamW(p, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **options)

    entries: list[tuple[str, torch.dtype, Callable[..., Any]]] = [
        ("fewbits bf16 split", bf16, ours("split")),
        ("fewbits bf16 fp32 master", bf16, ours("fp32")),
        ("fewbits bf16 none", bf16, ours("none")),
        ("fewbits fp16 fp32 master", fp16, ours("fp32")),
        ("fewbits fp32", fp32, ours("none")),
        ("torch fp32 fused", fp32, torchs(fused=True)),
        ("torch fp32 foreach", fp32, torchs(foreach=True)),
        ("torch fp32 single", fp32, torchs(foreach=False)),
        ("torch bf16 fused, bf16 moments, no master", bf16, torchs(fused=True)),
    ]
    return [Contestant(name, shapes, dtype, device, make) for name, dtype, make in entries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="nano")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", choices=["auto", "true", "false"], default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", default="", help="only contestants whose name contains this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    compile: bool | str = {"auto": "auto", "true": True, "false": False}[options.compile]
    shapes = shapes_of(options.model)
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    field = [c for c in contestants(shapes, options.device, compile) if options.only in c.name]
    for contestant in field:
        start = time.perf_counter()
        contestant.update()
        if cuda:
            torch.cuda.synchronize()
        print(f"{contestant.name}: first update {time.perf_counter() - start:.1f} s", flush=True)
        contestant.update()
    clips: dict[str, list[float]] = {"fewbits measure": [], "torch clip_grad_norm_": []}
    for _ in range(options.rounds):
        for contestant in field:
            device_ms, host_ms = timed(contestant.update, options.steps, cuda)
            contestant.device_ms.append(device_ms)
            contestant.host_ms.append(host_ms)
        gradients = [p.grad for p in field[0].parameters if p.grad is not None]
        clips["fewbits measure"].append(timed(lambda g=gradients: coefficient(measure(g), 1.0), options.steps, cuda)[0])
        peer = lambda p=field[0].parameters: torch.nn.utils.clip_grad_norm_(p, 1e9)  # noqa: E731
        clips["torch clip_grad_norm_"].append(timed(peer, options.steps, cuda)[0])
    rows = []
    for contestant in field:
        device_ms = statistics.median(contestant.device_ms)
        row = {
            "name": contestant.name,
            "ms": device_ms,
            "host_ms": statistics.median(contestant.host_ms),
            "bytes": contestant.bytes(),
            "gb_per_s": contestant.bytes() / device_ms / 1e6,
            "rounds_ms": contestant.device_ms,
            "execution": list(getattr(contestant.optimizer, "execution", ("", ""))),
        }
        rows.append(row)
        print(f"{row['name']:45} {row['ms']:9.3f} ms  host {row['host_ms']:8.3f} ms  {row['gb_per_s']:8.1f} GB/s")
    for name, values in clips.items():
        print(f"{name:45} {statistics.median(values):9.3f} ms")
    result = {
        "model": options.model,
        "parameters": numel,
        "tensors": len(shapes),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
        "clipping_ms": {name: statistics.median(values) for name, values in clips.items()},
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
