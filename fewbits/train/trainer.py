"""The loop around the step: take it, log it, evaluate, sample, save, and end in a way that can be continued.

The host reads from the device only at log points, and everything since the last one in a single transfer.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fewbits.checkpoint.load import Checkpoint
from fewbits.checkpoint.save import save_checkpoint
from fewbits.data.batches import eval_batches
from fewbits.data.ratios import compression_baseline
from fewbits.errors import FewbitsError
from fewbits.precision.switches import torch_switches
from fewbits.step import StepResult
from fewbits.train.build import Training, build_training, open_data
from fewbits.train.config import Config
from fewbits.train.evaluate import evaluate
from fewbits.train.events import Display, show_summary
from fewbits.train.execution import check_device, choose_execution, determinism
from fewbits.train.generate import sample
from fewbits.train.layers import check_layers
from fewbits.train.memory import MemoryMeter
from fewbits.train.ranks import refuse_ranks
from fewbits.train.record import Record, environment, write_atomically
from fewbits.train.resume import continued, first_choices, has_checkpoint, load_for_resume, recorded_choices, run_folder
from fewbits.train.rundir import Lock, check_free, check_writable, next_free
from fewbits.train.signals import Interrupts
from fewbits.train.state import collect, restore
from fewbits.train.summary import advise, introduce, summarize
from fewbits.train.throughput import Stopwatch, device_peak, mfu

EXIT = {"finished": 0, "stopped": 0, "diverged": 3, "crashed": 1}


def train(
    config: Config, resume: Path | str | None = None, console: Console | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Train as `config` says and return the summary that is also written to summary.json.

    Args:
        resume: a run directory (or a checkpoint in it) to go on with, bit for bit; its own choices are reused.
        console: where to show what happens; `quiet` shows nothing.

    Raises:
        FewbitsError: something the user can put right, before anything is written where that can be known.
    """
    refuse_ranks()
    display = Display(console, quiet)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())  # a resumed run takes the number it began with
        began = time.perf_counter()
        if resume is None:
            training, folder = _fresh(config, display, stack)
            checkpoint = None
        else:
            training, folder, checkpoint = _resumed(config, Path(resume), display, stack)
        stack.enter_context(torch_switches(training.precision, training.device))
        run = Run(training, folder, display, checkpoint, setup_s=time.perf_counter() - began)
        return run.go()


def exit_code(summary: dict[str, Any]) -> int:
    """The exit code that belongs to a summary: 0, 3 for a diverged run, 128 + signal for one that a signal stopped."""
    return {"SIGINT": 130, "SIGTERM": 143}.get(summary.get("reason", ""), EXIT[summary["status"]])


def _fresh(config: Config, display: Display, stack: ExitStack) -> tuple[Training, Path]:
    """A new training and its directory, which is made last: nothing is left behind by a mistake in the config."""
    check_device(config.check())
    check_layers(config)
    if config.train.out_dir:
        check_free(Path(config.train.out_dir))
    else:
        check_writable(Path("runs"))
    with display.progress() as progress:
        data = open_data(config, progress)
    config = config.resolve_vocabulary(data.tokenizer.vocab_size)
    with display.progress() as progress:
        choices = choose_execution(config, progress=progress)
    stack.enter_context(determinism(choices.deterministic.value and choices.torch_device().type == "cuda"))
    training = build_training(config, choices, data)
    folder = _claim(config, stack)
    training.config = replace(
        training.config,
        precision=choices.precision.value,
        train=replace(
            config.train,
            out_dir=str(folder),
            device=choices.device.value,
            compile="true" if choices.compile.value else "false",
        ),
    )
    write_atomically(folder / "config.toml", training.config.to_toml())
    return training, folder


def _claim(config: Config, stack: ExitStack) -> Path:
    """The run directory, made and locked for this process."""
    if config.train.out_dir:
        folder = Path(config.train.out_dir)
        lock = Lock(folder)
        try:
            check_free(folder)  # another run may have begun and ended since it was asked first
        except FewbitsError:
            lock.release()
            raise
        stack.callback(lock.release)
        return folder
    while True:
        folder = next_free(Path("runs"), config.name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise FewbitsError(f"Cannot make {folder}: {error.strerror}. Choose another --out_dir.") from error
        stack.callback(Lock(folder).release)
        return folder


def _resumed(
    config: Config, path: Path, display: Display, stack: ExitStack
) -> tuple[Training, Path, Checkpoint | None]:
    """A training brought to the state of the run's newest good checkpoint, and its directory, locked."""
    folder = run_folder(path)
    check_writable(folder)
    stack.callback(Lock(folder).release)
    checkpoint = None
    if has_checkpoint(path, folder):
        checkpoint = load_for_resume(path, folder, config.train.max_steps)
        config = continued(config, checkpoint)
        choices = recorded_choices(config, checkpoint)
    else:
        display.note(f"{folder} has no checkpoint yet: it begins again, as it began before.")
        choices = first_choices(config, folder)
    stack.enter_context(determinism(choices.deterministic.value and choices.torch_device().type == "cuda"))
    with display.progress() as progress:
        data = open_data(config, progress)
    training = build_training(config, choices, data)
    if checkpoint is not None:
        restore(training, checkpoint)
    if checkpoint is not None and checkpoint.save_dtype is not None:
        display.note(f"The weights were saved in {checkpoint.save_dtype}: the run goes on, but not bit for bit.")
    return training, folder, checkpoint


class _Diverged(Exception):
    """The latch is closed: the loss, or gradients that no loss scale can cure, were not finite at `step`."""

    def __init__(self, step: int, what: str):
        super().__init__(what)
        self.step, self.what = step, what


class Run:
    """One session of one training in its directory."""

    def __init__(
        self, training: Training, folder: Path, display: Display, checkpoint: Checkpoint | None, setup_s: float
    ):
        self.training, self.folder, self.display = training, folder, display
        self.config = training.config
        self.first = training.step.attempts
        self.done = self.first
        self.end = self.config.train.stop_at or self.config.train.max_steps
        self.record = Record(folder, self.first)
        self.setup_s = setup_s
        before = {} if checkpoint is None else checkpoint.state["progress"]
        self.wall_before: float = before.get("wall_s", 0.0)
        self.steps_before: float = before.get("step_s", 0.0)
        self.compression: dict[str, Any] = before.get("compression") or compression_baseline(
            training.corpus.documents("val")
        )
        self.meter = MemoryMeter(training.model, training.optimizer, training.device, self.config.train.micro_batches)
        self.watch = Stopwatch()
        self.step_s = 0.0
        self.waiting: list[tuple[int, StepResult, Tensor]] = []  # steps whose results are still on the device
        self.unlogged_s, self.unlogged_steps = 0.0, 0
        self.logged_ms: list[float] = []
        self.last: dict[str, Any] = before.get("last") or {}
        self.evaluation: dict[str, Any] = before.get("evaluation") or {}
        self.saved: Path | None = None if checkpoint is None else checkpoint.path
        self.peak = device_peak(training.running_precision, training.device)
        self.flops = self.config.model.flops_per_token(self.config.model.context)
        report = getattr(training.model, "fewbits_report", None)
        self.table = training.precision.table(report, training.device)
        self.began = time.perf_counter()

    def go(self) -> dict[str, Any]:
        """Runs to the end, however it comes, and returns the summary."""
        (self.folder / "summary.json").unlink(missing_ok=True)  # a run without one is going on, or was killed
        self._introduce()
        with Interrupts() as interrupts:
            summary = self._run(interrupts)
            show_summary(self.display, summary, self._paths())
            advise(self.display, summary, str(self.folder))
        return summary

    def _run(self, interrupts: Interrupts) -> dict[str, Any]:
        """The loop, and summary.json whatever ends it."""
        status, reason = "crashed", ""
        try:
            self.display.begin(self.first, self.end)
            self.began = time.perf_counter()
            reason = self._loop(interrupts)
            status = "finished" if self.done >= self.config.train.max_steps else "stopped"
        except _Diverged as error:
            status, reason = "diverged", f"{error.what} at step {error.step}"
            self.done = error.step
            self.record.event("diverged", error.step, message=reason)
        except KeyboardInterrupt:
            status, reason = "stopped", "a second Ctrl+C: nothing more was saved"
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            self.record.event("error", self.done, message=reason)
            raise
        finally:
            interrupts.ending()
            self.display.end()
            summary = self._finish(status, reason)
        return summary

    def _loop(self, interrupts: Interrupts) -> str:
        """Steps until the end or a signal; returns why it stopped early, or ""."""
        every = self.config.train
        self.watch.start()
        while self.done < self.end:
            measure = not self.meter.measured and (self.done > self.first or self.done + 1 == self.end)
            self._take_step(measure)
            stop = interrupts.received  # a signal that comes later than this ends the run one step later, saved as well
            last = self.done == self.end or stop is not None
            logs = last or self.done % every.log_every == 0 or self.done == 1
            evaluates = self._due(every.eval_every) or (self.done == self.end)
            samples, saves = self._due(every.sample_every), last or self._due(every.save_every)
            if logs or evaluates or samples or saves:
                self._read(logs)
            self.watch.pause()
            if evaluates:
                self._evaluate()
            if samples:
                self._sample()
            if saves:
                self._save()
            if stop is not None:
                return stop
            self.watch.start()
        return "" if self.done >= self.config.train.max_steps else f"--stop-at {self.end}"

    def _take_step(self, measure: bool) -> StepResult:
        """The next step; with `measure` its memory is taken, and its time left out where other steps stand for it."""
        take = self.training.take_step
        apart = measure and self.config.train.log_every > 1 and self.unlogged_steps > 0
        if apart:
            self.watch.pause()
        result = self.meter.measure(take) if measure else take()
        self.watch.start()
        self.done += 1
        self.unlogged_steps += not apart
        self.waiting.append((self.done, result, self.training.step.latched.clone()))
        self.display.advance(self.done)
        return result

    def _due(self, every: int) -> bool:
        return every > 0 and self.done % every == 0

    def _read(self, logs: bool) -> None:
        """Brings what happened since the last time from the device, in one transfer; logs the newest step if asked."""
        step, optimizer = self.training.step, self.training.optimizer
        values = [
            value.double()
            for _, result, latched in self.waiting
            for value in (result.loss, result.grad_norm, result.loss_scale, result.applied, latched)
        ]
        numbers = torch.stack([*values, step.skipped.double(), optimizer.applied_steps.double()]).tolist()
        seconds = self.watch.take()
        self.step_s += seconds
        self.unlogged_s += seconds
        skipped, applied_steps = int(numbers.pop(-2)), int(numbers.pop(-1))
        rows = [numbers[i : i + 5] for i in range(0, len(numbers), 5)]
        steps = [number for number, _, _ in self.waiting]
        self.waiting.clear()
        latched = next((i for i, row in enumerate(rows) if row[4]), None)
        withheld = [number for number, row in zip(steps, rows, strict=True) if not row[3]]
        if latched is not None:
            after = len(rows) - latched - 1  # attempts after the latch closed changed nothing and are not counted
            skipped -= after
            withheld = [number for number in withheld if number <= steps[latched]]
        if withheld:
            self.record.event("skipped", withheld[-1], steps=withheld)
        if logs or latched is not None:
            shown = len(rows) - 1 if latched is None else latched
            self._log(steps[shown], rows[shown], skipped, applied_steps)
        if latched is not None:
            loss = rows[latched][0]
            what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradients are not finite"
            raise _Diverged(steps[latched], what)

    def _log(self, number: int, row: list[float], skipped: int, applied_steps: int) -> None:
        """One line of metrics.jsonl and of the console; `row`: loss, gradient norm, loss scale, applied, latched."""
        seconds = self.unlogged_s / self.unlogged_steps
        self.unlogged_s, self.unlogged_steps = 0.0, 0
        rate = self.training.tokens_per_step / seconds
        entry = {
            "step": number,
            "tokens": number * self.training.tokens_per_step,
            "loss": row[0],
            "lr": self.training.lr_after(applied_steps - int(row[3])),
            "grad_norm": row[1],
            "loss_scale": row[2],
            "skipped": skipped,
            "ms": 1000 * seconds,
            "tok_per_s": rate,
            "mfu": mfu(self.flops, rate, self.peak),
            "memory_bytes": self.meter.peak(),
        }
        self.logged_ms.append(1000 * seconds)
        self.last = entry
        self.record.metrics(entry)
        self.display.step(entry)

    def _evaluate(self) -> None:
        """Held-out loss on the same windows every time."""
        training, config = self.training, self.config
        parts = config.train.micro_batches
        batches = eval_batches(
            training.store.val,
            training.store.val_documents,
            config.train.batch_size // parts,
            config.model.context,
            config.train.eval_batches * parts,
            config.data.mask_documents,
        )
        found = evaluate(training.model, batches, training.tokenizer.token_bytes)
        self.evaluation = {
            "step": self.done,
            "val_loss": found["loss"],
            "perplexity": found["perplexity"],
            "bits_per_byte": found["bits_per_byte"],
            "val_tokens": found["tokens"],
        }
        self.record.metrics(self.evaluation)
        self.display.evaluation(self.evaluation, self.compression)

    def _sample(self) -> None:
        config = self.config.train
        text = sample(
            self.training.model, self.training.tokenizer, config.prompt, config.sample_tokens, seed=config.seed % 2**63
        )
        self.record.event("sample", self.done, prompt=config.prompt, text=text)
        self.display.sample(self.done, config.prompt, text)

    def _save(self) -> None:
        config = self.config.train
        state = collect(self.training, self._progress())
        self.saved = save_checkpoint(
            self.folder / "checkpoints",
            self.done,
            **state,
            keep=config.keep_checkpoints,
            save_dtype=config.save_dtype or None,
        )
        self.record.event("save", self.done, path=str(self.saved))

    def _progress(self) -> dict[str, Any]:
        """What the loop itself continues from."""
        return {
            "wall_s": self.wall(),
            "step_s": self.steps_before + self.step_s,
            "compression": self.compression,
            "last": self.last,
            "evaluation": self.evaluation,
        }

    def wall(self) -> float:
        """Seconds of the loop so far, those of earlier sessions up to their checkpoint included."""
        return self.wall_before + time.perf_counter() - self.began

    def _introduce(self) -> None:
        """Says and records what is about to be trained, on what, how, and why so."""
        training = self.training
        kind = "resume" if self.first else "start"
        self.record.event(
            kind,
            self.first,
            choices=training.choices.to_json(),
            precision=str(training.precision),
            precision_table=self.table,
            environment=environment(),
            params=self.config.model.parameter_count(),
            data=training.store.describe(),
        )
        introduce(self.display, training, self.compression, self.table, self.peak)
        self.display.fact("run", f"{self.folder}" + (f", going on after step {self.first}" if self.first else ""))

    def _finish(self, status: str, reason: str) -> dict[str, Any]:
        """Writes summary.json and closes the record."""
        self.watch.pause()
        summary = summarize(self, status, reason)
        try:
            self.record.event("end", self.done, status=status, reason=reason)
            self.record.summary(summary)
        except FewbitsError:
            if status != "crashed":  # else the first error is the one to tell
                raise
        finally:
            self.record.close()
        return summary

    def _paths(self) -> list[str]:
        """What was written, for the last lines."""
        paths = [f"{self.folder}{os.sep}  config.toml, metrics.jsonl, events.jsonl, summary.json"]
        return paths if self.saved is None else [*paths, f"{self.saved}{os.sep}"]
