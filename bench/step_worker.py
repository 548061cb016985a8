"""One case of bench/train_step.py in a process of its own: builds it, then takes steps when told, and reports.

    python bench/step_worker.py '{"work": "gpt2-124m", "case": "compact bf16"}'

Reads one JSON object a line from standard input, {"steps": N, "skip": M, "idle": bool} or {"quit": true}, and answers each
with one line on standard output: the milliseconds of N steps after M untimed ones, the peak of the allocator, the loss. A
case that cannot run answers once with {"skipped": reason} or {"error": text, "oom": bool} and ends. Whatever libraries
print goes to standard error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from step_cases import Skip, build
from turn import time_kernels_in_turn, turn


class Clock:
    """Called after every step with its loss; times the steps that were asked for, and waits for orders in between.

    Steps are not waited for one by one, as in training: CUDA events stand between them, and the wall clock around all.
    """

    def __init__(
        self, answer: Callable[[dict[str, Any]], None], built: dict[str, Any], recorded: Callable[[], int] = lambda: 0
    ):
        import torch

        self.torch, self.cuda = torch, torch.cuda.is_available()
        self.answer, self.built, self.recorded = answer, built, recorded
        self.taken = 0
        self.turn = ExitStack()
        self.order: dict[str, Any] = {}

    def wait(self) -> None:
        """Blocks until the next order."""
        line = sys.stdin.readline()
        self.order = json.loads(line) if line.strip() else {"quit": True}
        if self.order.get("quit"):
            os._exit(0)  # a trainer's or a compiler's threads are not waited for
        self.left, self.began, self.marks = self.order["skip"] + self.order["steps"], time.perf_counter(), []
        self.synchronize()
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()
        if self.left == self.order["steps"]:
            self.mark()

    def synchronize(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def mark(self) -> None:
        """The end of a step, or the beginning of the first timed one."""
        if not self.marks:
            self.synchronize()
            self.wall = time.perf_counter()
        if self.cuda:
            self.marks.append(self.torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def __call__(self, loss: Any) -> None:
        self.taken += 1
        self.left -= 1
        if self.taken == 1:  # compiled: the rest of the warm-up has the device to itself
            self.synchronize()
            self.turn.enter_context(turn())
        if self.left <= self.order["steps"]:
            self.mark()
        if self.left == 0:
            self.synchronize()
            self.report(time.perf_counter(), loss)
            self.turn.close()
            self.wait()

    def report(self, now: float, loss: Any) -> None:
        if self.cuda:
            ms = [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        else:
            ms = [(b - a) * 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]
        found = {
            "ms": [round(x, 4) for x in ms],
            "wall_ms": round((now - self.wall) * 1e3 / len(ms), 4),
            "order_s": round(now - self.began, 2),
            "loss": round(float(loss), 5),
            "taken": self.taken,
        }
        if self.cuda:
            found["peak_bytes"] = max(self.torch.cuda.max_memory_allocated(), self.recorded())
            found["reserved_bytes"] = self.torch.cuda.max_memory_reserved()
            if self.order.get("idle"):  # others run while this one waits
                gc.collect()
                self.torch.cuda.empty_cache()
            found["rest_bytes"] = self.torch.cuda.memory_reserved()
        self.answer({**self.built, **found})


def main() -> None:
    """Builds the case of the command line and serves until told to quit."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(reply: dict[str, Any]) -> None:
        out.write(json.dumps(reply) + "\n")
        out.flush()

    began = time.perf_counter()
    try:
        order = json.loads(sys.argv[1])
        time_kernels_in_turn()
        drive, about = build(order["work"], order["case"], bool(order.get("tiny")), order.get("compile", "auto"))
        built = {**about, "build_s": round(time.perf_counter() - began, 1)}
        clock = Clock(answer, built, getattr(drive, "recorded", lambda: 0))
        clock.wait()
        drive(clock)
    except Skip as reason:
        answer({"skipped": str(reason)})
    except BaseException as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        answer({"error": text[-1500:], "oom": "out of memory" in text.lower(), "trace": traceback.format_exc()[-1500:]})
    out.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
