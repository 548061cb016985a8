"""Functions that a compiler has not seen: torch keeps what it compiled by code, and gives up on code compiled eight times."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import FunctionType
from typing import Any

_numbers = count()


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same by code of its own, which a compiler takes for another one: what is compiled for it counts
    for nobody else. Raises TypeError for what is not a plain Python function."""
    if not isinstance(function, FunctionType):
        raise TypeError(f"{function!r} is no plain function; wrap it in one.")
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    copy = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
