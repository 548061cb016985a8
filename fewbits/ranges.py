"""Names for stretches of a training step, for torch's profiler and for Nsight (NVTX); nothing while nobody looks.

`with span("backward"): ...` costs one call and one `with` of a shared empty context, under a microsecond, while ranges are
off. They are on within `recording()`, and for the life of the process when FEWBITS_NVTX=1 is set
(`FEWBITS_NVTX=1 nsys profile -t cuda,nvtx fewbits train --graph false`). Inside compiled code they are nothing: the tracer sees
no range.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

PREFIX = "fewbits: "
"""Begins the name of every range in a trace, so that ours are told from torch's."""
STEP, DATA, FORWARD, BACKWARD = "step", "data", "forward", "backward"
LOSS_HEAD, ATTENTION, QUANTIZE, UPDATE, BLOCK = "loss head", "attention", "quantize", "clip and update", "block"

_NOTHING: AbstractContextManager[None] = nullcontext()
_FOREVER = os.environ.get("FEWBITS_NVTX") == "1"
_profiled = False


def span(name: str, number: int | None = None) -> AbstractContextManager[Any]:
    """A context that is one range named `name` (with `number`, as "block 3") in whatever records; else an empty one."""
    if torch.compiler.is_compiling() or not (_profiled or _FOREVER):  # in this order: no guard on what may change
        return _NOTHING
    return _named(PREFIX + (name if number is None else f"{name} {number}"))


def ranges_are_recorded() -> bool:
    """Whether a profiler records ranges now. A CUDA graph would hide them: steps run eagerly then, the same kernels."""
    return _profiled


@contextmanager
def recording() -> Iterator[None]:
    """Within, spans are recorded; what was before is put back."""
    global _profiled
    before, _profiled = _profiled, True
    try:
        yield
    finally:
        _profiled = before


@contextmanager
def _named(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        if torch.cuda.is_available():
            nvtx: Any = torch.cuda.nvtx
            nvtx.range_push(name)
            stack.callback(nvtx.range_pop)
        if _profiled:
            stack.enter_context(torch.profiler.record_function(name))
        yield
