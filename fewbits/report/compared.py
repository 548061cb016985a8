"""What the page of a comparison shows, from compare.json and the metrics of its runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError
from fewbits.report.plots import Chart, Series, bar_chart, interval_chart, line_chart, running_mean
from fewbits.report.record import read_lines
from fewbits.report.words import count, duration, flat, of_bytes, percent, ratio, value_text

Json = Mapping[str, Any]
ROLES = ("working weights", "master weights", "moments", "gradients", "activations", "buffers")
COLOUR = {
    "same": "good",
    "better": "good",
    "worse": "bad",
    "diverged": "bad",
    "not shown": "plain",
    "reference": "plain",
}
LEGEND = (
    "same: the whole 95 % interval of the difference lies inside the margin. worse, better: it lies wholly beyond it. "
    "not shown: neither; so many seeds would decide. Differences are relative and paired by seed, positive is worse. "
    "Speed and memory are ratios to the first row."
)


def read_comparison(path: Path) -> dict[str, Any]:
    """The content of a compare.json. Raises FewbitsError when it is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FewbitsError(f"{path} cannot be read: {error.strerror}. Name a compare.json.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FewbitsError(f"{path} is not JSON ({error}).") from None
    if not isinstance(value, dict) or not str(value.get("schema", "")).startswith("fewbits.comparison/"):
        raise FewbitsError(f"{path} is not a comparison of fewbits.")
    return value


def table_row(row: Json) -> dict[str, str]:
    """One row of a comparison as text, the same words in the page and in the terminal."""
    judged = row.get("verdict") or {}
    losses = [loss for loss in row["losses"] if loss is not None]
    low, high = judged.get("interval") or (None, None)
    skipped = [s for s in row["skipped_steps"] if s is not None]
    steps = [s for s in row.get("steps") or [] if s is not None]
    kind = "reference" if row["reference"] else str(judged.get("kind", "-"))
    mean = math.fsum(losses) / len(losses) if losses else None
    return {
        "label": str(row["variant"]),
        "verdict": kind,
        "colour": COLOUR.get(kind, "plain"),
        "reason": str(judged.get("reason") or row.get("block_failure") or ""),
        "loss": value_text(mean),
        "difference": percent(judged.get("mean"), signed=True),
        "interval": f"{percent(low, signed=True)} to {percent(high, signed=True)}" if low is not None else "-",
        "speed": ratio(row.get("speed_ratio")),
        "tok_per_s": count(row.get("tok_per_s")),
        "ms": value_text(row.get("ms_per_step"), 1),
        "memory": ratio(row.get("memory_ratio")),
        "peak": of_bytes(row.get("peak_memory_bytes")),
        "skipped": f"{sum(skipped)} of {sum(steps):,}" if skipped else "-",
    }


def comparison_view(document: Json, folder: Path) -> dict[str, Any]:
    """Everything that the page of a comparison shows. `folder` holds compare.json and the runs."""
    rows = document["rows"]
    config = document.get("config") or document.get("asked") or ""
    return {
        "title": f"Comparison of {document['key']}: {', '.join(document['variants'])}",
        "complete": document["status"] == "complete",
        "lead": _lead(document),
        "notes": _notes(document),
        "key": document["key"],
        "rows": [{**table_row(row), "per_seed": _per_seed(row, document)} for row in rows],
        "legend": LEGEND,
        "seeds": document["seeds"],
        "reference": document["variants"][0],
        "loss_charts": loss_charts(document, folder),
        "cost_charts": cost_charts(rows),
        "measured": _measured(document),
        "choices": [{k: value_text(c.get(k)) for k in ("what", "value", "reason")} for c in _all_choices(document)],
        "environment": flat(document.get("environment") or {}),
        "repeat_sentence": "With the shared settings saved as config.toml, on a machine like the one above:",
        "commands": document.get("commands") or [],
        "config_text": config if document.get("asked") is None else document["asked"],
    }


def _lead(document: Json) -> str:
    runs = document["runs"]
    seeds = document["seeds"]
    first: Json = next((run for run in runs if run.get("tokens")), {})
    tokens = f", {count(first['tokens'])} tokens each" if first.get("tokens") else ""
    params = f" of {count(first['params'])} parameters" if first.get("params") else ""
    done = f"{len(runs)} of {len(document['variants']) * len(seeds)} runs have ended"
    return (
        f"The same training{params} with {len(document['variants'])} values of {document['key']} and "
        f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}{tokens}; margin {percent(document['margin'])}. {done}; "
        f"everything took {duration(document.get('wall_s'))}."
    )


def _notes(document: Json) -> list[str]:
    notes = []
    for run in document["runs"]:
        if run["status"] != "finished":
            why = f": {run['reason']}" if run.get("reason") else ""
            notes.append(f"{run['variant']} with seed {run['seed']} {run['status']}{why}.")
    if len(document["seeds"]) < 3:
        notes.append("Fewer than three seeds: no verdict is given, whatever the losses are.")
    if document["measure"] != "val_loss":
        notes.append(
            "The tokens differ between rows, so bits per byte of text are compared instead of the loss a token."
        )
    for block in document["blocks"]:
        if block.get("skipped"):
            notes.append(
                f"{block['variant']}: {block['skipped']} of {block['steps']} timed steps were skipped; "
                "such steps are cheaper than real ones."
            )
    return notes


def _per_seed(row: Json, document: Json) -> list[str]:
    cells = []
    differences = row.get("differences") or [None] * len(row["losses"])
    for loss, status, difference in zip(row["losses"], row["statuses"], differences, strict=True):
        if loss is None:
            cells.append("-" if status in (None, "finished") else str(status))
        else:
            cells.append(
                value_text(loss) + (f" ({percent(difference, signed=True)})" if difference is not None else "")
            )
    return cells


def _measured(document: Json) -> str:
    blocks = [b for b in document["blocks"] if b.get("status") == "ok"]
    rounds = len({b["round"] for b in blocks})
    where = blocks[0].get("device", "") if blocks else ""
    memory = "the allocator's peak" if where.startswith("cuda") else "the peak of live tensor bytes"
    sizes = ", ".join(f"{row['variant']} {of_bytes(row.get('resident_bytes'))}" for row in document["rows"])
    return (
        f"Measured in {rounds} alternating block{'' if rounds == 1 else 's'} a row, one process at a time, after "
        f"warm-up. Memory is {memory} of one whole step; the resident size of the process, which holds Python and "
        f"torch too, was {sizes}."
    )


def _all_choices(document: Json) -> list[Json]:
    """What the comparison decided, then what differs between the rows (which matmuls are native, and why)."""
    choices = list(document.get("choices") or [])
    seen = set()
    for block in document["blocks"]:
        for choice in block.get("choices") or []:
            if str(choice["what"]).startswith("matmul"):
                what = f"{block['variant']}: {choice['what']}"
                if what not in seen:
                    seen.add(what)
                    choices.append({**choice, "what": what})
    return choices


def loss_charts(document: Json, folder: Path) -> list[tuple[str, str]]:
    """(svg, caption): training loss, held-out loss, and the paired differences of every seed."""
    training: list[Series] = []
    held_out: list[Series] = []
    for index, label in enumerate(document["variants"]):
        for run in (r for r in document["runs"] if r["variant"] == label):
            lines = read_lines(folder / run["folder"] / "metrics.jsonl")
            name = label if run["seed"] == document["seeds"][0] else ""
            steps = [m for m in lines if "loss" in m and m["loss"] is not None]
            y = [float(m["loss"]) for m in steps]
            smooth = running_mean(y, max(1, len(y) // 30))
            training.append(Series(name, [float(m["step"]) for m in steps], smooth, colour=index))
            tests = [m for m in lines if m.get("val_loss") is not None]
            x = [float(m["step"]) for m in tests]
            held_out.append(Series(name, x, [float(m["val_loss"]) for m in tests], colour=index, points=True))
    charts = [
        (
            line_chart(training, Chart("Training loss", "step", "nats a token", height=300)),
            "A running mean; one line a seed, one colour a row.",
        ),
        (
            line_chart(held_out, Chart("Held-out loss", "step", "nats a token", height=300)),
            "On text that no run has seen.",
        ),
    ]
    return [*charts, (difference_chart(document), "Grey: the margin. Bars: the 95 % interval. Dots: single seeds.")]


def difference_chart(document: Json) -> str:
    """The relative differences to the reference, each seed a dot, with interval and margin."""
    rows = []
    for index, row in enumerate(document["rows"]):
        if not row["reference"]:
            pairs = zip(document["seeds"], row.get("differences") or [], strict=False)
            dots = [(f"seed {seed}", d) for seed, d in pairs if d is not None]
            rows.append((str(row["variant"]), index, (row.get("verdict") or {}).get("interval"), dots))
    return interval_chart("Difference of held-out loss to the reference", rows, float(document["margin"]))


def cost_charts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(svg, caption): bars of tokens/s and of peak memory by role."""
    charts = []
    timed = [row for row in rows if row.get("tok_per_s")]
    if timed:
        labels = [row["variant"] for row in timed]
        totals = [f"{count(row['tok_per_s'])} ({ratio(row.get('speed_ratio'))})" for row in timed]
        ranges = [
            f"{row['variant']} {ratio(row['speed_ratio_range'][0])} to {ratio(row['speed_ratio_range'][1])}"
            for row in timed
            if row.get("speed_ratio_range") and not row["reference"]
        ]
        caption = f"Ratio over the rounds: {', '.join(ranges)}." if ranges else ""
        charts.append(
            (bar_chart("Tokens a second", labels, [("", [row["tok_per_s"] for row in timed])], totals), caption)
        )
    sized = [row for row in rows if row.get("peak_memory_bytes")]
    if sized:
        labels = [row["variant"] for row in sized]
        roles = [role for role in ROLES if any((row.get("memory") or {}).get(role) for row in sized)]
        parts = [(role, [float((row.get("memory") or {}).get(role) or 0) for row in sized]) for role in roles]
        parts = parts or [("", [float(row["peak_memory_bytes"]) for row in sized])]
        totals = [f"{of_bytes(row['peak_memory_bytes'])} ({ratio(row.get('memory_ratio'))})" for row in sized]
        charts.append((bar_chart("Peak memory by role", labels, parts, totals), ""))
    return charts
