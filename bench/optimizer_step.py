"""What the optimizer costs alone: our AdamW as one launch, as compiled pieces, and torch's, on the shapes of a model.

    python bench/optimizer_step.py --model llama-1b gpt2-124m --check --sweep --out optimizer_step.json

Contestants take turns for `--rounds` rounds of `--steps` calls each, so that drift and neighbours hit all alike; the
median of the rounds counts. On CUDA the time is that of the device between two events; `host_ms` is the time until the
call returns, taken with an idle device. `bytes` is what the work must at least read and write: an update reads weight,
what is kept beside it, moments and gradient, and writes all but the gradient; a norm reads the gradients. `of_copy` is
the rate against that of `copy_` between two large tensors, which takes its turn like all others. "step" is the norm,
the clip coefficient and the update. Gradients have the dtype of the weight. `--sweep` tries other cuts of the tensors
into programs; what has not begun after `--limit` seconds is left out, and what fails is recorded as an error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.kernels import update as kernel
from fewbits.kernels.update import Cut
from fewbits.optim.adamw import AdamW
from fewbits.optim.clip import coefficient, measure

START = time.perf_counter()

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


CUTS = [Cut(block, warps) for block, warps in ((512, 4), (1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8))]
NORM_CUTS = [
    Cut(norm_block=block, norm_repeat=repeat, norm_warps=warps)
    for block, repeat, warps in ((1024, 8, 4), (2048, 4, 4), (2048, 8, 4), (2048, 16, 4), (4096, 4, 8), (4096, 8, 8))
]


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)


class Entry:
    """One thing to time: `work()` moves at least `bytes` bytes."""

    def __init__(self, name: str, work: Callable[[], Any], size: int, note: Callable[[], Any] = lambda: None):
        self.name, self.work, self.bytes, self.note = name, work, size, note
        self.device_ms: list[float] = []
        self.host_ms: list[float] = []
        self.error = ""

    def attempt(self, action: Callable[[], None]) -> None:
        """An entry that fails is out, the others go on."""
        if self.error:
            return
        try:
            action()
        except Exception as error:
            self.error = "".join(traceback.format_exception_only(error)).strip()
            say(f"{self.name} failed: {self.error}")

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "bytes": self.bytes, "note": self.note()}
        if self.error or not self.device_ms:
            return {**row, "error": self.error or "left out"}
        ms = statistics.median(self.device_ms)
        host = statistics.median(self.host_ms)
        return {**row, "ms": ms, "host_ms": host, "gb_per_s": self.bytes / ms / 1e6, "rounds_ms": self.device_ms}


def timed(function: Callable[[], Any], steps: int, cuda: bool) -> tuple[float, float]:
    """(device ms, host ms) of one call: the mean of `steps` calls, and the first of them until it returns."""
    if not cuda:
        start = time.perf_counter()
        for _ in range(steps):
            function()
        spent = (time.perf_counter() - start) * 1000 / steps
        return spent, spent
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()  # also keeps the device busy while the host gets ahead
    host = (time.perf_counter() - start) * 1000
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(steps):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / steps, host


def weights(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.randn(shape, device=device).mul_(0.02).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter).mul_(1e-3)
    return parameters


def update_bytes(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> int:
    """Weight and state read and written once, the gradient read once."""
    total = 0
    for p in parameters:
        state = [v for v in optimizer.state[p].values() if torch.is_tensor(v) and v.shape == p.shape]
        total += sum(2 * t.numel() * t.itemsize for t in [p, *state]) + p.numel() * p.itemsize
    return total


def ours(name: str, parameters: list[nn.Parameter], master: str, compile: bool | str) -> tuple[AdamW, list[Entry]]:
    """Our optimizer, stepped once, and its entries."""
    optimizer = AdamW(parameters, lr=1e-4, master=master, compile=compile)
    device = parameters[0].device
    one, yes = torch.ones((), device=device), torch.ones((), dtype=torch.bool, device=device)
    gradients: dict[Any, Tensor] = {p: p.grad for p in parameters if p.grad is not None}

    def update() -> None:
        optimizer.apply(factor=one, applied=yes, lr_factor=one, gradients=gradients)

    def step() -> None:
        norm = optimizer.grad_norm(gradients)
        factor = coefficient(norm, 1.0)
        optimizer.apply(factor=factor, applied=torch.isfinite(norm), lr_factor=one, gradients=gradients)

    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    say(f"{name}: first step {time.perf_counter() - start:.1f} s ({optimizer.execution.value})")
    read, moved = sum(g.numel() * g.itemsize for g in gradients.values()), update_bytes(optimizer, parameters)
    return optimizer, [
        Entry(f"{name}, update", update, moved, lambda: list(optimizer.execution)),
        Entry(f"{name}, norm", lambda: optimizer.grad_norm(gradients), read, lambda: list(optimizer.execution)),
        Entry(f"{name}, step", step, moved + read, lambda: list(optimizer.execution)),
    ]


def torchs(parameters: list[nn.Parameter], fused: bool) -> list[Entry]:
    """torch's AdamW on fp32 weights, and its clipping."""
    name = f"torch fp32 {'fused' if fused else 'foreach'}"
    options: dict[str, Any] = {"fused": True} if fused else {"foreach": True}
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **options)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    step()
    read, moved = sum(p.numel() * 4 for p in parameters), update_bytes(optimizer, parameters)
    return [
        Entry(f"{name}, update", optimizer.step, moved),
        Entry(f"{name}, clip_grad_norm_", lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0), 3 * read),
        Entry(f"{name}, step", step, moved + 3 * read),
    ]


def recut(entry: Entry, optimizer: AdamW, cut: Cut, label: str) -> Entry:
    """`entry` with tables cut in another way; the tables of every cut stay, so that taking turns costs nothing."""
    made: list[Any] = []

    def work() -> None:
        before = optimizer.cut, optimizer._tables
        optimizer.cut, optimizer._tables = cut, made[0] if made else None
        try:
            entry.work()
            made[:] = [optimizer._tables]
        finally:
            optimizer.cut, optimizer._tables = before

    return Entry(f"{entry.name}, {label}", work, entry.bytes)


def copying(device: str, bytes: int) -> Entry:
    source, target = (torch.zeros(bytes // 4, dtype=torch.int32, device=device) for _ in range(2))
    return Entry("copy", lambda: target.copy_(source), 2 * bytes)


def take_turns(entries: list[Entry], options: argparse.Namespace, cuda: bool) -> None:
    for entry in entries:
        entry.attempt(lambda entry=entry: (entry.work(), entry.work()))  # type: ignore[misc]
    for _ in range(options.rounds):
        for entry in entries:

            def once(entry: Entry = entry) -> None:
                device_ms, host_ms = timed(entry.work, options.steps, cuda)
                entry.device_ms.append(device_ms)
                entry.host_ms.append(host_ms)

            entry.attempt(once)


def in_time(options: argparse.Namespace) -> bool:
    return time.perf_counter() - START < options.limit


def field(shapes: list[tuple[int, ...]], options: argparse.Namespace, device: str) -> Iterator[list[Entry]]:
    """Groups of entries, made one after the other as long as time is left."""
    bf16, fp32, cuda = torch.bfloat16, torch.float32, device.startswith("cuda")
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    yield [copying(device, min(2**31, 16 * numel))]
    yield torchs(weights(shapes, fp32, device), fused=True)
    parameters = weights(shapes, bf16, device)
    optimizer, entries = ours("fewbits split", parameters, "split", "auto")
    yield entries
    if cuda and in_time(options):
        yield ours("fewbits split compiled pieces", weights(shapes, bf16, device), "split", True)[1]
    if options.sweep and optimizer.execution.value == "kernel":
        for cut in CUTS:
            if in_time(options):
                yield [recut(entries[0], optimizer, cut, f"block {cut.block} warps {cut.warps}")]
        for cut in NORM_CUTS:
            if in_time(options):
                label = f"block {cut.norm_block} repeat {cut.norm_repeat} warps {cut.norm_warps}"
                yield [recut(entries[1], optimizer, cut, label)]
    if in_time(options) and numel < 5e8:
        yield ours("fewbits fp32 master", weights(shapes, bf16, device), "fp32", "auto")[1]
        yield ours("fewbits fp32 weights", weights(shapes, fp32, device), "none", "auto")[1]


def race(model: str, options: argparse.Namespace, device: str) -> dict[str, Any]:
    cuda = device.startswith("cuda")
    shapes = shapes_of(model)
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    say(f"{model}: {numel / 1e6:.1f}M parameters in {len(shapes)} tensors")
    entries: list[Entry] = []
    groups = field(shapes, options, device)
    while True:
        try:
            entries += next(groups)
        except StopIteration:
            break
        except Exception as error:  # what comes after in this model is lost, the rest is not
            entries.append(failed := Entry("making the contestants", lambda: None, 0))
            failed.error = f"{type(error).__name__}: {error}"
            say(traceback.format_exc())
            break
    entries = [entry for entry in entries if options.only in entry.name or entry.name == "copy"]
    take_turns(entries, options, cuda)
    rows = [entry.row() for entry in entries]
    copy_rate = next((row["gb_per_s"] for row in rows if row["name"] == "copy" and "ms" in row), None)
    for row in rows:
        if "ms" in row and copy_rate:
            row["of_copy"] = row["gb_per_s"] / copy_rate
            print(
                f"{row['name']:55} {row['ms']:9.3f} ms  host {row['host_ms']:8.3f} ms  {row['gb_per_s']:8.1f} GB/s"
                f"  {row['of_copy']:6.1%} of copy",
                flush=True,
            )
    return {"model": model, "parameters": numel, "tensors": len(shapes), "rows": rows}


def check(device: str) -> dict[str, Any]:
    """Does the kernel give the bits of the eager definition, and of the other master kind, over 20 steps on this device?

    Values that differ are counted, with the largest difference; norms are compared with fp64.
    """
    shapes = [(512, 257), (7,), (1024, 64), (33, 3), ()] if device != "cpu" else [(16, 129), (7,), ()]
    runs: dict[str, tuple[AdamW, list[nn.Parameter]]] = {}
    for name, master, compile in (
        ("kernel", "split", "auto"),
        ("fp32 master", "fp32", "auto"),
        ("eager", "split", False),
    ):
        torch.manual_seed(0)
        parameters = weights(shapes, torch.bfloat16, device)
        runs[name] = AdamW(parameters, lr=1e-2, master=master, compile=compile), parameters
    one = torch.ones((), device=device)
    errors = []
    for step in range(20):
        torch.manual_seed(step)
        values = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
        for optimizer, parameters in runs.values():
            optimizer.apply(
                factor=one * 0.3,
                applied=one.bool(),
                lr_factor=one,
                gradients=dict(zip(parameters, values, strict=True)),
            )
        optimizer, parameters = runs["kernel"]
        exact = torch.cat([value.double().flatten() for value in values]).norm().item()
        found = optimizer.grad_norm(dict(zip(parameters, values, strict=True))).item()
        errors += [abs(found / exact - 1), abs(measure(values).item() / exact - 1)]
    kernel_run, compared = runs.pop("kernel"), {}
    for name, (optimizer, parameters) in runs.items():
        pairs = [
            (kernel_run[0].exact_weight(p), optimizer.exact_weight(q))
            for p, q in zip(kernel_run[1], parameters, strict=True)
        ]
        compared[name] = {
            "differ": sum(int((a != b).sum()) for a, b in pairs),
            "largest": max(float((a - b).abs().max()) for a, b in pairs),
        }
    result = {"execution": list(kernel_run[0].execution), "probe": kernel.failure(torch.device(device)), **compared}
    result |= {"norm_error": max(errors[::2]), "measure_error": max(errors[1::2])}
    say(f"check: {result}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=["nano"], nargs="+")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--check", action="store_true", help="compare results before anything is timed")
    parser.add_argument("--sweep", action="store_true", help="try other cuts of the tensors into programs")
    parser.add_argument("--limit", type=float, default=70.0, help="seconds after which no new contestant is made")
    parser.add_argument("--only", default="", help="only contestants whose name contains this")
    parser.add_argument("--out", type=Path, help="file; default optimizer_step.json in $OUT, if that is set")
    options = parser.parse_args()
    out = options.out or (Path(os.environ["OUT"]) / "optimizer_step.json" if "OUT" in os.environ else None)
    cuda = options.device.startswith("cuda")
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "models": [],
    }

    def save() -> None:
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")

    if options.check:
        try:
            result["check"] = check(options.device)
        except Exception as error:
            result["check"] = {"error": f"{type(error).__name__}: {error}"}
            say(traceback.format_exc())
        save()
    for model in options.model:
        result["models"].append(race(model, options, options.device))
        save()
        if cuda:
            torch.cuda.empty_cache()
    say("done")


if __name__ == "__main__":
    main()
