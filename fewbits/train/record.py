"""What a run leaves behind while it goes on: metrics.jsonl, events.jsonl, summary.json, config.toml.

Every line of a .jsonl file is one strict JSON object, written and flushed at once. A number that is not finite becomes
null, and the object names it: `{"loss": null, "nonfinite": {"loss": "nan"}}`; a NaN step is never invisible. Files that
are replaced (summary.json, config.toml) are written beside and renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from fewbits.errors import FewbitsError
from fewbits.precision.hardware import cpu_name

SCHEMA = 1  # of summary.json


def strict(value: Mapping[str, Any]) -> dict[str, Any]:
    """The same object with non-finite numbers at its top level as null, named under "nonfinite".

    >>> strict({"step": 3, "loss": float("nan")})
    {'step': 3, 'loss': None, 'nonfinite': {'loss': 'nan'}}
    """
    bad = {key: str(x) for key, x in value.items() if isinstance(x, float) and not math.isfinite(x)}
    plain: dict[str, Any] = {key: None if key in bad else x for key, x in value.items()}
    return {**plain, "nonfinite": bad} if bad else plain


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`, whole or not at all. Raises FewbitsError when the folder cannot be written."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise FewbitsError(f"Cannot write {path}: {error.strerror}. Free space or choose another --out_dir.") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`value` as indented strict JSON, replaced atomically; a number that is not finite becomes null."""
    write_atomically(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(x) for key, x in value.items()}
    return [_finite(x) for x in value] if isinstance(value, list | tuple) else value


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; a last line cut short by a kill is left out, a missing file is empty."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict):
                yield entry


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they decide results."""
    versions = {}
    for name in ("fewbits", "torch", "numpy", "safetensors", "tokenizers", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "versions": versions,
        "command": " ".join(sys.argv),
    }


class Record:
    """The growing files of one run directory. Lines later than `from_step` are dropped when a run is resumed there."""

    def __init__(self, folder: Path, from_step: int = 0):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = self._open("metrics.jsonl", from_step)
        self._events = self._open("events.jsonl", from_step)

    def _open(self, name: str, from_step: int) -> TextIO:
        path = self.folder / name
        if path.exists():  # steps after the checkpoint are about to be run again; a torn last line goes as well
            kept = [entry for entry in read_lines(path) if entry.get("step", 0) <= from_step]
            write_atomically(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept))
        try:
            return open(path, "a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise FewbitsError(f"Cannot write {path}: {error.strerror}. Choose another --out_dir.") from error

    def metrics(self, entry: Mapping[str, Any]) -> None:
        """One logged step, or one evaluation."""
        self._write(self._metrics, entry)

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Something that happened: start, resume, save, skipped, sample, stop, diverged, error."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self._write(self._events, {"event": kind, "step": step, "time": when, **details})

    def _write(self, file: TextIO, entry: Mapping[str, Any]) -> None:
        try:
            file.write(json.dumps(_finite(strict(entry)), ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
        except OSError as error:
            raise FewbitsError(f"Cannot write {self.folder}: {error.strerror}. Free some space and resume.") from error

    def summary(self, value: Mapping[str, Any]) -> None:
        """Replace summary.json."""
        write_json(self.folder / "summary.json", strict({"schema": SCHEMA, **value}))

    def close(self) -> None:
        """Close both files; the record is of no use afterwards."""
        self._metrics.close()
        self._events.close()
