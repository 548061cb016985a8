"""Tables for the terminal: a comparison, a model that was made small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fewbits.report.compared import LEGEND, table_row
from fewbits.report.quantized import layer_rows, lead, result_rows
from fewbits.report.words import percent

STYLE = {"good": "green", "bad": "red", "plain": ""}


def comparison_table(document: Mapping[str, Any]) -> Table:
    """The rows of a comparison: verdict, loss, speed and memory, each as a ratio to the first row."""
    table = Table(box=box.ASCII2, title=None, caption=caption(document), caption_justify="left", show_edge=False)
    table.add_column(str(document["key"]), style="bold", overflow="fold")
    table.add_column("verdict", overflow="fold")
    for heading in ("loss", "difference", "95 % interval", "speed", "ms/step", "memory", "peak", "skipped"):
        table.add_column(heading, justify="right", no_wrap=heading != "95 % interval")
    for row in document["rows"]:
        cells = table_row(row)
        verdict = Text(cells["verdict"], style=STYLE[cells["colour"]])
        if cells["reason"]:
            verdict.append(f" ({cells['reason']})", style="dim")
        names = ("loss", "difference", "interval", "speed", "ms", "memory", "peak", "skipped")
        table.add_row(Text(cells["label"]), verdict, *(Text(cells[name]) for name in names))
    return table


def caption(document: Mapping[str, Any]) -> str:
    """What the columns of a comparison mean."""
    seeds = len(document["seeds"])
    return f"{seeds} seed{'' if seeds == 1 else 's'}, margin {percent(document['margin'])}. {LEGEND}"


def comparison_lines(document: Mapping[str, Any]) -> list[str]:
    """The comparison in sentences, one a row, for logs and narrow consoles.

    >>> row = {"variant": "fp32", "reference": True, "losses": [2.0], "skipped_steps": [0], "steps": [9]}
    >>> comparison_lines({"rows": [row]})
    ['fp32: reference, loss 2.0000']
    """
    lines = []
    for row in document["rows"]:
        cells = table_row(row)
        parts = [f"{cells['label']}: {cells['verdict']}", f"loss {cells['loss']}"]
        if cells["difference"] != "-":
            parts.append(f"difference {cells['difference']} ({cells['interval']})")
        if cells["speed"] != "-":
            parts.append(f"speed {cells['speed']}, memory {cells['memory']}")
        if cells["reason"]:
            parts.append(cells["reason"])
        lines.append(", ".join(parts))
    return lines


def quantized_tables(document: Mapping[str, Any]) -> list[Table | Text]:
    """A model that was made small: every layer, the whole model before and after, what was decided and why."""
    parts: list[Table | Text] = []
    if document["layers"]:
        layers = Table(box=box.ASCII2, show_edge=False)
        headings = {
            "layer": "layer",
            "shape": "shape",
            "sqnr": "SQNR dB",
            "cosine": "cosine",
            "output": "outputs",
            "after": "size",
        }
        for name, heading in headings.items():
            layers.add_column(heading, justify="left" if name == "layer" else "right", no_wrap=True)
        for row in layer_rows(document):
            layers.add_row(*(Text(row[name]) for name in headings))
        parts.append(layers)
    whole = Table(box=box.ASCII2, show_edge=False, caption=lead(document), caption_justify="left")
    whole.add_column("whole model", style="bold", overflow="fold")
    for heading in ("before", "after", "change"):
        whole.add_column(heading, justify="right")
    for cells in result_rows(document):
        whole.add_row(*map(Text, cells))
    notes = [Text(note, style="yellow") for note in document["notes"]]
    choices = [Text(f"{c['what']:<14}{c['value']} ({c['reason']})") for c in document["choices"]]
    return [*parts, Text(""), whole, *notes, *choices]
