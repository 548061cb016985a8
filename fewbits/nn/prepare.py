"""What changes in a model, ours or a foreign one, when it is trained in a precision, and why.

`prepare` rounds the parameters to the working format (nearest, ties away from zero) and keeps what the rounding cut off,
by parameter name, until an optimizer adopts it: an fp32 checkpoint loses nothing. Buffers are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fewbits.errors import FewbitsError, nearest
from fewbits.formats import Format
from fewbits.nn import remainder
from fewbits.nn.embedding import Embedding
from fewbits.nn.emulate import emulation, needed
from fewbits.nn.linear import Linear
from fewbits.nn.norm import LayerNorm, RMSNorm
from fewbits.nn.transformer import Transformer
from fewbits.numerics.update import round_away, split_master
from fewbits.precision.precision import Precision

# torch's class -> ours, with what is better about it. Subclasses are left alone: they may mean something else.
_TWINS: dict[type[nn.Module], tuple[type[nn.Module], str]] = {
    nn.Linear: (Linear, "multiplies in the working format, natively or emulated"),
    nn.Embedding: (Embedding, "sums its weight gradient in fp32"),
    nn.LayerNorm: (LayerNorm, "fp32 statistics and weight-gradient sums"),
    nn.RMSNorm: (RMSNorm, "fp32 statistics and weight-gradient sums"),
}
_OURS = tuple(ours for ours, _ in _TWINS.values())


@dataclass
class Report:
    """What `prepare` did: one row (module, kind, what, reason) for every module with parameters of its own."""

    precision: Precision
    rounded: int = 0
    parameters: int = 0
    foreign: bool = False
    """Whether modules remain that are not ours: their 16-bit CPU matmuls are emulated from outside."""
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    @property
    def kept(self) -> list[tuple[str, str, str, str]]:
        """The rows of the modules that stay out of the working format."""
        return [row for row in self.rows if row[2].startswith("kept")]

    def __str__(self) -> str:
        head = f"{self.precision}: {self.rounded} of {self.parameters} parameters rounded, ties away"
        return "\n".join([head, *("  ".join(row) for row in self.rows)])


def prepare(model: nn.Module, precision: str | Precision, keep: Iterable[str] = ()) -> nn.Module:
    """Makes `model` trainable in `precision`, in place, and returns it; `model.fewbits_report` says what changed.

    Args:
        model: any torch module in fp32 (fp64, or an already narrow checkpoint, is taken as it is).
        precision: a name or a value; see `Precision.parse`.
        keep: name patterns of modules that stay out of the working format ("lm_head", "layers.0.*"), or get a format of
            their own ("layers.3=fp32"). Their inputs and outputs are cast.

    Raises:
        FewbitsError: the model is prepared already, a pattern matches nothing, or a parameter cannot be rounded.
    """
    precision = Precision.parse(precision) if isinstance(precision, str) else precision
    if (before := getattr(model, "fewbits_precision", None)) is not None:
        raise FewbitsError(f"the model is prepared as {before} already; prepare a fresh model as {precision}.")
    exceptions = _exceptions(model, keep, precision)
    _refuse_not_finite(model)
    report = Report(precision)
    remainders: dict[str, Tensor] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if not own:
            continue
        row = _swap(module)
        report.foreign |= not isinstance(module, _OURS)
        format, reason = exceptions.get(name, (precision.working, row[1]))
        kept = name in exceptions
        report.rows.append((name or "model", type(module).__name__, f"{'kept in ' if kept else ''}{format}", reason))
        for parameter in own:
            if id(parameter) in names:
                report.parameters += 1
                report.rounded += _round(parameter, format, names.pop(id(parameter)), remainders)
        if kept:
            _cast_around(module, format, precision.working)
        if isinstance(module, Linear):
            module.tf32 = precision.operand.name == "tf32" and not kept
    if isinstance(model, Transformer):
        model.tf32 = precision.operand.name == "tf32"
    model.register_forward_pre_hook(_cast_inputs(precision.working), with_kwargs=True)
    if report.foreign and precision.working.bits == 16:
        _emulate_around(model)
    attributes: dict[str, Any] = model.__dict__
    attributes.update(fewbits_precision=precision, fewbits_report=report, fewbits_remainders=remainders)
    return model


def _exceptions(model: nn.Module, keep: Iterable[str], precision: Precision) -> dict[str, tuple[Format, str]]:
    """Module name -> (format, reason) for every module with parameters that a pattern names, directly or from above."""
    found: dict[str, tuple[Format, str]] = {}
    names = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    for text in keep:
        pattern, _, format_name = text.partition("=")
        format = Format.parse(format_name) if format_name else Format.parse("fp32")
        if format.dtype is None or format.bits < 16:
            raise FewbitsError(f"keep {text!r}: parameters are stored in fp32, bf16, fp16 or fp64, not {format.name}.")
        matched = [n for n in names if any(fnmatchcase(prefix, pattern) for prefix in _prefixes(n))]
        if not matched:
            hint = nearest(pattern, names) or f" Modules with parameters are {', '.join(names[:8])}."
            raise FewbitsError(f"keep {text!r} matches no module of the model.{hint}")
        found.update({name: (format, f"named by keep {text!r}") for name in matched})
    if found and precision.working.bits >= 32:
        raise FewbitsError(
            f"{precision} keeps every parameter in {precision.working}; keep= has nothing to except there."
        )
    return found


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _refuse_not_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise FewbitsError(f"parameter {name} holds NaN or infinity; load a sound checkpoint before preparing it.")


def _swap(module: nn.Module) -> tuple[str, str]:
    """Turns a module of exactly torch's class into ours, keeping parameters, hooks and names; (class, reason)."""
    if isinstance(module, _OURS):
        return type(module).__name__, "ours"
    if type(module) in _TWINS:
        ours, reason = _TWINS[type(module)]
        module.__class__ = ours
        return ours.__name__, reason
    return type(module).__name__, "not ours: torch's kernels, emulated from outside where needed"


def _round(parameter: nn.Parameter, format: Format, name: str, remainders: dict[str, Tensor]) -> bool:
    """Rounds one parameter to `format`; keeps its remainder by name and on the parameter. False if nothing changed."""
    dtype = format.dtype or torch.float32  # tf32 is stored as fp32: only its products are narrower
    exact = parameter.data
    if exact.dtype == dtype:
        return False
    if dtype in (torch.float32, torch.float64):
        parameter.data = exact.to(dtype)
        return False
    exact = exact.float()
    parameter.data, left = split_master(exact) if dtype == torch.bfloat16 else (round_away(exact, dtype), exact)
    if not torch.isfinite(parameter.data).all():
        raise FewbitsError(
            f"parameter {name} reaches {exact.abs().max():.4g}, beyond {format.name} (max {format.max:.4g}). "
            "Use bf16-mixed, or rescale the model."
        )
    remainders[name] = left
    remainder.leave(parameter, left)
    return True


def _to(dtype: torch.dtype) -> Any:
    return lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _cast_inputs(format: Format) -> Any:
    cast = _to(format.dtype or torch.float32)

    def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return tree_map(cast, args), tree_map(cast, kwargs)

    return hook


def _cast_around(module: nn.Module, inside: Format, outside: Format) -> None:
    """An exception computes in its own format: what enters is cast to it, what leaves goes back to the working format."""
    module.register_forward_pre_hook(_cast_inputs(inside), with_kwargs=True)
    module.register_forward_hook(lambda module, args, output: tree_map(_to(outside.dtype or torch.float32), output))


def _emulate_around(model: nn.Module) -> None:
    """A forward call of a foreign model, in training or evaluation, emulates 16-bit CPU matmuls where that is needed."""
    entered: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(emulation(needed(module)))
        entered[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
