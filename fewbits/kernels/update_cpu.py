"""The update of weights on a CPU in one pass over memory: the fast twin of numerics/update.py there, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from fewbits.choice import Choice
from fewbits.kernels import cpp
from fewbits.kernels.update import RULES
from fewbits.ranges import span

_RULES = {"adamw": 0, "adam": 1, "sgd": 2}
_KINDS = {"split": 0, "fp32": 1, "none": 2}
_WIDTH = 8  # scalars that the library copies


@cache
def library() -> Choice:
    """Choice(the compiled library or None, why), settled for the life of the process."""
    return cpp.library("update_cpu", {"update": "iiiiilpppppfifp"})


def why_not(rule: Callable[..., None], working: torch.dtype, gradient: torch.dtype) -> str:
    """What keeps tensors of these dtypes from `update`, or ""."""
    if rule not in RULES:
        return f"the rule {getattr(rule, '__name__', rule)} has no kernel"
    if working not in cpp.FORMATS or gradient not in cpp.FORMATS:
        return f"{working} weights with {gradient} gradients; bf16, fp16 and fp32 fit"
    return ""


def update(
    rule: Callable[..., None],
    kind: str,
    working: Tensor,
    gradient: Tensor,
    kept: Tensor | None,
    moments: Sequence[Tensor],
    factor: Tensor,
    clip_value: Tensor | None,
    scalars: Tensor,
) -> None:
    """`update_flat` of optim/engine.py for what `why_not` allows: contiguous tensors of one shape; reads the gradient only."""
    values = torch.zeros(_WIDTH)
    values[: len(scalars)] = scalars
    places = [
        None if one is None else one.data_ptr()
        for one in (working, gradient, kept, *moments, *[None] * (2 - len(moments)))
    ]
    limit = 0.0 if clip_value is None else float(clip_value)
    with span("update"):  # no operator of torch: a profiler would not see it
        library().value.update(
            torch.get_num_threads(), cpp.FORMATS[working.dtype], _RULES[RULES[rule]], _KINDS[kind],
            cpp.FORMATS[gradient.dtype], working.numel(), *places, float(factor), clip_value is not None, limit,
            values.data_ptr(),
        )  # fmt: skip
