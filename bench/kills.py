"""Claim: a training killed (SIGKILL) at any moment, also inside a save, resumes to the uninterrupted run's bits.

Each trial starts a real `fewbits train`, kills it at a random moment or inside a save, resumes it to the end, and
compares every byte of the final weights and of the optimizer's state with a run that nobody killed. Precisions,
optimizers and master kinds take turns.

    python bench/kills.py                          50 kills, 20 of them inside a save -> bench/results/kills.json
    python bench/kills.py --kills 5 --inside 2
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS, SAVE_EVERY = 40, 2
TINY = {
    "tokenizer": "bytes",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 32,
    "context": 32,
    "dropout": 0.1,
    "batch_size": 4,
    "micro_batches": 2,
    "warmup_steps": 5,
    "max_steps": STEPS,
    "save_every": SAVE_EVERY,
    "eval_every": 0,
    "eval_batches": 1,
    "sample_every": 0,
    "device": "cpu",
    "compile": "false",
}
KINDS = {
    "fp32 adamw": {"precision": "fp32"},
    "bf16-mixed adamw, split masters": {"precision": "bf16-mixed"},
    "fp16-mixed adamw, fp32 masters, a loss scale that moves": {
        "precision": "fp16-mixed",
        "loss_scale": "dynamic:initial=16777216,interval=7",
    },
    "bf16-true sgd": {"precision": "bf16-true", "optimizer": "sgd", "lr": 0.02},
}


@dataclass
class Place:
    """A folder for trials: the text, the cache, and a reference run of each kind made when it is first asked for."""

    folder: Path
    references: dict[str, tuple[dict[str, str], float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.folder / "text.txt").write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`fewbits train` with these arguments, its output kept."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "FEWBITS_CACHE": str(self.folder / "cache"), "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-m", "fewbits", "train", *arguments]
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def begin(self, run: Path, kind: str) -> subprocess.Popen[str]:
        """A new run of a kind in `run`."""
        options = {**TINY, **KINDS[kind], "data": self.folder / "text.txt", "out_dir": run}
        return self.start(*(f"--{name}={value}" for name, value in options.items()), "--deterministic")

    def reference(self, kind: str) -> tuple[dict[str, str], float, float]:
        """What the uninterrupted run ends with, and the seconds that its process and one of its steps took."""
        if kind not in self.references:
            run, began = self.folder / f"reference-{len(self.references)}", time.monotonic()
            finish(self.begin(run, kind))
            seconds = time.monotonic() - began
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            self.references[kind] = final(run), seconds, summary["ms_per_step"] / 1000
        return self.references[kind]


def finish(process: subprocess.Popen[str]) -> str:
    """Its output once it ended well. Raises RuntimeError with the output when it did not."""
    output, _ = process.communicate(timeout=300)
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with {process.returncode}:\n{output}")
    return output


def final(run: Path) -> dict[str, str]:
    """sha256 of the weights and of the optimizer's state at the last step."""
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    names = ("model.safetensors", "optimizer.safetensors")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def inside_a_save(run: Path) -> bool:
    """Whether a save is on its way, or was when the process died."""
    try:
        return any(name.startswith((".saving-", ".replaced-", ".pruned-")) for name in os.listdir(run / "checkpoints"))
    except FileNotFoundError:
        return False


def newest(run: Path) -> int:
    """The last step that has a folder; -1 without any."""
    found = (run / "checkpoints").glob("step-*")
    return max((int(path.name.removeprefix("step-")) for path in found), default=-1)


def kill(process: subprocess.Popen[str]) -> bool:
    """SIGKILL; False when the process had ended by itself."""
    alive = process.poll() is None
    if alive:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    return alive


def kill_anywhere(process: subprocess.Popen[str], run: Path, after_step: int, delay: float) -> bool:
    """Kills `delay` seconds after the checkpoint of `after_step` is seen, wherever the run is then."""
    while process.poll() is None and newest(run) < after_step:
        time.sleep(0.002)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    return kill(process)


def kill_inside_save(process: subprocess.Popen[str], run: Path, after_step: int, delay: float) -> bool:
    """Kills `delay` seconds into the first save seen after the checkpoint of `after_step`; False if it missed."""
    while process.poll() is None:
        if newest(run) >= after_step and inside_a_save(run):
            time.sleep(delay)
            return kill(process) and inside_a_save(run)
        time.sleep(0.0002)
    process.communicate()
    return False


def resume(place: Place, run: Path, kind: str) -> tuple[Path, str]:
    """Brings a killed run to its end; returns where the end is and from where it went on."""
    process = place.start("--resume", str(run))
    output, _ = process.communicate(timeout=300)
    if process.returncode == 0:
        return run, "its newest checkpoint"
    if newest(run) < 0 and process.returncode == 2:  # killed before there was anything to resume: said in one sentence
        again = run.with_name(run.name + "-again")
        finish(place.begin(again, kind))
        return again, "the start: there was no checkpoint yet"
    if newest(run) == STEPS and "finished" in output:
        return run, "nothing: the last step was saved"
    raise RuntimeError(f"resuming {run} ended with {process.returncode}:\n{output}")


def trial(place: Place, number: int, inside: bool, randomness: random.Random) -> dict[str, object] | None:
    """One kill and its resume; None when the kill missed (the run had ended, or no save was on its way)."""
    kind = list(KINDS)[number % len(KINDS)]
    expected, seconds, step_seconds = place.reference(kind)
    run = place.folder / f"run-{number}-{randomness.randrange(10**9)}"
    process = place.begin(run, kind)
    last = randomness.randrange(-SAVE_EVERY, STEPS - SAVE_EVERY, SAVE_EVERY)
    if inside:
        hit = kill_inside_save(process, run, last, randomness.uniform(0, 0.03))
    elif last < 0:  # before the first checkpoint: also while it imports, reads and builds
        hit = kill_anywhere(process, run, -1, randomness.uniform(0, seconds))
    else:
        hit = kill_anywhere(process, run, last, randomness.uniform(0, 2 * SAVE_EVERY * step_seconds))
    if not hit:
        return None
    at = {"newest_checkpoint": newest(run), "inside_a_save": inside_a_save(run)}
    end, went_on_from = resume(place, run, kind)
    leftovers = inside_a_save(end)
    return {"kind": kind, **at, "resumed_from": went_on_from, "leftovers": leftovers, "equal": final(end) == expected}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--inside", type=int, default=20, help="how many of them inside a save")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "kills.json")
    options = parser.parse_args()
    randomness, missed = random.Random(options.seed), 0
    trials: list[dict[str, object]] = []
    report: dict[str, object] = summary(trials, missed)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        while len(trials) < options.kills:
            wanted = options.kills - len(trials) <= options.inside - sum(bool(t["inside_a_save"]) for t in trials)
            inside = wanted or (len(trials) % 5 in (1, 3) and options.inside > 0)
            result = trial(place, len(trials), inside, randomness)
            if result is None:
                missed += 1
                continue
            trials.append(result)
            print(f"{len(trials):3d}  {result}", flush=True)
            report = summary(trials, missed)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")  # as they come: what was shown stays shown
    print(f"{report['equal']} of {len(trials)} equal, {report['inside_a_save']} inside a save -> {options.out}")
    return 0 if report["equal"] == len(trials) else 1


def summary(trials: list[dict[str, object]], missed: int) -> dict[str, object]:
    """What is written to bench/results."""
    return {
        "schema": "fewbits.bench/1",
        "claim": "a killed training resumes to the bits of the uninterrupted run, weights and optimizer state",
        "kills": len(trials),
        "inside_a_save": sum(bool(result["inside_a_save"]) for result in trials),
        "equal": sum(bool(result["equal"]) for result in trials),
        "kills_that_missed": missed,
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "machine": {"platform": platform.platform(), "cpu": _cpu(), "python": platform.python_version()},
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "trials": trials,
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor())


if __name__ == "__main__":
    sys.exit(main())
