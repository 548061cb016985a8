"""The loss runs of a comparison as they lie on disk: which have ended, and with what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ENDED = ("finished", "diverged")  # by themselves: such a run is never run again
KEPT = (
    "status", "val_loss", "bits_per_byte", "final_loss", "skipped_steps", "steps", "tokens", "wall_s", "tok_per_s",
    "precision", "reason", "distinct_tokens", "epochs", "params",
)  # fmt: skip


def ended_well(run: Path) -> bool:
    """Whether a run has a summary that says it ended by itself."""
    return _summary(run).get("status") in ENDED


def relative(run: Path) -> str:
    """The run's folder as seen from the folder of compare.json."""
    return "/".join(run.parts[-3:])


def _summary(run: Path) -> dict[str, Any]:
    try:
        value = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def run_entry(run: Path, label: str, seed: int) -> dict[str, Any] | None:
    """What compare.json keeps of a run that ended; None when it did not."""
    summary = _summary(run)
    if summary.get("status") not in ENDED:
        return None
    return {"variant": label, "seed": seed, "folder": relative(run), **{key: summary.get(key) for key in KEPT}}


def last_entry(path: Path) -> dict[str, Any]:
    """The last whole line with a loss of a metrics file, or {}."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            tail = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    for line in reversed(tail):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and "loss" in entry:
            return entry
    return {}


def crashed_entry(run: Path, label: str, seed: int) -> dict[str, Any]:
    """What compare.json keeps of a run that ended otherwise: the last line it wrote to its log."""
    log = run.with_name(f"{run.name}.log")
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    reason = lines[-1].strip()[:500] if lines else str(_summary(run).get("reason") or "it said nothing")
    return {
        "variant": label,
        "seed": seed,
        "status": "crashed",
        "folder": relative(run),
        "wall_s": 0.0,
        "reason": reason,
    }
