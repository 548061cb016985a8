"""A choice made for the user, with its reason."""

from __future__ import annotations

from typing import Any, NamedTuple


class Choice(NamedTuple):
    """What the program decided where the user did not, and why: `Choice("cpu", "no CUDA device is present")`."""

    value: Any
    reason: str
