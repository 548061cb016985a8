"""Two CPU cores: our step in every precision beside transformers' Trainer and Lightning on one GPT-2 shape, interleaved.

    python bench/cpu_peers.py [--rounds 3] [--sizes nano,12m]
    python bench/cpu_peers.py --sizes 28m --cases "ours int8,ours bf16-mixed,Trainer bf16,Lightning bf16" --name cpu_28m

Run it where two cores are idle (taskset -c 0,1). Writes bench/results/cpu_peers.json. "heap kept" gives the Trainer what our
Step does to the heap of the process (fewbits/kernels/heap.py), so that the rest can be compared. A peer that cannot be
imported is left out, with the reason. --note goes into the file: say there what else was running.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from blocks import ROOT, alternate, save
from peers import table

sys.path.insert(0, str(ROOT))

from fewbits.lab.variants import split_values

SIZES = {
    "nano": "V=4096 T=256 B=8 L=4 H=4 D=256",
    "12m": "V=4096 T=256 B=8 L=6 H=6 D=384",
    "28m": "V=4096 T=256 B=8 L=8 H=8 D=512",
}
CASES = {
    "ours fp32": "ours fp32",
    "ours bf16-mixed": "ours bf16-mixed",
    "ours fp16-mixed": "ours fp16-mixed",
    "ours fp8": "ours fp8",
    "ours fp8-row": "ours fp8-row",
    "ours fp8-block": "ours fp8-block",
    "ours int8": "ours int8",
    "Trainer fp32": "trainer fp32",
    "Trainer bf16": "trainer bf16",
    "Trainer fp32 heap kept": "trainer fp32 heap=1",
    "Trainer bf16 heap kept": "trainer bf16 heap=1",
    "Lightning fp32": "lightning fp32",
    "Lightning bf16": "lightning bf16",
    "ours fp32 compiled": "ours fp32 compile=1",
    "ours bf16-mixed compiled": "ours bf16-mixed compile=1",
}
NEEDS = {"trainer": "transformers", "lightning": "lightning"}


def missing(case: str) -> str:
    """Why a case cannot run here, or ""."""
    module = NEEDS.get(CASES[case].split()[0], "fewbits")
    return "" if importlib.util.find_spec(module) else f"{module} is not installed"


def main() -> None:
    """Alternates all cases for every size and saves the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sizes", default="nano,12m")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--name", default="cpu_peers")
    parser.add_argument("--note", default="")
    a = parser.parse_args()
    names, sizes = split_values(a.cases), split_values(a.sizes)
    for what, given, known in (("case", names, CASES), ("size", sizes, SIZES)):
        if not given:
            parser.error(f"--{what}s names none")
        if unknown := [name for name in given if name not in known]:
            parser.error(f"there is no {what} {unknown[0]!r}; there are {', '.join(known)}")
    left_out = {name: reason for name in names if (reason := missing(name))}
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    results: dict[str, dict[str, Any]] = {}
    for size in sizes:
        shape = [*SIZES[size].split(), "warmup=3", f"steps={a.steps}"]
        cases = {
            name: [*CASES[name].split()[:2], *shape, *CASES[name].split()[2:]] for name in names if name not in left_out
        }
        results[size] = alternate(str(Path(__file__).parent / "peers.py"), cases, a.rounds)
        print(f"\n{size}: {SIZES[size]}")
        table(results[size], 8 * 256, next(iter(cases)))
    save(a.name, {"note": a.note, "left out": left_out, "shapes": SIZES, "results": results})


if __name__ == "__main__":
    main()
