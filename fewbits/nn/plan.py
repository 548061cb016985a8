"""What is planned for each module of a model before anything changes: the precision, its exceptions, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from fewbits.choice import Choice
from fewbits.errors import FewbitsError, nearest
from fewbits.formats import Format
from fewbits.nn.eligible import MULTIPLE, eligible
from fewbits.nn.transformer import Transformer
from fewbits.precision.precision import Precision
from fewbits.precision.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """A precision and its exceptions by module name, each with its reason; made before anything changes.

    exceptions: modules stored in a format of their own. lowbit: whether the recipe takes a linear layer, see `eligible`.
    """

    precision: Precision
    exceptions: dict[str, tuple[Format, str]]
    lowbit: dict[str, tuple[bool, str]]

    @property
    def taken(self) -> list[str]:
        return [name for name, (taken, _) in self.lowbit.items() if taken]


def make_plan(model: nn.Module, precision: Precision, keep: Iterable[str]) -> Plan:
    """Raises FewbitsError where a pattern of `keep` matches nothing, no layer is left for the recipe, or the head cannot be
    what is asked for."""
    exceptions, kept_out = _exceptions(model, keep, precision)
    lowbit = eligible(model, precision.recipe, {*exceptions, *kept_out})
    if precision.head != "working":
        _refuse_head(model, precision, {*exceptions, *kept_out})
        lowbit.pop("head", None)  # it does not stay out: the precision says how it multiplies
    _refuse_nothing(lowbit, precision)
    return Plan(precision, exceptions, lowbit)


def takes(model: nn.Module, precision: Precision, keep: Iterable[str] = ()) -> list[str]:
    """Names of the linear layers that the recipe of `precision` takes in a model that is not prepared.

    Raises FewbitsError where `prepare` would: a pattern of `keep` matches nothing, or no layer is left.
    """
    return make_plan(model, precision, keep).taken


def choices(plan: Plan, layers: Mapping[str, Choice] | None) -> dict[str, Choice]:
    """For every layer that the recipe takes the text of its own, "" where it stays in the working format, and why.

    layers: as `prepare` takes them. Raises FewbitsError where they are not those of the plan.
    """
    names, precision = plan.taken, plan.precision
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


def _refuse_head(model: nn.Module, precision: Precision, kept: Collection[str]) -> None:
    asked = f"head={precision.head}"
    if not isinstance(model, Transformer):
        raise FewbitsError(
            f"{asked} changes the loss head of fewbits.Transformer; this {type(model).__name__} makes its logits itself. "
            "Leave it out."
        )
    name, width = "embed" if model.head is None else "head", model.config.n_embd
    if name in kept:
        raise FewbitsError(
            f"{asked} contradicts a keep that names '{name}', whose weight the head multiplies. Leave one out."
        )
    if width % MULTIPLE:
        raise FewbitsError(
            f"{asked} would win nothing: n_embd={width} is not divisible by {MULTIPLE}, and no device multiplies such codes. "
            "Leave it out, or choose another width."
        )


def _refuse_nothing(lowbit: Mapping[str, tuple[bool, str]], precision: Precision) -> None:
    """A recipe that changes nothing must not look as if it did."""
    if not precision.recipe or any(taken for taken, _ in lowbit.values()):
        return
    shown = "; ".join(f"{name}: {reason}" for name, (_, reason) in list(lowbit.items())[:4])
    what = f"no linear layer that it takes ({shown})" if shown else "no linear layer"
    head = "" if precision.head == "working" else f", head={precision.head}"
    raise FewbitsError(
        f"The recipe of {precision} would change nothing: the model has {what}. Use '{precision.working}-mixed{head}'."
    )


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
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            hint = nearest(pattern, names) or f" Modules with parameters are {', '.join(names[:8])}{more}."
            if pattern in ("head", "lm_head") and "embed" in names and isinstance(model, Transformer):
                hint = " Its head is tied: it multiplies the weight of 'embed'."
            raise FewbitsError(f"keep {text!r} matches no module of the model.{hint}")
        if precision.recipe and not format_name:
            kept_out.update(matched)
        else:
            found.update({name: (format, f"named by keep {text!r}") for name in matched})
    if precision.working.bits >= 32:  # every parameter is kept so
        found = {name: (format, why) for name, (format, why) in found.items() if format != precision.working}
    if found and precision.working.bits >= 32:
        format = next(iter(found.values()))[0]
        raise FewbitsError(
            f"{precision} keeps every parameter in {precision.working}, and keep asks for {format}: leave it out."
        )
    return found, kept_out


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
