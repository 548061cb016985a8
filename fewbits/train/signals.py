"""SIGTERM and Ctrl+C end a run at the next step with a checkpoint; a second Ctrl+C stops at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While open, the first SIGINT or SIGTERM is noted in `received` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt where the program is, unless it comes at once: wrappers such as timeout or
    make hand on the Ctrl+C that the terminal has sent already. Outside the main thread, where Python allows no
    handlers, nothing is noted and nothing changes.
    """

    SAME_PRESS_S = 0.3

    def __init__(self) -> None:
        self.received: str | None = None
        self._when = 0.0
        self._ending = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def ending(self) -> None:
        """From here on further signals are ignored: only the last small files are still to be written."""
        self._ending = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._when = signal.Signals(number).name, time.monotonic()
        elif not self._ending and number == signal.SIGINT and time.monotonic() - self._when > self.SAME_PRESS_S:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
