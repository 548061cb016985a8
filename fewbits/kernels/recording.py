"""Recording CUDA graphs: what a graph reads besides what its owner holds (tables of addresses in caches, which may let them
go), and a device that is as before where a recording fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lists: list[list[object]] = []


@contextmanager
def keeping() -> Iterator[list[object]]:
    """Within, the list gets everything that `keep` is told of. Whoever records a graph lets it live as long as the graph."""
    found: list[object] = []
    _lists.append(found)
    try:
        yield found
    finally:
        _lists.remove(found)


def keep(thing: object) -> None:
    """`thing` is read by what is launched now."""
    for found in _lists:
        found.append(thing)


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[list[object]]:
    """Within, what runs on `device` is recorded into `graph` and not run; the list is that of `keeping`.

    A recording that fails leaves torch's generator waiting for its end, and every later random number an error ("Offset
    increment outside graph capture"): it then gets a state of its own again, equal to the one before.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    before = generator.get_state()
    try:
        with torch.cuda.device(index), keeping() as found, torch.cuda.graph(graph):
            yield found
    except BaseException:
        fresh = torch.Generator(device=torch.device("cuda", index))
        fresh.set_state(before)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise
