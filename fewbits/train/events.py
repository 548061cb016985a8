"""What a person sees while a training runs: facts with their reasons, a line a logged step, a bar with ETA, a summary.

In a terminal a progress bar stays below the lines; elsewhere (a pipe, a file) there are plain lines only, each with its
own ETA. All text of the program is ASCII; samples lose control characters, and what a console cannot encode is a "?".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from fewbits.data.cache import Progress

# name, heading, width, format of a present value
_COLUMNS: tuple[tuple[str, str, int, Callable[[Any], str]], ...] = (
    ("step", "step", 6, lambda x: f"{x:d}"),
    ("loss", "loss", 8, lambda x: f"{x:.4f}"),
    ("lr", "lr", 8, lambda x: f"{x:.2e}"),
    ("grad_norm", "|grad|", 7, lambda x: f"{x:.3g}"),
    ("loss_scale", "scale", 6, lambda x: power(x)),
    ("skipped", "skip", 4, lambda x: f"{x:d}"),
    ("ms", "ms", 7, lambda x: f"{x:.0f}" if x >= 100 else f"{x:.1f}"),
    ("tok_per_s", "tok/s", 8, lambda x: f"{x:,.0f}"),
    ("mfu", "mfu", 6, lambda x: f"{100 * x:.1f}%"),
    ("memory_bytes", "memory", 8, lambda x: size(x)),
)

SETUP_S = 10.0  # set-up that takes so long is worth a word


def power(value: float) -> str:
    """A power of two as people write it; other numbers as they are.

    >>> power(65536.0), power(1.0), power(0.5)
    ('2^16', '1', '2^-1')
    """
    exponent = 0
    while value > 1 and value % 2 == 0:
        value, exponent = value / 2, exponent + 1
    while 0 < value < 1 and exponent > -200:
        value, exponent = value * 2, exponent - 1
    return f"{value:g}" if exponent == 0 else f"2^{exponent}" if value == 1 else f"{value * 2.0**exponent:g}"


def size(count: float | None) -> str:
    """A number of bytes in binary units.

    >>> size(1536), size(3 * 2**30), size(None)
    ('1.50 KiB', '3.00 GiB', '-')
    """
    if count is None:
        return "-"
    for power_of_two, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power_of_two:
            amount = count / 2**power_of_two
            return f"{amount:.2f} {unit}" if amount < 10 else f"{amount:.{1 if amount < 100 else 0}f} {unit}"
    return f"{count:.0f} B"


def clock(seconds: float | None) -> str:
    """A duration for a bar or a column.

    >>> clock(75), clock(3725), clock(None)
    ('1:15', '1:02:05', '-')
    """
    if seconds is None:
        return "-"
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def step_line(entry: Mapping[str, Any]) -> str:
    """One logged step as a line of the table; "-" where a value is unknown, "nan" or "inf" where it is not finite."""
    cells = []
    for key, _, width, show in _COLUMNS:
        value = entry.get(key)
        cells.append(("-" if value is None else show(value)).rjust(width))
    return " ".join(cells)


HEADING = " ".join(heading.rjust(width) for _, heading, width, _ in _COLUMNS)


def printable(text: str, encoding: str = "utf-8") -> str:
    """`text` without control characters (a sample may not drive the terminal), in what `encoding` can show.

    >>> printable("a\\x1b[31mb\\tc\\u00e9", "ascii")
    'a?[31mb    c?'
    """
    plain = text.replace("\r\n", "\n").replace("\t", "    ")
    shown = "".join(ch if ch == "\n" or ch.isprintable() else "?" for ch in plain)
    return shown.encode(encoding, "replace").decode(encoding, "replace")


class _Eta(ProgressColumn):
    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        return Text(f"{clock(task.elapsed)} gone, ETA {clock(task.fields.get('eta'))}", style="cyan")


class Display:
    """The console of one training. Everything that is shown goes through it; with `quiet` nothing is."""

    def __init__(self, console: Console | None = None, quiet: bool = False):
        self.console = Console(quiet=True) if quiet else console or Console()
        self._encoding = getattr(self.console.file, "encoding", None) or "utf-8"
        self._bar: Bar | None = None
        self._task: Any = None
        self._lines = 0
        self._began = time.monotonic()
        self._first = self._total = self._done = 0
        self._compiling_s = 0.0

    def line(self, text: str, style: str = "") -> None:
        """One line as it stands: no markup, no wrapping where nobody's terminal needs it."""
        shown = printable(text, self._encoding)
        self.console.print(Text(shown, style=style), soft_wrap=not self.console.is_terminal)

    def fact(self, name: str, value: str, reason: str = "") -> None:
        """A line such as `device      cpu  (why: no CUDA device is present)`."""
        text = Text(printable(value, self._encoding))
        if reason:
            text.append(printable(f"  (why: {reason})", self._encoding), style="dim")
        self._hanging(Text(f"{name:<11} ", style="bold"), text)

    def table(self, rows: str, indent: int) -> None:
        """A plain-text table; in a narrow terminal its long lines go on below their `indent`-th column."""
        for row in rows.splitlines():
            shown = printable(row, self._encoding)
            self._hanging(Text("  " + shown[:indent], style="dim"), Text(shown[indent:], style="dim"))

    def _hanging(self, head: Text, text: Text) -> None:
        """`head` and `text` on a line; in a terminal, what does not fit goes on below the beginning of `text`."""
        width = max(30, self.console.width - len(head))
        lines = text.wrap(self.console, width) if self.console.is_terminal else [text]
        for number, piece in enumerate(lines or [text]):
            piece.rstrip()
            self.console.print((head.copy() if number == 0 else Text(" " * len(head))) + piece, soft_wrap=True)

    def note(self, text: str) -> None:
        """Something the person should know."""
        self.line(text, "yellow")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Within: a callable (done, total, what) that shows how far long work is; in a pipe, a line when it begins."""
        if not self.console.is_terminal:
            yield self._announce()
            return
        columns = (TextColumn("{task.description}"), BarColumn(30), _Eta())
        with Bar(*columns, console=self.console, transient=True, refresh_per_second=4) as bar:
            tasks: dict[str, Any] = {}
            began: dict[str, float] = {}

            def update(done: int, total: int, what: str) -> None:
                if what not in tasks:
                    tasks[what], began[what] = bar.add_task(what, total=total, eta=None), time.monotonic()
                left = (time.monotonic() - began[what]) / done * (total - done) if done else None
                bar.update(tasks[what], completed=done, total=total, eta=left)

            yield update

    def _announce(self) -> Progress:
        seen: set[str] = set()

        def update(done: int, total: int, what: str) -> None:
            if what not in seen:
                seen.add(what)
                self.line(f"{what} ...", "dim")

        return update

    def begin(self, done: int, total: int) -> None:
        """Steps `done` + 1 to `total` are about to run."""
        self._began, self._first, self._done, self._total = time.monotonic(), done, done, total
        if self.console.is_terminal and not self.console.quiet:
            self._bar = Bar(
                TextColumn("train"),
                BarColumn(None),
                TextColumn("{task.completed}/{task.total}"),
                _Eta(),
                TextColumn("{task.fields[state]}"),
                console=self.console,
                transient=True,
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("train", total=total, completed=done, eta=None, state="")
            self._bar.start()

    def eta(self) -> float | None:
        """Seconds until the last step at the pace since `begin`, evaluations included and compiling, which does not come
        again, left out; None before the first step."""
        steps = self._done - self._first
        gone = max(0.0, time.monotonic() - self._began - self._compiling_s)
        return gone / steps * (self._total - self._done) if steps else None

    def advance(self, done: int, compiling_s: float = 0.0) -> None:
        """Step `done` has been handed to the device. compiling_s: seconds that compilers have taken since `begin`."""
        self._done, self._compiling_s = done, compiling_s
        if self._bar is not None:
            self._bar.update(self._task, completed=done, eta=self.eta())

    def step(self, entry: Mapping[str, Any]) -> None:
        """A logged step, under a heading that comes back every 25 lines."""
        plain = not self.console.is_terminal
        if self._lines % 25 == 0:
            self.line(HEADING + ("      eta" if plain else ""), "bold")
        self._lines += 1
        text = step_line(entry) + (f" {clock(self.eta()):>8}" if plain else "")
        self.line(text, "yellow" if entry.get("loss") is None or entry.get("nonfinite") else "")
        if self._bar is not None:
            self._bar.update(self._task, state=f"loss {entry['loss']:.3f}")

    def evaluation(self, entry: Mapping[str, Any], compression: Mapping[str, Any]) -> None:
        """A result on held-out text, with what general compressors make of the same text."""
        bits = entry.get("bits_per_byte")
        text = f"{entry['step']:>6d} eval loss {entry['val_loss']:.4f}, perplexity {entry['perplexity']:.4g}"
        self.line(text + ("" if bits is None else f", bits/byte {bits:.3f}{beside(compression)}"), "green")

    def sample(self, step: int, prompt: str, text: str) -> None:
        """What the model writes by now, prompt included."""
        shown = f"after {prompt!r}" if prompt.strip() else "from nothing"
        self.line(f"{step:>6d} sample {shown}:", "magenta")
        for piece in (prompt + text).rstrip().splitlines():
            self.line(f"       | {piece}".rstrip(), "dim")

    def end(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def held_out(entry: Mapping[str, Any]) -> str:
    """Loss, perplexity and bits per byte on held-out text, in words."""
    text = f"held out: loss {entry['val_loss']:.4f}, perplexity {entry['perplexity']:.4g}"
    bits = entry.get("bits_per_byte")
    return text if bits is None else f"{text}, bits per byte {bits:.4f}"


def beside(compression: Mapping[str, Any]) -> str:
    """What compressors make of the held-out text, to stand beside bits per byte."""
    parts = [f"{name} {compression[name]:.2f}" for name in ("gzip", "xz") if compression.get(name) is not None]
    return f" ({', '.join(parts)})" if parts else ""


def show_summary(display: Display, summary: Mapping[str, Any], wrote: Iterable[str]) -> None:
    """The end of a run: what happened, how good, how fast, how much memory, where it is."""
    how = "" if not summary.get("reason") else f" ({summary['reason']})"
    took = clock(summary["wall_s"])
    display.fact(
        str(summary["status"]),
        f"{summary['steps']:,} of {summary['max_steps']:,} steps{how}, {summary['tokens']:,} tokens "
        f"({summary['epochs']:.2f} epochs of {summary['distinct_tokens']:,} distinct) in {took}",
    )
    if summary.get("val_loss") is not None:
        display.fact("held out", held_out(summary).removeprefix("held out: ") + beside(summary["compression"]))
    skipped = summary["skipped_steps"]
    speed = "-" if not summary["tok_per_s"] else f"{summary['tok_per_s']:,.0f} tokens/s over the whole time"
    if (compiling := summary.get("compile_s") or 0.0) >= 1:
        speed += f" ({compiling:.0f} s of it compiling)"
    if summary.get("setup_s", 0.0) >= SETUP_S:
        speed += f" after {summary['setup_s']:.0f} s of set-up"
    if summary.get("ms_per_step"):
        speed += f", {summary['ms_per_step']:,.1f} ms a step"
    if summary.get("mfu") is not None:
        speed += f", mfu {100 * summary['mfu']:.1f} %"
    display.fact("speed", speed + (f", {skipped:,} {'step' if skipped == 1 else 'steps'} skipped" if skipped else ""))
    if summary.get("memory"):
        roles = ", ".join(f"{role} {size(count)}" for role, count in summary["memory"].items() if count)
        display.fact("memory", f"{size(summary['peak_memory_bytes'])} at the peak: {roles}")
    for number, path in enumerate(wrote):
        display.fact("wrote" if number == 0 else "", path)
