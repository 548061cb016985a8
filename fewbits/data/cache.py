"""The cache folder: entries appear whole or not at all, are built by one process at a time, and notice a changed byte.

An entry is a folder with a `manifest.json` that holds the size and SHA-256 of every other file. It is built in a
sibling `NAME.tmp-*`, flushed to the disk and renamed, under a lock on `NAME.lock` that the system frees when its
holder dies.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fewbits.errors import FewbitsError
from fewbits.places import cache_root

MANIFEST = "manifest.json"
SCHEMA = 1


class Progress(Protocol):
    """Called now and then during long work: `done` of `total` units, and `what` is being done (one short phrase)."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


def silent(done: int, total: int, what: str) -> None:
    """The progress callback that shows nothing."""


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder for what can be built again: `cache`, else `FEWBITS_CACHE`, else `~/.cache/fewbits`; made if missing.

    Errors: FewbitsError when it cannot be created.
    """
    folder = Path(cache or cache_root()).expanduser()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)  # whether it can be written is asked when there is something to write
    return folder


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the system says about an unwritable or full cache into one sentence."""
    try:
        yield
    except BrokenPipeError:  # a console that went away while progress was shown
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise FewbitsError(
            f"Cannot write the cache folder {str(folder)!r} ({reason}). Name a writable folder with enough space in "
            "the environment variable FEWBITS_CACHE or with --data.cache."
        ) from error


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry(
    cache: Path, name: str, build: Callable[[Path], dict[str, Any]], progress: Progress = silent
) -> tuple[Path, dict[str, Any]]:
    """The cache entry `name`, built if it is missing or damaged, and the facts that its builder returned.

    cache: folder from `cache_folder`. name: file name of the entry, unique for its content.
    build: fills the folder it is given and returns JSON facts; they are stored in the manifest.
    Two processes that ask for the same entry: one builds, the other waits and then opens what was built.
    """
    folder = cache / name
    facts = verified(folder)
    if facts is not None:
        return folder, facts
    with _locked(cache, name, progress):
        facts = verified(folder)  # another process may have built it while this one waited
        if facts is None:
            facts = _build(folder, build)
    return folder, facts


def verified(folder: Path) -> dict[str, Any] | None:
    """The facts in the manifest of `folder`, or None when it is missing, incomplete, of another version or changed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        body = {"schema": manifest["schema"], "files": manifest["files"], "facts": manifest["facts"]}
        if manifest["schema"] != SCHEMA or manifest["checksum"] != _checksum(body):
            return None
        for name, known in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != known["bytes"] or sha256(path) != known["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    facts: dict[str, Any] = manifest["facts"]
    return facts


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


@contextmanager
def _locked(cache: Path, name: str, progress: Progress) -> Iterator[None]:
    from filelock import FileLock, Timeout

    with writing(cache):
        lock = FileLock(cache / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress(0, 1, "waiting for another process that is building the same")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Builds one entry beside its place and renames it there; called under the lock, so leftovers are nobody's."""
    with writing(folder.parent):
        for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a process that was killed while building
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        try:
            facts = build(temporary)
            names = sorted(path.name for path in temporary.iterdir())
            files = {
                name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)} for name in names
            }
            body = {"schema": SCHEMA, "files": files, "facts": facts}
            text = json.dumps({**body, "checksum": _checksum(body)}, indent=1)
            (temporary / MANIFEST).write_text(text, encoding="utf-8")
            for name in [*names, MANIFEST]:
                flush_to_disk(temporary / name)
            flush_to_disk(temporary)
            if folder.exists():  # damaged: verified() said so
                shutil.rmtree(folder)
            temporary.rename(folder)
            flush_to_disk(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return facts


def flush_to_disk(path: Path) -> None:
    """Makes a file, or the entries of a folder, survive a power cut (fsync). Windows cannot open folders: skipped."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
