"""Master weights: what the optimizer keeps so that a small update is never lost in a 16-bit working weight.

| kind  | working weight | kept beside it                       | the exact weight is        |
|-------|----------------|--------------------------------------|----------------------------|
| fp32  | bf16, fp16     | `master`: fp32, like the parameter   | the master                 |
| split | bf16           | `master`: int16 remainder            | working bits and remainder |
| none  | any            | nothing                              | the working weight         |

The working weight is always the exact one rounded to nearest, ties away from zero; with "none" this rounding is where
a 16-bit weight loses small updates. fp32 and fp64 weights are exact already and keep nothing, whatever kind is asked
for.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.nn import remainder
from fewbits.numerics.update import join_master, round_away, split_into, split_master
from fewbits.numerics.wide import wide_dtype
from fewbits.optim import sharding
from fewbits.precision.kinds import master_of

STATE_DTYPES = {"fp32": torch.float32, "split": torch.int16}


def waiting_remainder(parameter: Tensor) -> Tensor | None:
    """The remainder left on `parameter` (local, on its device), unless the weight was changed or converted since."""
    found = remainder.waiting(parameter)
    if found is None:
        return None
    fits = (torch.int16, torch.float32) if parameter.dtype == torch.bfloat16 else (torch.float32,)
    if found.shape != parameter.shape or found.dtype not in fits or parameter.dtype.itemsize != 2:
        return None
    return sharding.local(found).to(parameter.device)


def leave_remainder(parameter: Tensor, kept: Tensor) -> None:
    """Leaves `kept` (int16 or fp32, local) on `parameter` until an optimizer makes its state."""
    remainder.leave(parameter, sharding.placed(kept, parameter))


@cache
def kind_for(kind: str, dtype: torch.dtype) -> str:
    """What a parameter of `dtype` keeps when the optimizer was asked for `kind`: "fp32", "split" or "none"."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise FewbitsError(
            f"a parameter has dtype {dtype}; the optimizers update bf16, fp16, fp32 and fp64 parameters."
        )
    return master_of(kind, Format.parse(dtype))


def read(kind: str, working: Tensor, master: Tensor | None) -> Tensor:
    """The exact weight, fp32 or fp64. It may be `master` or `working` itself: updating it in place then stores it."""
    if master is None:
        return working.to(wide_dtype(working.dtype))
    return master if kind == "fp32" else join_master(working, master)


def rounded(kind: str, exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(working weight in `dtype`, what is kept beside it) for an exact weight."""
    if kind == "split":
        return split_master(exact)
    return round_away(exact, dtype), exact if kind == "fp32" else None


def store(kind: str, exact: Tensor, working: Tensor, kept: Tensor | None) -> None:
    """Writes an exact weight into `working` and what is kept beside it; either may be `exact` itself."""
    if kind == "split" and kept is not None:
        split_into(exact, working, kept)
        return
    if kept is not None and kept is not exact:
        kept.copy_(exact)
    if working is not exact:
        working.copy_(round_away(exact, working.dtype))


def from_remainder(kind: str, working: Tensor, left: Tensor) -> Tensor | None:
    """What to keep beside `working`, given its remainder: int16 bits (for bf16), or the exact weight itself in fp32.

    An exact weight whose rounding is no longer the working weight is not used: an edit through `parameter.data`, which
    no version counter sees, would be undone by it.
    """
    if kind == "none":
        return None
    if left.dtype == torch.int16:
        return left if kind == "split" else join_master(working, left)
    exact = torch.where(round_away(left, working.dtype) == working, left, working.float())
    return split_master(exact)[1] if kind == "split" else exact
