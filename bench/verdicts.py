"""Held-out loss of precisions against a reference, paired by seed: trainings side by side, judged as `compare` does.

    python bench/verdicts.py --precisions bf16-mixed,fp8,fp8-row --seeds 5 --workers 8 [--name NAME] [OPTIONS]

OPTIONS are those of `fewbits train`.

Losses only: trainings that share a machine say nothing about speed. Writes bench/results/NAME.json. A training that is in
the file already is not run again, so an interrupted bench goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blocks import ROOT, header

sys.path.insert(0, str(ROOT))

KEPT = ("status", "val_loss", "bits_per_byte", "final_loss", "steps", "tokens", "skipped_steps", "reason")


def train(task: tuple[str, int], recipe: str, options: list[str], threads: int, folder: Path) -> dict[str, Any]:
    """One training in a process of its own: what its summary says."""
    precision, seed = task
    run = folder / f"{precision}-{seed}".replace("/", "_").replace(" ", "")
    command = [sys.executable, "-m", "fewbits", "train", recipe, "--precision", precision, "--seed", str(seed),
               "--out_dir", str(run), "--sample_every", "0", "--eval_every", "0", "--save_every", "0", *options]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    path = run / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {"status": "crashed", "reason": done.stderr[-500:]}
    logged = [json.loads(line) for line in (run / "metrics.jsonl").open()] if path.exists() else []
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    entry = {"variant": precision, "seed": seed, **{key: summary.get(key) for key in KEPT}, "train_losses": losses}
    print(
        f"{precision:12s} seed {seed}: {entry['status']} {entry['val_loss']}  ({time.time() - began:.0f} s)", flush=True
    )
    if entry["status"] == "crashed":
        print(done.stderr[-1500:], flush=True)
    return entry


def main() -> None:
    """Trains what is missing, judges, prints a table and saves."""
    from fewbits.lab.rows import make_rows

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="nano")
    parser.add_argument("--precisions", default="bf16-mixed,fp8,fp8-row,fp8-block,mxfp8,nvfp4,int8")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--margin", type=float, default=0.005)
    parser.add_argument("--name", default="verdicts")
    a, a.options = parser.parse_known_args()
    path = Path(os.environ.get("OUT") or ROOT / "bench" / "results") / f"{a.name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    runs = [run for run in before.get("runs", []) if run["status"] != "crashed"]
    precisions = a.precisions.split(",")
    have = {(run["variant"], run["seed"]) for run in runs}
    missing = [(p, seed) for seed in range(a.seeds) for p in precisions if (p, seed) not in have]

    def save() -> list[dict[str, Any]]:
        rows = make_rows(precisions, list(range(a.seeds)), [], runs, a.margin, "val_loss")
        shown = {"recipe": a.recipe, "options": a.options, "margin": a.margin, "rows": rows, "runs": runs}
        path.write_text(json.dumps({**header(), **shown}, indent=1) + "\n")
        return rows

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(a.workers) as pool:
        futures = [pool.submit(train, task, a.recipe, a.options, a.threads, Path(folder)) for task in missing]
        for future in futures:
            runs.append(future.result())
            save()
    for row in save():
        verdict = row["verdict"] or {}
        low, high = verdict.get("interval") or (float("nan"), float("nan"))
        shown = f"{100 * (verdict.get('mean') or 0):+.3f} % ({100 * low:+.3f} to {100 * high:+.3f})"
        print(f"{row['variant']:14s} {verdict.get('kind', 'reference'):10s} {shown}")
    print("wrote", path)


if __name__ == "__main__":
    main()
