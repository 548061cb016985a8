"""What a recipe's training step takes on this device, part by part, beside what the device allows.

First the ceilings are measured (a copy, a matmul of every native format), then, for every precision that runs natively, real
steps on random tokens are timed and a few of them profiled: forward, backward, clipping and update, without reading data.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.lab.block import time_steps, warm_up
from fewbits.lab.ceilings import Ceilings, measure_ceilings
from fewbits.lab.floors import Floor, Linears, floors, linears_of
from fewbits.lab.progress import Watch
from fewbits.precision.hardware import Hardware, check, describe, native, native_matmul
from fewbits.precision.precision import Precision
from fewbits.step import StepResult
from fewbits.train.attribution import GAPS, PARTS, UNKNOWN
from fewbits.train.build import build_step, with_vocabulary
from fewbits.train.compiling import CompileClock, compiler_failure, keep_compiled_code
from fewbits.train.config import Config, load_recipe
from fewbits.train.execution import GUESSED_VOCABULARY, check_device, missing_compiler
from fewbits.train.layers import layers_of_run
from fewbits.train.memory import MemoryMeter, gradient_bytes, resting
from fewbits.train.profile import profile_steps
from fewbits.train.record import environment, write_atomically, write_json
from fewbits.train.rundir import Lock, check_free, next_free
from fewbits.train.shapes import slow_shapes
from fewbits.train.throughput import FORMULA, device_peak, mfu
from fewbits.train.trace import Breakdown

SCHEMA = 1
PRECISIONS = (
    "fp32",
    "tf32",
    "bf16-mixed",
    "fp16-mixed",
    "fp8",
    "fp8-delayed",
    "fp8-delayed, head=fp8",
    "fp8-row",
    "fp8-block",
    "fp8-auto",
    "int8",
    "mxfp8",
    "nvfp4",
)
"""Those that are tried where none are named; what the device does not multiply natively is left out, with the reason."""
SECONDS = 3.0  # of timed steps for each precision
PROFILED = 3  # steps
LARGEST_CPU_STEP = 1e12  # FLOPs: a few seconds on two cores; larger steps are benched on fewer sequences


@dataclass(frozen=True)
class Bench:
    """A bench that was measured. `document` is what bench.json holds."""

    path: Path
    document: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One entry a precision: speed, memory, parts with their floors."""
        return list(self.document["rows"])


class Trial:
    """A model, its optimizer and their step on one batch of random tokens that lies on the device."""

    def __init__(self, config: Config, precision: Precision, device: torch.device, compile: bool):
        self.device = device
        self.layers = layers_of_run(config, precision, device, compile, None) or None
        self.model, self.optimizer, self.step = build_step(config, precision, device, compile, self.layers)
        shape = (config.train.batch_size, config.model.context)
        tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        self._batch: list[dict[str, Tensor]] = [
            {"input_ids": tokens.to(device), "labels": tokens.roll(-1, 1).to(device)}
        ]

    def take_step(self) -> StepResult:
        """One step on the same tokens."""
        return self.step(self._batch)

    def optimizer_bytes(self) -> int:
        """Bytes that clipping and update move at least: gradients twice, weights and the optimizer's state in and out."""
        roles = resting(self.model, self.optimizer)
        state = roles["working weights"] + roles["master weights"] + roles["moments"]
        return 2 * gradient_bytes(self.model, accumulated=False) + 2 * state


def bench(
    recipe: Config | str = "nano",
    precisions: Sequence[str] | None = None,
    out_dir: str | Path = "",
    seconds: float = SECONDS,
    console: Console | None = None,
    quiet: bool = False,
) -> Bench:
    """Bench a recipe on this device; writes bench.json, and a trace a precision, into `out_dir` (default runs/bench-NAME-N).

    Args:
        recipe: a recipe's name, or a config. One micro-batch of it is the step that is timed.
        precisions: which; default: the config's own if it names one, else all that run natively here.
        seconds: of timed steps, for each precision.

    Raises FewbitsError before anything is measured when the request does not fit together or the device is not there.
    """
    config = load_recipe(recipe) if isinstance(recipe, str) else recipe
    if not 0 < seconds < 1e4:
        raise FewbitsError(f"seconds={seconds} does not fit. Give the seconds of timed steps, such as {SECONDS:g}.")
    device = torch.device(check_device(config.check()).value)
    hardware = describe(device)
    config, notes = bench_config(config, device)
    named, left_out = _precisions(config, precisions, hardware)
    folder = Path(out_dir) if out_dir else next_free(Path("runs"), f"bench-{config.name}")
    check_free(folder)
    keep_compiled_code(config.data.cache)
    lock = Lock(folder)
    try:
        write_atomically(folder / "config.toml", config.to_toml())
        session = _Session(folder, config, device, hardware, seconds, Watch(console, quiet, "bench"))
        return session.run(named, left_out, notes)
    finally:
        lock.release()


def bench_config(config: Config, device: torch.device) -> tuple[Config, list[str]]:
    """One micro-batch of `config` as a whole step, its vocabulary known, smaller where a CPU would take minutes a step;
    what was changed, in sentences."""
    config = with_vocabulary(config, GUESSED_VOCABULARY)
    train, notes = config.train, []
    rows = train.batch_size // train.micro_batches
    if train.micro_batches > 1:
        notes.append(
            f"The step is one of the recipe's {train.micro_batches} micro-batches, with an update of its own: the optimizer "
            f"takes {train.micro_batches} times its share."
        )
    if config.data.mask_documents:
        notes.append(
            "The recipe masks documents, and a window of the bench holds one: how many it has is up to the text."
        )
    per_row = config.model.flops_per_token() * config.model.context
    if device.type == "cpu" and rows * per_row > LARGEST_CPU_STEP:
        fewer = max(1, int(LARGEST_CPU_STEP / per_row))
        notes.append(f"{fewer} of {rows} sequences are benched: the whole step would take a CPU too long.")
        rows = min(rows, fewer)
    return replace(config, train=replace(train, batch_size=rows, micro_batches=1)), notes


def native_precisions(hardware: Hardware) -> tuple[list[str], dict[str, str]]:
    """Names of the precisions whose matmuls run natively, and why the others do not."""
    found, left_out = [], {}
    for name in PRECISIONS:
        precision = Precision.parse(name)
        answer = native(precision.operand, hardware)
        if answer.value and precision.recipe.output is not None:
            answer = native_matmul(precision.recipe.output, hardware)
        if answer.value:
            found.append(name)
        else:
            left_out[name] = answer.reason
    return found, left_out


def _precisions(
    config: Config, wanted: Sequence[str] | None, hardware: Hardware
) -> tuple[list[Precision], dict[str, str]]:
    left_out: dict[str, str] = {}
    if wanted:
        names = list(wanted)
    elif config.precision != "auto":
        names = [config.precision]
    else:
        names, left_out = native_precisions(hardware)
    found = [replace(config, precision=name).resolve_precision() for name in names]
    for precision in found:
        check(precision, hardware)
    return found, left_out


class _Session:
    """One bench in its folder."""

    def __init__(
        self, folder: Path, config: Config, device: torch.device, hardware: Hardware, seconds: float, watch: Watch
    ):
        self.folder, self.config, self.device, self.hardware = folder, config, device, hardware
        self.seconds, self.watch = seconds, watch
        self.tokens = config.train.batch_size * config.model.context
        self.flops = config.model.flops_per_token()
        self.compile = choose_compile(config, device)

    def run(self, precisions: Sequence[Precision], left_out: dict[str, str], notes: list[str]) -> Bench:
        """Measures everything; bench.json is written after each precision, so that an interrupted bench leaves what it has."""
        with self.watch:
            self.watch.state("measuring the ceilings")
            ceilings = measure_ceilings(self.device, self.hardware)
            rates = ", ".join(f"{name} {rate / 1e12:.4g}" for name, rate in ceilings.matmul.items())
            self.watch.line(f"ceilings    copy {ceilings.copy / 1e9:,.4g} GB/s; matmul in TFLOP/s: {rates}")
            few_bits = next((one for one in precisions if one.recipe), None)  # wants the largest multiples
            slow = slow_shapes(self.config.model, self.config.train.batch_size, self.device, few_bits)
            document = self._document(ceilings, left_out, [*notes, *slow])
            path = self.folder / "bench.json"
            began = time.monotonic()
            for number, precision in enumerate(precisions):
                each = (time.monotonic() - began) / number if number else None
                self.watch.plan(None if each is None else each * (len(precisions) - number))
                self.watch.state(f"timing {precision}")
                row = self._row(precision)
                document["rows"].append(row)
                self._set_beside(document, ceilings)
                write_json(path, document)
                self.watch.line(self._said(row, began, number + 1, len(precisions)))
            self.watch.state("measuring the ceilings again")
            self._set_beside(document, ceilings.better(measure_ceilings(self.device, self.hardware)))
            document["status"] = "finished"
            write_json(path, document)
        return Bench(path, document)

    def _said(self, row: dict[str, Any], began: float, done: int, total: int) -> str:
        left = (time.monotonic() - began) / done * (total - done)
        eta = f"  (about {left:.0f} s left)" if done < total else ""
        if row["status"] != "ok":
            return f"{row['precision']:<11} {row['status']}: {row['reason']}{eta}"
        layers = f"; {row['layers']}" if row["layers"] else ""
        return (
            f"{row['precision']:<11} {row['tok_per_s']:,.0f} tokens/s, {row['ms_per_step']:,.4g} ms a step{eta}{layers}"
        )

    def _document(self, ceilings: Ceilings, left_out: dict[str, str], notes: list[str]) -> dict[str, Any]:
        model, train = self.config.model, self.config.train
        return {
            "schema": SCHEMA,
            "status": "running",
            "name": self.config.name,
            "device": str(self.hardware),
            "kind": self.device.type,
            "model": asdict(model),
            "params": model.parameter_count(),
            "batch_size": train.batch_size,
            "context": model.context,
            "tokens_per_step": self.tokens,
            "flops_per_token": self.flops,
            "flops_formula": FORMULA,
            "compile": {"value": self.compile.value, "reason": self.compile.reason},
            "notes": notes,
            "ceilings": asdict(ceilings),
            "rows": [],
            "left_out": left_out,
            "config": self.config.to_toml(),
            "environment": environment(),
        }

    def _set_beside(self, document: dict[str, Any], ceilings: Ceilings) -> None:
        """Puts the floors by these ceilings beside the times of all rows."""
        document["ceilings"] = asdict(ceilings)
        for row in (row for row in document["rows"] if row["status"] == "ok"):
            precision = Precision.parse(row["precision"])
            least = floors(
                self.config.model, self.tokens, precision, self.hardware, self.device, ceilings, row["optimizer_bytes"],
                [Linears(**alike) for alike in row["linears"]],
            )  # fmt: skip
            row["floor_ms"] = sum(floor.ms for floor in least.values())
            for entry in row["parts"]:
                floor = least.get(entry["part"], Floor(0.0, "no rule knows these kernels"))
                entry |= {"floor_ms": floor.ms, "floor": floor.why}

    def _row(self, precision: Precision) -> dict[str, Any]:
        """One precision; what fails is a row with its reason, and the bench goes on."""
        began = time.monotonic()
        row: dict[str, Any] = {"precision": str(precision)}
        try:
            try:
                found = self._measure(precision, bool(self.compile.value))
            except Exception as error:
                why = compiler_failure(error) if self.compile.value else ""
                if not why or self.config.train.compile == "true":
                    raise
                row["eager"] = f"compiling failed: {why}"
                found = self._measure(precision, False)
            row |= {"status": "ok", **found}
        except torch.OutOfMemoryError:
            row |= {"status": "failed", "reason": "it does not fit into memory"}
        except (RuntimeError, NotImplementedError) as error:
            row |= {"status": "failed", "reason": str(error).strip().splitlines()[0][:200] or type(error).__name__}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {**row, "wall_s": time.monotonic() - began}

    def _measure(self, precision: Precision, compile: bool) -> dict[str, Any]:
        config = replace(self.config, precision=str(precision))
        trial = Trial(config, precision, self.device, compile)
        meter = MemoryMeter(trial.model, trial.optimizer, self.device, 1, trial.step.graph)
        with CompileClock(compile) as clock:
            warm_up(trial, meter)
        pieces, steps, _ = time_steps(trial, self.seconds, least_steps=4)
        ms = 1e3 * mean(pieces)  # not the median: tokens over it are those of a second
        graph, peak = trial.step.graph_outcome, meter.peak()
        if trial.step.graph is not None:
            trial.step.graph.forget()  # profiled steps are eager, and its memory would stand beside theirs
        folder = self.folder / "traces" / re.sub(r"[^A-Za-z0-9.+-]+", "_", str(precision))
        folder.mkdir(parents=True, exist_ok=True)
        found = profile_steps(trial.take_step, self.device, PROFILED, folder)
        rate = 1e3 * self.tokens / ms
        times = part_times(found, ms)
        return {
            "ms_per_step": ms,
            "ms_range": [1e3 * min(pieces), 1e3 * max(pieces)],
            "steps": steps,
            "tok_per_s": rate,
            "mfu": mfu(self.flops, rate, device_peak(precision, self.device)),
            "optimizer_bytes": trial.optimizer_bytes(),
            "layers": str(trial.layers) if trial.layers else "",
            "linears": [alike._asdict() for alike in linears_of(trial.model)],
            "peak_memory_bytes": peak,
            "graph": {"value": bool(graph.value), "reason": graph.reason},
            "compile_s": clock.seconds if compile else None,
            "parts": [{"part": part, "ms": times[part]} for part in (*PARTS, UNKNOWN) if part in times],
            "profile": found.to_json(),
        }


def part_times(found: Breakdown, ms: float) -> dict[str, float]:
    """Milliseconds of every part of a step that takes `ms` when nobody profiles it.

    On CUDA kernels take the same time under the profiler, and what they do not fill is the gap. On a CPU the profiler slows
    everything: the shares are its, the sum is `ms`.
    """
    times = {part: found.parts.get(part, 0.0) for part in PARTS}
    if UNKNOWN in found.parts:
        times[UNKNOWN] = found.parts[UNKNOWN]
    if found.on == "cuda":
        return {**times, GAPS: max(0.0, ms - found.busy)}
    whole = sum(times.values()) or 1.0
    return {part: value * ms / whole for part, value in times.items()}


def choose_compile(config: Config, device: torch.device) -> Choice:
    """Whether the benched steps are compiled: as the config says, else on CUDA where the compiler is there."""
    if config.train.compile != "auto":
        return Choice(config.train.compile == "true", f"--compile {config.train.compile}")
    if device.type != "cuda":
        return Choice(False, "compiling for a CPU takes longer than a short run gains; --compile true compiles")
    missing = missing_compiler(device)
    return Choice(not missing, missing or "compiled steps are what one trains with on a GPU")
