"""One timing block in a process of its own: `python -m fewbits.lab.block SPEC` builds a training, warms up, times real
steps, measures their memory by role, and prints one JSON line.

A block takes ordinary steps on ordinary batches: data, forward, backward, clipping, update. It is short on purpose; a
comparison alternates the blocks of its variants (A B A B), so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from fewbits.errors import FewbitsError
from fewbits.precision.hardware import wait
from fewbits.step import Step, StepResult
from fewbits.train.build import build_training, open_data
from fewbits.train.compiling import keep_compiled_code
from fewbits.train.config import Config
from fewbits.train.execution import choose_execution
from fewbits.train.memory import MemoryMeter, resident_bytes

LEAST_WARMUP = 3  # the first step makes the optimizer's state and compiles, the second is measured for memory
MOST_WARMUP = 25  # a dynamic loss scale needs some skipped steps to settle; a skipped step is cheaper than a real one
PIECES = 8  # the timed stretch is cut in about so many pieces; their median ignores a hiccup


def run_block(config: Config, seconds: float, least_steps: int = 4) -> dict[str, Any]:
    """Time steps of a training for about `seconds`; returns what `main` prints. Raises FewbitsError."""
    keep_compiled_code(config.data.cache)
    data = open_data(config)
    config = config.resolve_vocabulary(data.tokenizer.vocab_size)
    choices = choose_execution(config)
    training = build_training(config, choices, data)
    meter = training.memory_meter()
    warmup = warm_up(training, meter)
    if training.device.type == "cuda":  # compiling and picking kernels take memory that training does not
        torch.cuda.reset_peak_memory_stats(training.device)
    timing = time.monotonic()
    pieces, steps, applied = time_steps(training, seconds, least_steps)
    ms = 1000.0 * median(pieces)
    return {
        "status": "ok",
        "ms_per_step": ms,
        "ms_range": [1000.0 * min(pieces), 1000.0 * max(pieces)],
        "tok_per_s": 1000.0 * training.tokens_per_step / ms,
        "steps": steps,
        "skipped": steps - applied,
        "warmup_steps": warmup,
        "timed_s": time.monotonic() - timing,
        "peak_memory_bytes": meter.peak(),
        "memory": meter.roles(),
        "resident_bytes": resident_bytes(),
        "precision": str(training.precision),
        "device": str(training.device),
        "choices": choices.to_json(),
        "precision_table": training.precision.table(getattr(training.model, "fewbits_report", None), training.device),
    }


class Stepping(Protocol):
    """Something whose steps are timed: a Training, or a model on a batch that lies ready."""

    @property
    def device(self) -> torch.device: ...

    @property
    def step(self) -> Step: ...

    def take_step(self) -> StepResult: ...


def warm_up(training: Stepping, meter: MemoryMeter) -> int:
    """Take steps until the state is made, memory is measured and an update was applied; the number of steps taken."""
    applied = False
    for taken in range(1, MOST_WARMUP + 1):
        if applied and not meter.measured:
            result = meter.measure(training.take_step)
        else:
            result = training.take_step()
        applied = applied or bool(result.applied)
        if taken >= LEAST_WARMUP and applied and meter.measured and training.step.warm:
            break
    return taken


def time_steps(training: Stepping, seconds: float, least_steps: int) -> tuple[list[float], int, int]:
    """(seconds a step in each piece, steps, applied steps). The device is awaited once a piece, not once a step."""
    wait(training.device)
    began = time.perf_counter()
    training.take_step()
    wait(training.device)
    first = time.perf_counter() - began
    length = max(1, round(seconds / PIECES / max(first, 1e-6)))
    pieces: list[float] = []
    results = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(pieces) * length < least_steps:
        start = time.perf_counter()
        results += [training.take_step().applied for _ in range(length)]
        wait(training.device)
        pieces.append((time.perf_counter() - start) / length)
    return pieces, len(results), int(torch.stack(results).sum())


def main(arguments: list[str]) -> int:
    """Read the spec (JSON: config as TOML text, seconds), print the block as the last line; 2 for a user error."""
    spec = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    try:
        result = run_block(Config.from_toml(spec["config"]), spec["seconds"], spec.get("least_steps", 4))
    except FewbitsError as error:
        print(f"fewbits: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
