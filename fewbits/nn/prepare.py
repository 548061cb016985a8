"""What changes in a model, ours or a foreign one, when it is trained in a precision, and why.

`prepare` rounds the parameters to the working format (nearest, ties away from zero) and keeps what the rounding cut off,
by parameter name, until an optimizer adopts it: an fp32 checkpoint loses nothing. Buffers are left alone. With a recipe,
linear layers multiply in few bits from then on. `unprepare` takes it all back.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from fewbits.choice import Choice
from fewbits.errors import FewbitsError, nearest
from fewbits.formats import Format
from fewbits.nn import remainder
from fewbits.nn.eligible import eligible
from fewbits.nn.embedding import Embedding
from fewbits.nn.emulate import emulation, needed
from fewbits.nn.fake import LEARNED, fake_linear, first_log_scale
from fewbits.nn.linear import Linear
from fewbits.nn.lowbit import let_compilers_in, lowbit_linear, recipe_of
from fewbits.nn.mlp import lowbit_mlp
from fewbits.nn.norm import LayerNorm, RMSNorm
from fewbits.nn.packed import refuse_packed
from fewbits.nn.scale_history import ScaleHistory
from fewbits.nn.transformer import Transformer
from fewbits.numerics.random import mix_key
from fewbits.numerics.update import join_master, round_away, split_master
from fewbits.precision.precision import Precision
from fewbits.precision.recipe import Recipe

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


def prepare(
    model: nn.Module,
    precision: str | Precision,
    keep: Iterable[str] = (),
    layers: Mapping[str, Choice] | None = None,
) -> nn.Module:
    """Makes `model` trainable in `precision`, in place, and returns it; `model.fewbits_report` says what changed.

    Args:
        model: any torch module in fp32 (fp64, or an already narrow checkpoint, is taken as it is).
        precision: a name or a value; see `Precision.parse`.
        keep: name patterns of modules that stay out of the recipe ("lm_head", "layers.0.*"; in a precision without a
            recipe: out of the working format, in fp32), or are stored in a format of their own ("layers.3=fp32"): their
            inputs and outputs are cast.
        layers: for every linear layer that the recipe takes, by name, the recipe that it gets (canonical text, or "bf16")
            and why: what `choose_layers` returns. A precision with layers=auto needs it.

    Raises:
        FewbitsError: the model is prepared or quantized already, a pattern matches nothing, a parameter cannot be
            rounded, no layer is left for the recipe, or `layers` are not those of the model. The model is then unchanged.
    """
    precision = Precision.parse(precision) if isinstance(precision, str) else precision
    if (before := getattr(model, "fewbits_precision", None)) is not None:
        raise FewbitsError(f"the model is prepared as {before} already; prepare a fresh model as {precision}.")
    refuse_packed(model, f"be prepared as {precision}")
    exceptions, kept_out = _exceptions(model, keep, precision)
    _refuse_not_finite(model)
    lowbit = eligible(model, precision.recipe, {*exceptions, *kept_out})
    _refuse_nothing(lowbit, precision)
    chosen = _chosen([name for name, (taken, _) in lowbit.items() if taken], precision, layers)
    report = Report(precision)
    remainders: dict[str, Tensor] = {}
    undo = _Undo()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, module in list(model.named_modules()):
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if not own:
            continue
        undo.classes.append((module, type(module)))
        row = _swap(module)
        report.foreign |= not isinstance(module, _OURS)
        format, reason = exceptions.get(name, (precision.working, row[1]))
        what = f"kept in {format}" if name in exceptions else str(format)
        if name in lowbit:
            choice = chosen.get(name, Choice("", lowbit[name][1]))
            what, reason = f"kept in {format}", choice.reason
            if choice.value:
                what = _in_words(choice.value, precision)
                _give_recipe(module, name, choice.value, undo)
        report.rows.append((name or "model", type(module).__name__, what, reason))
        for parameter in own:
            if id(parameter) in names:
                report.parameters += 1
                undo.dtypes.append((parameter, parameter.dtype))
                report.rounded += _round(parameter, format, names.pop(id(parameter)), remainders)
        if name in exceptions:
            undo.hooks += _cast_around(module, format, precision.working)
        if isinstance(module, Linear):
            module.tf32 = precision.operand.name == "tf32" and name not in exceptions
    if isinstance(model, Transformer):
        model.tf32 = precision.operand.name == "tf32"
        model.logits = precision.logits
    if precision.recipe:
        for function in (fake_linear,) if precision.recipe.fake else (lowbit_linear, lowbit_mlp):
            let_compilers_in(function)
    undo.hooks.append(model.register_forward_pre_hook(_cast_inputs(precision.working), with_kwargs=True))
    if report.foreign and precision.working.bits == 16:
        undo.hooks += _emulate_around(model)
    attributes: dict[str, Any] = model.__dict__
    attributes.update(
        fewbits_precision=precision, fewbits_report=report, fewbits_remainders=remainders, fewbits_undo=undo
    )
    return model


@dataclass
class _Undo:
    """What `unprepare` puts back."""

    classes: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    dtypes: list[tuple[nn.Parameter, torch.dtype]] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)
    lowbit: list[nn.Module] = field(default_factory=list)


@torch.no_grad()
def unprepare(model: nn.Module, optimizer: Any = None) -> nn.Module:
    """Gives back the model that `prepare` changed, in place: its classes, hooks and dtypes, with exact weights.

    optimizer: the fewbits optimizer that holds the master weights; without one, what waits on the parameters is used, and
    a weight that was trained since is its working weight. `prepare` may be called again afterwards.

    Raises FewbitsError for a model that is not prepared.
    """
    undo: _Undo | None = getattr(model, "fewbits_undo", None)
    if undo is None:
        raise FewbitsError("the model is not prepared; there is nothing to take back.")
    held = {id(p) for group in getattr(optimizer, "param_groups", []) for p in group["params"]}
    for parameter, dtype in undo.dtypes:
        left = remainder.waiting(parameter)
        if optimizer is not None and id(parameter) in held:
            exact = optimizer.exact_weight(parameter)
        elif left is not None:
            exact = join_master(parameter.data, left) if left.dtype == torch.int16 else left
        else:
            exact = parameter.data
        remainder.drop(parameter)
        parameter.data, parameter.grad = exact.to(dtype), None
    for module in undo.lowbit:
        module._buffers.pop("site", None)
        module._non_persistent_buffers_set.discard("site")
        module._parameters.pop(LEARNED, None)
        for name in ("recipe", "fake", "history"):
            module.__dict__.pop(name, None)
    for module, kind in undo.classes:
        module.__dict__.pop("tf32", None)
        module.__class__ = kind
    for hook in undo.hooks:
        hook.remove()
    if isinstance(model, Transformer):
        model.tf32, model.logits = False, "auto"
    for name in ("fewbits_precision", "fewbits_report", "fewbits_remainders", "fewbits_undo"):
        model.__dict__.pop(name, None)
    return model


def _give_recipe(module: nn.Module, name: str, text: str, undo: _Undo) -> None:
    """Turns a linear layer of ours to few bits. A layer draws its own random numbers, set apart by its name; one whose
    scales are learned gets them as an fp32 parameter."""
    held: Any = module
    recipe = recipe_of(text)
    held.recipe, held.fake = text, recipe.fake
    if recipe.fake and (learned := first_log_scale(held.weight, held.recipe)) is not None:
        module.register_parameter(LEARNED, learned)
    if recipe.stochastic:
        device = held.weight.device
        site = torch.tensor(mix_key(zlib.crc32(name.encode())), dtype=torch.int64, device=device)
        module.register_buffer("site", site, persistent=False)
    if recipe.delayed:
        held.history = ScaleHistory()
    undo.lowbit.append(module)


def takes(model: nn.Module, precision: Precision, keep: Iterable[str] = ()) -> list[str]:
    """Names of the linear layers that the recipe of `precision` takes in a model that is not prepared.

    Raises FewbitsError where `prepare` would: a pattern of `keep` matches nothing, or no layer is left.
    """
    exceptions, kept_out = _exceptions(model, keep, precision)
    lowbit = eligible(model, precision.recipe, {*exceptions, *kept_out})
    _refuse_nothing(lowbit, precision)
    return [name for name, (taken, _) in lowbit.items() if taken]


def _chosen(names: list[str], precision: Precision, layers: Mapping[str, Choice] | None) -> dict[str, Choice]:
    """For every layer that the recipe takes the text of its own, "" where it stays in the working format, and why."""
    if layers is None and precision.layers == "auto":
        raise FewbitsError(
            f"{precision} is decided by a timing of this model's shapes. Give prepare what it found, "
            f"layers=fewbits.choose_layers(model, '{precision}', tokens=...), or write layers=all."
        )
    if layers is None:
        return dict.fromkeys(names, Choice(str(precision.recipe), "ours, by the recipe"))
    if set(layers) != set(names):
        odd = sorted(set(layers) ^ set(names))[0]
        what = "is no linear layer that the recipe takes" if odd in layers else "is taken, and has no choice"
        raise FewbitsError(f"layers= belongs to another model or another keep: '{odd}' {what}.")
    recipes = {value: Recipe() if value == "bf16" else Recipe.parse(value) for value, _ in layers.values()}
    return {name: Choice(str(recipes[c.value]) if recipes[c.value] else "", c.reason) for name, c in layers.items()}


def _in_words(recipe: str, precision: Precision) -> str:
    """How a report calls a layer's recipe: the precision where it is the whole of it, else with what is left out."""
    if recipe == str(precision.recipe):
        return str(precision)
    return str(precision.replace(recipe=recipe_of(recipe), layers="all"))


def _refuse_nothing(lowbit: Mapping[str, tuple[bool, str]], precision: Precision) -> None:
    """A recipe that changes nothing must not look as if it did."""
    if not precision.recipe or any(taken for taken, _ in lowbit.values()):
        return
    shown = "; ".join(f"{name}: {reason}" for name, (_, reason) in list(lowbit.items())[:4])
    what = f"no linear layer that it takes ({shown})" if shown else "no linear layer"
    raise FewbitsError(f"{precision} would change nothing: the model has {what}. Use {precision.working}-mixed.")


def _exceptions(
    model: nn.Module, keep: Iterable[str], precision: Precision
) -> tuple[dict[str, tuple[Format, str]], set[str]]:
    """What patterns name, directly or from above: module name -> (storage format, reason), and who stays out of the recipe."""
    found: dict[str, tuple[Format, str]] = {}
    kept_out: set[str] = set()
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
        if precision.recipe and not format_name:
            kept_out.update(matched)
        else:
            found.update({name: (format, f"named by keep {text!r}") for name in matched})
    if found and precision.working.bits >= 32:
        raise FewbitsError(
            f"{precision} keeps every parameter in {precision.working}; keep= has nothing to except there."
        )
    return found, kept_out


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


def _cast_around(module: nn.Module, inside: Format, outside: Format) -> list[RemovableHandle]:
    """An exception computes in its own format: what enters is cast to it, what leaves goes back to the working format."""
    return [
        module.register_forward_pre_hook(_cast_inputs(inside), with_kwargs=True),
        module.register_forward_hook(
            lambda module, args, output: tree_map(_to(outside.dtype or torch.float32), output)
        ),
    ]


def _emulate_around(model: nn.Module) -> list[RemovableHandle]:
    """A forward call of a foreign model, in training or evaluation, emulates 16-bit CPU matmuls where that is needed."""
    entered: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(emulation(needed(module)))
        entered[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        entered.pop().__exit__(None, None, None)

    return [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
