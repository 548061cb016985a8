"""Files that survive a crash: written, synced, and only then given their name."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PIECE = 16 << 20  # bytes handed to the disk and the hash at a time: small beside the tensors, large beside a call


class Written(NamedTuple):
    """What reached the disk: size in bytes and sha256 as hexadecimal text."""

    bytes: int
    sha256: str


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> Written:
    """Write the pieces one after the other and sync them. Hashes what it was given in the same pass, so that a disk
    that stores something else is noticed on load. Errors: OSError, as the system raised it."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as handle:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for start in range(0, len(view), PIECE):
                part = view[start : start + PIECE]
                handle.write(part)
                digest.update(part)
            size += len(view)
        handle.flush()
        os.fsync(handle.fileno())
    return Written(size, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename is not until its folder is synced."""
    if os.name != "posix":  # elsewhere a folder cannot be opened for syncing
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(folder: Path) -> None:
    """Remove a folder and what it holds; nothing when it is not there."""
    if folder.is_dir():
        shutil.rmtree(folder)
