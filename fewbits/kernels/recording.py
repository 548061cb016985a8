"""What a CUDA graph reads besides what its owner holds: tables of addresses in caches, which may let them go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
