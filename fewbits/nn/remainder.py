"""What rounding cut off a weight, waiting on its parameter until an optimizer adopts it: an fp32 checkpoint loses nothing.

`parameter.fewbits_remainder` is the int16 remainder of a split master, or the exact fp32 weight; `fewbits_version` is the
version of the parameter at that time, so that a weight that was changed since does not get an old remainder.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def leave(parameter: Tensor, remainder: Tensor) -> None:
    """Leaves `remainder` (int16 or fp32, shaped like the parameter) on the parameter as it is now."""
    held: Any = parameter
    held.fewbits_remainder, held.fewbits_version = remainder, parameter._version


def waiting(parameter: Tensor) -> Tensor | None:
    """The remainder that waits, or None: there is none, or the parameter was changed in place since."""
    fresh = getattr(parameter, "fewbits_version", None) == parameter._version
    found: Tensor | None = getattr(parameter, "fewbits_remainder", None) if fresh else None
    return found


def drop(parameter: Tensor) -> None:
    """Removes what `leave` left."""
    for name in ("fewbits_remainder", "fewbits_version"):
        if hasattr(parameter, name):
            delattr(parameter, name)
