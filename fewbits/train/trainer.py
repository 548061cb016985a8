"""The loop around the step: take it, log it, evaluate, sample, save, and end in a way that can be continued.

The host reads from the device only at log points, and everything since the last one in a single transfer.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fewbits.checkpoint.load import Checkpoint
from fewbits.checkpoint.save import save_checkpoint
from fewbits.data.batches import eval_batches
from fewbits.data.ratios import compression_baseline
from fewbits.errors import FewbitsError
from fewbits.precision.switches import torch_switches
from fewbits.step import StepResult
from fewbits.train.begin import eager_again, fresh, resumed
from fewbits.train.build import Training
from fewbits.train.compiling import CompileClock, compiler_failure, keep_compiled_code
from fewbits.train.config import Config
from fewbits.train.evaluate import evaluate
from fewbits.train.events import Display, show_summary
from fewbits.train.generate import sample
from fewbits.train.profile import SUMMARY, TRACE, WARMUP, StepProfiler, describe
from fewbits.train.ranks import refuse_ranks
from fewbits.train.record import Record, environment, write_atomically
from fewbits.train.signals import Interrupts
from fewbits.train.state import collect
from fewbits.train.summary import advise, introduce, summarize
from fewbits.train.throughput import Stopwatch, device_peak, mfu
from fewbits.train.waiting import Arrived, Waiting

EXIT = {"finished": 0, "stopped": 0, "diverged": 3, "crashed": 1}


def train(
    config: Config,
    resume: Path | str | None = None,
    console: Console | None = None,
    quiet: bool = False,
    profile: int = 0,
) -> dict[str, Any]:
    """Train as `config` says and return the summary that is also written to summary.json.

    Args:
        resume: a run directory (or a checkpoint in it) to go on with, bit for bit; its own choices are reused.
        console: where to show what happens; `quiet` shows nothing.
        profile: so many steps, after a warm-up, run under torch's profiler: trace.json.gz and profile.json in the run.

    Raises:
        FewbitsError: something the user can put right, before anything is written where that can be known.
    """
    refuse_ranks()
    if profile < 0:
        raise FewbitsError(f"--profile {profile} does not fit. Give the number of steps to profile, 5 for example.")
    display = Display(console, quiet)
    keep_compiled_code(config.data.cache)
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())  # a resumed run takes the number it began with
        began = time.perf_counter()
        if resume is None:
            training, folder = fresh(config, display, stack)
            checkpoint = None
        else:
            training, folder, checkpoint = resumed(config, Path(resume), display, stack)
        stack.enter_context(torch_switches(training.precision, training.device))
        run = Run(training, folder, display, checkpoint, setup_s=time.perf_counter() - began)
        run.may_fall_back = resume is None and config.train.compile == "auto"
        stack.enter_context(run.clock)
        if profile:
            run.profiler = StepProfiler(training.device, min(profile, run.end - run.first))
            stack.callback(run.profiler.close)
        return run.go()


def exit_code(summary: dict[str, Any]) -> int:
    """The exit code that belongs to a summary: 0, 3 for a diverged run, 128 + signal for one that a signal stopped."""
    return {"SIGINT": 130, "SIGTERM": 143}.get(summary.get("reason", ""), EXIT[summary["status"]])


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
        self.timed_before: int = before.get("timed_steps", self.first)
        self.compression: dict[str, Any] = before.get("compression") or compression_baseline(
            training.corpus.documents("val")
        )
        self.meter = training.memory_meter()
        self.watch = Stopwatch()
        self.clock = CompileClock(training.choices.compile.value)
        self.compiled_before: float = before.get("compile_s", 0.0)
        self.may_fall_back = False
        self.profiler: StepProfiler | None = None
        self.step_s, self.timed_steps = 0.0, 0
        self.waiting = Waiting()
        self.unlogged_s, self.unlogged_steps = 0.0, 0
        self.logged_ms: list[float] = []
        self.last: dict[str, Any] = before.get("last") or {}
        self.evaluation: dict[str, Any] = before.get("evaluation") or {}
        self.saved: Path | None = None if checkpoint is None else checkpoint.path
        self.peak = device_peak(training.running_precision, training.device)
        self.flops = self.config.model.flops_per_token(training.batches.visible_context)
        report = getattr(training.model, "fewbits_report", None)
        self.table = training.precision.table(report, training.device)
        self.began = time.perf_counter()

    def go(self) -> dict[str, Any]:
        """Runs to the end, however it comes, and returns the summary."""
        (self.folder / "summary.json").unlink(missing_ok=True)  # a run without one is going on, or was killed
        self._introduce()
        with Interrupts() as interrupts:
            summary = self._run(interrupts)
            if self.profiler is not None and not self.profiler.complete:
                self.display.fact(
                    "profile", f"not written: the run ended after {self.profiler.taken} of {self.profiler.steps} steps"
                )
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
        """The next step; with `measure` its memory is taken, and its time left out where other steps stand for it.

        The time of a profiled step is always left out, and so is the compiler's.
        """
        profiled = self.profiler is not None and not self.profiler.complete and self._is_warm()
        apart = profiled or (measure and self.config.train.log_every > 1 and self.unlogged_steps > 0)
        if apart:
            self.watch.pause()
        self.clock.take()  # what was compiled since the last step was not in anybody's time
        result = self._execute(measure, profiled)
        if (compiled := self.clock.take()) and not apart:
            self.watch.leave_out(compiled)
        self.watch.start()
        self.done += 1
        self.unlogged_steps += not apart
        self.timed_steps += not apart
        self.waiting.add(self.done, result, self.training.step.latched)
        self.display.advance(self.done, self.clock.seconds)
        return result

    def _execute(self, measure: bool, profiled: bool) -> StepResult:
        """One step, profiled or measured or plain; eager from the first on where the compiler was tried and failed."""
        take = self.training.take_step
        try:
            if profiled and self.profiler is not None:
                result = self.profiler.step(take)
                if self.profiler.complete:
                    self._show_profile(self.profiler)
                return result
            return self.meter.measure(take) if measure else take()
        except Exception as error:
            reason = compiler_failure(error) if self.training.choices.compile.value else ""
            if not reason or self.done > self.first:
                raise
            if not self.may_fall_back:
                raise FewbitsError(f"torch.compile failed here: {reason}. Use --compile false.") from error
            self._go_eager(f"compiling failed at the first step: {reason}")
            return self.training.take_step()

    def _go_eager(self, reason: str) -> None:
        """Begins again without the compiler: the same weights, from the same seed, before any step was taken."""
        self.training = eager_again(self.training, reason)
        self.config = config = self.training.config
        self.meter = self.training.memory_meter()
        write_atomically(self.folder / "config.toml", config.to_toml())
        self.record.event("eager", self.done, reason=reason)
        self.display.fact("compile", "no", reason)

    def _is_warm(self) -> bool:
        """Whether the steps that warm up are over; fewer of them where the run is too short for its profile."""
        steps = 0 if self.profiler is None else self.profiler.steps
        return self.done - self.first >= max(0, min(WARMUP, self.end - self.first - steps))

    def _show_profile(self, profiler: StepProfiler) -> None:
        found = profiler.finish(self.folder)
        for name, text in describe(found):
            self.display.fact(name, text)
        self.display.fact("", f"{self.folder / TRACE} (for ui.perfetto.dev), {self.folder / SUMMARY}")
        self.record.event("profile", self.done, steps=found.steps)

    def _due(self, every: int) -> bool:
        return every > 0 and self.done % every == 0

    def _read(self, logs: bool) -> None:
        """Brings what happened since the last time from the device, in one transfer; logs the newest step if asked."""
        found, counters = self.waiting.read(self.training.step.skipped, self.training.optimizer.applied_steps)
        skipped, applied_steps = counters
        seconds = self.watch.take()
        self.step_s += seconds
        self.unlogged_s += seconds
        end = next((i for i, one in enumerate(found) if one.latched), None)
        if end is not None:
            skipped -= len(found) - end - 1  # attempts after the latch closed changed nothing and are not counted
            found = found[: end + 1]
        if withheld := [one.number for one in found if not one.applied]:
            self.record.event("skipped", withheld[-1], steps=withheld)
        newest = found[-1]
        if logs or newest.latched:
            self._log(newest, skipped, applied_steps)
        if newest.latched:
            what = "the gradients are not finite" if math.isfinite(newest.loss) else f"the loss is {newest.loss}"
            raise _Diverged(newest.number, what)

    def _log(self, one: Arrived, skipped: int, applied_steps: int) -> None:
        """One line of metrics.jsonl and of the console."""
        seconds = self.unlogged_s / self.unlogged_steps if self.unlogged_steps else None  # all of them were profiled
        self.unlogged_s, self.unlogged_steps = 0.0, 0
        rate = self.training.tokens_per_step / seconds if seconds else None
        entry = {
            "step": one.number,
            "tokens": one.number * self.training.tokens_per_step,
            "loss": one.loss,
            "lr": self.training.lr_after(applied_steps - int(one.applied)),
            "grad_norm": one.grad_norm,
            "loss_scale": one.loss_scale,
            "skipped": skipped,
            "ms": 1000 * seconds if seconds else None,
            "tok_per_s": rate,
            "mfu": mfu(self.flops, rate, self.peak),
            "memory_bytes": self.meter.peak(),
        }
        if seconds:
            self.logged_ms.append(1000 * seconds)
        self.last = entry
        self.record.metrics(entry)
        if self.clock.seconds and one.number == self.first + 1:
            took = f"in {self.clock.seconds:.1f} s, not in the steps' times; kept in"
            if self.training.choices.compile.value:
                self.display.fact("compiled", f"{took} {keep_compiled_code(self.config.data.cache)}")
            else:
                self.display.fact("kernels", f"of fewbits compiled {took} the cache")
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
            "timed_steps": self.timed_before + self.timed_steps,
            "compile_s": self.compile_s(),
            "compression": self.compression,
            "last": self.last,
            "evaluation": self.evaluation,
        }

    def wall(self) -> float:
        """Seconds of the loop so far, those of earlier sessions up to their checkpoint included."""
        return self.wall_before + time.perf_counter() - self.began

    def compile_s(self) -> float:
        """Seconds of compiling in `wall`."""
        return self.compiled_before + self.clock.seconds

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
