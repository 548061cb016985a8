"""What changes in a model, ours or a foreign one, when it is trained in a precision, and why.

`prepare` rounds the parameters to the working format (nearest, ties away from zero) and keeps what the rounding cut off,
by parameter name, until an optimizer adopts it: an fp32 checkpoint loses nothing. Buffers are left alone. With a recipe,
linear layers multiply in few bits from then on. `unprepare` takes it all back.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.nn import remainder
from fewbits.nn.embedding import Embedding
from fewbits.nn.emulate import emulation, needed
from fewbits.nn.fake import LEARNED, fake_linear, first_log_scale
from fewbits.nn.linear import Linear
from fewbits.nn.lowbit import let_compilers_in, limits, lowbit_linear, recipe_of
from fewbits.nn.mlp import lowbit_mlp
from fewbits.nn.norm import LayerNorm, RMSNorm, add_norm_codes
from fewbits.nn.packed import refuse_packed
from fewbits.nn.plan import Plan, choices, make_plan
from fewbits.nn.scale_history import ScaleHistory
from fewbits.nn.transformer import Transformer
from fewbits.numerics.random import mix_key
from fewbits.numerics.update import join_master, round_away, split_master
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
            rounded, no layer is left for the recipe, `layers` are not those of the model, or it has no loss head that
            head=fp8 fits. The model is then unchanged.
    """
    precision = Precision.parse(precision) if isinstance(precision, str) else precision
    if (before := getattr(model, "fewbits_precision", None)) is not None:
        raise FewbitsError(f"the model is prepared as {before} already; prepare a fresh model as {precision}.")
    refuse_packed(model, f"be prepared as {precision}")
    plan = make_plan(model, precision, keep)
    _refuse_not_finite(model)
    chosen = choices(plan, layers)
    change = _Change(Report(precision), {}, _Undo(), {id(p): name for name, p in model.named_parameters()})
    for name, module in list(model.named_modules()):
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if own:
            _prepare_module(module, name, own, plan, chosen.get(name), change)
    _prepare_whole(model, precision, change)
    attributes: dict[str, Any] = model.__dict__
    attributes.update(
        fewbits_precision=precision,
        fewbits_report=change.report,
        fewbits_remainders=change.remainders,
        fewbits_undo=change.undo,
    )
    return model


def _prepare_module(
    module: nn.Module, name: str, own: list[nn.Parameter], plan: Plan, choice: Choice | None, change: _Change
) -> None:
    """Changes one module with parameters of its own; choice: what the recipe gives it, None where it takes it not."""
    precision, report, undo = plan.precision, change.report, change.undo
    undo.classes.append((module, type(module)))
    reason = _swap(module)
    format, what = precision.working, str(precision.working)
    if name in plan.exceptions:
        format, reason = plan.exceptions[name]
    if name in plan.exceptions or name in plan.lowbit:
        what = f"kept in {format}"
    if name in plan.lowbit:
        reason = plan.lowbit[name][1] if choice is None else choice.reason
    if choice is not None and choice.value:
        what = _in_words(choice.value, precision)
        _give_recipe(module, name, choice.value, undo)
    report.rows.append((name or "model", type(module).__name__, what, reason))
    report.foreign |= not isinstance(module, _OURS)
    for parameter in own:
        if (full_name := change.names.pop(id(parameter), None)) is not None:
            report.parameters += 1
            undo.dtypes.append((parameter, parameter.dtype))
            report.rounded += _round(parameter, format, full_name, change.remainders)
    if name in plan.exceptions:
        undo.hooks += _cast_around(module, format, precision.working)
    if isinstance(module, Linear):
        module.tf32 = precision.operand.name == "tf32" and name not in plan.exceptions


def _prepare_whole(model: nn.Module, precision: Precision, change: _Change) -> None:
    """What a model does around its modules: cast its inputs, emulate, know its logits."""
    if isinstance(model, Transformer):
        model.tf32 = precision.operand.name == "tf32"
        model.logits, model.head_format = precision.logits, precision.head
        if precision.head == "fp8":
            why = f"asked for; {precision.working} in evaluation"
            change.report.rows.append(("matmuls of the loss head", type(model).__name__, "fp8", why))
    if precision.recipe:
        for function in (fake_linear,) if precision.recipe.fake else (lowbit_linear, lowbit_mlp, add_norm_codes):
            let_compilers_in(function)
    hooks = change.undo.hooks
    hooks.append(model.register_forward_pre_hook(_cast_inputs(precision.working), with_kwargs=True))
    if change.report.foreign and precision.working.bits == 16:
        hooks += _emulate_around(model)


@dataclass
class _Change:
    """What has changed so far; names: of the parameters yet to come, by id, so that a tied one is rounded once."""

    report: Report
    remainders: dict[str, Tensor]
    undo: _Undo
    names: dict[int, str]


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
        model.tf32, model.logits, model.head_format = False, "auto", "working"
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
        held.history = ScaleHistory(limits=limits(recipe))
    undo.lowbit.append(module)


def _in_words(recipe: str, precision: Precision) -> str:
    """How a report calls a layer's recipe: the precision where it is the whole of it, else with what is left out."""
    if recipe == str(precision.recipe):
        return str(precision)
    return str(precision.replace(recipe=recipe_of(recipe), layers="all"))


def not_finite(model: nn.Module) -> Iterator[str]:
    """Names of the parameters that hold NaN or infinity."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            yield name


def _refuse_not_finite(model: nn.Module) -> None:
    if name := next(not_finite(model), None):
        raise FewbitsError(f"parameter {name} holds NaN or infinity; load a sound checkpoint before preparing it.")


def _swap(module: nn.Module) -> str:
    """Turns a module of exactly torch's class into ours, keeping parameters, hooks and names; says what it is."""
    if isinstance(module, _OURS):
        return "ours"
    if type(module) in _TWINS:
        ours, reason = _TWINS[type(module)]
        module.__class__ = ours
        return reason
    return "not ours: torch's kernels, emulated from outside where needed"


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
