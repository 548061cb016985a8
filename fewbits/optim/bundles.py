"""Bundles of parameters that one launch updates, kept from step to step as long as nothing moves.

A step compares addresses, which costs the host less than a microsecond a parameter; what it finds unchanged it does not
make again. Where only gradients moved (backward allocates them anew), the tables get their new addresses, 64 bytes a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fewbits.kernels.update import FORMATS, RULES, Cut, Row, Table, Variant, why_not
from fewbits.optim.engine import Item, Rule
from fewbits.optim.scalars import Scalars
from fewbits.optim.sharding import is_sharded, local


class Bundle(NamedTuple):
    """Parameters that can share one call."""

    group: dict[str, Any]
    since: Tensor
    items: list[Item]


class Layout(NamedTuple):
    """Where everything lies that a step touches: `fixed` should never change, `gradients` are addresses.

    whole: no gradient is a DTensor, of which this rank has only a part. parameters: those with a gradient.
    """

    fixed: list[object]
    gradients: list[int]
    whole: bool
    parameters: list[Tensor]


def layout(
    groups: Sequence[dict[str, Any]],
    state: Mapping[Any, Mapping[str, Tensor]],
    gradients: Mapping[Any, Tensor] | None,
    moments: Callable[[dict[str, Any]], tuple[str, ...]],
) -> Layout | None:
    """The layout of all parameters with a gradient, in order; None where a gradient is sparse or state is missing."""
    fixed: list[object] = []
    addresses: list[int] = []
    parameters: list[Tensor] = []
    whole = True
    for group in groups:
        fixed += (id(group), moments(group))
        for parameter in group["params"]:
            gradient = parameter.grad if gradients is None else gradients.get(parameter)
            if gradient is None:
                continue
            held = state.get(parameter)
            if not held or gradient.layout != torch.strided:
                return None
            if type(gradient) is not Tensor:
                whole, gradient = whole and not is_sharded(gradient), _plain(gradient)
            parameters.append(parameter)
            addresses.append(gradient.data_ptr())
            fixed += (id(parameter), gradient.dtype, gradient.numel(), gradient.is_contiguous())
            mine: Iterable[Tensor] = (parameter, *held.values())
            if type(parameter) is not Parameter:
                mine = map(_plain, mine)
            fixed += map(Tensor.data_ptr, mine)
    return Layout(fixed, addresses, whole, parameters)


def _plain(tensor: Tensor) -> Tensor:
    return tensor if type(tensor) is Tensor or type(tensor) is Parameter else local(tensor)


class Tables:
    """The tables of everything in one layout, and `rest`: what no table takes, by the keys its bundles came with.

    Tables keep addresses, not tensors: a gradient that is let go is free, and so is state that moves away. Items of the
    rest are tensors: for one step.
    """

    def __init__(self, where: Layout, found: Mapping[Any, Bundle], rule: Rule, names: Sequence[str], cut: Cut) -> None:
        self._where = where
        self.whole = where.whole
        self._places: list[list[int]] = []
        self.tables: list[Table] = []
        self.rest: dict[Any, Bundle] = {}
        self.weights: list[Tensor] = []
        numbers: dict[tuple[int, int], int] = {}  # rows of scalars by group and birth
        rows: dict[tuple[Variant, torch.device], list[tuple[int, Row]]] = {}
        for key, bundle in found.items():
            number = numbers.setdefault((id(bundle.group), id(bundle.since)), len(numbers))
            for item in bundle.items:
                row = Row(item.gradient, item.working, item.master, item.moments, number)
                if item.working.device != bundle.since.device or why_not(rule, key[1], row):
                    self.rest.setdefault(key, bundle._replace(items=[])).items.append(item)
                else:
                    formats = FORMATS[item.working.dtype], FORMATS[item.gradient.dtype]
                    variant = Variant(RULES[rule], key[1], *formats, len(item.moments))
                    rows.setdefault((variant, item.working.device), []).append((item.place, row))
        for (variant, _), placed in rows.items():
            self.tables.append(Table(variant, [row for _, row in placed], cut))
            self._places.append([place for place, _ in placed])
            self.weights += [where.parameters[place] for place, _ in placed]
        owners = {
            (id(bundle.group), id(bundle.since)): bundle for bundle in found.values()
        }  # in the order of `numbers`
        self.scalars = Scalars([b.group for b in owners.values()], [b.since for b in owners.values()], names)

    def follow(self, where: Layout) -> bool:
        """Takes over a layout in which at most gradients moved; False where more did: make new tables then."""
        if self.rest or where.fixed != self._where.fixed:
            return False
        if where.gradients != self._where.gradients:
            for table, places in zip(self.tables, self._places, strict=True):
                table.move_gradients([where.gradients[place] for place in places])
            self._where = where
        return True
