"""What a comparison must find: three plants, two of them through the whole of `compare` with its subprocesses.

    python bench/planted.py [--seeds 3] [--device cpu] [--out FOLDER]

1. `bf16-true` (no master weights, updates rounded to nearest) with a small learning rate swallows updates: `worse`.
2. `fp16-mixed` without a loss scale on a model whose gradients are small: `worse` or `diverged`; with the dynamic scale
   it is `same`. Small by construction: the mean over 2^15 targets of probabilities near 2^-10 makes gradients of 2^-25,
   half the smallest number of fp16 (with 256 tokens instead of 1,024, 3 seeds gave +1.6 % with too wide an interval).
3. bf16-mixed against itself is never `better` or `worse`: 20 repetitions of the verdict with the noise of seeds, and
   one real comparison of a variant with itself, whose losses a CPU repeats bit for bit.

Everything is small and ends in minutes on two cores. Exits 1 when a plant was not found; writes
bench/results/planted.json.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from blocks import save

from fewbits.lab.compare import compare
from fewbits.lab.verdict import verdict
from fewbits.train.config import Config

SMALL_STEPS = """
name = "small-learning-rate"
[model]
context = 32
n_layer = 2
n_head = 2
n_embd = 64
[data]
tokenizer = "bytes"
[optim]
lr = 2e-5  # below half a bf16 step (2^-15) of every weight that is larger than 1/64
schedule = "constant"
weight_decay = 0.0
[train]
max_steps = 150
batch_size = 8
eval_batches = 20
eval_every = 0
save_every = 0
"""

SMALL_GRADIENTS = """
name = "small-gradients"
[model]
context = 32
n_layer = 2
n_head = 2
n_embd = 32
[data]
tokenizer = "bpe:1024"
[optim]
lr = 5e-3
warmup_steps = 5
[train]
max_steps = 20
batch_size = 1024
eval_batches = 1
eval_every = 0
save_every = 0
"""

REPETITIONS = 20
BETWEEN_SEEDS = 0.0009  # standard deviation of the paired differences of bf16-mixed and fp32 in such small trainings


def swallowed_updates(out: Path, seeds: int, device: str) -> dict[str, Any]:
    """bf16-true at a small learning rate must be worse than fp32; bf16-mixed, with exact masters, must not."""
    result = compare(
        with_device(SMALL_STEPS, device), ["fp32", "bf16-mixed", "bf16-true"], seeds=seeds, rounds=0, out_dir=out
    )
    found = {name: result.verdict(name) for name in ("bf16-mixed", "bf16-true")}
    return {
        "found": found,
        "as_planted": found["bf16-true"] == "worse" and found["bf16-mixed"] == "same",
        **rows(result),
    }


def small_gradients(out: Path, seeds: int, device: str) -> dict[str, Any]:
    """fp16 without a loss scale must be worse or diverge where gradients are small; with the dynamic one it is same."""
    plain, dynamic = "fp16-mixed, loss_scale=none", "fp16-mixed"
    config = with_device(SMALL_GRADIENTS, device)
    result = compare(config, ["fp32", dynamic, plain], seeds=seeds, rounds=0, out_dir=out)
    found = {label: result.verdict(label) for label in result.document["variants"][1:]}
    unscaled, scaled = found[result.document["variants"][2]], found[dynamic]
    return {"found": found, "as_planted": unscaled in ("worse", "diverged") and scaled == "same", **rows(result)}


def itself(out: Path, seeds: int, device: str) -> dict[str, Any]:
    """A variant against itself is never better or worse."""
    config = with_device(SMALL_STEPS.replace("max_steps = 150", "max_steps = 30"), device)
    result = compare(config, ["bf16-mixed", "bf16-mixed"], seeds=seeds, rounds=0, out_dir=out)
    found = [result.verdict("bf16-mixed (2)")]
    rng = random.Random(0)
    found += [verdict([rng.gauss(0.0, BETWEEN_SEEDS) for _ in range(3)]).kind for _ in range(REPETITIONS)]
    counts = {kind: found.count(kind) for kind in sorted(set(found))}
    return {"found": counts, "as_planted": not {"better", "worse", "diverged"} & set(found), **rows(result)}


def with_device(text: str, device: str) -> Config:
    """The config of a plant on a device."""
    return Config.from_toml(text.rstrip() + f'\ndevice = "{device}"\ncompile = "false"\n')


def rows(result: Any) -> dict[str, Any]:
    """What is kept of a comparison."""
    keys = ("variant", "losses", "differences", "verdict", "skipped_steps", "statuses")
    return {"rows": [{key: row[key] for key in keys} for row in result.rows], "wall_s": result.document["wall_s"]}


PLANTS = {"swallowed updates": swallowed_updates, "small gradients": small_gradients, "itself": itself}


def main() -> int:
    """Run the plants, say what was found, and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="")
    parser.add_argument("--only", default=",".join(PLANTS))
    a = parser.parse_args()
    folder = Path(a.out or tempfile.mkdtemp(prefix="planted-"))
    results = {}
    for name in a.only.split(","):
        results[name] = PLANTS[name](folder / name.replace(" ", "-"), a.seeds, a.device)
        print(
            f"{name}: {'as planted' if results[name]['as_planted'] else 'NOT FOUND'}: {results[name]['found']}",
            flush=True,
        )
    save("planted", {"seeds": a.seeds, "device": a.device, "results": results})
    return 0 if all(result["as_planted"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
