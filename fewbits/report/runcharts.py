"""The charts of one run."""

from __future__ import annotations

import math
from typing import Any

from fewbits.report.plots import Chart, Series, bar_chart, line_chart, running_mean
from fewbits.report.record import RunRecord
from fewbits.report.words import of_bytes

Figure = tuple[str, str]  # svg, caption


def run_charts(record: RunRecord) -> list[Figure]:
    """(svg, caption) of loss, learning rate, gradient norm, loss scale, throughput and memory, as far as recorded."""
    skipped = skipped_steps(record)
    figures = [_loss(record)]
    plain = (
        ("lr", "Learning rate", "", ""),
        ("grad_norm", "Gradient norm", "", "The global norm before clipping, unscaled."),
    )
    for key, title, unit, caption in plain:
        x, y = record.column(key)
        if x:
            chart = Chart(title, "step", unit, log_y=key == "grad_norm" and wide(y), zero=key == "lr")
            figures.append((line_chart([Series("", x, y)], chart), caption))
    figures += _loss_scale(record, skipped)
    x, y = record.column("tok_per_s")
    if x:
        smooth = Series("running mean of 10", x, running_mean(y, 10))
        chart = Chart("Throughput", "step", "tokens a second", zero=True)
        figures.append((line_chart([Series("logged", x, y, faint=True), smooth], chart), ""))
    x, y = record.column("memory_bytes")
    if x:
        chart = Chart("Peak memory so far", "step", "MiB", zero=True)
        figures.append((line_chart([Series("", x, [b / 2**20 for b in y])], chart), ""))
    return figures


def _loss(record: RunRecord) -> Figure:
    x, y = record.column("loss")
    vx = [float(e["step"]) for e in record.evaluations]
    vy = [float(e["val_loss"]) for e in record.evaluations]
    window = max(1, min(25, len(y) // 20))
    lines = [Series("training, each logged step", x, y, faint=window > 1)]
    if window > 1:
        lines.append(Series(f"training, mean of {window}", x, running_mean(y, window)))
    lines.append(Series("held-out", vx, vy, colour=1, points=True))
    bad = [a for a, b in zip(x, y, strict=True) if not math.isfinite(b)]
    chart = Chart("Loss", "step", "nats a token", marks=bad, mark_name="not finite")
    return line_chart([s for s in lines if s.x], chart), "Cross entropy; the natural logarithm of the perplexity."


def _loss_scale(record: RunRecord, skipped: list[float]) -> list[Figure]:
    x, y = record.column("loss_scale")
    if not x or (set(y) == {1.0} and not skipped):
        return []
    chart = Chart(
        "Loss scale",
        "step",
        log_y=True,
        y_powers_of_two=True,
        marks=skipped,
        mark_name="skipped steps",
    )
    total = int(record.column("skipped")[1][-1]) if record.column("skipped")[1] else len(skipped)
    caption = f"The power of two by which the loss is multiplied before backward. {total} steps skipped in all."
    return [(line_chart([Series("loss scale", x, y, steps=True)], chart), caption)]


def skipped_steps(record: RunRecord) -> list[float]:
    """The skipped steps: as the events name them, else the logged steps at which their count had grown."""
    named = [float(step) for e in record.events if e.get("event") == "skipped" for step in e.get("steps") or []]
    if named:
        return named
    x, y = record.column("skipped")
    return [x[i] for i in range(len(x)) if y[i] > (y[i - 1] if i else 0)]


def wide(values: list[float]) -> bool:
    """Whether positive values span more than a factor of 30, so that a log axis shows them better."""
    good = [v for v in values if math.isfinite(v) and v > 0]
    return bool(good) and max(good) > 30 * min(good)


def memory_chart(memory: dict[str, Any]) -> Figure:
    """One bar a role, from summary.json's {role: bytes}."""
    roles = {role: float(size) for role, size in memory.items() if isinstance(size, int | float) and size > 0}
    if not roles:
        return bar_chart("Peak memory by role", [], []), ""
    svg = bar_chart(
        "Peak memory by role", list(roles), [("", list(roles.values()))], [of_bytes(size) for size in roles.values()]
    )
    return svg, "Activations are what is left of the peak after the other roles."
