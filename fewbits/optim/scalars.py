"""The scalars of an update (learning rate, bias corrections and so on) of all parameters at once, made on the device.

Every (group, birth) is a row. Options of the groups are columns in fp64, so that the formula of an optimizer's `scalars`
runs once for all rows; it is uploaded again only where an option changes. The number of applied steps never leaves the
device: skipped steps do not count, and the host does not know which were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.kernels.update import WIDTH, to_device

Formula = Callable[[dict[str, Any], Any, Any], Sequence[Any]]


class Scalars:
    """Rows of scalars. groups, since: group and birth (0-d int64 on the device) of every row. names: the options; those
    that are a number, a tuple of numbers or a 0-d tensor become columns.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], since: Sequence[Tensor], names: Sequence[str]) -> None:
        self._groups = list(groups)
        self._names = [name for name in names if _is_number(groups[0].get(name))]
        self._births, self._since = list(since), torch.stack(list(since))  # held: nothing else gets their addresses
        self._uploaded: list[list[float]] = []
        self._columns: tuple[Tensor, ...] = ()

    def values(self, formula: Formula, count: Tensor, lr_factor: Tensor) -> Tensor:
        """fp32 [rows, 8] for the count-th update (0-d int64): what `formula(group, lr, n)` gives, the last repeated."""
        columns = self._options()
        births = (count - self._since).double()
        found = list(formula(columns, lr_factor.double() * columns["lr"], births))
        return torch.stack([*found, *[found[-1]] * (WIDTH - len(found))], dim=1).float()

    def _options(self) -> dict[str, Any]:
        """Every option as a column, fp64 [rows], or as a tuple of columns."""
        flat: list[list[Any]] = []
        for name in self._names:
            column = [group[name] for group in self._groups]
            flat += map(list, zip(*column, strict=True)) if isinstance(column[0], tuple | list) else [column]
        numbers = [[0.0 if isinstance(x, Tensor) else float(x) for x in column] for column in flat]
        if numbers != self._uploaded:
            table = to_device(torch.tensor(numbers, dtype=torch.float64), self._since.device)
            self._uploaded, self._columns = numbers, table.unbind()
        ready = [
            self._with_tensors(column, held) if any(isinstance(x, Tensor) for x in column) else held
            for column, held in zip(flat, self._columns, strict=True)
        ]
        first, options = self._groups[0], {}
        for name in self._names:
            many = len(first[name]) if isinstance(first[name], tuple | list) else 0
            options[name] = tuple(ready.pop(0) for _ in range(many)) if many else ready.pop(0)
        return options

    def _with_tensors(self, column: Sequence[Any], held: Tensor) -> Tensor:
        """torch allows a tensor for lr: whatever it holds now counts. One on the CPU is read there."""
        return torch.stack(
            [
                x.to(held.device, held.dtype, non_blocking=True).reshape(()) if isinstance(x, Tensor) else held[row]
                for row, x in enumerate(column)
            ]
        )


def _is_number(option: Any) -> bool:
    return isinstance(option, int | float | tuple | list | Tensor) and not isinstance(option, bool)
