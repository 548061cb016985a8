"""Saved state of an optimizer: refused before anything changes where it does not fit, else copied, each tensor in its dtype."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.numerics.wide import wide_dtype
from fewbits.optim import master


def check_state_dict(state_dict: Mapping[str, Any], kinds: Mapping[str, str], sizes: Sequence[int]) -> None:
    """Raises FewbitsError unless it comes from an optimizer of these kinds, with groups of so many parameters."""
    if "applied_steps" not in state_dict or "kinds" not in state_dict:
        raise FewbitsError("this is not the state of a fewbits optimizer: it has no applied_steps; load one that is.")
    for what, own in kinds.items():
        saved = state_dict["kinds"].get(what)
        if saved != own and what != "master":  # what masters are kept is compared parameter by parameter
            raise FewbitsError(f"the saved state has {what} {saved!r} and this optimizer {own!r}; make it as saved.")
    found = [len(group["params"]) for group in state_dict["param_groups"]]
    if found != list(sizes):
        raise FewbitsError(
            f"the saved state has groups of {found} parameters and this optimizer {list(sizes)}; group them as saved."
        )


def by_name(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """Parameter name -> its state, from "NAME/exp_avg" and so on.

    Raises FewbitsError for a name that is not among `names`, and where applied_steps is missing.
    """
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key != "applied_steps":
            saved.setdefault(key.rpartition("/")[0], {})[key.rpartition("/")[2]] = value
    foreign = sorted(set(saved) - set(names))
    if foreign or "applied_steps" not in tensors:
        what = f"state of {foreign[0]!r}, which is not here" if foreign else "no applied_steps"
        raise FewbitsError(f"the saved optimizer state holds {what}; load it into the model that wrote it.")
    return saved


class Copies:
    """Copies of the saved state of parameters; those of one birth share their `since`, 0-d int64 on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._births: dict[int, Tensor] = {}

    def copy(
        self, parameter: Tensor, kind: str, moments: Sequence[str], saved: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state of one parameter with master `kind`. Raises FewbitsError for other names, dtypes or shapes."""
        dtypes = dict.fromkeys(moments, wide_dtype(parameter.dtype))
        if kind != "none":
            dtypes["master"] = master.STATE_DTYPES[kind]
        if set(saved) != {*dtypes, "since"}:
            raise FewbitsError(
                f"the saved state of a {parameter.dtype} parameter holds {', '.join(sorted(saved))}; this optimizer "
                f"keeps {', '.join(sorted({*dtypes, 'since'}))} (master {kind!r}): make it as it was saved."
            )
        born = int(saved["since"])
        if born not in self._births:
            self._births[born] = torch.full((), born, dtype=torch.int64, device=self._device)
        state = {"since": self._births[born]}
        for name, dtype in dtypes.items():
            value = saved[name]
            if value.dtype != dtype or value.shape != parameter.shape:
                raise FewbitsError(
                    f"the saved {name} is {value.dtype} {tuple(value.shape)} and this one is {dtype} "
                    f"{tuple(parameter.shape)}: make the optimizer as it was saved."
                )
            state[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            state[name].copy_(value)
        return state
