"""What one lever of the training step is worth: variants of the same step in one process, alternating A B A B.

    python bench/levers.py --recipe gpt2-124m --cases "precision=bf16-mixed,train.graph=false; precision=bf16-mixed" \
        --out bench/results/levers_NAME.json

A case is overrides of the recipe, separated by commas, and cases by semicolons; `+` stands for the comma inside of a precision.
`compile=no|blocks|auto` says how much of the model is compiled at once, `split=no` puts the gradients of q, k and v side by
side. `documents=N` cuts windows into documents of N tokens on average, which do not see each other; `mask=pairs` has
attention told so pair by pair where blocks would do. Whole steps (forward, backward, clipping, AdamW with exact master weights)
on random tokens that lie on the device.
`--profile N` adds the N kernels that take the longest.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from blocks import changed, header

from fewbits.nn.documents import document_mask
from fewbits.precision.precision import Precision
from fewbits.train.build import build_step
from fewbits.train.config import load_recipe

OWN = ("compile=", "split=", "documents=", "mask=")


def build(recipe: str, case: str, device: torch.device) -> tuple[Any, int]:
    """A step with its batch, as something to call, and the tokens in one call."""
    pairs = [pair.strip() for pair in case.split(",")]
    own = dict(pair.split("=") for pair in pairs if pair.startswith(OWN))
    compile, split = own.get("compile", "auto"), own.get("split", "yes")
    overrides = ",".join(pair for pair in pairs if pair.partition("=")[0] not in own)
    config = changed(load_recipe(recipe), overrides).check()
    model, _, step = build_step(config, Precision.parse(config.precision), device, compile != "no")
    if compile == "blocks":
        model._run_stack = None
    if split == "no":
        for block in model.blocks:
            block.attention.qkv.splits = lambda _: False
    if own.get("mask") == "pairs":
        model._mask = lambda documents, _: document_mask(documents)
    batch, parts = config.train.batch_size, config.train.micro_batches
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.model.vocab_size, (batch, config.model.context + 1), generator=generator).to(device)
    whole = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    if length := int(own.get("documents", 0)):
        whole |= documents(whole["input_ids"].shape, length, device)
    pieces = {key: value.chunk(parts) for key, value in whole.items()}
    micro_batches = [{key: pieces[key][i].contiguous() for key in pieces} for i in range(parts)]

    def take() -> Any:
        return step(micro_batches)

    take.step = step  # type: ignore[attr-defined]
    return take, batch * config.model.context


def documents(shape: tuple[int, int], length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Documents and positions [B, T] of windows that were cut from documents of `length` tokens on average (exponential)."""
    begins = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 1 / length
    begins[:, 0] = True
    places = torch.arange(shape[1]).expand(shape)
    positions = places - torch.where(begins, places, 0).cummax(1).values
    return {"documents": begins.cumsum(1).to(device, torch.int32), "positions": positions.contiguous().to(device)}


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm(take: Any, device: torch.device, least: int = 3) -> float:
    """Seconds until steps run as they will."""
    began = time.perf_counter()
    taken = 0
    while taken < least or not take.step.warm:
        take()
        wait(device)
        taken += 1
    return time.perf_counter() - began


def timed(take: Callable[[], Any], steps: int, device: torch.device) -> tuple[float, float]:
    """(ms a step, ms of the host a step until the calls return)."""
    wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        take()
    returned = time.perf_counter()
    wait(device)
    return 1e3 * (time.perf_counter() - began) / steps, 1e3 * (returned - began) / steps


def kernels(take: Callable[[], Any], count: int, device: torch.device) -> list[list[Any]]:
    """[name, ms, calls] of the longest kernels of a step, and their sum."""
    activities = [
        torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    ]
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(2):
            take()
        wait(device)
    rows = []
    for event in profiled.key_averages():
        ms = (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 2e3
        rows.append([event.key[:110], round(ms, 3), event.count / 2])
    rows.sort(key=lambda row: -row[1])
    return [["all", round(sum(row[1] for row in rows), 3), sum(row[2] for row in rows)], *rows[:count]]


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="nano")
    parser.add_argument("--cases", required=True)
    parser.add_argument("--set", default="", help="overrides of every case, first of all")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    cases = [case.strip() for case in options.cases.split(";")]
    found: dict[str, dict[str, Any]] = {}
    takes: dict[str, Any] = {}
    for case in cases:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        try:
            takes[case], tokens = build(options.recipe, ",".join(filter(None, (options.set, case))), device)
            found[case] = {"warm_up_s": warm(takes[case], device), "tokens": tokens, "ms": [], "host_ms": []}
            if device.type == "cuda":
                found[case]["peak_gib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**30
            found[case]["graph"] = takes[case].step.graph_outcome.reason
        except Exception as error:  # one variant that fails is a row
            found[case] = {"error": f"{type(error).__name__}: {str(error).strip()[:500]}"}
            takes.pop(case, None)
        print(case, found[case], flush=True)
        gc.collect()
    for _ in range(options.rounds):
        for case, take in takes.items():
            ms, host = timed(take, options.steps, device)
            found[case]["ms"].append(ms)
            found[case]["host_ms"].append(host)
    first = None
    for case, take in takes.items():
        row = found[case]
        row["median_ms"] = statistics.median(row["ms"])
        row["tok_per_s"] = 1e3 * row["tokens"] / row["median_ms"]
        row["loss"] = float(take().loss)
        first = first or row["median_ms"]
        row["speed"] = first / row["median_ms"]
        if options.profile:
            row["kernels"] = kernels(take, options.profile, device)
        host = statistics.median(row["host_ms"])
        print(
            f"{row['median_ms']:9.2f} ms  x{row['speed']:.3f}  host {host:7.2f} ms  {row['tok_per_s']:10,.0f} tok/s  "
            f"loss {row['loss']:.4f}  {case or options.recipe}",
            flush=True,
        )
        for name, ms, calls in row.get("kernels", []):
            print(f"    {ms:8.3f} ms {calls:6.0f} x  {name}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        document = {**header(), "recipe": options.recipe, "set": options.set, "cases": found}
        options.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
