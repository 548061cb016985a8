"""How a run is executed where the user left it open: device, precision, compiled or not. Decided by timing real steps.

The timing is short (seconds): steps of the same model on random tokens, the candidates taking turns so that a busy
neighbour hurts all alike. What is decided is recorded with its reason and never timed again when the run is resumed.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fewbits.choice import Choice
from fewbits.data.cache import Progress, silent
from fewbits.errors import FewbitsError, nearest
from fewbits.formats import Format
from fewbits.nn.timing import Measure
from fewbits.precision.hardware import check, describe, native, wait
from fewbits.precision.precision import Precision
from fewbits.train.build import build_step, with_vocabulary
from fewbits.train.choices import Choices
from fewbits.train.config import Config
from fewbits.train.layers import layers_of_run

BUDGET_S = 6.0  # for timing the precisions; a round that began is finished
WORTH = 0.95  # a less exact precision must take less than this part of the time
GUESSED_VOCABULARY = 4096  # when the tokenizer is not built yet


@dataclass(frozen=True)
class _Habits:
    """What is known about a kind of device before anything is timed."""

    flops: float
    """FLOPs of the largest step that is timed; larger models are timed on fewer layers and rows."""
    slowest: float
    """FLOP/s that any step reaches: bounds the length of a run that is too short to be worth timing."""
    gain: float
    """Part of the time that compiling may save at best."""
    compiling_s: float
    """Usual time to compile, cold."""
    worth_s: float
    """Length of a run from which compiling is tried: trying may cost a few per cent of it, and win more."""


# CPU: 0 to 15 % gained for 12 to 26 s, measured on two cores. CUDA: 1.2 to 2.5 times as fast for 20 to 90 s.
_HABITS = {"cpu": _Habits(6e10, 5e9, 0.15, 25.0, 1000.0), "cuda": _Habits(5e13, 2e12, 0.6, 45.0, 150.0)}


def choose_execution(config: Config, measure: Measure | None = None, progress: Progress = silent) -> Choices:
    """Device, precision, compilation and layers for `config`, each with its reason; at once when all is given.

    measure: what times the ways of multiplying of a linear layer, under layers=auto; None times on the device.
    progress: called while layers and blocks are timed, which may take minutes where each has to be compiled.
    Raises FewbitsError for a device that is not there, and a precision or `compile` that it cannot run.
    """
    config = with_vocabulary(config, GUESSED_VOCABULARY)
    device = check_device(config)
    torch_device = torch.device(device.value)
    threads = Choice(torch.get_num_threads(), "what torch finds here")
    trials = _Trials(config, torch_device)
    try:
        precision = _choose_precision(config, torch_device, trials)
        chosen = config.resolve_precision(precision.value)
        whole = chosen.replace(layers="all")  # layers are timed last, in the mode that they will run in
        compile = _choose_compile(config, whole, torch_device, trials)
        deterministic = _choose_determinism(config, whole, torch_device, trials, compile.value)
    finally:
        trials.close()
    layers = layers_of_run(config, chosen, torch_device, compile.value, measure, progress)
    return Choices(device, precision, compile, deterministic, threads, layers=layers)


def check_device(config: Config) -> Choice:
    """The device of `config`. Raises FewbitsError, before any work is done, when it is not there or not usable."""
    if config.train.deterministic:
        prepare_determinism()
    device = choose_device(config.train.device)
    place = torch.device(device.value)
    check(config.resolve_precision("fp32"), describe(place))
    if config.train.compile == "true" and (missing := missing_compiler(place)):
        raise FewbitsError(f"--compile true: {missing}. Install it, or use --compile false.")
    return device


def choose_device(wanted: str) -> Choice:
    """The device for "auto", "cpu", "cuda" or "cuda:N". Raises FewbitsError when it is not there."""
    if wanted == "auto":
        if torch.cuda.is_available() and describe("cuda:0").kind == "cuda":
            return Choice("cuda:0", f"a GPU is here: {torch.cuda.get_device_name(0)}")
        others = [kind for kind in ("mps", "xpu") if getattr(torch, kind).is_available()]
        others += ["rocm"] if torch.version.hip else []
        besides = f" ({others[0]} is here but not supported in this version)" if others else ""
        return Choice("cpu", f"torch finds no CUDA device{besides}")
    kind, _, number = wanted.partition(":")
    if kind not in ("cpu", "cuda", "mps", "xpu") or not (number or "0").isdecimal():
        hint = nearest(wanted, ["cpu", "cuda"])
        raise FewbitsError(f"--device {wanted}: it must be auto, cpu, cuda or cuda:N.{hint}")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(number or 0)
        if index >= count:
            have = f"{count} CUDA device{'s' if count != 1 else ''}" if count else "no CUDA device"
            raise FewbitsError(f"--device {wanted}: torch finds {have} here. Use --device cpu or --device auto.")
        return Choice(f"cuda:{index}", "--device was given")
    return Choice(kind, "--device was given")


class _Trials:
    """Steps of the configured model on random tokens, timed. Models are kept while candidates take turns."""

    def __init__(self, config: Config, device: torch.device):
        self.device = device
        self.config = _shrink(config, _HABITS.get(device.type, _HABITS["cpu"]).flops)
        full = config.model.flops_per_token() * config.train.batch_size * config.model.context
        small = self.config.model.flops_per_token() * self.config.train.batch_size * self.config.model.context
        self.ratio = full / small
        """FLOPs of a real step over those of a timed one."""
        self.note = ""
        if self.config.model != config.model:
            self.note = f", timed on {self.config.model.n_layer} of {config.model.n_layer} layers"
        self._steps: dict[tuple[str, bool], Any] = {}
        self._batch = [self._random_batch()]
        self.eager: dict[str, float] = {}
        """Seconds of a timed eager step by precision."""

    def _random_batch(self) -> dict[str, Tensor]:
        shape = (self.config.train.batch_size, self.config.model.context)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.config.model.vocab_size, shape, generator=generator)
        return {"input_ids": tokens.to(self.device), "labels": tokens.roll(-1, 1).to(self.device)}

    def once(self, precision: Precision, compile: bool) -> float:
        """Seconds of one step; the first of its kind builds the model and warms up."""
        key = (str(precision), compile)
        if key not in self._steps:
            self._steps[key] = step = build_step(self.config, precision, self.device, compile)[2]
            while not step.warm:
                step(self._batch)
        wait(self.device)
        began = time.perf_counter()
        self._steps[key](self._batch)
        wait(self.device)
        return time.perf_counter() - began

    def race(self, runners: Sequence[tuple[Precision, bool]], rounds: int = 3) -> list[float]:
        """Median seconds of each runner over rounds in which they take turns, after one step of warm-up each."""
        for runner in runners:
            self.once(*runner)
        times: list[list[float]] = [[] for _ in runners]
        deadline = time.perf_counter() + BUDGET_S
        for _ in range(rounds):
            for taken, runner in zip(times, runners, strict=True):
                taken.append(self.once(*runner))
            if time.perf_counter() > deadline:
                break
        return [statistics.median(taken) for taken in times]

    def close(self) -> None:
        """Frees everything."""
        self._batch.clear()
        self.clear()

    def clear(self) -> None:
        """Frees all models and the memory they took."""
        self._steps.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _shrink(config: Config, flops: float) -> Config:
    """One micro-batch of `config`, with fewer layers, rows, positions (in this order) while it exceeds `flops`."""
    train = replace(config.train, batch_size=config.train.batch_size // config.train.micro_batches, micro_batches=1)
    model = config.model

    def cost() -> float:
        return model.flops_per_token() * train.batch_size * model.context

    if cost() > flops and model.n_layer > 2:
        model = replace(model, n_layer=2)
    while cost() > flops and train.batch_size > 1:
        train = replace(train, batch_size=train.batch_size // 2)
    while cost() > flops and model.context > 64:
        model = replace(model, context=model.context // 2)
    return replace(config, model=model, train=train)


def _choose_precision(config: Config, device: torch.device, trials: _Trials) -> Choice:
    if config.precision != "auto":
        return Choice(config.precision, "--precision or the recipe says so")
    hardware = describe(device)
    names = {"fp32": "fp32"}
    if device.type != "cpu":
        names.update({"tf32": "tf32"} if native(Format.parse("tf32"), hardware).value else {})
    bf16 = native(Format.parse("bf16"), hardware)
    if bf16.value:
        names["bf16"] = "bf16-mixed"
    elif device.type != "cpu" and native(Format.parse("fp16"), hardware).value:
        names["fp16"] = "fp16-mixed"
    if len(names) == 1:
        return Choice("fp32", f"16-bit products would be emulated: {bf16.reason}")
    candidates = [config.resolve_precision(name) for name in names.values()]
    times = _time_each(candidates, trials)
    fitting = [candidate for candidate in candidates if candidate in times]
    if not fitting:
        raise FewbitsError("No precision fits into memory here. Make batch_size smaller, or micro_batches larger.")
    best = fitting[0]
    for candidate in fitting[1:]:  # from the most exact on
        best = candidate if times[candidate] < WORTH * times[best] else best
    shown = ", ".join(f"{c.name} {1000 * times[c]:.4g} ms" for c in fitting)
    return Choice(best.name, f"the fastest here in a short timing of real steps{trials.note}: {shown}")


def _time_each(candidates: list[Precision], trials: _Trials) -> dict[Precision, float]:
    """Seconds a step of each candidate that fits into memory: taking turns, or alone where they do not fit together."""
    try:
        found = trials.race([(candidate, False) for candidate in candidates])
        times = dict(zip(candidates, found, strict=True))
    except torch.OutOfMemoryError:
        times = {}
        for candidate in candidates:
            trials.clear()
            with suppress(torch.OutOfMemoryError):
                times[candidate] = trials.race([(candidate, False)])[0]
    trials.clear()
    trials.eager.update({str(candidate): seconds for candidate, seconds in times.items()})
    return times


def _choose_compile(config: Config, precision: Precision, device: torch.device, trials: _Trials) -> Choice:
    missing = missing_compiler(device)
    if config.train.compile == "false":
        return Choice(False, "--compile false")
    if config.train.compile == "true":
        return Choice(True, "--compile true")
    if missing:
        return Choice(False, missing)
    habits = _HABITS.get(device.type, _HABITS["cpu"])
    steps = config.train.max_steps
    flops = config.model.flops_per_token() * config.train.batch_size * config.model.context * steps
    if flops / habits.slowest < habits.worth_s:
        return Choice(False, "the run is too short to win back the time of compiling")
    if str(precision) not in trials.eager:
        trials.eager[str(precision)] = trials.race([(precision, False)], rounds=2)[0]
    eager = trials.eager[str(precision)] * trials.ratio
    if steps * eager < habits.worth_s:
        return Choice(
            False,
            f"the run takes about {_seconds(steps * eager)}; compiling takes about {habits.compiling_s:.0f} s "
            f"and saves {100 * habits.gain:.0f} % of it at best",
        )
    return _measure_compile(config, precision, trials)


def _measure_compile(config: Config, precision: Precision, trials: _Trials) -> Choice:
    """Compile the model and see; the compiler keeps its work, so that the run itself starts warm."""
    try:
        first = trials.once(precision, True)
        eager, compiled = trials.race([(precision, False), (precision, True)])
    except Exception as error:  # whatever a compiler throws: the eager mode is always there
        return Choice(False, f"compiling failed here ({type(error).__name__})")
    cost = max(0.0, first - compiled)
    won = (eager - compiled) * trials.ratio * config.train.max_steps
    shown = f"a step takes {1000 * compiled:.4g} ms compiled and {1000 * eager:.4g} ms eager{trials.note}"
    if won > cost:
        return Choice(True, f"{shown}; over the run that wins {_seconds(won)} for {_seconds(cost)} of compiling")
    return Choice(False, f"{shown}; over the run that does not win back {_seconds(cost)} of compiling")


def _seconds(count: float) -> str:
    return f"{count:.2g} s" if count < 10 else f"{count:.0f} s" if count < 600 else f"{count / 60:.0f} min"


def missing_compiler(device: torch.device) -> str:
    """What torch.compile lacks on `device`, in words, or ""."""
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        return "no C++ compiler (g++ or clang++) is installed, and torch.compile needs one"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed, and torch.compile needs it on CUDA"
    return ""


def _choose_determinism(
    config: Config, precision: Precision, device: torch.device, trials: _Trials, compile: bool
) -> Choice:
    if device.type == "cpu":
        return Choice(True, "a CPU always gives the same bits for the same number of threads")
    if not config.train.deterministic:
        return Choice(False, "without --deterministic what is restored is exact, later sums may differ in order")
    runner = [(precision, compile)]
    trials.race(runner)  # a device that was idle is slow at first, which would be counted as the price of freedom
    free = trials.race(runner)[0]
    trials.clear()
    with determinism(True):
        bound = trials.race(runner)[0]
    price = f"{100 * (bound / free - 1):+.0f} %" if bound > free else "none that shows"
    return Choice(True, f"--deterministic; its price: {price} ({1000 * free:.4g} to {1000 * bound:.4g} ms a step)")


def prepare_determinism() -> None:
    """What must be set before CUDA starts: cuBLAS keeps one workspace and so one order of summation."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def determinism(active: bool) -> Iterator[None]:
    """Within, on CUDA, only kernels that give the same bits every time; torch's switches are put back afterwards."""
    if not active:
        yield
        return
    prepare_determinism()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    inductor: Any = importlib.import_module("torch._inductor.config")
    tuned = getattr(inductor, "deterministic", None)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    if tuned is not None:
        inductor.deterministic = True  # the compiler must not pick kernels by timing either
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        if tuned is not None:
            inductor.deterministic = tuned
