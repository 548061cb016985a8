"""Does quantization-aware training close the gap that few bits of weights open? At equal steps, on the default recipe.

    python bench/qat.py [--steps 150] [--tail 50] [--seeds 3] [--groups 32,128] [--workers 1] [--threads 2] [--device cuda]

For every seed: `bf16-mixed` for all steps (the goal); its weights rounded to int4 to the nearest afterwards (the gap); the
same training whose last `tail` steps are in `int4-qat` instead, with the same batches, schedule and optimizer state; the
same with learned scales; and `int4-qat` from the first step. All take the same number of steps. The loss is held out, of
the model as it would be stored. `closed` is the part of the gap that is gone, of the means over the seeds: (rounded -
trained) / (rounded - bf16); it means something only where the gap does: it is null where the gap's interval holds 0.

Embedding and head (one tied weight) stay in bf16. Writes bench/results/qat_nano_WEIGHTS.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from blocks import ROOT, save

T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # 95 %, by number of seeds


def variants(weights: str, groups: list[str]) -> dict[str, dict[str, Any]]:
    """What is made of the runs of the first stage: name -> the checkpoint to begin with, precision."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        name, own = f"{weights} {group}", f"int4-qat, output=bf16 x {weights}/{group}"
        found[f"{name}, rounded afterwards"] = {"start": "end", "precision": own}
        found[f"{name}, qat at the end"] = {"start": "middle", "precision": own}
        found[f"{name}, qat at the end, learned"] = {"start": "middle", "precision": f"{own}/learned"}
        found[f"{name}, qat from the start"] = {"start": "", "precision": own}
    return found


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    """One training, or the rest of one, and its held-out loss: in a process of its own."""
    import torch

    from fewbits.checkpoint.hf import from_hf
    from fewbits.checkpoint.load import load_checkpoint
    from fewbits.checkpoint.save import save_checkpoint
    from fewbits.choice import Choice
    from fewbits.data.batches import eval_batches
    from fewbits.train.build import build_training, open_data
    from fewbits.train.choices import Choices
    from fewbits.train.config import load_recipe
    from fewbits.train.evaluate import evaluate
    from fewbits.train.state import collect

    torch.set_num_threads(task["threads"])
    config = load_recipe("nano")
    train = replace(config.train, max_steps=task["steps"], seed=task["seed"], device=task["device"], compile="false")
    model = config.model
    if task["tiny"]:
        model = replace(model, context=32, n_layer=1, n_head=2, n_embd=128)
        config = replace(config, data=replace(config.data, tokenizer="bytes"))
    warmup = min(config.optim.warmup_steps, task["steps"] // 5)
    optim = replace(config.optim, warmup_steps=warmup)
    config = replace(config, precision=task["precision"], train=train, model=model, optim=optim)
    reason = "a bench"
    choices = Choices(
        Choice(task["device"], reason), Choice(config.precision, reason), Choice(False, reason), Choice(True, reason),
        Choice(task["threads"], reason),
    )  # fmt: skip
    training = build_training(config, choices, open_data(config))
    folder = Path(task["folder"])
    if task["start"]:  # as resuming does, but into another precision: exact weights, moments, counters
        checkpoint = load_checkpoint(folder / task["start"])
        _, tensors = from_hf(json.loads(checkpoint.files["config.json"]), checkpoint.model)
        parameters = dict(training.model.named_parameters())
        for name, tensor in tensors.items():
            training.optimizer.load_exact(parameters[name], tensor)
        training.optimizer.load_named_state(parameters.items(), checkpoint.optimizer)
        training.step.load_state_dict(checkpoint.state["step"])
    began = time.perf_counter()
    first = training.step.attempts
    while training.step.attempts < task["steps"]:
        if task["keep"] and training.step.attempts == task["steps"] - task["tail"]:
            save_checkpoint(folder / "middle", training.step.attempts, **collect(training, {}), keep=1)
        training.take_step()
    seconds = time.perf_counter() - began
    if task["keep"]:
        save_checkpoint(folder / "end", training.step.attempts, **collect(training, {}), keep=1)
    store = training.store
    held_out = eval_batches(store.val, store.val_documents, 8, config.model.context, task["batches"], False)
    found = evaluate(training.model, held_out)
    steps = training.step.attempts - first
    return {
        "loss": found["loss"],
        "tokens": found["tokens"],
        "ms_per_step": round(1e3 * seconds / steps, 1) if steps else None,
    }


def run_all(tasks: dict[str, dict[str, Any]], workers: int, threads: int) -> dict[str, dict[str, Any]]:
    """Every task in a process of its own, `workers` at a time. A task that fails ends the bench with its message."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}

    def one(named: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        name, task = named
        process = subprocess.run(
            [sys.executable, __file__, "--task", json.dumps(task)], capture_output=True, text=True, env=environment,
            check=False,
        )  # fmt: skip
        if process.returncode:
            raise SystemExit(f"{name} failed:\n{process.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
        print(f"{name:52s} loss {result['loss']:.4f}  {result['ms_per_step'] or 0:8.1f} ms a step", flush=True)
        return name, result

    with ThreadPoolExecutor(workers) as pool:
        return dict(pool.map(one, tasks.items()))


def interval(values: list[float]) -> dict[str, Any]:
    """Mean and the half width of its 95 % interval (Student's t; None for one value)."""
    n = len(values)
    half = T_QUANTILE.get(n, 2.2) * statistics.stdev(values) / n**0.5 if n > 1 else None
    return {"mean": statistics.fmean(values), "half_width": half, "values": values}


def main() -> int:
    """Run everything, say what part of the gap is closed, and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="steps of every training")
    parser.add_argument("--tail", type=int, default=0, help="steps of them in int4-qat; default a third")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--groups", default="32,128", help="sizes of groups, or row")
    parser.add_argument("--batches", type=int, default=100, help="held-out batches of 8 sequences")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads of each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", default="int4", help="or int3, int2: where int4 opens no gap")
    parser.add_argument("--tiny", action="store_true", help="a model of one layer on bytes: does the bench run?")
    parser.add_argument("--task", default="", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.task:
        print(json.dumps(run_task(json.loads(a.task))))
        return 0
    tail = a.tail or a.steps // 3
    if not 0 < tail < a.steps or a.seeds < 1:
        parser.error(f"--tail {tail} must lie between 1 and --steps {a.steps}, and --seeds be 1 or more")
    groups = [word if word == "row" else f"group:{word}" for word in a.groups.split(",")]
    with tempfile.TemporaryDirectory(prefix="qat-") as folder:
        base = {"steps": a.steps, "tail": tail, "threads": a.threads, "batches": a.batches, "tiny": a.tiny,
                "device": a.device}  # fmt: skip
        seeds = {seed: {**base, "seed": seed, "folder": f"{folder}/{seed}"} for seed in range(a.seeds)}
        goal = {
            f"seed {seed}, bf16-mixed": {**task, "precision": "bf16-mixed", "start": "", "keep": True}
            for seed, task in seeds.items()
        }
        found = run_all(goal, a.workers, a.threads)
        made = variants(a.weights, groups)
        rest = {
            f"seed {seed}, {name}": {**task, **variant, "keep": False}
            for name, variant in made.items()
            for seed, task in seeds.items()
        }
        found |= run_all(rest, a.workers, a.threads)

    def losses(name: str) -> list[float]:
        return [float(found[f"seed {seed}, {name}"]["loss"]) for seed in range(a.seeds)]

    bf16 = losses("bf16-mixed")
    rows: dict[str, Any] = {"bf16-mixed": interval(bf16)}
    for name in made:
        mine, rounded = losses(name), losses(f"{name.partition(',')[0]}, rounded afterwards")
        above, gap = (interval([x - y for x, y in zip(losses_, bf16, strict=True)]) for losses_ in (mine, rounded))
        rows[name] = {**interval(mine), "above_bf16": above}
        shown = f"{name:44s} {above['mean']:+.4f} above bf16-mixed"
        if mine != rounded:
            there = gap["half_width"] is not None and gap["mean"] > gap["half_width"]
            rows[name]["closed"] = 1 - above["mean"] / gap["mean"] if there else None
            rows[name]["gain"] = interval([x - y for x, y in zip(rounded, mine, strict=True)])
            shown += f", closes {100 * rows[name]['closed']:.0f} % of the gap" if there else ", no gap is shown"
        print(shown)
    save(f"qat_nano_{a.weights}" if not a.tiny else "qat_tiny", {"steps": a.steps, "tail": tail, "seeds": a.seeds, "rows": rows,
         "runs": found})  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
