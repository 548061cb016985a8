"""A bench as people see it: its tables, pictures and page, from what bench.json holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fewbits.errors import FewbitsError
from fewbits.report.plots import bar_chart
from fewbits.report.words import count, flat, of_bytes, percent, value_text

LEGEND = (
    "A floor is the least time of a part by the ceilings measured here: operations over the rate of a large matmul in their "
    "format, bytes over the rate of a copy, every activation moved once. A part that another one absorbs can lie below its own."
)
_ON = {
    "cuda": "Times of kernels, from a profile of a few steps; gaps are what they leave of a step that nobody profiles.",
    "cpu": "Shares of operators' own time in a profile of a few steps, times the time of a step that nobody profiles.",
}


def read_bench(path: Path) -> dict[str, Any]:
    """The document of a bench.json. Raises FewbitsError where it is none."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FewbitsError(f"{path} cannot be read as a bench: {error}.") from None
    if document.get("schema") != 1 or "ceilings" not in document:
        raise FewbitsError(f"{path} is no bench of this version of fewbits; run fewbits bench again.")
    return document


def timed_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that hold times."""
    return [row for row in document["rows"] if row["status"] == "ok"]


def shown(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row whose parts are shown: the fastest."""
    rows = timed_rows(document)
    return max(rows, key=lambda row: float(row["tok_per_s"])) if rows else None


def speed_cells(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """One entry a precision, as text."""
    rows = timed_rows(document)
    first = rows[0]["tok_per_s"] if rows else None
    found = []
    for row in document["rows"]:
        if row["status"] != "ok":
            found.append({"precision": row["precision"], "failed": row["reason"]})
            continue
        found.append(
            {
                "precision": row["precision"],
                "failed": "",
                "speed": count(row["tok_per_s"]),
                "ratio": f"{row['tok_per_s'] / first:.2f}x",
                "ms": value_text(row["ms_per_step"], 1),
                "floor": value_text(row["floor_ms"], 1),
                "mfu": "-" if row["mfu"] is None else percent(row["mfu"]),
                "cores": _cores(row["profile"]),
                "memory": of_bytes(row["peak_memory_bytes"]),
                "compile": "-" if row["compile_s"] is None else f"{row['compile_s']:.0f} s",
            }
        )
    return found


def _cores(profile: Mapping[str, Any]) -> str:
    """Which formats the matmul time went to, and how much of it ran on tensor cores."""
    whole = sum(profile["matmul_formats"].values())
    formats = ", ".join(f"{name} {100 * ms / whole:.0f} %" for name, ms in profile["matmul_formats"].items() if whole)
    if profile["tensor_cores"] is None:
        return formats or "-"
    return f"{formats}; {100 * profile['tensor_cores']:.0f} % on tensor cores"


def part_cells(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """One entry a part of the step, as text; parts that take no time and have no floor are left out."""
    whole = sum(entry["ms"] for entry in row["parts"]) or 1.0
    return [
        {
            "part": entry["part"],
            "ms": value_text(entry["ms"], 2),
            "share": f"{100 * entry['ms'] / whole:.0f} %",
            "floor": value_text(entry["floor_ms"], 2),
            "above": value_text(max(0.0, entry["ms"] - entry["floor_ms"]), 2),
            "why": entry["floor"],
        }
        for entry in _present(row)
    ]


def _present(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in row["parts"] if entry["ms"] or entry["floor_ms"]]


def bench_tables(document: Mapping[str, Any]) -> list[Table | Text]:
    """What the terminal shows: every precision, then the parts of the fastest beside their floors."""
    rows = speed_cells(document)
    done = [cells for cells in rows if not cells["failed"]]
    found: list[Table | Text] = [_speed_table(done)]
    found += [Text(f"{c['precision']:<11} failed: {c['failed']}", style="red") for c in rows if c["failed"]]
    found += [Text(f"{c['precision']:<11} matmul time: {c['cores']}", style="dim") for c in done]
    row = shown(document)
    if row is not None:
        parts = Table(box=box.ASCII2, show_edge=False)
        parts.add_column(row["precision"], style="bold", no_wrap=True)
        for heading in ("ms", "share", "floor", "above"):
            parts.add_column(heading, justify="right", no_wrap=True)
        for cells in part_cells(row):
            parts.add_row(*(cells[name] for name in ("part", "ms", "share", "floor", "above")))
        found += [Text(""), parts, Text(LEGEND, style="dim"), Text("")]
    found += [Text(f"left out    {names}: {reason}", style="dim") for names, reason in left_out(document)]
    return found + [Text(note, style="yellow") for note in document["notes"]]


def _speed_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """One line a precision; columns that nothing is known for are left out."""
    headings = {
        "speed": "tokens/s",
        "ratio": "speed",
        "ms": "ms/step",
        "floor": "floor",
        "mfu": "mfu",
        "memory": "memory",
        "compile": "compiling",
    }
    known = {name: heading for name, heading in headings.items() if any(cells[name] != "-" for cells in rows)}
    table = Table(box=box.ASCII2, show_edge=False)
    table.add_column("precision", style="bold", no_wrap=True)
    for heading in known.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(cells["precision"], *(cells[name] for name in known))
    return table


def left_out(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(precisions, reason): those that the device does not run natively, by the reason they share."""
    reasons: dict[str, list[str]] = {}
    for name, reason in document["left_out"].items():
        reasons.setdefault(reason, []).append(name)
    return [(", ".join(names), reason) for reason, names in reasons.items()]


def bench_charts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(picture, caption): a bar a part with its floor, tokens a second, the parts of every precision, the ceilings."""
    rows, row = timed_rows(document), shown(document)
    charts = []
    if row is not None:
        charts.append((parts_chart(row), _ON[document["kind"]]))
        labels = [r["precision"] for r in rows]
        totals = [cells["speed"] + f" ({cells['ratio']})" for cells in speed_cells(document) if not cells["failed"]]
        speeds = [r["tok_per_s"] for r in rows]
        charts.append(
            (bar_chart("Tokens a second", labels, [("", speeds)], totals), "The whole step, timed unprofiled.")
        )
    if len(rows) > 1:
        charts.append((every_chart(rows), "Milliseconds a step."))
    ceilings = document["ceilings"]
    rates = {name: rate / 1e12 for name, rate in ceilings["matmul"].items()}
    caption = f"A large square matmul, the best of several. A copy moves {ceilings['copy'] / 1e9:,.4g} GB/s, both ways counted."
    texts = [f"{rate:,.4g}" for rate in rates.values()]
    charts.append((bar_chart("Matmul ceilings, TFLOP/s", list(rates), [("", list(rates.values()))], texts), caption))
    return charts


def parts_chart(row: Mapping[str, Any]) -> str:
    """A bar for each part of the step: its floor, and what lies above it."""
    parts = _present(row)
    low = [min(entry["ms"], entry["floor_ms"]) for entry in parts]
    above = [max(0.0, entry["ms"] - entry["floor_ms"]) for entry in parts]
    totals = [f"{entry['ms']:,.3g} ms, floor {entry['floor_ms']:,.3g}" for entry in parts]
    labels = [entry["part"] for entry in parts]
    title = f"One step in {row['precision']}: {row['ms_per_step']:,.4g} ms, floors {row['floor_ms']:,.4g} ms"
    return bar_chart(title, labels, [("floor", low), ("above the floor", above)], totals)


def every_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """The parts of every precision as stacked bars; small parts that nobody could tell apart are one."""
    times = [{entry["part"]: entry["ms"] for entry in row["parts"]} for row in rows]
    names = list(dict.fromkeys(name for found in times for name in found))
    folded = {name: name if name in _OWN_COLOUR else "copies and other" for name in names}
    parts = {
        label: [sum(ms for name, ms in found.items() if folded[name] == label) for found in times]
        for label in dict.fromkeys(folded[name] for name in names)
    }
    kept = [(label, values) for label, values in parts.items() if any(values)]
    totals = [f"{row['ms_per_step']:,.4g} ms" for row in rows]
    return bar_chart("Where the step goes", [str(row["precision"]) for row in rows], kept, totals, width=760)


_OWN_COLOUR = ("matmuls", "attention", "loss head", "elementwise", "optimizer", "gaps and host")  # of seven colours


def bench_view(document: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Everything that the page shows."""
    row = shown(document)
    return {
        "title": f"Bench of {document['name']} · {folder.resolve().name}",
        "lead": _lead(document),
        "notes": [*document["notes"], *_unfinished(document)],
        "charts": bench_charts(document),
        "speeds": speed_cells(document),
        "shown": None if row is None else row["precision"],
        "parts": [] if row is None else part_cells(row),
        "kernels": [] if row is None else _kernels(row),
        "legend": LEGEND,
        "left_out": left_out(document),
        "facts": [
            ("device", document["device"]),
            ("compiled", f"{'yes' if document['compile']['value'] else 'no'} ({document['compile']['reason']})"),
            ("FLOPs", f"{document['flops_per_token']:,} a token: {document['flops_formula']}"),
        ],
        "environment": flat(document["environment"]),
        "commands": [document["environment"].get("command", ""), f"python -m json.tool {folder / 'bench.json'}"],
    }


def _kernels(row: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "name": k["name"] if len(k["name"]) <= 110 else k["name"][:107] + "...",
            "part": k["part"],
            "ms": value_text(k["ms"], 3),
            "calls": f"{k['calls']:.3g}",
        }
        for k in row["profile"]["kernels"][:15]
    ]


def _unfinished(document: Mapping[str, Any]) -> list[str]:
    return [] if document["status"] == "finished" else ["The bench was interrupted; here is what it had measured."]


def _lead(document: Mapping[str, Any]) -> str:
    model = document["model"]
    return (
        f"One training step (forward, backward, clipping, update) of {count(document['params'])} parameters "
        f"({model['n_layer']} layers, {model['n_embd']} wide) on {document['batch_size']} sequences of "
        f"{document['context']:,} tokens, on {document['device']}: how long it takes in each precision, where the time goes, "
        "and what this device would allow."
    )
