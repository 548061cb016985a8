"""One sitting of a comparison: timing blocks, the horizon, the loss runs, and rows anew after each of them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.lab import store
from fewbits.lab.budget import block_means, run_seconds, shorten
from fewbits.lab.child import Ended, run_child
from fewbits.lab.progress import Watch
from fewbits.lab.rows import make_rows, run_of
from fewbits.lab.runs import crashed_entry, ended_well, last_entry, run_entry
from fewbits.lab.variants import Variants, variant_config
from fewbits.train.config import Config
from fewbits.train.record import write_atomically
from fewbits.train.rundir import locked


class Session:
    """One sitting of a comparison: blocks, horizon, runs, rows."""

    def __init__(self, folder: Path, document: dict[str, Any], variants: Variants, watch: Watch):
        self.folder, self.document, self.variants, self.watch = folder, document, variants, watch
        self.names = dict(zip(variants.labels, variants.folders, strict=True))
        self.values = dict(zip(variants.labels, variants.values, strict=True))
        self._since = time.monotonic()
        self._before = float(document["wall_s"])

    def run(self, config: Config, budget: float | None, rounds: int, seconds: float, device: torch.device) -> None:
        with self.watch:
            if self.document["config"] is None:
                base = self._pin(config, device)
                self.save()
                self._blocks(base, rounds, seconds, budget)
                self.document["config"] = self._horizon(base, budget).to_toml()
                self.save()
            base = Config.from_toml(self.document["config"])
            self._blocks(base, rounds, seconds, budget)  # of variants or rounds that came in a later session
            for seed in self.document["seeds"]:
                for label in self.variants.labels:
                    self._run(base, label, seed)
            self.document["status"] = "complete" if self._all_ended() else "running"
            self.save()

    def save(self) -> None:
        """Rows anew from what is there, and compare.json with them."""
        d = self.document
        d["rows"] = make_rows(d["variants"], d["seeds"], d["blocks"], d["runs"], d["margin"], d["measure"])
        d["wall_s"] = self._before + time.monotonic() - self._since
        store.write(self.folder / "compare.json", d)

    def note(self, what: str, choice: Choice) -> None:
        """Record a decision with its reason, and show it."""
        self.document["choices"] = [c for c in self.document["choices"] if c["what"] != what]
        self.document["choices"].append({"what": what, "value": choice.value, "reason": choice.reason})
        self.watch.line(f"{what}: {choice.value}  (why: {choice.reason})")

    def _all_ended(self) -> bool:
        runs = self.document["runs"]
        return all(run_of(runs, label, seed) for label in self.variants.labels for seed in self.document["seeds"])

    def _pin(self, config: Config, device: torch.device) -> Config:
        """The config with nothing left open: every variant runs on the same device, compiled or not, written alike."""
        kept = [c for c in self.document["choices"] if c["what"] in ("device", "compile", "precision")]
        if config.train.device == "auto":
            why = "a CUDA device is present" if device.type == "cuda" else "no CUDA device is present"
            self.note("device", Choice(str(device), why))
        compiled = config.train.compile
        if compiled == "auto":
            compiled, why = compile_choice(device)
            self.note("compile", Choice(compiled, f"the same for every variant; {why}"))
        train = replace(
            config.train,
            device=str(device),
            compile=compiled,
            sample_every=0,
            keep_checkpoints=1,
            out_dir="",
            stop_at=0,
        )
        precision = config.precision
        if precision == "auto" and self.variants.key != "precision":
            recorded = next((c["value"] for c in kept if c["what"] == "precision"), None)
            precision = recorded or self._pilot(replace(config, train=train))
        return replace(config, precision=precision, train=train)

    def _pilot(self, config: Config) -> str:
        """What precision "auto" becomes here: decided once, by the timing that a training would do."""
        self.watch.state("choosing the precision")
        ended, block = self._block_process(config, "pilot", 0.5)
        if block is None:
            raise FewbitsError(f"The first training did not run: {ended.last_words}")
        recorded = next(c for c in block["choices"] if c["what"] == "precision")
        self.note("precision", Choice(recorded["value"], recorded["reason"]))
        return str(recorded["value"])

    def _blocks(self, base: Config, rounds: int, seconds: float, budget: float | None) -> None:
        """The timing blocks that are missing, alternating: A B A B."""
        have = {(b["variant"], b["round"]) for b in self.document["blocks"] if b.get("status") == "ok"}
        if budget is not None:
            seconds = min(seconds, budget * 60 * 0.15 / max(1, rounds * len(self.names)))
        for number in range(rounds):
            for label in self.variants.labels:
                if (label, number) not in have:
                    self.watch.plan(self._left_in_all(base, rounds, budget))
                    self._block(base, label, number, seconds, f"{number + 1} of {rounds}")

    def _block(self, base: Config, label: str, number: int, seconds: float, place: str) -> None:
        self.watch.state(f"timing {label}, block {place}")
        config = variant_config(base, self.variants, self.values[label], self.document["seeds"][0])
        ended, block = self._block_process(config, f"{self.names[label]}-{number}", seconds)
        if ended.code == 2:
            raise FewbitsError(f"{label}: {ended.last_words.rpartition('fewbits: error: ')[2]}")
        entry: dict[str, Any] = {"variant": label, "round": number, "wall_s": ended.seconds}
        entry.update(block or {"status": "failed", "reason": ended.last_words})
        entry["ready_s"] = ended.seconds - (block or {}).get("timed_s", 0.0)
        self.document["blocks"] = [
            b for b in self.document["blocks"] if (b["variant"], b["round"]) != (label, number)
        ] + [entry]
        self.save()
        if block is None:
            self.watch.line(f"{label}: block {place} failed: {ended.last_words}", "yellow")
        else:
            speed = f"{block['ms_per_step']:.1f} ms a step, {block['tok_per_s']:,.0f} tokens/s"
            self.watch.line(f"{label}: block {place}, {speed}")

    def _block_process(self, config: Config, name: str, seconds: float) -> tuple[Ended, dict[str, Any] | None]:
        spec = self.folder / "blocks" / f"{name}.json"
        spec.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(spec, json.dumps({"config": config.to_toml(), "seconds": seconds}))
        ended = run_child(["-m", "fewbits.lab.block", str(spec)], spec.with_suffix(".log"))
        lines = ended.output.strip().splitlines()
        try:
            return ended, json.loads(lines[-1]) if ended.code == 0 and lines else None
        except json.JSONDecodeError:
            return ended, None

    def _horizon(self, base: Config, budget: float | None) -> Config:
        if budget is None:
            return base
        spent = self._before + time.monotonic() - self._since
        costs = [block_means(self.document["blocks"], label) for label in self.variants.labels]
        known = [cost for cost in costs if cost]
        if not known or self.variants.key == "train.max_steps":
            return base
        worst = max(known)
        seeds = len(self.document["seeds"])
        config, choice = shorten(base, [cost or worst for cost in costs], seeds, budget * 60 - spent)
        self.note("max_steps", choice)
        return config

    def _estimate(self, base: Config, label: str) -> float | None:
        """Seconds of one run: as runs before it took, else planned from its blocks; None before either."""
        ended = [r for r in self.document["runs"] if r.get("process_s")]
        like = [r["process_s"] for r in ended if r["variant"] == label]
        if like:
            return float(sum(like) / len(like))
        means = block_means(self.document["blocks"], label)
        if means is None:
            return float(sum(r["process_s"] for r in ended) / len(ended)) if ended else None
        return run_seconds(variant_config(base, self.variants, self.values[label], 0), *means)

    def _left_in_all(self, base: Config, rounds: int, budget: float | None) -> float | None:
        """Estimated seconds until the end while blocks are still missing; the budget bounds them."""
        taken = [b["wall_s"] for b in self.document["blocks"]]
        runs = self._left(base)
        left = None
        if taken and runs is not None:
            left = max(0, rounds * len(self.names) - len(taken)) * sum(taken) / len(taken) + runs
        if budget is None or self.document["config"] is not None:
            return left
        bound = max(1.0, budget * 60 - (self._before + time.monotonic() - self._since))
        return bound if left is None else min(left, bound)

    def _left(self, base: Config) -> float | None:
        """Estimated seconds of the runs that are missing."""
        runs = self.document["runs"]
        missing = [
            label for label in self.variants.labels for seed in self.document["seeds"] if not run_of(runs, label, seed)
        ]
        estimates = [self._estimate(base, label) for label in missing]
        return None if any(e is None for e in estimates) else sum(e for e in estimates if e is not None)

    def _run(self, base: Config, label: str, seed: int) -> None:
        """One loss run: reused when it has ended, resumed when it was cut off, else started."""
        if run_of(self.document["runs"], label, seed):
            return
        config = variant_config(base, self.variants, self.values[label], seed)
        run = self.folder / "runs" / self.names[label] / f"seed-{seed}"
        while locked(run):  # a run that outlived its comparison: one process at a time, so wait for it
            self.watch.state(f"waiting for the process that still writes to {run}")
            time.sleep(1.0)
        recipe = run.with_name(f"{run.name}.toml")
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(recipe, config.to_toml())
        self.watch.plan(self._left(base))
        seconds = None
        if not ended_well(run):
            seconds = self._train(config, run, recipe, f"{label}, seed {seed}", self._estimate(base, label))
        entry = run_entry(run, label, seed) or crashed_entry(run, label, seed)
        self.document["runs"].append({**entry, "process_s": seconds if entry["status"] == "finished" else None})
        self.save()
        value = entry.get(self.document["measure"])
        shown = "-" if value is None else f"{value:.4f}"
        self.watch.plan(self._left(base))
        left = self.watch.eta()
        eta = f"  (about {left / 60:.1f} minutes left)" if left else ""
        self.watch.line(f"{label}: seed {seed} {entry['status']}, held-out {self.document['measure']} {shown}{eta}")

    def _train(self, config: Config, run: Path, recipe: Path, name: str, estimate: float | None) -> float | None:
        """Train in a child to the end of it; its seconds, or None when it was only the rest of a run."""
        resumed = (run / "checkpoints" / "latest").exists()
        if resumed:
            arguments = ["-m", "fewbits", "train", "--resume", str(run)]
        else:
            shutil.rmtree(run, ignore_errors=True)  # ours, and without a checkpoint there is nothing in it to keep
            arguments = ["-m", "fewbits", "train", "--config", str(recipe), "--out_dir", str(run)]

        def watch() -> None:
            last = last_entry(run / "metrics.jsonl")
            step = int(last.get("step", 0))
            part = step / config.train.max_steps * (estimate or 0.0)
            loss = f", loss {last['loss']:.3f}" if isinstance(last.get("loss"), float) else ""
            self.watch.state(f"training {name}: step {step}/{config.train.max_steps}{loss}", part)

        ended = run_child(arguments, run.with_name(f"{run.name}.log"), watch)
        if ended.code == 2:
            raise FewbitsError(f"{name}: {ended.last_words.rpartition('fewbits: error: ')[2]}")
        return None if resumed else ended.seconds


def compile_choice(device: torch.device) -> tuple[Literal["true", "false"], str]:
    """Whether the runs of a comparison are compiled, where the user left it open, and why."""
    if device.type != "cuda":
        return "false", "compiling for a CPU costs more than short runs gain"
    if importlib.util.find_spec("triton") is None:
        return "false", "Triton is not installed"
    return "true", "compiled steps are what one trains with on a GPU"
