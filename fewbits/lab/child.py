"""One child process at a time, with its output in a log, and a parent that never leaves it behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

GRACE = 120.0  # seconds in which an interrupted run may write its checkpoint


class Terminated(KeyboardInterrupt):
    """SIGTERM came: end as after Ctrl+C."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, its seconds, its standard output, the last lines of its standard error."""

    code: int
    seconds: float
    output: str
    last_words: str


def run_child(
    arguments: Sequence[str], log: Path, watch: Callable[[], None] | None = None, every: float = 0.5
) -> Ended:
    """Run `python ARGUMENTS` to its end. `watch` is called every so many seconds while it runs.

    On Ctrl+C and SIGTERM the child is asked to end (it saves a checkpoint), awaited, and the interrupt raised again.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    output, errors = log.with_suffix(".out"), log
    began = time.monotonic()
    with open(output, "w+b") as out, open(errors, "w+b") as err, _terminate_as_interrupt():
        child = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        try:
            while child.poll() is None:
                if watch is not None:
                    watch()
                try:
                    child.wait(every)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException as stop:
            _end(child, asked=isinstance(stop, KeyboardInterrupt) and not isinstance(stop, Terminated))
            raise
    text = output.read_text(encoding="utf-8", errors="replace")
    words = errors.read_text(encoding="utf-8", errors="replace")
    return Ended(child.returncode, time.monotonic() - began, text, last_lines(words or text))


def last_lines(text: str, most: int = 3) -> str:
    """The last lines that say something, joined.

    >>> last_lines("a\\n\\nb\\nc\\nd\\n")
    'b / c / d'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-most:])


def _end(child: subprocess.Popen[bytes], asked: bool) -> None:
    """Let the child finish its last save; ask it first unless the terminal's Ctrl+C has reached it already."""
    if child.poll() is None and not asked:
        child.terminate()
    try:
        child.wait(2.0 if asked else GRACE)
    except subprocess.TimeoutExpired:
        child.terminate()  # Ctrl+C reached only us (no terminal), or the child is slow to save
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    except KeyboardInterrupt:  # the second Ctrl+C stops at once
        child.kill()
        child.wait()
        raise


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Within, SIGTERM raises Terminated (in the main thread; elsewhere Python cannot)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        raise Terminated(f"signal {number}")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
