"""A whole step as one CUDA graph: recorded once, then replayed with no work on the host between its kernels.

A step of a small model launches some 2,000 kernels, each of which costs the host 5 to 10 us: what the device finishes
sooner than that waits. What is replayed are the very kernels of the step, so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.kernels.recording import recording
from fewbits.nn.transformer import Transformer

MicroBatch = Mapping[str, Tensor]
MODES = ("auto", "true", "false")


def graph_choice(wanted: str, model: nn.Module, device: torch.device) -> Choice:
    """Whether steps of `model` are recorded: wanted is "auto", "true" or "false".

    Raises FewbitsError for another word, and for "true" where it cannot be.
    """
    if wanted not in MODES:
        raise FewbitsError(f"graph={wanted!r} does not fit; use auto, true or false.")
    if wanted == "false":
        return Choice(False, "graph=false was given")
    why_not = _why_not(model, device)
    if why_not and wanted == "true":
        raise FewbitsError(f"graph=true does not fit: {why_not}. Use graph=auto or graph=false.")
    if why_not:
        return Choice(False, why_not)
    return Choice(True, "the same kernels without work on the host between them")


def _why_not(model: nn.Module, device: torch.device) -> str:
    if device.type != "cuda":
        return f"CUDA graphs are for CUDA; this is {device.type}"
    if not isinstance(model, Transformer):
        return "a model that is not ours may do on the host what a graph would not repeat"
    if model.config.dropout:
        return "dropout draws from a generator whose seed would be recorded"
    return ""


class _Recorded(NamedTuple):
    """A graph with what it reads and writes."""

    graph: Any
    micro_batches: list[dict[str, Tensor]]
    result: tuple[Tensor, ...]
    kept: list[object]


class StepGraph:
    """Runs `take(micro_batches)`, which returns a tuple of tensors, eagerly until it is warm and from a graph then.

    Args:
        take: the step. It may not wait for the device, and must read what changes between its calls from tensors that
            stay where they are.
        fingerprint: everything else that `take` depends on, as something that can be compared; another one records anew.
        device: a CUDA device.
    """

    WARM = 3
    """Eager calls before a recording: compilers compile, autotuners tune and caches fill in them."""

    def __init__(
        self,
        take: Callable[[Sequence[MicroBatch]], tuple[Tensor, ...]],
        fingerprint: Callable[[], object],
        device: torch.device,
    ):
        self.take, self.fingerprint, self.device = take, fingerprint, device
        self.choice = Choice(True, f"recorded after {self.WARM} steps")
        self._seen: object = None
        self._calls = 0
        self._recorded: _Recorded | None = None
        self.peak = 0
        """Largest allocation on the device while the graph was recorded, in bytes: a replay allocates nothing that shows."""
        self.recording = False
        """Whether `take` is being recorded now, and must take no number from the host that changes."""

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, ...]:
        """One call of `take`, however it runs. What it returns belongs to the caller."""
        seen = (_signature(micro_batches), self.fingerprint())
        if seen != self._seen:
            self.forget()
            self._seen = seen
        if self._recorded is None and self.choice.value and self._calls >= self.WARM:
            self._record(micro_batches)
        if self._recorded is None:
            self._calls += 1
            return self.take(micro_batches)
        for mine, given in zip(self._recorded.micro_batches, micro_batches, strict=True):
            for key, tensor in mine.items():
                tensor.copy_(given[key], non_blocking=True)
        self._recorded.graph.replay()
        return tuple(tensor.clone() for tensor in self._recorded.result)

    @property
    def settled(self) -> bool:
        """Whether the next call runs as all later ones will."""
        return self._recorded is not None or not self.choice.value

    def forget(self) -> None:
        """Frees the graph and its memory; the next calls are eager again."""
        self._recorded, self._calls, self._seen, self.peak = None, 0, None, 0

    def _record(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Records `take`; nothing of it happens before a replay. Where that fails steps stay eager, and `choice` says why."""
        mine = [{key: tensor.clone() for key, tensor in micro_batch.items()} for micro_batch in micro_batches]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.recording = True
        try:
            with recording(graph, self.device) as kept:
                result = self.take(mine)
        except torch.OutOfMemoryError:
            self.choice = Choice(False, "its memory did not fit beside what is there")
        except RuntimeError as error:  # what CUDA does not record, in words of the driver
            self.choice = Choice(False, f"recording failed: {str(error).strip().splitlines()[0]}")
        else:
            self._recorded = _Recorded(graph, mine, tuple(result), kept)
            self.peak = torch.cuda.max_memory_allocated(self.device)
        finally:
            self.recording = False


def _signature(micro_batches: Sequence[MicroBatch]) -> object:
    return [
        [(key, tensor.shape, tensor.dtype) for key, tensor in sorted(micro_batch.items())]
        for micro_batch in micro_batches
    ]
