"""The run directory: which one, whether it may be written, and that one run at a time is in it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fewbits.errors import FewbitsError

if sys.platform != "win32" or TYPE_CHECKING:
    import fcntl
else:
    fcntl = None

SMALL = "quantize.json"  # what a folder that `fewbits quantize` wrote holds beside the model
MARKS = ("config.toml", "metrics.jsonl", "summary.json", "checkpoints")


def is_run(folder: Path) -> bool:
    """Whether `folder` holds what `fewbits train` leaves behind."""
    return (folder / "config.toml").is_file()


def run_of(path: Path) -> Path | None:
    """The run directory that `path` (itself, its checkpoints folder or one of its checkpoints) belongs to, or None."""
    return next((folder for folder in (path, *path.absolute().parents[:2]) if is_run(folder)), None)


def refuse_small(path: Path) -> None:
    """Raises FewbitsError when `path` is a model that was made small, where a run is needed."""
    if (path / SMALL).is_file():
        raise FewbitsError(
            f"{path} was made by `fewbits quantize`: it is for use (eval, generate), and cannot be trained on; its page is "
            "report.html in it. Name the run that it was made from."
        )


def check_writable(folder: Path) -> None:
    """Raises FewbitsError when `folder`, or the nearest existing folder above it, cannot be written. Makes nothing."""
    place = folder.absolute()
    if place.exists() and not place.is_dir():
        raise FewbitsError(f"--out_dir {folder} is a file. Name a folder for the run.")
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise FewbitsError(f"{place} is a file, so {folder} cannot be made below it. Choose another --out_dir.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise FewbitsError(f"No permission to write in {place}. Choose another --out_dir.")


def check_free(folder: Path) -> None:
    """Raises FewbitsError when a new run may not start in `folder`: another run, or foreign files, are there."""
    check_writable(folder)
    if not folder.exists():
        return
    if any((folder / mark).exists() for mark in MARKS):
        raise FewbitsError(
            f"{folder} holds a run already. Continue it with --resume {folder}, or choose another --out_dir."
        )
    found = sorted(entry.name for entry in folder.iterdir() if entry.name != ".lock")
    if found:
        shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise FewbitsError(f"{folder} is not empty (it holds {shown}). Choose another --out_dir for the run.")


def next_free(parent: Path, name: str) -> Path:
    """`parent/name-N` with the smallest N >= 1 that does not exist."""
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"


class Lock:
    """One run at a time in a folder. The system lets go of the lock when the process ends, however it ends."""

    def __init__(self, folder: Path):
        """Take the lock of `folder` (made if missing). Raises FewbitsError when another process holds it."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held until release)
        except OSError as error:
            raise FewbitsError(f"Cannot write in {folder}: {error.strerror}. Choose another --out_dir.") from error
        if not self._take():
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise FewbitsError(
                f"Another run (process {holder}) is writing to {folder}. Wait for it, or choose another --out_dir."
            )
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def _take(self) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Let the next run in. The empty lock file stays: removing it would race with a run that is opening it."""
        self._file.truncate(0)
        self._file.close()


def locked(folder: Path) -> bool:
    """Whether a process is writing to the run in `folder` now."""
    if fcntl is None or not (folder / ".lock").exists():
        return False
    with open(folder / ".lock", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
