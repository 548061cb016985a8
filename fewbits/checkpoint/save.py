"""Save a checkpoint as one transaction: a crash at any instant leaves the previous one usable and `latest` valid.

1  clear what an earlier crash left         4  rename the folder to step-00001000, sync
2  write .saving-step-00001000, sync        5  replace `latest`, sync
3  write the next `latest` beside it        6  prune to the last `keep`
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint.disk import Written, remove_folder, sync_folder, write_file
from fewbits.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    PRUNED,
    REPLACED,
    SAVING,
    STATE,
    STATE_VERSION,
    latest_text,
    manifest_text,
    step_name,
    step_of,
)
from fewbits.checkpoint.schema import dump_json
from fewbits.checkpoint.tensors import tensor_pieces
from fewbits.errors import FewbitsError


class CheckpointWarning(UserWarning):
    """Something about a checkpoint that a person should know while the work goes on."""


SAVE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def save_checkpoint(
    folder: Path | str,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    files: Mapping[str, str | bytes],
    keep: int,
    save_dtype: str | None = None,
) -> Path:
    """Save everything of one step under `folder`/step-00001000 and point `folder`/latest to it; returns that path.

    model, optimizer: tensors of any device, shape and dtype that safetensors holds, stored bit for bit. save_dtype
    "bf16" or "fp16" stores the model's floating tensors rounded to nearest even instead (the manifest says so; exact
    resume needs None). state: what JSON holds, non-finite floats included. files: text or bytes by plain file name.
    keep: how many checkpoints stay, this one included.

    Errors: FewbitsError when the disk is full or cannot be written; the last good checkpoint and `latest` stay."""
    folder = Path(folder)
    if keep < 1:
        raise FewbitsError(f"keep={keep} would keep no checkpoint. Choose 1 or more.")
    if step < 0:
        raise FewbitsError(f"step={step} cannot be saved. Steps count from 0.")
    contents = _contents(step, model, optimizer, state, files, save_dtype)
    target, temporary = folder / step_name(step), folder / (SAVING + step_name(step))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder, SAVING, PRUNED)
        try:
            _write_folder(temporary, contents, step, save_dtype)
            write_file(folder / (SAVING + LATEST), [latest_text(target.name)])
            _publish(temporary, target)
        except BaseException:  # an interrupt too: nothing half-written stays
            _clear_quietly(folder)
            raise
    except OSError as error:
        raise _failure(error, folder, step) from error
    _prune(folder, target, keep)
    return target


def save_model(
    folder: Path | str,
    step: int,
    model: Mapping[str, Tensor],
    state: Mapping[str, Any],
    files: Mapping[str, str | bytes],
    save_dtype: str | None = None,
) -> Path:
    """Save a model that will not be trained on as one checkpoint of its own, `folder` itself; returns that path.

    As `save_checkpoint`: all of it or nothing, hashed, no pickle; with no optimizer, no `latest` and no older ones.

    Errors: FewbitsError when `folder` is there and not empty, the disk is full or cannot be written."""
    folder = Path(folder)
    check_new(folder)
    contents = _contents(step, model, {}, state, files, save_dtype)
    temporary = folder.absolute().parent / (SAVING + folder.name)
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            remove_folder(temporary)
            _write_folder(temporary, contents, step, save_dtype)
            if folder.exists():
                folder.rmdir()
            os.rename(temporary, folder)
            sync_folder(temporary.parent)
        except BaseException:  # an interrupt too: nothing half-written stays
            with contextlib.suppress(OSError):
                remove_folder(temporary)
            raise
    except OSError as error:
        raise _failure(error, folder, step) from error
    return folder


def check_new(folder: Path) -> None:
    """Errors: FewbitsError when something is in `folder` already."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FewbitsError(f"{folder} is there already and will not be overwritten. Name a folder that is not there.")


def _contents(
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    files: Mapping[str, str | bytes],
    save_dtype: str | None,
) -> dict[str, Any]:
    """File name -> bytes, or -> the tensors of a safetensors file. All that can be refused is refused here."""
    if save_dtype is not None and save_dtype not in SAVE_DTYPES:
        raise FewbitsError(f"save_dtype={save_dtype!r} is not one of bf16, fp16 or none (the exact values).")
    for name in files:
        if name in (MANIFEST, MODEL, OPTIMIZER, STATE) or Path(name).name != name or name.startswith("."):
            raise FewbitsError(f"A checkpoint cannot hold a file named {name!r}. Choose a plain name of its own.")
    return {
        MODEL: dict(model) if save_dtype is None else _Rounded(model, SAVE_DTYPES[save_dtype]),
        OPTIMIZER: dict(optimizer),
        STATE: dump_json({"schema": STATE_VERSION, "step": step, "state": dict(state)}),
        **{name: text.encode() if isinstance(text, str) else text for name, text in files.items()},
    }


class _Rounded(dict[str, Tensor]):
    """The model's floating tensors in 16 bits, finite values beyond fp16's range at its ends."""

    def __init__(self, model: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        limit = torch.finfo(dtype).max
        for name, tensor in model.items():
            if not tensor.is_floating_point():
                self[name] = tensor
                continue
            rounded = tensor.detach().to(dtype)
            if bool((rounded.isinf() & tensor.isfinite()).any()):
                warnings.warn(
                    f"{name} has values beyond {limit:g}, the largest of save_dtype {str(dtype).split('.')[-1]}; they "
                    "are stored as that. Save with bf16 or exactly.",
                    CheckpointWarning,
                    stacklevel=4,
                )
                rounded = torch.where(tensor.isinf(), rounded, rounded.clamp(-limit, limit))
            self[name] = rounded


def _write_folder(temporary: Path, contents: Mapping[str, Any], step: int, save_dtype: str | None) -> None:
    temporary.mkdir()
    written: dict[str, Written] = {}
    for name, content in contents.items():
        # transformers reads "format"; the step is for whoever finds the file alone
        metadata = {"format": "pt", "step": str(step)}
        pieces = [content] if isinstance(content, bytes) else tensor_pieces(content, metadata)
        written[name] = write_file(temporary / name, pieces)
    write_file(temporary / MANIFEST, [manifest_text(step, save_dtype, written)])
    sync_folder(temporary)


def _publish(temporary: Path, target: Path) -> None:
    """Give the finished folder its name, then point `latest` to it."""
    folder = target.parent
    replaced = folder / (REPLACED + target.name)
    if target.exists():  # the same step again: until the new one stands, load finds the old under its other name
        remove_folder(replaced)
        os.rename(target, replaced)
    try:
        os.rename(temporary, target)
    except OSError:
        if replaced.exists():
            os.rename(replaced, target)
        raise
    sync_folder(folder)
    os.replace(folder / (SAVING + LATEST), folder / LATEST)
    sync_folder(folder)


def _clear(folder: Path, *prefixes: str) -> None:
    """Remove what a crashed save left behind."""
    for path in list(folder.iterdir()):
        if path.name.startswith(prefixes):
            if path.is_dir():
                remove_folder(path)
            else:
                path.unlink(missing_ok=True)


def _clear_quietly(folder: Path) -> None:
    with contextlib.suppress(OSError):  # the first error is the one to report; the next save clears what is left
        _clear(folder, SAVING)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Keep `newest` and the keep - 1 before it. Steps after it belong to a future that was abandoned: they go first."""
    try:
        _clear(folder, REPLACED)
        now = step_of(newest) or 0
        steps = {path: step for path in folder.glob("step-*") if (step := step_of(path)) is not None and path != newest}
        order = sorted(steps, key=lambda path: (steps[path] > now, -steps[path]))
        for path in order[keep - 1 :]:
            # Renamed first, because removing a folder is not one act: a crash in the middle must not look like damage.
            hidden = folder / (PRUNED + path.name)
            remove_folder(hidden)
            os.rename(path, hidden)
            remove_folder(hidden)
    except OSError as error:
        warnings.warn(
            f"{newest.name} is saved, but older checkpoints in {folder} could not be removed ({error.strerror}).",
            CheckpointWarning,
            stacklevel=3,
        )


def _failure(error: OSError, folder: Path, step: int) -> FewbitsError:
    """What the system said, in one sentence with what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free)"
        except OSError:
            free = ""
        what, todo = f"the disk is full{free}", "Free some space, keep fewer checkpoints, or name another folder"
    elif isinstance(error, PermissionError) or error.errno == errno.EROFS:
        what, todo = "there is no permission to write there", "Change the permissions or name another folder"
    elif isinstance(error, FileExistsError | NotADirectoryError):
        what, todo = "a file stands where a folder is needed", "Move it away or name another folder"
    else:
        what, todo = f"the system said: {error.strerror or error}", "Name another folder if it persists"
    return FewbitsError(
        f"The checkpoint of step {step} could not be saved in {folder}: {what}. {todo}; the last good checkpoint is "
        "untouched."
    )
