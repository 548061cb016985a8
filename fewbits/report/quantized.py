"""What the page and the terminal show of a model that was made small, from quantize.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbits.report.plots import bar_chart
from fewbits.report.words import count, flat, of_bytes, percent, ratio, value_text

Json = Mapping[str, Any]
LEGEND = (
    "SQNR: energy of the weights over energy of their rounding errors, in decibels, higher is better; of the outputs: the "
    "same for what the layer passes on, over the calibration text. Cosine: between the weights before and after."
)


def result_rows(document: Json) -> list[tuple[str, str, str, str]]:
    """(what, before, after, change) for the whole model."""
    before, after, difference = document["before"], document["after"], document["difference"]
    low, high = difference["interval"] or (None, None)
    interval = "" if low is None else f" ({percent(low, signed=True)} to {percent(high, signed=True)})"
    rows = [
        (
            "held-out loss",
            value_text(before["loss"]),
            value_text(after["loss"]),
            percent(difference["mean"], signed=True) + interval,
        ),
        ("perplexity", value_text(before["perplexity"], 3), value_text(after["perplexity"], 3), ""),
        ("bits per byte", value_text(before["bits_per_byte"]), value_text(after["bits_per_byte"]), ""),
    ]
    for name, words in (
        ("accuracy", "next token: accuracy"),
        ("precision", "next token: precision"),
        ("recall", "next token: recall"),
        ("f1", "next token: F1"),
    ):
        rows.append((words, percent(before[name]), percent(after[name]), ""))
    smaller = document["bytes_before"] / document["bytes_after"]
    rows.append(
        (
            "weights on disk",
            of_bytes(document["bytes_before"]),
            of_bytes(document["bytes_after"]),
            f"{ratio(smaller)} smaller",
        )
    )
    speeds = dict(document["generation_tok_per_s"])
    after_speed = speeds.pop("after")
    for name, speed in speeds.items():
        words = f"generation, tokens/s, {name}"
        rows.append((words, value_text(speed, 1), value_text(after_speed, 1), ratio(after_speed / speed)))
    return rows


def layer_rows(document: Json) -> list[dict[str, str]]:
    """One row a layer as text."""
    return [
        {
            "layer": row["layer"],
            "shape": "x".join(map(str, row["shape"])),
            "method": row["method"] + (f", alpha {row['alpha']:.2f}" if row.get("alpha") else ""),
            "sqnr": value_text(row["sqnr_db"], 1),
            "cosine": value_text(row["cosine"]),
            "output": value_text(row["output_sqnr_db"], 1),
            "before": of_bytes(row["bytes_before"]),
            "after": of_bytes(row["bytes"]),
        }
        for row in document["layers"]
    ]


def quantized_view(document: Json, out: Path) -> dict[str, Any]:
    """Everything that the page shows."""
    charts = []
    for key, title, caption in (
        ("sqnr_db", "SQNR of the weights, dB", ""),
        ("output_sqnr_db", "SQNR of the outputs, dB", "Over the calibration text."),
    ):
        known = [(row["layer"], row[key]) for row in document["layers"] if row[key] is not None]
        if known:
            labels, values = [name for name, _ in known], [value for _, value in known]
            totals = [value_text(value, 1) for value in values]
            charts.append((bar_chart(title, labels, [("", [max(0.0, value) for value in values])], totals), caption))
    return {
        "title": f"{Path(document['source']).resolve().name} in {document['scheme']}",
        "lead": lead(document),
        "notes": document["notes"],
        "results": result_rows(document),
        "layers": layer_rows(document),
        "legend": LEGEND,
        "charts": charts,
        "choices": [
            {key: value_text(choice[key]) for key in ("what", "value", "reason")} for choice in document["choices"]
        ],
        "environment": flat(document["environment"]),
        "commands": [document["command"], f"fewbits eval {out}", f'fewbits generate {out} --prompt "def "'],
    }


def lead(document: Json) -> str:
    """One or two sentences: what was done to what, and measured on what."""
    options, after = document["options"], document["after"]
    text = f", calibrated on {document['calibrated_on']}" if document["calibrated_on"] else ""
    layers = f"{len(document['layers'])} linear layers" if document["layers"] else "All weights"
    return (
        f"{layers} of {document['source']} (step {count(document['step'])}) in {document['scheme']} by method "
        f"{options['method']}{text}; stored as {document['stored_as']}. Measured on {count(after['tokens'])} held-out "
        f"tokens of {document['measured_on']} in {document['difference']['batches']} batches; the interval is a 95 % "
        "t-interval of the difference, paired by batch."
    )
