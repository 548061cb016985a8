"""What a training step of llama-1b keeps in memory in bf16 and in 8 bits: peak and breakdown by role, compiled.

    python bench/activation_memory.py            # on an H100, under 3 minutes: bench/results/activation_memory_h100.json
    python bench/activation_memory.py --smoke    # a tiny Llama, any machine, writes nothing

16,384 tokens in one micro-batch (batch 8, context 2,048), AdamW with the precision's masters, one process a precision.
The peak is the allocator's over three steps after the first two; roles are those of fewbits/train/memory.py, with the
codes of weights that a step holds apart. What autograd keeps is measured on its own: what is allocated between forward
and backward beyond what rests and is held.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from blocks import ROOT, header, save

PRECISIONS = ("bf16-mixed", "fp8", "fp8-row", "fp8-block")
GIB = 2**30


def measure(precision: str, smoke: bool) -> dict[str, Any]:
    """Peak bytes by role, bytes kept for backward and milliseconds a step, in this process."""
    import torch

    from fewbits.nn.lowbit import held_weights
    from fewbits.precision.precision import Precision
    from fewbits.train.build import build_step
    from fewbits.train.config import load_recipe
    from fewbits.train.memory import MemoryMeter, live_bytes

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    config = load_recipe("llama-1b")
    batch, context = (2, 64) if smoke else (8, 2048)
    if smoke:
        shape = {
            "context": context,
            "n_layer": 2,
            "n_head": 4,
            "n_kv_head": 2,
            "n_embd": 128,
            "n_ff": 256,
            "vocab_size": 512,
        }
        config = replace(config, model=replace(config.model, **shape))
    config = replace(config, train=replace(config.train, graph="false"))  # a replay allocates nothing that shows
    model, optimizer, step = build_step(config, Precision.parse(precision), device, compile=cuda)
    ids = torch.randint(config.model.vocab_size, (batch, context + 1), generator=torch.Generator().manual_seed(0))
    micro_batch = {"input_ids": ids[:, :-1].to(device), "labels": ids[:, 1:].to(device)}

    def run() -> Any:
        return step([micro_batch])

    started = time.perf_counter()
    for _ in range(2):
        float(run().loss)
    getattr(model, "fewbits_remainders", {}).clear()
    first = time.perf_counter() - started
    kept, held = kept_bytes(model, micro_batch, held_weights, live_bytes, cuda)
    meter = MemoryMeter(model, optimizer, device, 1)
    if not cuda:
        meter.measure(run)
    started = time.perf_counter()
    for _ in range(3):
        loss = float(run().loss)
    roles = meter.roles() or {}
    roles["held codes"] = min(held, roles.get("activations", 0))
    roles["activations"] = roles.get("activations", 0) - roles["held codes"]
    return {
        "peak": meter.peak(),
        "roles": roles,
        "kept_for_backward": kept,
        "ms": round((time.perf_counter() - started) / 3 * 1e3, 2),
        "first_two_steps_s": round(first, 1),
        "loss": loss,
    }


def kept_bytes(model: Any, micro_batch: Any, held_weights: Any, live_bytes: Any, cuda: bool) -> tuple[int | None, int]:
    """(bytes allocated between forward and backward, beyond what is there before; bytes of the held codes). The kept ones
    contain the gradients that the loss head makes in its forward pass."""
    import torch

    with held_weights(model):
        codes = [t for m in model.modules() for t in (getattr(m, "held", None) or ()) if t is not None]
        held = live_bytes(codes)
        if not cuda:
            return None, held
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model.loss_sum(micro_batch)
        kept = torch.cuda.memory_allocated() - before
        (loss * 1e-5).backward()
    for parameter in model.parameters():
        parameter.grad = None
    return kept, held


def main() -> None:
    """Runs one process a precision, prints the table, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on any device, nothing written")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.smoke)))
        return
    results: dict[str, Any] = {}
    for precision in options.precisions.split(","):
        command = [sys.executable, str(Path(__file__)), "--case", precision, *(["--smoke"] if options.smoke else [])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
        lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
        good = process.returncode == 0 and lines
        results[precision] = json.loads(lines[-1]) if good else {"error": process.stderr[-2000:]}
        show(precision, results[precision], results)
    if options.smoke:
        print(json.dumps({**header(), "precisions": list(results)}))
    else:
        save("activation_memory_h100", {"tokens": 8 * 2048, "model": "llama-1b", "results": results})


def show(precision: str, row: dict[str, Any], results: dict[str, Any]) -> None:
    """One line: peak, activations, each against the first precision, and the rest of the roles."""
    if "error" in row:
        print(f"{precision:12} {row['error']}", flush=True)
        return
    base = next(iter(results.values()))
    parts = [f"{precision:12} {row['ms']:9.1f} ms  peak {(row['peak'] or 0) / GIB:6.2f} GiB"]
    if row is not base and "peak" in base:
        for name, mine, theirs in (
            ("peak", row["peak"], base["peak"]),
            ("activations", row["roles"]["activations"], base["roles"]["activations"]),
            ("kept", row["kept_for_backward"], base["kept_for_backward"]),
        ):
            if mine and theirs:
                parts.append(f"{name} {100 * (mine / theirs - 1):+.1f} %")
    parts += [f"{role} {count / GIB:.2f}" for role, count in row["roles"].items() if count > GIB / 100]
    print("  ".join(parts), flush=True)


if __name__ == "__main__":
    main()
