"""What compiling costs a training when it first starts, and when it starts again: fresh processes, one cache folder.

    python bench/second_start.py --name cpu          # nano in bf16-mixed and fp32: bench/results/second_start_cpu.json
    python bench/second_start.py --name h200         # with a GPU: GPT-2 124M in fp8-delayed, head=fp8
    python bench/second_start.py --smoke             # a tiny shape; writes nothing

Each case is `fewbits train --compile true` three times in processes of their own: with an empty cache, and twice with what
the first left there. Seconds in the compiler are those of summary.json (`compile_s`), seconds until the first step is done
those of the whole process less the steps after it. The claim: a second start takes at most 30 % of the first's compiling.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from blocks import ROOT, header, save

CASES = {"nano bf16-mixed": ["--precision", "bf16-mixed"], "nano fp32": ["--precision", "fp32"]}
ON_A_GPU = {
    "gpt2-124m fp8-delayed, head=fp8": ["gpt2-124m", "--precision", "fp8-delayed, head=fp8", "--data", "python",
                                        "--tokenizer", "bpe:50257", "--batch_size", "32", "--micro_batches", "1"],
}  # fmt: skip
SHORT = "--max_steps 3 --warmup_steps 1 --log_every 1 --eval_batches 1 --sample_every 0 --save_every 0 --compile true"
TINY = "--n_layer 2 --n_embd 32 --n_head 2 --context 32 --batch_size 2 --tokenizer bytes"


def start(arguments: list[str], folder: Path, number: int) -> dict[str, Any]:
    """One training in a process of its own; what it says about compiling."""
    run = folder / f"run-{number}"
    words = [sys.executable, "-m", "fewbits", "train", *arguments, *SHORT.split(), "--out_dir", str(run)]
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("TORCHINDUCTOR_", "TRITON_"))
    }
    variables |= {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    began = time.perf_counter()
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {"compile_s": summary["compile_s"], "process_s": wall, "ms_per_step": summary["ms_per_step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="cpu")
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = {**header(), "cases": {}}
    cases = ON_A_GPU if torch.cuda.is_available() and not options.smoke else CASES
    for name, arguments in list(cases.items())[: 1 if options.smoke else None]:
        with tempfile.TemporaryDirectory() as folder:
            given = [*arguments, *(TINY.split() if options.smoke else [])]
            starts = [start(given, Path(folder), number) for number in range(options.starts)]
        ratios = [again["compile_s"] / starts[0]["compile_s"] for again in starts[1:]]
        results["cases"][name] = {"starts": starts, "compile_ratios": ratios, "at_most_30_percent": max(ratios) <= 0.3}
        shown = ", ".join(f"{s['compile_s']:.1f} s compiling of {s['process_s']:.1f} s" for s in starts)
        print(f"{name}: {shown}; second start {', '.join(f'{100 * r:.0f} %' for r in ratios)}", flush=True)
    if not options.smoke:
        save(f"second_start_{options.name}", results)


if __name__ == "__main__":
    main()
