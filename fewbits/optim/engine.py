"""Runs an update rule over many tensors: one flat function, compiled where that pays, cut into pieces where not; on a CPU
the C++ that has its bits.

The function is the same for every master kind up to how the exact weight is read and stored, so that the new exact
weight comes from the same lines (and the same compiled arithmetic) for all of them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.kernels import update_cpu
from fewbits.kernels.dispatch import update_execution, updates_in_one_pass
from fewbits.numerics.wide import wide_dtype
from fewbits.optim import master

Rule = Callable[[Tensor, Tensor, Sequence[Tensor], Tensor], None]
"""rule(weight, gradient, moments, scalars): updates in place; see numerics/update.py."""

ALIGN = 64  # elements; flat tensors have a multiple of it: vectorized code then leaves no tail that rounds otherwise
SMALL = 32768  # elements; smaller tensors are updated together: most of a model's tensors hold few of its numbers
PIECE = 262144  # elements; larger pieces leave a CPU's caches, smaller ones spend their time between the calls


@dataclass(frozen=True, eq=False)
class Item:
    """One parameter's local tensors, all of one shape.

    working: bf16, fp16, fp32 or fp64; gradient: any float; master: fp32, int16 or None; moments: fp32 (fp64 with fp64).
    place: its number among all parameters of the step that have a gradient.
    """

    working: Tensor
    gradient: Tensor
    master: Tensor | None
    moments: tuple[Tensor, ...]
    place: int = 0

    def stored(self) -> list[Tensor]:
        """What an update changes."""
        return [self.working, *([] if self.master is None else [self.master]), *self.moments]


@dataclass(frozen=True, eq=False)
class Settings:
    """What all items of one call share: the rule, the master kind, and tensors on their device.

    factor, clip_value (or None): 0-d fp32; applied: 0-d bool, or None for always; scalars: 1-D, of the update's dtype.
    """

    rule: Rule
    kind: str
    factor: Tensor
    clip_value: Tensor | None
    applied: Tensor | None
    scalars: Tensor


def update_flat(
    rule: Rule,
    kind: str,
    working: Tensor,
    gradient: Tensor,
    kept: Tensor | None,
    moments: Sequence[Tensor],
    factor: Tensor,
    clip_value: Tensor | None,
    applied: Tensor | None,
    scalars: Tensor,
) -> None:
    """One update, in place, of tensors of one shape (see Item, Settings). Where `applied` is false every bit stays."""
    wide = wide_dtype(working.dtype)
    gradient = gradient * factor if gradient.dtype == wide else gradient.to(wide).mul_(factor)
    if clip_value is not None:
        gradient = torch.minimum(torch.maximum(gradient, -clip_value), clip_value)
    exact = master.read(kind, working, kept)
    if applied is None:
        rule(exact, gradient, moments, scalars)
        master.store(kind, exact, working, kept)
        return
    new_exact, new_moments = exact.clone(), [moment.clone() for moment in moments]
    rule(new_exact, gradient, new_moments, scalars)
    for moment, new in zip(moments, new_moments, strict=True):
        moment.copy_(torch.where(applied, new, moment))
    new_working, new_kept = master.rounded(kind, new_exact, working.dtype)
    working.copy_(torch.where(applied, new_working, working))
    if kept is not None and new_kept is not None:
        kept.copy_(torch.where(applied, new_kept, kept))


@functools.cache
def compiled_update(*variant: object) -> Callable[..., None]:
    """`update_flat`, compiled for sizes not known in advance; one per `variant` (rule, kind, dtypes, what is None).

    torch.compile counts recompilations by code object and stops at a limit; a code object for each variant starts
    afresh.
    """
    code = update_flat.__code__.replace()
    function = types.FunctionType(code, update_flat.__globals__, update_flat.__name__)
    return torch.compile(function, dynamic=True, fullgraph=True)


def choose_execution(compile: bool | str, device: torch.device) -> Choice:
    """Choice("kernel" | "compiled" | "eager", reason) for updates on `device`; `compile` is "auto", True or False."""
    if compile is False:
        return Choice("eager", "compile=False was given")
    if compile is True:
        return Choice("compiled", "compile=True was given")
    if compile != "auto":
        raise FewbitsError(f"compile={compile!r} does not fit; use 'auto', True or False.")
    return update_execution(device)


def is_compiler_failure(error: Exception) -> bool:
    """Did torch.compile fail (no compiler, an unsupported device), as opposed to the update itself?"""
    modules = ("torch._dynamo.exc", "torch._inductor.exc")
    return any(kind.__module__ in modules for kind in type(error).__mro__)


def parts(items: Sequence[Item]) -> list[list[Item]]:
    """`items`, which share device, dtypes and settings, as the parts that one call of the update takes each."""
    alone: list[list[Item]] = []
    together = []
    for item in items:
        if _is_flat(item):
            alone.append([item])
        elif item.working.numel():
            together.append(item)
    return [*alone, together] if together else alone


def run(part: Sequence[Item], settings: Settings, compiled: bool) -> None:
    """Updates one part in place. A compiler that fails does so before anything of the part has changed."""
    if not compiled and settings.applied is None and all(map(partial(_in_one_pass, settings.rule), part)):
        for item in part:
            _run_in_one_pass(item, settings)
    elif len(part) == 1 and _is_flat(part[0]):
        _run_flat(part[0], settings, compiled)
    else:
        _run_together(part, settings, compiled)


def _in_one_pass(rule: Rule, item: Item) -> bool:
    plain = all(type(one) in (Tensor, torch.nn.Parameter) for one in (item.gradient, *item.stored()))
    return plain and updates_in_one_pass(rule, item.working, item.gradient)


def _run_in_one_pass(item: Item, settings: Settings) -> None:
    s, stored = settings, item.stored()
    rows = [one.contiguous() for one in stored]
    kept, moments = (rows[1], rows[2:]) if item.master is not None else (None, rows[1:])
    update_cpu.update(
        s.rule, s.kind, rows[0], item.gradient.contiguous(), kept, moments, s.factor, s.clip_value, s.scalars
    )
    for one, new in zip(stored, rows, strict=True):
        if new is not one:  # it does not lie row by row
            one.copy_(new)
    torch.autograd.graph.increment_version(stored)


def _is_flat(item: Item) -> bool:
    size = item.working.numel()
    return size >= SMALL and size % ALIGN == 0 and item.working.is_contiguous()


def _run_together(items: Sequence[Item], settings: Settings, compiled: bool) -> None:
    """Copies the items into one flat item, padded with zeros, updates that and copies back: few calls, not many."""
    columns = list(zip(*(item.stored() for item in items), strict=True))
    sizes = [item.working.numel() for item in items]
    padding = -sum(sizes) % ALIGN

    def flatten(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([*(tensor.reshape(-1) for tensor in tensors), tensors[0].new_zeros(padding)])

    flat, gradient = [flatten(column) for column in columns], flatten([item.gradient for item in items])
    has_master = items[0].master is not None
    together = Item(flat[0], gradient, flat[1] if has_master else None, tuple(flat[1 + has_master :]))
    _run_flat(together, settings, compiled)
    for whole, column in zip(flat, columns, strict=True):
        parts = torch.split(whole, [*sizes, padding])[:-1]
        torch._foreach_copy_(list(column), [part.view_as(tensor) for part, tensor in zip(parts, column, strict=True)])


def _run_flat(item: Item, settings: Settings, compiled: bool) -> None:
    working, *stored = (tensor.view(-1) for tensor in item.stored())
    gradient = item.gradient.reshape(-1)
    kept, moments = (stored[0], stored[1:]) if item.master is not None else (None, stored)
    s = settings
    size = working.numel()
    if compiled or working.device.type != "cpu" or size <= PIECE:
        function: Callable[..., None] = update_flat
        if compiled:
            masks = (s.clip_value is None, s.applied is None)
            function = compiled_update(s.rule, s.kind, working.dtype, gradient.dtype, len(moments), *masks)
        function(s.rule, s.kind, working, gradient, kept, moments, s.factor, s.clip_value, s.applied, s.scalars)
        return
    for start in range(0, size, PIECE):
        cut = slice(start, min(start + PIECE, size))
        update_flat(
            s.rule,
            s.kind,
            working[cut],
            gradient[cut],
            None if kept is None else kept[cut],
            [moment[cut] for moment in moments],
            s.factor,
            s.clip_value,
            s.applied,
            s.scalars,
        )
