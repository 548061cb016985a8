"""Load a checkpoint: every byte is verified before any tensor is used, and nothing can run code."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from fewbits.checkpoint.disk import PIECE
from fewbits.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    REPLACED,
    STATE,
    STATE_VERSION,
    Damaged,
    read_latest,
    read_manifest,
    reading,
    step_of,
)
from fewbits.checkpoint.save import CheckpointWarning
from fewbits.checkpoint.schema import check, check_version, load_json
from fewbits.checkpoint.tensors import read_tensors
from fewbits.errors import FewbitsError

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """What `save_checkpoint` was given, bit for bit (the model rounded when `save_dtype` says so)."""

    path: Path
    step: int
    model: dict[str, Tensor]
    """CPU tensors in the stored dtypes, each in a storage of its own."""
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    files: dict[str, bytes]
    """The other files by name: config.json, tokenizer.json, ..."""
    save_dtype: str | None
    """None: the model is exact. "bf16" or "fp16": it was rounded, and a resumed run is not bit-exact."""


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Load the newest good checkpoint of a run folder or of its checkpoints folder, or exactly the one that is named.

    A damaged newest one is named in a `CheckpointWarning`, with the file that was changed, and the good one before it
    is used. Files that the manifest does not list are named in a warning and not used.

    Errors: FewbitsError when there is none, none is good, the one named is damaged, or it is of another version."""
    path = Path(path)
    if path.name == LATEST and path.is_file():
        path = path.parent
    if not path.exists():
        raise FewbitsError(f"{path} does not exist. Name a run folder, or one of its checkpoints.")
    if (path / MANIFEST).is_file() or (path.is_dir() and step_of(path) is not None):
        return _load_named(path)
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    candidates, problems = _candidates(folder)
    if not candidates:
        raise FewbitsError(_nothing_here(path, folder))
    for candidate in candidates:
        try:
            checkpoint = _read(candidate)
        except Damaged as error:
            problems.append(f"{candidate.name}: {error}")
            continue
        for problem in problems:
            _warn(f"{folder}: {problem}. Using {candidate.name}, which is intact.")
        return checkpoint
    raise FewbitsError(f"No checkpoint in {folder} is intact: {'; '.join(problems)}. Start again or restore a copy.")


def list_checkpoints(path: Path | str) -> list[Path]:
    """The checkpoint folders of a run or checkpoints folder, newest first, unverified; [] when there are none."""
    folder = Path(path) / "checkpoints" if (Path(path) / "checkpoints").is_dir() else Path(path)
    found = [entry for entry in folder.glob("step-*") if entry.is_dir() and step_of(entry) is not None]
    return sorted(found, key=lambda entry: step_of(entry) or 0, reverse=True)


def check_shapes(expected: Mapping[str, Tensor | Sequence[int]], tensors: Mapping[str, Tensor]) -> None:
    """Errors: FewbitsError naming the first tensor that is missing, unexpected or of another shape than expected."""
    for name, want in expected.items():
        shape = list(want.shape if isinstance(want, Tensor) else want)
        if name not in tensors:
            raise FewbitsError(
                f"The checkpoint has no tensor '{name}' (expected {shape}): it is of another model. "
                "Use the model options that it was saved with."
            )
        if list(tensors[name].shape) != shape:
            raise FewbitsError(
                f"The checkpoint is of another shape: '{name}' is {list(tensors[name].shape)} there and {shape} here. "
                "Use the model options that it was saved with."
            )
    extra = next((name for name in tensors if name not in expected), None)
    if extra is not None:
        raise FewbitsError(
            f"The checkpoint has a tensor '{extra}' {list(tensors[extra].shape)} that is not expected here: it is of "
            "another model. Use the model options that it was saved with."
        )


def _candidates(folder: Path) -> tuple[list[Path], list[str]]:
    """Checkpoint folders in the order in which to try them, and what is wrong with `latest`.

    `latest` first (under its other name if a save crashed while replacing it), then the steps before it from new to
    old, then those after it."""
    found = list_checkpoints(folder)
    replaced = sorted(folder.glob(f"{REPLACED}step-*"), key=lambda entry: step_of(entry) or 0, reverse=True)
    problems: list[str] = []
    try:
        newest = folder / read_latest(folder)
        if newest in found:
            now = step_of(newest) or 0
            found.sort(key=lambda entry: ((step_of(entry) or 0) > now, -(step_of(entry) or 0)))
        elif (hidden := folder / (REPLACED + newest.name)) in replaced:
            replaced.remove(hidden)
            found.insert(0, hidden)
        elif found:
            problems.append(f"{LATEST} points to {newest.name}, which is missing")
    except Damaged as error:
        problems.append(str(error))
    return found + replaced, problems


def _load_named(path: Path) -> Checkpoint:
    try:
        return _read(path)
    except Damaged as error:
        raise FewbitsError(
            f"{path} is damaged: {error}. Name the run folder instead to use the newest checkpoint that is intact."
        ) from None


def _read(folder: Path) -> Checkpoint:
    """Read and verify everything. Errors: Damaged, naming the file; FewbitsError for another version."""
    manifest = read_manifest(folder)
    entries: dict[str, dict[str, Any]] = manifest["files"]
    for name, entry in entries.items():  # sizes first: a truncated file is found without reading gigabytes
        _check_size(folder / name, entry["bytes"])
    tensors = {name: _verified(folder / name, read_tensors, **entries[name]) for name in (MODEL, OPTIMIZER)}
    files = {name: _verified(folder / name, _read_all, **entries[name]) for name in entries if name not in tensors}
    state = load_json(files.pop(STATE))
    check_version(state.get("schema"), STATE_VERSION, str(folder / STATE))
    check(state, {"schema": str, "step": int, "state": {str: object}}, str(folder / STATE))
    if manifest["step"] != state["step"] or step_of(folder) not in (None, state["step"]):  # None: a copy elsewhere
        raise Damaged(f"it holds step {manifest['step']}, so the folder was renamed")
    _warn_of_extra(folder, entries)
    return Checkpoint(
        folder, state["step"], tensors[MODEL], tensors[OPTIMIZER], state["state"], files, manifest["save_dtype"]
    )


def _check_size(path: Path, expected: int) -> None:
    with reading(path.name):
        size = path.stat().st_size
    if size != expected:
        raise Damaged(f"{path.name} is {'cut off' if size < expected else 'too long'} ({size} of {expected} bytes)")


def _verified(path: Path, read: Callable[[Callable[[memoryview], None], int], T], bytes: int, sha256: str) -> T:
    """What `read` makes of a file of so many bytes, given out only when they are the ones saved. Errors: Damaged."""
    digest = hashlib.sha256()
    try:
        with reading(path.name), open(path, "rb", buffering=0) as handle:

            def fill(target: memoryview) -> None:
                filled = 0
                while filled < len(target):
                    count = handle.readinto(target[filled : filled + PIECE])
                    if not count:
                        raise ValueError("it is cut off")
                    digest.update(target[filled : filled + count])
                    filled += count

            result = read(fill, bytes)
    except ValueError as error:
        raise Damaged(f"{path.name} was changed ({error})") from None
    if digest.hexdigest() != sha256:
        raise Damaged(f"{path.name} was changed (its sha256 is not the one in {MANIFEST})")
    return result


def _read_all(fill: Callable[[memoryview], None], size: int) -> bytes:
    content = bytearray(size)
    fill(memoryview(content))
    return bytes(content)


def _warn_of_extra(folder: Path, entries: Mapping[str, object]) -> None:
    extra = [entry.name for entry in folder.iterdir() if entry.name not in entries and entry.name != MANIFEST]
    extra = sorted(name for name in extra if not name.startswith("."))
    if extra:
        _warn(f"{folder} also holds {', '.join(extra)}, which fewbits did not save. It is not used.")


def _warn(message: str) -> None:
    warnings.warn(message, CheckpointWarning, stacklevel=3)


def _nothing_here(path: Path, folder: Path) -> str:
    if path.is_file():
        return f"{path} is a file. Name a run folder, or one of its checkpoints."
    if folder != path or (path / "config.toml").is_file():
        return f"{path} has no checkpoint yet. `fewbits train --resume {path}` begins it again."
    if (path / "config.json").is_file():
        return f"{path} looks like a Hugging Face folder, not like a run of fewbits. fewbits.load opens it."
    names = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    holds = f"it holds {shown}" if names else "it is empty"
    return f"{path} is not a run or checkpoint of fewbits ({holds}). Name a folder that `fewbits train` wrote."
