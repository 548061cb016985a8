"""One GPU: GPT-2 124M in every precision beside transformers' Trainer, compiled, interleaved.

    python bench/gpu_peers.py [--rounds 2]

Writes bench/results/gpu_peers.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from blocks import alternate, save
from peers import table

SHAPE = "V=50304 T=1024 B=32 L=12 H=12 D=768 warmup=8 steps=16 compile=1"
CASES = {
    "Trainer bf16 compiled": "trainer bf16",
    "ours bf16-mixed": "ours bf16-mixed",
    "ours fp16-mixed": "ours fp16-mixed",
    "ours bf16-true": "ours bf16-true",
    "ours fp16-true": "ours fp16-true",
    "ours tf32": "ours tf32",
    "ours fp32": "ours fp32",
}


def main() -> None:
    """Alternates all cases and saves the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", default=",".join(CASES))
    a = parser.parse_args()
    cases = {name: [*CASES[name].split(), *SHAPE.split()] for name in a.cases.split(",")}
    results = alternate(str(Path(__file__).parent / "peers.py"), cases, a.rounds)
    table(results, 32 * 1024, next(iter(cases)))
    save("gpu_peers", {"shape": SHAPE, "results": results})


if __name__ == "__main__":
    main()
