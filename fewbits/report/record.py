"""Read what a run left behind, whole or broken off: nothing here needs the run to have ended well."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError


@dataclass(frozen=True)
class RunRecord:
    """One run folder. `summary` and `config` are empty dicts when their files are missing."""

    path: Path
    metrics: list[dict[str, Any]]
    """Logged steps, in order; after a resume the later record of a step replaces the earlier one."""
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    notes: list[str] = field(default_factory=list)
    """What was odd about the files, in sentences for the reader of the report."""

    @property
    def status(self) -> str:
        """finished, stopped, diverged or crashed; a run without a summary crashed (or is still going)."""
        return str(self.summary.get("status", "crashed"))

    def column(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one metric; missing and null values are left out, nan and inf stay."""
        pairs = [(float(m["step"]), number_of(m[key])) for m in self.metrics if m.get(key) is not None]
        return [x for x, _ in pairs], [y for _, y in pairs]


def number_of(value: Any) -> float:
    """A recorded number as a float; what is not one is nan."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def restore_nonfinite(entry: dict[str, Any]) -> dict[str, Any]:
    """A line of a .jsonl file with the numbers that strict JSON cannot hold put back.

    >>> restore_nonfinite({"step": 3, "loss": None, "nonfinite": {"loss": "nan"}})
    {'step': 3, 'loss': nan}
    """
    named = entry.get("nonfinite")
    if not isinstance(named, dict):
        return entry
    plain = {key: value for key, value in entry.items() if key != "nonfinite"}
    return {**plain, **{key: number_of(value) for key, value in named.items()}}


def read_run(path: Path) -> RunRecord:
    """Read a run folder. Errors: FewbitsError when the folder is missing or holds nothing that a run writes."""
    path = Path(path)
    if not path.is_dir():
        raise FewbitsError(f"{path} is not a folder. Name the --out_dir of a run.")
    names = ("metrics.jsonl", "summary.json", "config.toml")
    if not any((path / name).exists() for name in names):
        raise FewbitsError(f"{path} holds none of {', '.join(names)}: it is no run. Name the --out_dir of a run.")
    notes: list[str] = []
    lines = read_lines(path / "metrics.jsonl", notes)
    metrics = {m["step"]: m for m in lines if "step" in m and "val_loss" not in m}
    evaluations = {m["step"]: m for m in lines if "step" in m and m.get("val_loss") is not None}
    config_text = _text(path / "config.toml")
    config: dict[str, Any] = {}
    try:
        config = tomllib.loads(config_text)
    except tomllib.TOMLDecodeError as error:
        notes.append(f"config.toml could not be read ({error}).")
    return RunRecord(
        path,
        [metrics[step] for step in sorted(metrics)],
        [evaluations[step] for step in sorted(evaluations)],
        read_lines(path / "events.jsonl", notes),
        _json(path / "summary.json", notes),
        config,
        config_text,
        notes,
    )


def read_lines(path: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, () when it is missing; a line that is not one is left out and noted."""
    result, bad = [], []
    lines = _text(path).splitlines()
    for i, line in enumerate(lines, 1):
        try:
            value = json.loads(line) if line.strip() else None
        except json.JSONDecodeError:
            bad.append(i)
            continue
        if isinstance(value, dict):
            result.append(restore_nonfinite(value))
    if bad and notes is not None:
        cut = bad == [len(lines)]
        what = "the last line is cut off" if cut else f"line {bad[0]} is not JSON"
        notes.append(f"{path.name}: {what}; {len(bad)} of {len(lines)} lines left out.")
    return result


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path)
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        notes.append(f"{path.name} is not JSON ({error}).")
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise FewbitsError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
