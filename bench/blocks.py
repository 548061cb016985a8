"""Runs cases in alternating blocks (A B A B ...), one process at a time, so that drift of the machine cancels."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Environment variables that change what is measured start with one of these.
_TUNING = ("OMP_", "GOMP_", "MKL_", "ONEDNN_", "MALLOC_", "GLIBC_TUNABLES", "TORCHINDUCTOR_")
ROOT = Path(__file__).resolve().parent.parent


def device_name() -> str:
    """The GPU where one is present, else the processor and the number of usable cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as lines:
        model = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        )
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def header() -> dict[str, Any]:
    """Where and when: every results file starts with it."""
    import torch

    return {
        "device": device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_TUNING)},
    }


def alternate(script: str, cases: dict[str, list[str]], rounds: int, timeout: float = 300) -> dict[str, Any]:
    """Runs `script --case ARGS...` for every case in turn, `rounds` times; each prints one JSON line with "ms" (a list).

    Returns case -> {"ms": median over all blocks, "blocks": medians, "spread": (max - min) / median of the blocks, ...}.
    """
    blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for index in range(rounds):
        for name, arguments in cases.items():
            started = time.time()
            paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            process = subprocess.run(
                [sys.executable, script, "--case", *arguments], capture_output=True, text=True, timeout=timeout,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=False,
            )  # fmt: skip
            lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
            block = json.loads(lines[-1]) if process.returncode == 0 and lines else {"error": process.stderr[-600:]}
            blocks[name].append(block)
            shown = f"{statistics.median(block['ms']):9.2f} ms" if "ms" in block else block["error"][-200:]
            print(f"round {index + 1}  {name:34s} {shown}  ({time.time() - started:.0f} s)", flush=True)
    return {name: summary(found) for name, found in blocks.items()}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One case over its blocks."""
    good = [block for block in found if "ms" in block]
    if not good:
        return {"error": found[-1].get("error", "no block ran")}
    medians = [statistics.median(block["ms"]) for block in good]
    rest = {key: value for key, value in good[-1].items() if key != "ms"}
    middle = statistics.median(medians)
    spread = (max(medians) - min(medians)) / middle
    return {"ms": round(middle, 3), "blocks": [round(m, 3) for m in medians], "spread": round(spread, 4), **rest}


def timed(step: Callable[[], Any], warmup: int, steps: int) -> list[float]:
    """Milliseconds of `steps` steps after `warmup`, each waited for."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(warmup):
        step()
    wait()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def save(name: str, results: dict[str, Any]) -> Path:
    """Writes bench/results/NAME.json (or $OUT/NAME.json where OUT names a folder) and says where."""
    folder = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**header(), **results}, indent=1) + "\n")
    print("wrote", path)
    return path


def milliseconds(call: Callable[[], Any], before: Callable[[], Any]) -> float:
    """The median of ten calls on a GPU, after two that do not count, each with `before` enqueued ahead of it, untimed; without
    a GPU one call, and NaN."""
    import torch

    if not torch.cuda.is_available():
        call()
        return float("nan")
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[2:])[5]


def changed(config: Any, overrides: str) -> Any:
    """A config with overrides as of `fewbits train`, NAME=VALUE with commas between; `+` stands for the comma in a value."""
    from fewbits.train.config import override

    for pair in filter(None, overrides.split(",")):
        name, _, value = pair.strip().partition("=")
        config = override(config, name, value.replace("+", ", "))
    return config
