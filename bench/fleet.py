"""Processes that take turns: one a case, kept alive but idle, so that blocks alternate A B C A B C without starting anew.

First everything is built and compiled, several processes side by side; then one block at a time is timed while nothing
compiles. As many processes stay alive as fit into the memory of the device; the others start again for each block, with
the compiler's cache warm. A case that fails, hangs or refuses costs itself only, and a budget that ends leaves what there is.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

CONTEXT = 700 * 2**20  # what a process takes on the device beside its tensors
USABLE = 0.97  # of the device's memory


class Worker:
    """A process that answers orders, each a line of JSON, and its standard error in a file."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process is)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment,
            start_new_session=True,  # a group of its own: the compiler's helpers end with it
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.pipe, self.out, self.buffer = self.process.stdin, self.process.stdout, b""
        os.set_blocking(self.out.fileno(), False)

    def order(self, **what: Any) -> None:
        with contextlib.suppress(OSError):  # it has ended: its answer says so
            self.pipe.write(json.dumps(what).encode() + b"\n")
            self.pipe.flush()

    def poll(self) -> dict[str, Any] | None:
        """The answer, if it has come; an error once the process is gone."""
        while b"\n" not in self.buffer:
            try:
                found = os.read(self.out.fileno(), 1 << 16)
            except BlockingIOError:
                return None
            if not found:
                self.process.wait()
                return {"error": f"ended with exit code {self.process.returncode}: {self.tail()}", "oom": False}
            self.buffer += found
        line, self.buffer = self.buffer.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def answer(self, seconds: float) -> dict[str, Any]:
        """The answer, waited for; an error, and the end of the process, when none comes."""
        until = time.monotonic() + seconds
        while (found := self.poll()) is None:
            if time.monotonic() >= until:
                self.close(at_once=True)
                return {"error": f"no answer within {seconds:.0f} s: {self.tail()}", "oom": False}
            wait_any([self], until - time.monotonic())
        return found

    def tail(self, size: int = 400) -> str:
        """The end of what it wrote to standard error."""
        self.log.seek(max(0, os.fstat(self.log.fileno()).st_size - size))
        return self.log.read().decode(errors="replace").strip()

    def close(self, at_once: bool = False) -> None:
        if not at_once:
            self.order(quit=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def wait_any(workers: Sequence[Worker], seconds: float) -> None:
    """Returns when one of them has written something, or after `seconds`."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.out, selectors.EVENT_READ)
        selector.select(max(0.0, seconds))


@dataclass
class Case:
    """What is known of one case."""

    name: str
    guess: int
    """Bytes that its running step may take, before it has run."""
    blocks: list[dict[str, Any]] = field(default_factory=list)
    warm: dict[str, Any] = field(default_factory=dict)
    """The answer to its first order: what compiled, and the loss after the same number of steps as everyone."""
    trouble: dict[str, str] = field(default_factory=dict)
    """{"error": ...} or {"skipped": ...}."""
    ready_s: float = 0.0
    rest: int = 0
    alone: bool = False
    worker: Worker | None = None
    last: float = 0.0

    def need(self) -> int:
        return (int(self.warm.get("reserved_bytes", 0)) or self.guess) + CONTEXT

    def row(self) -> dict[str, Any]:
        """Everything for the results file."""
        kept = ("compiled", "build_s", "loss", "taken", "reserved_bytes")
        about = {key: self.warm[key] for key in kept if key in self.warm}
        return {**self.trouble, "blocks": self.blocks, "ready_s": round(self.ready_s, 1), **about}


@dataclass
class Fleet:
    """The cases of one work.

    command: the command line of a case's process. memory: bytes of the device, None where it does not matter.
    changed: called after everything that is worth saving.
    """

    cases: dict[str, Case]
    command: Callable[[str], Sequence[str]]
    environment: dict[str, str]
    memory: int | None = None
    parallel: int = 1
    warmup: int = 8
    skip: int = 3
    block_s: float = 1.5
    changed: Callable[[], None] = lambda: None

    def prepare(self, until: float) -> None:
        """Builds, compiles and warms up every case, the first ones first, until all are ready or time is over."""
        waiting, busy = [case for case in self.cases.values() if not case.trouble], {}
        began: dict[str, float] = {}
        while waiting or busy:
            while waiting and time.monotonic() < until and self._may_start(waiting[0], list(busy.values())):
                case = waiting.pop(0)
                busy[case.name], began[case.name] = case, time.monotonic()
                self._start(case)
            if time.monotonic() >= until:
                for case in [*busy.values(), *waiting]:
                    self._drop(case, at_once=True)
                    case.trouble = {"skipped": "not ready when the time for compiling was over"}
                    print(f"{case.name}: {case.trouble['skipped']}", flush=True)
                break
            wait_any([case.worker for case in busy.values() if case.worker], min(5.0, until - time.monotonic()))
            for case in list(busy.values()):
                reply = case.worker.poll() if case.worker else None
                if reply is None:
                    continue
                del busy[case.name]
                case.ready_s = time.monotonic() - began[case.name]
                if reply.get("oom") and not case.alone and (busy or self._alive()):
                    self._drop(case)
                    case.alone = True
                    waiting.append(case)
                    print(f"{case.name}: out of memory beside others, tried again alone", flush=True)
                else:
                    self._settle(case, reply)
        self.changed()

    def rounds(self, number: int, until: float) -> None:
        """Times blocks in turn, `number` a case; a block that would end after `until` is left out."""
        for index in range(number):
            for case in self.cases.values():
                if not case.warm or case.trouble:
                    continue
                steps = max(4, min(50, round(self.block_s * 1e3 / typical(case))))
                restart = 0.0 if case.worker else case.ready_s
                cost = (steps + self.skip) * typical(case) / 1e3 * 1.2 + restart
                if time.monotonic() + cost > until:
                    continue
                self._block(index, case, steps, max(30.0, until - time.monotonic() + 30.0))
            self.changed()

    def close(self) -> None:
        """Ends every process."""
        for case in self.cases.values():
            self._drop(case)

    def _block(self, index: int, case: Case, steps: int, seconds: float) -> None:
        self._make_room(case)
        if case.worker is None:
            self._start(case)
            assert case.worker
            self._settle(case, case.worker.answer(seconds), again=True)
        if case.worker is None:
            return
        case.worker.order(steps=steps, skip=self.skip, idle=len(self.cases) > 1)
        reply = case.worker.answer(seconds)
        case.last = time.monotonic()
        if "ms" not in reply:
            self._settle(case, reply)
            return
        case.rest = int(reply.get("rest_bytes", 0))
        ms = reply["ms"]
        block = {"round": index, "ms": round(statistics.median(ms), 4), "wall_ms": reply["wall_ms"], "steps": len(ms)}
        block |= {"least_ms": min(ms), "most_ms": max(ms), "loss": reply["loss"], "taken": reply["taken"]}
        if "peak_bytes" in reply:
            block["peak_bytes"] = reply["peak_bytes"]
        case.blocks.append(block)
        print(f"round {index + 1}  {case.name:28s} {block['ms']:9.2f} ms  ({len(ms)} steps)", flush=True)

    def _start(self, case: Case) -> None:
        case.worker = Worker(self.command(case.name), self.environment)
        case.worker.order(steps=self.warmup, skip=0, idle=len(self.cases) > 1)

    def _settle(self, case: Case, reply: dict[str, Any], again: bool = False) -> None:
        """Takes the first answer of a process, or the trouble it is in."""
        case.last = time.monotonic()
        if "ms" in reply:
            if not again:
                case.warm = reply
                print(f"{case.name}: ready after {case.ready_s:.0f} s, loss {reply['loss']:.4f}", flush=True)
            case.rest = int(reply.get("rest_bytes", 0))
            return
        self._drop(case)
        case.trouble = {key: str(reply[key]) for key in ("error", "skipped", "trace") if key in reply}
        print(f"{case.name}: {case.trouble.get('skipped') or case.trouble.get('error')}", flush=True)

    def _alive(self) -> list[Case]:
        return [case for case in self.cases.values() if case.worker is not None]

    def _drop(self, case: Case, at_once: bool = False) -> None:
        if case.worker is not None:
            case.worker.close(at_once)
            case.worker = None

    def _may_start(self, case: Case, busy: list[Case]) -> bool:
        """Whether there is a free place and room; room is made among the idle ones when nothing else is going on."""
        if busy and (case.alone or len(busy) >= self.parallel):
            return False
        if case.alone:
            for other in self._alive():
                self._drop(other)
        if not busy:
            self._make_room(case)
        return not busy or self._fits(case, busy)

    def _fits(self, case: Case, busy: list[Case]) -> bool:
        if self.memory is None:
            return True
        idle = sum(other.rest + CONTEXT for other in self._alive() if other not in busy and other is not case)
        return idle + sum(other.need() for other in busy) + case.need() <= USABLE * self.memory

    def _make_room(self, case: Case) -> None:
        """Ends idle processes, the one that ran last first: in a fixed order of turns it is needed last."""
        while not self._fits(case, []):
            idle = [other for other in self._alive() if other is not case]
            if not idle:
                return
            self._drop(max(idle, key=lambda other: other.last))


def typical(case: Case) -> float:
    """Milliseconds of a step: of the last block, else of the later warm-up steps."""
    if case.blocks:
        return float(case.blocks[-1]["ms"])
    ms = case.warm["ms"]
    return max(0.01, min(ms[len(ms) // 2 :]))
