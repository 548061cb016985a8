"""How far a comparison or a bench is: one bar with an ETA in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fewbits.train.events import clock, printable


class Watch:
    """Shows finished pieces as lines and the whole as one bar. `quiet` shows nothing."""

    def __init__(self, console: Console | None = None, quiet: bool = False, what: str = "compare"):
        self._console = Console(quiet=True) if quiet else console or Console()
        self._encoding = getattr(self._console.file, "encoding", None) or "utf-8"
        self._bar = Progress(
            TextColumn(what),
            BarColumn(24),
            TextColumn("{task.fields[eta]}"),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            transient=True,
            refresh_per_second=2,
            disable=not self._console.is_terminal or quiet,
        )
        self._task = self._bar.add_task(what, total=None, eta="", state="")
        self._left = 0.0
        self._began = time.monotonic()

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def plan(self, left: float | None) -> None:
        """Seconds of work that are left by the present estimate; None when it is not known yet."""
        self._left = left or 0.0

    def eta(self, part: float = 0.0) -> float | None:
        """Seconds until the end: what was left, less the `part` of it that the running piece has gone through."""
        return max(0.0, self._left - part) if self._left else None

    def state(self, text: str, part: float = 0.0) -> None:
        """What runs now, and how many of the planned seconds it has gone through."""
        left = self.eta(part)
        spent = time.monotonic() - self._began
        total = None if left is None else left + spent
        eta = f"ETA {clock(left)}" if left is not None else "ETA after the first part"
        self._bar.update(self._task, total=total, completed=spent, eta=eta, state=printable(text, self._encoding))

    def line(self, text: str, style: str = "") -> None:
        """One line that stays."""
        shown = printable(text, self._encoding)
        self._console.print(shown, style=style or None, markup=False, highlight=False, soft_wrap=True)
