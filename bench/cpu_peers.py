"""Two CPU cores: our fp32 and bf16-mixed steps beside transformers' Trainer on the same GPT-2 shape, interleaved.

    python bench/cpu_peers.py [--rounds 3] [--sizes nano,12m]

Run it where two cores are idle (taskset -c 0,1). Writes bench/results/cpu_peers.json. "heap kept" gives the Trainer what our
Step does to the heap of the process (fewbits/kernels/heap.py), so that the rest can be compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from blocks import alternate, save
from peers import table

SIZES = {
    "nano": "V=4096 T=256 B=8 L=4 H=4 D=256",
    "12m": "V=4096 T=256 B=8 L=6 H=6 D=384",
}
CASES = {
    "ours fp32": "ours fp32",
    "ours bf16-mixed": "ours bf16-mixed",
    "ours fp16-mixed": "ours fp16-mixed",
    "Trainer fp32": "trainer fp32",
    "Trainer bf16": "trainer bf16",
    "Trainer fp32 heap kept": "trainer fp32 heap=1",
    "Trainer bf16 heap kept": "trainer bf16 heap=1",
    "ours fp32 compiled": "ours fp32 compile=1",
    "ours bf16-mixed compiled": "ours bf16-mixed compile=1",
}


def main() -> None:
    """Alternates all cases for every size and saves the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sizes", default="nano,12m")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--name", default="cpu_peers")
    a = parser.parse_args()
    results = {}
    for size in a.sizes.split(","):
        shape = [*SIZES[size].split(), "warmup=3", f"steps={a.steps}"]
        cases = {name: [*CASES[name].split()[:2], *shape, *CASES[name].split()[2:]] for name in a.cases.split(",")}
        results[size] = alternate(str(Path(__file__).parent / "peers.py"), cases, a.rounds)
        print(f"\n{size}: {SIZES[size]}")
        table(results[size], 8 * 256, next(iter(cases)))
    save(a.name, {"shapes": SIZES, "results": results})


if __name__ == "__main__":
    main()
