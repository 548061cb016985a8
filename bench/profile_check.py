"""Whether the profile knows what it sees: `fewbits bench` and `fewbits train --profile` of GPT-2 124M at full shape on a GPU.

    OUT=/tmp python bench/profile_check.py --name profile_check_h200     # a GPU, under 90 seconds
    OUT=/tmp python bench/profile_check.py --smoke   # tiny shapes, any device

Each variant must put at least 95 % of the kernels' time into a part by its rules, and at least 95 % of the matmul time of
a 16-bit or fp8 step must have run on tensor cores; names that no rule knows are listed, with the longest kernels and their
parts. A variant that fails is recorded with its error and the next one runs. Exit code 1 where one failed or missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from blocks import ROOT, header, save

sys.path.insert(0, str(ROOT))

from fewbits.lab.bench import bench
from fewbits.train.config import Config, load_recipe
from fewbits.train.trainer import train

LEAST = 0.95
LATEST = {
    "train bf16-mixed": 0.0,
    "bench bf16-mixed": 0.0,
    "bench fp8-delayed, head=fp8": 62.0,
}  # begins only before so many seconds; 0: always


def shape(smoke: bool) -> Config:
    """32 windows of 1,024 tokens in one piece, on text and a tokenizer that cost no time."""
    config = load_recipe("gpt2-124m")
    model, train_config = config.model, replace(config.train, batch_size=32, micro_batches=1, compile="auto")
    if smoke:
        model = replace(model, n_layer=2, n_embd=64, n_head=2, context=64, vocab_size=512)
        train_config = replace(train_config, batch_size=4, compile="false")
    train_config = replace(
        train_config, max_steps=8, eval_batches=1, eval_every=0, sample_every=0, save_every=0, log_every=1
    )
    if torch.cuda.is_available() and not smoke:
        train_config = replace(train_config, compile="true")
    data = replace(config.data, data="python", tokenizer="bytes")
    optim = replace(config.optim, warmup_steps=2)
    return replace(config, precision="bf16-mixed", model=model, data=data, optim=optim, train=train_config)


def profiled_training(config: Config, folder: Path) -> dict[str, Any]:
    """`fewbits train --profile 3`: its profile.json, and what the run says about compiling and speed."""
    summary = train(replace(config, train=replace(config.train, out_dir=str(folder / "run"))), profile=3)
    found = json.loads((folder / "run" / "profile.json").read_text(encoding="utf-8"))
    kept = {key: summary[key] for key in ("ms_per_step", "step_tok_per_s", "mfu", "compile_s", "setup_s", "status")}
    return {"profile": found, "trace_bytes": (folder / "run" / "trace.json.gz").stat().st_size, **kept}


def benched(config: Config, precision: str, folder: Path, seconds: float) -> dict[str, Any]:
    """`fewbits bench --precisions PRECISION`: its row, with the ceilings."""
    found = bench(config, [precision], folder / "bench", seconds)
    (row,) = found.rows
    if row["status"] != "ok":
        raise RuntimeError(row["reason"])
    return {**row, "ceilings": found.document["ceilings"]}


def judged(result: dict[str, Any]) -> list[str]:
    """What a variant misses, in sentences."""
    profile, misses = result["profile"], []
    if profile["attributed"] < LEAST:
        names = "; ".join(profile["unknown"])
        misses.append(f"{100 * profile['attributed']:.1f} % of the time is attributed; unknown: {names}")
    if profile["tensor_cores"] is not None and profile["tensor_cores"] < LEAST:
        misses.append(f"{100 * profile['tensor_cores']:.1f} % of the matmul time is known to have run on tensor cores")
    return misses


def attempt(name: str, run: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """A variant in a folder of its own; an error becomes its result."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = run(Path(folder))
            result["misses"] = judged(result)
        except Exception as error:
            traceback.print_exc()
            result = {"misses": [f"{type(error).__name__}: {error}"]}
    result["wall_s"] = time.monotonic() - began
    print(f"== {name}: {'; '.join(result['misses']) or 'good'} ({result['wall_s']:.0f} s)", flush=True)
    for kernel in result.get("profile", {}).get("kernels", [])[:25]:
        print(
            f"   {kernel['ms']:8.3f} ms {kernel['part']:<14} {kernel['calls']:6.1f}x {kernel['name'][:100]}", flush=True
        )
    for part in result.get("parts", []):
        print(f"   {part['part']:<14} {part['ms']:8.2f} ms, floor {part['floor_ms']:8.2f}: {part['floor']}", flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--name", default="profile_check")
    options = parser.parse_args()
    config, began = shape(options.smoke), time.monotonic()
    seconds = 0.05 if options.smoke else 1.5
    variants: dict[str, Callable[[Path], dict[str, Any]]] = {
        "train bf16-mixed": lambda folder: profiled_training(config, folder),
        "bench bf16-mixed": lambda folder: benched(config, "bf16-mixed", folder, seconds),
        "bench fp8-delayed, head=fp8": lambda folder: benched(config, "fp8-delayed, head=fp8", folder, seconds),
    }
    results: dict[str, Any] = {**header(), "variants": {}}
    for name, run in variants.items():
        gone = time.monotonic() - began
        if LATEST[name] and gone > LATEST[name]:
            print(f"== {name}: left out after {gone:.0f} s", flush=True)
            continue
        results["variants"][name] = attempt(name, run)
        save("profile_check_smoke" if options.smoke else options.name, results)
    return int(any(result["misses"] for result in results["variants"].values()))


if __name__ == "__main__":
    sys.exit(main())
