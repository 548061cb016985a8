"""Held-out loss of precisions against a reference, paired by seed: trainings side by side, judged as `compare` does.

    python bench/verdicts.py --precisions bf16-mixed,fp8,fp8-row --seeds 5 --workers 8 [--name NAME] [OPTIONS]
    python bench/verdicts.py --recipe gpt2-124m --precisions bf16-mixed,fp8 --seeds 1 --name curves_gpt2-124m \
        --data python-all --tokenizer bpe:50257 --batch_size 32 --micro_batches 1 --max_steps 1530 --warmup_steps 150 \
        --eval_every 153 --eval_batches 4 --compile true                      # one curve of 50M tokens a precision

OPTIONS are those of `fewbits train`. Precisions are separated as in `fewbits compare`.

Losses only: trainings that share a machine say nothing about speed. Writes bench/results/NAME.json (or into --out, or $OUT):
the verdicts, what was learned, and of every training the losses along the way, training and held out. A training that is
in the file already is not run again, so an interrupted bench goes on where it was. Every training saves at its end, 13 GB for
1.1B parameters, deleted once it is read: TMPDIR=/dev/shm where memory is larger than the disk is fast.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from blocks import ROOT, header

sys.path.insert(0, str(ROOT))

from fewbits.lab.variants import split_values

KEPT = ("status", "val_loss", "bits_per_byte", "final_loss", "steps", "tokens", "epochs", "skipped_steps", "reason")
POINTS = 200  # of a training curve at most: the file stays readable


def thinned(points: list[list[float]]) -> list[list[float]]:
    """At most POINTS of them, evenly spread, the last one always."""
    every = -(-len(points) // POINTS) or 1
    return points[::-1][::every][::-1]


def curve(run: Path) -> dict[str, list[list[float]]]:
    """[step, loss] of training and of every held-out evaluation, from a run's metrics; the last wins where a step repeats."""
    from fewbits.train.record import read_lines

    found: dict[str, dict[int, float | None]] = {"loss": {}, "val_loss": {}}
    for entry in read_lines(run / "metrics.jsonl"):
        for key, points in found.items():
            if key in entry:
                points[entry["step"]] = None if entry[key] is None else round(entry[key], 5)
    train, held_out = ([[step, loss] for step, loss in points.items()] for points in found.values())
    return {"train": thinned(train), "held_out": held_out}


def learned(run: Path, summary: dict[str, Any]) -> dict[str, Any] | None:
    """What a training learned: the text, its tokenizer, how many tokens there are, and how often they were seen."""
    if "data" not in summary:
        return None
    data, config = summary["data"], tomllib.loads((run / "config.toml").read_text())["data"]
    sizes = {split: {k: data[split][k] for k in ("tokens", "bytes", "documents")} for split in ("train", "val")}
    about = {"data": config["data"], "tokenizer": config["tokenizer"], "vocab_size": data["vocab_size"]}
    return {**about, "distinct_tokens": summary["distinct_tokens"], "epochs": summary["epochs"], **sizes}


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
    about = {key: summary.get(key) for key in KEPT}
    entry = {"variant": precision, "seed": seed, **about, "curve": curve(run), "learned": learned(run, summary)}
    shutil.rmtree(run, ignore_errors=True)
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
    parser.add_argument("--out", default=os.environ.get("OUT") or str(ROOT / "bench" / "results"))
    a, a.options = parser.parse_known_args()
    path = Path(a.out) / f"{a.name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if before and (before["recipe"], pairs(before["options"])) != (a.recipe, pairs(a.options)):
        parser.error(f"{path} holds trainings of {before['recipe']} {' '.join(before['options'])}: give another --name")
    runs = [run for run in before.get("runs", []) if run["status"] in ("finished", "diverged")]
    precisions = split_values(a.precisions)
    have = {(run["variant"], run["seed"]) for run in runs}
    missing = [(p, seed) for seed in range(a.seeds) for p in precisions if (p, seed) not in have]

    def save() -> list[dict[str, Any]]:
        runs.sort(key=lambda run: (run["seed"], [*precisions, run["variant"]].index(run["variant"])))
        rows = make_rows(precisions, list(range(a.seeds)), [], runs, a.margin, "val_loss")
        data = next((run["learned"] for run in runs if run.get("learned")), None)  # the same for all: once is enough
        each = [{key: value for key, value in run.items() if key != "learned"} for run in runs]
        shown = {"recipe": a.recipe, "options": a.options, "data": data or before.get("data"), "margin": a.margin}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text({**header(), **shown, "rows": rows, "runs": each}))
        return rows

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(a.workers) as pool:
        futures = [pool.submit(train, task, a.recipe, a.options, a.threads, Path(folder)) for task in missing]
        try:
            for future in as_completed(futures):
                runs.append(future.result())
                save()
        except BaseException:  # an interrupt: what waits is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for row in save():
        verdict = row["verdict"] or {}
        low, high = verdict.get("interval") or (float("nan"), float("nan"))
        shown = f"{100 * (verdict.get('mean') or 0):+.3f} % ({100 * low:+.3f} to {100 * high:+.3f})"
        print(f"{row['variant']:14s} {verdict.get('kind', 'reference'):10s} {shown}")
    show_curves(precisions, runs)
    print("wrote", path)


def pairs(options: list[str]) -> list[tuple[str, ...]]:
    """Options with their values, in whatever order they came."""
    joined = " ".join(options).replace("=", " ").split("--")
    return sorted(tuple(part.split()) for part in joined if part.strip())


def text(results: dict[str, Any]) -> str:
    """Indented JSON with the points of a curve on one line each pair."""
    return re.sub(r"\[\s+(-?[\d.e+-]+),\s+(-?[\d.e+-]+|null)\s+\]", r"[\1, \2]", json.dumps(results, indent=1)) + "\n"


def show_curves(precisions: list[str], runs: list[dict[str, Any]]) -> None:
    """Held-out losses of seed 0 along the way, with the difference to the first precision."""
    first = [run for run in runs if run["seed"] == 0]
    found = {run["variant"]: dict(run.get("curve", {}).get("held_out", [])) for run in first}
    steps = sorted(set().union(*found.values())) if found else []
    if len(steps) < 2:
        return
    print("step      " + "".join(f"{name:>24s}" for name in precisions))
    for step in steps:
        losses = [found.get(name, {}).get(step) for name in precisions]
        cells = [
            "-" if x is None else f"{x:.4f}" + (f" ({x / losses[0] - 1:+.2%})" if losses[0] else "") for x in losses
        ]
        print(f"{step:<10d}" + "".join(f"{cell:>24s}" for cell in cells))


if __name__ == "__main__":
    main()
