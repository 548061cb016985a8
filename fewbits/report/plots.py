"""Line and bar charts as inline SVG: no script, no font, no network.

Colours are CSS variables (`--s0` to `--s6`, `--ink`, `--muted`, `--grid`) that the page defines for light and dark; the
fallbacks written beside them are the colour-blind-safe palette of Okabe and Ito (2008) without its yellow, which
vanishes on white. Series differ by dash pattern too, so that a grey print can be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

Place = Callable[[float], float]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7a7a7a")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 2")
MOST_POINTS = 500  # a longer series is thinned to its minimum and maximum in each of 250 buckets
_LEAST = 1e-300  # sizes below are 0: near the smallest number of fp64, ticks and their logarithms are no numbers


@dataclass(frozen=True)
class Series:
    """One line: x and y of equal length. Points that are not finite numbers break the line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False
    points: bool = False
    steps: bool = False
    """Draw as a staircase: the value holds until the next point (a loss scale)."""


@dataclass(frozen=True)
class Chart:
    """What a line chart shows beside its series."""

    title: str
    x_label: str = ""
    y_label: str = ""
    log_y: bool = False
    zero: bool = False
    """Begin the y axis at 0."""
    marks: Sequence[float] = ()
    """x positions marked by a tick at the foot of the plot (skipped steps)."""
    mark_name: str = ""
    width: int = 640
    height: int = 260
    y_powers_of_two: bool = False


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    ticks: list[float] = field(default_factory=list)
    log: bool = False
    base: float = 10.0

    def place(self, value: float) -> float:
        """The value's position between 0 and 1."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round tick positions (1, 2, 2.5 or 5 times a power of ten) that cover [low, high].

    >>> nice_ticks(0.0, 9.3)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    span = high - low
    if span < _LEAST:
        span = abs(high) if abs(high) > _LEAST else 1.0
        low, high = low - span / 2, high + span / 2
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [0.0 if i == 0 else float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float, base: float = 10.0) -> list[float]:
    """Ticks of a log axis that cover [low, high]: powers of the base, thinned; 1-2-5 when it spans few decades.

    >>> log_ticks(0.5, 30.0)
    [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
    """
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    if base == 10.0 and high <= 100.0 * low:
        fine = [float(f"{m * 10.0**k:.12g}") for k in range(first, last + 1) for m in (1, 2, 5)]
        below = max((t for t in fine if t <= low * 1.0001), default=fine[0])
        above = min((t for t in fine if t >= high * 0.9999), default=fine[-1])
        return [t for t in fine if below <= t <= above]
    stride = max(1, math.ceil((last - first) / 6))
    last = first + max(1, math.ceil((last - first) / stride)) * stride
    return [float(base**k) for k in range(first, last + 1, stride)]


def number(value: float) -> str:
    """A short number for people: 0.0031, 12.5, 1,200, 3.4M, 6e-05.

    >>> [number(v) for v in (0, 0.0031, 12.5, 1200, 3400000, 6e-5)]
    ['0', '0.0031', '12.5', '1,200', '3.4M', '6e-05']
    """
    size = abs(value)
    if size == 0:
        return "0"
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size >= unit:
            return f"{value / unit:.3g}{letter}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size < 1e-3 else f"{value:.4g}"


def thin(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """The series with at most `most` points: of each bucket the lowest and the highest, so that spikes survive."""
    if len(x) <= most:
        return list(x), list(y)
    size = math.ceil(len(x) / (most // 2))
    keep: list[int] = []
    for start in range(0, len(x), size):
        bucket = range(start, min(start + size, len(x)))
        finite = [i for i in bucket if math.isfinite(y[i])] or list(bucket)[:1]
        keep.extend(sorted({min(finite, key=lambda i: y[i]), max(finite, key=lambda i: y[i])}))
        gap = next((i for i in bucket if not math.isfinite(y[i])), None)
        if gap is not None:
            keep.append(gap)
    keep = sorted({*keep, 0, len(x) - 1})
    return [x[i] for i in keep], [y[i] for i in keep]


def running_mean(y: Sequence[float], window: int) -> list[float]:
    """The mean of the last `window` finite values at each point; a value that is not finite stays what it is."""
    result, recent = [], []
    for value in y:
        if not math.isfinite(value):
            result.append(value)
            continue
        recent.append(value)
        if len(recent) > window:
            recent.pop(0)
        result.append(math.fsum(recent) / len(recent))
    return result


def _colour(index: int) -> str:
    i = index % len(PALETTE)
    return f"var(--s{i},{PALETTE[i]})"


def _text(x: float, y: float, content: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(content)}</text>'


def _open(title: str, width: int, height: int) -> list[str]:
    return [
        f'<svg class="chart" role="img" aria-label="{escape(title, quote=True)}" viewBox="0 0 {width} {height}" '
        f'xmlns="http://www.w3.org/2000/svg" font-family="system-ui,-apple-system,Segoe UI,sans-serif" font-size="11" '
        f'fill="var(--ink,#222)">',
        f'<text x="8" y="16" font-size="13" font-weight="600">{escape(title)}</text>',
    ]


def _axes(series: Sequence[Series], chart: Chart) -> tuple[_Axis, _Axis] | None:
    xs = [x for s in series for x, y in zip(s.x, s.y, strict=True) if _shown(y, chart)]
    ys = [y for s in series for y in s.y if _shown(y, chart)]
    if not xs:
        return None
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    x_ticks = [t for t in nice_ticks(x_low, x_high, 6) if x_low <= t <= x_high]
    low, high = min(ys), max(ys)
    if chart.log_y:
        base = 2.0 if chart.y_powers_of_two else 10.0
        if low == high:  # a constant stands in the middle
            low, high = low / base, high * base
        ticks = log_ticks(low, high, base)
        return _Axis(x_low, x_high, x_ticks), _Axis(ticks[0], ticks[-1], ticks, True, base)
    ticks = nice_ticks(0.0 if chart.zero else low, high)
    return _Axis(x_low, x_high, x_ticks), _Axis(ticks[0], ticks[-1], ticks)


def _shown(y: float, chart: Chart) -> bool:
    return math.isfinite(y) and (y > _LEAST or not chart.log_y)


def _tick_text(value: float, axis: _Axis) -> str:
    if axis.log and axis.base == 2.0:
        return number(value) if 1 <= value <= 1024 else f"2^{round(math.log2(value))}"
    return number(value)


def line_chart(series: Sequence[Series], chart: Chart) -> str:
    """The chart as one `<svg>` element; a chart without a single finite point says so instead of drawing nothing."""
    out = _open(chart.title, chart.width, chart.height)
    axes = _axes(series, chart)
    if axes is None:
        out.append(_text(chart.width / 2, chart.height / 2, "nothing finite was recorded", extra='opacity="0.6"'))
        return "".join([*out, "</svg>"])
    x_axis, y_axis = axes
    left, right, top, bottom = 58.0, chart.width - 14.0, 44.0, chart.height - 36.0

    def px(value: float) -> float:
        return left + (right - left) * x_axis.place(value)

    def py(value: float) -> float:
        return bottom - (bottom - top) * y_axis.place(value)

    out.extend(_frame(chart, x_axis, y_axis, (left, right, top, bottom), px, py))
    for mark in chart.marks:
        if x_axis.low <= mark <= x_axis.high:
            out.append(f'<path d="M{px(mark):.1f} {bottom:.1f}v-9" stroke="{_colour(1)}" stroke-width="2"/>')
    for s in series:
        out.extend(_line(s, chart, px, py))
    out.append(_legend([(s.name, s.colour, s.faint) for s in series if s.name], left, 31.0, chart))
    return "".join([*out, "</svg>"])


def _frame(
    chart: Chart, x_axis: _Axis, y_axis: _Axis, box: tuple[float, float, float, float], px: Place, py: Place
) -> list[str]:
    left, right, top, bottom = box
    out = []
    for tick in y_axis.ticks:
        out.append(f'<path d="M{left:.1f} {py(tick):.1f}H{right:.1f}" stroke="var(--grid,#ddd)"/>')
        out.append(_text(left - 6, py(tick) + 4, _tick_text(tick, y_axis), "end"))
    for tick in x_axis.ticks:
        out.append(f'<path d="M{px(tick):.1f} {bottom:.1f}v4" stroke="var(--muted,#888)"/>')
        out.append(_text(px(tick), bottom + 16, number(tick)))
    out.append(f'<path d="M{left:.1f} {bottom:.1f}H{right:.1f}" stroke="var(--muted,#888)"/>')
    out.append(_text((left + right) / 2, bottom + 31, chart.x_label, extra='fill="var(--muted,#666)"'))
    if chart.y_label:
        middle = (top + bottom) / 2
        turn = f'fill="var(--muted,#666)" transform="rotate(-90 12 {middle:.1f})"'
        out.append(_text(12, middle, chart.y_label, extra=turn))
    return out


def _line(s: Series, chart: Chart, px: Place, py: Place) -> list[str]:
    out, path, pen_down, last = [], [], False, 0.0
    for x, y in zip(*thin(s.x, s.y), strict=True):
        if not _shown(y, chart):
            pen_down = False
            continue
        if pen_down and s.steps:
            path.append(f"H{px(x):.1f}V{py(y):.1f}")
        else:
            path.append(f"{'L' if pen_down else 'M'}{px(x):.1f} {py(y):.1f}")
        pen_down, last = True, y
        if s.points:
            out.append(
                f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{_colour(s.colour)}">'
                f"<title>{escape(s.name)}: {number(y)} at {number(x)}</title></circle>"
            )
    dash = "" if s.faint else DASHES[s.colour % len(DASHES)]
    style = f'stroke-dasharray="{dash}"' if dash else ""
    opacity, weight = (0.35, 1) if s.faint else (1, 1.8)
    out.insert(
        0,
        f'<path d="{"".join(path)}" fill="none" stroke="{_colour(s.colour)}" stroke-width="{weight}" '
        f'stroke-linejoin="round" opacity="{opacity}" {style}>'
        f"<title>{escape(s.name)}: last {number(last)}</title></path>",
    )
    return out


def _legend(entries: Sequence[tuple[str, int, bool]], x: float, y: float, chart: Chart) -> str:
    out = []
    for name, colour, faint in entries:
        dash = "" if faint else DASHES[colour % len(DASHES)]
        out.append(
            f'<path d="M{x:.1f} {y - 4:.1f}h18" stroke="{_colour(colour)}" stroke-width="2.4" '
            f'opacity="{0.4 if faint else 1}" {f"stroke-dasharray={chr(34)}{dash}{chr(34)}" if dash else ""}/>'
        )
        out.append(_text(x + 23, y, name, "start"))
        x += 38 + 6.3 * len(name)
    if chart.mark_name and len(chart.marks) > 0:
        out.append(f'<path d="M{x + 8:.1f} {y:.1f}v-9" stroke="{_colour(1)}" stroke-width="2"/>')
        out.append(_text(x + 16, y, chart.mark_name, "start"))
    return "".join(out)


def bar_chart(
    title: str,
    labels: Sequence[str],
    parts: Sequence[tuple[str, Sequence[float]]],
    totals: Sequence[str] = (),
    width: int = 640,
) -> str:
    """Horizontal bars, one a label, stacked from named parts; `totals` is written at the end of each bar."""
    row, top = 30.0, 48.0 if len(parts) > 1 else 30.0
    height = int(top + row * len(labels) + 10)
    left = min(220.0, 20.0 + 7.0 * max((len(label) for label in labels), default=0))
    right = width - 20.0 - 7.0 * max((len(t) for t in totals), default=8)
    sums = [math.fsum(values[i] for _, values in parts) for i in range(len(labels))]
    full = max([s for s in sums if math.isfinite(s)], default=0.0) or 1.0
    out = _open(title, width, height)
    if len(parts) > 1:
        out.append(_squares([name for name, _ in parts], 8.0, 36.0))
    for i, label in enumerate(labels):
        y, x = top + row * i, left
        out.append(_text(left - 8, y + 15, label, "end"))
        for k, (name, values) in enumerate(parts):
            size = max(0.0, (right - left) * values[i] / full) if math.isfinite(values[i]) else 0.0
            colour = _colour(k if len(parts) > 1 else i)
            tip = f"{escape(label)}{': ' + escape(name) if name else ''}: {number(values[i])}"
            out.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{size:.1f}" height="20" fill="{colour}">'
                f"<title>{tip}</title></rect>"
            )
            x += size
        out.append(_text(x + 6, y + 15, totals[i] if totals else number(sums[i]), "start"))
    return "".join([*out, "</svg>"])


def _squares(names: Sequence[str], x: float, y: float) -> str:
    out = []
    for k, name in enumerate(names):
        out.append(f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="10" height="10" fill="{_colour(k)}"/>')
        out.append(_text(x + 14, y, name, "start"))
        x += 26 + 6.4 * len(name)
    return "".join(out)


def interval_chart(
    title: str,
    rows: Sequence[tuple[str, int, Sequence[float] | None, Sequence[tuple[str, float]]]],
    margin: float,
    width: int = 640,
) -> str:
    """Fractions around zero: each row (label, colour, interval or None, named dots), the margin as a grey band.

    The axis reaches to the largest value, but not beyond 60 margins: what lies further out stands at the edge.
    """
    sizes = [abs(v) for _, _, interval, dots in rows for v in [*(interval or ()), *(d for _, d in dots)]]
    full = min(1.15 * max([2.0 * margin, *(v for v in sizes if math.isfinite(v))]), 60.0 * margin)
    top, step, left, right = 30.0, 34.0, 150.0, width - 24.0
    foot = top + step * len(rows) + 8
    out = _open(title, width, int(foot + 26))

    def px(value: float) -> float:
        return left + (right - left) * (0.5 + 0.5 * max(-1.0, min(1.0, value / full)))

    band = px(margin) - px(-margin)
    box = f'x="{px(-margin):.1f}" y="{top:.1f}" width="{band:.1f}" height="{foot - top:.1f}"'
    out.append(f'<rect {box} fill="var(--grid,#ddd)"/>')
    out.append(f'<path d="M{px(0):.1f} {top:.1f}V{foot:.1f}" stroke="var(--muted,#888)"/>')
    for i, (label, index, interval, dots) in enumerate(rows):
        y, colour = top + step * (i + 0.5) + 4, _colour(index)
        out.append(_text(left - 12, y + 4, label, "end"))
        if interval is not None:
            low, high = px(interval[0]), px(interval[1])
            out.append(f'<path d="M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 6:.1f}v12M{high:.1f} {y - 6:.1f}v12" ')
            out.append(f'stroke="{colour}" stroke-width="2.5"/>')
        for name, value in dots:
            tip = f"<title>{escape(name)}: {100 * value:+.3f} %</title>"
            out.append(f'<circle cx="{px(value):.1f}" cy="{y:.1f}" r="4.5" fill="{colour}">{tip}</circle>')
    for tick in (t for t in nice_ticks(-full, full, 6) if abs(t) <= full):
        out.append(f'<path d="M{px(tick):.1f} {foot:.1f}v4" stroke="var(--muted,#888)"/>')
        out.append(_text(px(tick), foot + 16, f"{100 * tick:+.3g} %" if tick else "0"))
    return "".join([*out, "</svg>"])
