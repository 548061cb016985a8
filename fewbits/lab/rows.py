"""From blocks and runs to one row a variant: speed and memory as ratios to the first, loss with its verdict."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from fewbits.lab.verdict import Verdict, verdict

Json = Mapping[str, Any]


def make_rows(
    labels: Sequence[str],
    seeds: Sequence[int],
    blocks: Sequence[Json],
    runs: Sequence[Json],
    margin: float,
    measure: str,
) -> list[dict[str, Any]]:
    """One row a label, the first being the reference. What was not measured yet is None."""
    rows = []
    for label in labels:
        own = [run_of(runs, label, seed) for seed in seeds]
        row: dict[str, Any] = {"variant": label, "reference": label == labels[0]}
        row.update(speed_row(blocks, label, labels[0]))
        row.update(memory_row(blocks, label, labels[0]))
        row["losses"] = [loss_of(run, measure) for run in own]
        row["statuses"] = [run["status"] if run else None for run in own]
        row["skipped_steps"] = [run.get("skipped_steps") if run else None for run in own]
        row["steps"] = [run.get("steps") if run else None for run in own]
        if label == labels[0]:
            row.update(differences=None, verdict=None)
        else:
            result, differences = judge(own, [run_of(runs, labels[0], seed) for seed in seeds], margin, measure)
            row.update(differences=differences, verdict=result.to_json())
        rows.append(row)
    return rows


def run_of(runs: Sequence[Json], label: str, seed: int) -> Json | None:
    """The run of a variant and seed, if it has ended."""
    return next((run for run in runs if run["variant"] == label and run["seed"] == seed), None)


def loss_of(run: Json | None, measure: str) -> float | None:
    """The held-out result of a run; None when it diverged, crashed or has not ended."""
    if run is None or run["status"] != "finished":
        return None
    value = run.get(measure)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def judge(
    runs: Sequence[Json | None], references: Sequence[Json | None], margin: float, measure: str
) -> tuple[Verdict, list[float | None]]:
    """The verdict on a variant, and its relative difference to the reference for each seed (None: none to be had).

    A diverged run of the variant makes the row `diverged`. A run that crashed, or whose reference has no loss, leaves
    no pair; then nothing is shown, because which seeds are missing may hang on what is being compared.
    """
    pairs = [(run, reference) for run, reference in zip(runs, references, strict=True) if run and reference]
    differences: list[float | None] = []
    for run, reference in zip(runs, references, strict=True):
        own, base = loss_of(run, measure), loss_of(reference, measure)
        differences.append((own - base) / base if own is not None and base else None)
    finite = [d for d in differences if d is not None]
    if any(diverged(run) for run, _ in pairs):
        values = [math.inf if diverged(run) else 0.0 for run, _ in pairs]
        result = verdict(values, margin)
        mean = math.fsum(finite) / len(finite) if finite else None
        return Verdict("diverged", mean, None, margin, len(pairs), None, result.reason), differences
    result = verdict(finite, margin)
    lost = len(pairs) - len(finite)
    if lost:
        base_lost = any(loss_of(reference, measure) is None for _, reference in pairs)
        why = "the reference diverged or crashed" if base_lost else "a run crashed"
        reason = f"{lost} of {len(pairs)} pairs have no difference: {why}"
        return Verdict("not shown", result.mean, None, margin, len(finite), None, reason), differences
    return result, differences


def diverged(run: Json) -> bool:
    """Whether a run left the finite numbers: by its own word, or by a held-out loss that is none."""
    if run["status"] == "diverged":
        return True
    return bool(run["status"] == "finished" and loss_of(run, "val_loss") is None)


def speed_row(blocks: Sequence[Json], label: str, reference: str) -> dict[str, Any]:
    """ms a step and tokens/s (medians over blocks); their ratios to the reference: geometric means over the rounds.

    Each round gives one ratio from two blocks that ran close together, so that a machine that slows down over minutes
    slows both; the range of these ratios says how well the mean is known.
    """
    own = {b["round"]: b for b in blocks if b["variant"] == label and b.get("status") == "ok"}
    base = {b["round"]: b for b in blocks if b["variant"] == reference and b.get("status") == "ok"}
    failed = next((b for b in blocks if b["variant"] == label and b.get("status") not in ("ok", None)), None)
    row: dict[str, Any] = dict.fromkeys(("ms_per_step", "tok_per_s", "time_ratio", "speed_ratio", "speed_ratio_range"))
    row["block_failure"] = None if failed is None else failed.get("reason")
    if not own:
        return row
    row["ms_per_step"] = median(b["ms_per_step"] for b in own.values())
    row["tok_per_s"] = median(b["tok_per_s"] for b in own.values())
    rounds = sorted(own.keys() & base.keys())
    if rounds:
        speeds = [own[r]["tok_per_s"] / base[r]["tok_per_s"] for r in rounds]
        times = [own[r]["ms_per_step"] / base[r]["ms_per_step"] for r in rounds]
        row["speed_ratio"], row["time_ratio"] = geometric_mean(speeds), geometric_mean(times)
        row["speed_ratio_range"] = [min(speeds), max(speeds)]
    return row


def memory_row(blocks: Sequence[Json], label: str, reference: str) -> dict[str, Any]:
    """Peak memory of a step in bytes, by role, and as a ratio to the reference; the largest of the blocks."""
    own = _fullest(blocks, label)
    base = _fullest(blocks, reference)
    row: dict[str, Any] = dict.fromkeys(("peak_memory_bytes", "memory", "memory_ratio", "resident_bytes"))
    if own is None:
        return row
    row.update(peak_memory_bytes=own["peak_memory_bytes"], memory=own.get("memory"))
    row["resident_bytes"] = own.get("resident_bytes")
    if base is not None:
        row["memory_ratio"] = own["peak_memory_bytes"] / base["peak_memory_bytes"]
    return row


def _fullest(blocks: Sequence[Json], label: str) -> Json | None:
    measured = [b for b in blocks if b["variant"] == label and b.get("peak_memory_bytes")]
    return max(measured, key=lambda b: int(b["peak_memory_bytes"]), default=None)


def geometric_mean(values: Sequence[float]) -> float:
    """The mean that treats a ratio and its inverse alike.

    >>> geometric_mean([0.5, 2.0])
    1.0
    """
    return math.exp(math.fsum(math.log(v) for v in values) / len(values))


CSV_COLUMNS = (
    "variant", "verdict", "mean_difference", "interval_low", "interval_high", "margin", "seeds", "seeds_needed",
    "mean_loss", "losses", "ms_per_step", "tok_per_s", "time_ratio", "speed_ratio", "peak_memory_bytes", "memory_ratio",
    "resident_bytes", "skipped_steps", "statuses",
)  # fmt: skip


def to_csv(rows: Sequence[Json]) -> str:
    """The rows as CSV, one line a variant; values per seed are joined by spaces, what is unknown is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        judged = row.get("verdict") or {}
        low, high = judged.get("interval") or (None, None)
        losses = [loss for loss in row["losses"] if loss is not None]
        flat = {key: _cell(row.get(key)) for key in CSV_COLUMNS}
        flat.update(
            verdict=judged.get("kind", "reference"), mean_difference=_cell(judged.get("mean")), interval_low=_cell(low),
            interval_high=_cell(high), margin=_cell(judged.get("margin")), seeds=str(len(losses)),
            seeds_needed=_cell(judged.get("seeds_needed")),
            mean_loss=_cell(math.fsum(losses) / len(losses) if losses else None),
        )  # fmt: skip
        writer.writerow(flat)
    return out.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join("-" if item is None else _cell(item) for item in value)
    return "" if value is None else f"{value:.8g}" if isinstance(value, float) else str(value)
