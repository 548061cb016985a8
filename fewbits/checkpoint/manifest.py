"""What a checkpoint folder says about itself: the manifest, and `latest` that points to one folder.

    checkpoints/latest                     "fewbits.latest/1 step-00001000 CHECKSUM", one line
    checkpoints/step-00001000/manifest.json    size and sha256 of every other file, and the checksum of this text

Both are refused unless they are byte for byte what fewbits would write, so that any changed byte is noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewbits.checkpoint.disk import Written
from fewbits.checkpoint.schema import check, check_version
from fewbits.errors import FewbitsError

MANIFEST, MODEL, OPTIMIZER, STATE, LATEST = (
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "latest",
)
MANIFEST_VERSION, STATE_VERSION, LATEST_VERSION = "fewbits.checkpoint/1", "fewbits.state/1", "fewbits.latest/1"
MANIFEST_SCHEMA = {
    "step": int,
    "save_dtype": (None, "bf16", "fp16"),
    "files": {str: {"bytes": int, "sha256": str}},
    "checksum": str,
}
SAVING, REPLACED, PRUNED = ".saving-", ".replaced-", ".pruned-"  # prefixes of what a crash may leave behind
_STEP_NAME = re.compile(r"step-(\d{8,})")


class Damaged(Exception):
    """A checkpoint that is not what was saved; the message names the file and what is wrong with it."""


@contextmanager
def reading(name: str) -> Iterator[None]:
    """A file that cannot be read within is Damaged."""
    try:
        yield
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({error.strerror})") from None


def step_name(step: int) -> str:
    """The folder name of a step.

    >>> step_name(1000)
    'step-00001000'
    """
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a folder's name, or None for a folder that is no checkpoint."""
    match = _STEP_NAME.fullmatch(folder.name.removeprefix(REPLACED))
    return int(match[1]) if match else None


def manifest_text(step: int, save_dtype: str | None, files: Mapping[str, Written]) -> bytes:
    """The manifest of a folder with these files."""
    entries = {name: {"bytes": written.bytes, "sha256": written.sha256} for name, written in sorted(files.items())}
    return _sealed({"schema": MANIFEST_VERSION, "step": step, "save_dtype": save_dtype, "files": entries})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as an object. Errors: Damaged; FewbitsError when an intact one is of another version."""
    with reading(MANIFEST):
        raw = (folder / MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw.decode())
        body = {key: value for key, value in manifest.items() if key != "checksum"}
        intact = _sealed(body) == raw
    except (ValueError, AttributeError, RecursionError):  # not JSON, not UTF-8, not an object
        intact = False
    if not intact:
        raise Damaged(f"{MANIFEST} was changed (its own checksum differs)")
    check_version(manifest.get("schema"), MANIFEST_VERSION, str(folder / MANIFEST))
    try:
        check(body | {"checksum": manifest["checksum"]}, {"schema": str, **MANIFEST_SCHEMA}, MANIFEST)
    except FewbitsError as error:
        raise Damaged(str(error)) from None
    missing = {MODEL, OPTIMIZER, STATE} - manifest["files"].keys()
    if missing:
        raise Damaged(f"{MANIFEST} does not list {min(missing)}")
    return dict(manifest)


def latest_text(name: str) -> bytes:
    """The content of `latest` that points to the folder `name`."""
    line = f"{LATEST_VERSION} {name}"
    return f"{line} {hashlib.sha256(line.encode()).hexdigest()}\n".encode()


def read_latest(checkpoints: Path) -> str:
    """The folder name that `latest` points to. Errors: Damaged."""
    with reading(LATEST):
        raw = (checkpoints / LATEST).read_bytes()
    parts = raw.decode("utf-8", errors="replace").split(" ")
    if len(parts) != 3 or latest_text(parts[1]) != raw or not _STEP_NAME.fullmatch(parts[1]):
        raise Damaged(f"{LATEST} was changed (its own checksum differs)")
    return parts[1]


def _sealed(body: dict[str, Any]) -> bytes:
    """The text of an object with its own checksum as the last key."""
    digest = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    return (json.dumps({**body, "checksum": digest}, indent=1) + "\n").encode()
