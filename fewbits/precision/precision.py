"""A precision: one named, printable, parseable choice of a format for every role of a training run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fewbits.choice import Choice
from fewbits.errors import FewbitsError, nearest
from fewbits.formats import FORMATS, Format
from fewbits.precision.kinds import check_master, master_of
from fewbits.precision.loss_scale import read, write
from fewbits.precision.recipe import MATMULS, RECIPES, Recipe


@dataclass(frozen=True)
class Precision:
    """Formats by role. Two precisions with equal fields are equal; `Precision.parse(str(p)) == p`.

    name: fp64 fp32 tf32 fp16-mixed bf16-mixed fp16-true bf16-true, the recipes (fp8 fp8-row fp8-block mxfp8 nvfp4 int8 ...), or
        "custom" for bf16-mixed with a recipe written out.
    working: what the model's parameters are stored in.
    operand: what the three matmuls (output, grad_input, grad_weight) multiply where no recipe says otherwise; also the
        format of activations.
    gradient: what gradients of parameters arrive in.
    reduction: softmax, norm statistics, the loss, sums over tokens, accumulation.
    master: "auto", "fp32", "split" (bf16 plus a 16-bit remainder) or "none"; see resolved_master.
    moments: "fp32"; "fp64" for fp64.
    update_rounding: how the working weight is rounded after an update: "nearest" (ties away from zero).
    loss_scale: "none", "static:1024", "dynamic" or "dynamic:initial=65536,interval=2000" (any of initial, growth,
        backoff, interval, floor, ceiling, hysteresis).
    logits: what the logits of the head are rounded to, once, from their fp32 sums, before the gradient is made of them (the
        softmax itself runs in the reduction format; evaluation takes fp32 logits): "fp32", "fp16" or "bf16"; "auto" is fp16
        on CUDA where the working weight has 16 bits, else the reduction format.
    head: how the three matmuls of the loss head multiply in training: "working", in the format of its weight, or "fp8": e4m3
        hidden states and weight, e5m2 gradient of the logits, a power of two each, as the recipe fp8 multiplies.
        Evaluation, generation and a loss of one's own, which is given logits, take the working format.
    recipe: how the matmuls of linear layers multiply in few bits; empty where they do not.
    layers: which linear layers the recipe takes: "all" that it can, or "auto": each shape multiplies as fast as a timing on
        this device shows that it can, by the whole recipe, a part of it, or in the working format (`choose_layers`).

    Raises FewbitsError for fields that contradict each other.
    """

    name: str
    working: Format
    operand: Format
    gradient: Format
    reduction: Format
    master: str = "auto"
    moments: str = "fp32"
    update_rounding: str = "nearest"
    loss_scale: str = "none"
    logits: str = "auto"
    head: str = "working"
    recipe: Recipe = field(default_factory=Recipe)
    layers: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_scale", write(*read(self.loss_scale)))
        _check_master(self)
        _check_logits(self)
        _check_head(self)
        wide = "fp64" if self.working.name == "fp64" else "fp32"
        if self.moments != wide:
            raise FewbitsError(f"{self.name} keeps its moments in {wide} in this version, not '{self.moments}'.")
        if self.update_rounding != "nearest":
            raise FewbitsError(f"update_rounding is 'nearest' in this version, not '{self.update_rounding}'.")
        _check_layers(self)

    def __str__(self) -> str:
        """The name, then what differs from its defaults: "bf16-mixed, master=fp32", "fp8, grad_weight=bf16"."""
        base = PRECISIONS.get(self.name, _CUSTOM)
        parts = [] if self.name == "custom" else [self.name]
        was = base.recipe.texts()
        parts += [f"{key}={text}" for key, text in self.recipe.texts().items() if text != was[key]]
        parts += ["fake"] if self.recipe.fake and not base.recipe.fake else []
        parts += [f"{key}={getattr(self, key)}" for key in OVERRIDES if getattr(self, key) != getattr(base, key)]
        return ", ".join(parts)

    @staticmethod
    def parse(text: str | Precision) -> Precision:
        """The precision of a name or alias, with overrides: "bf16-mixed, master=fp32, loss_scale=static:1024"; or a recipe
        over bf16-mixed, written out: "output=e4m3/row, grad_input=e5m2/tensor, grad_weight=bf16, accumulate=14bit".

        NAME-auto is NAME with layers=auto.

        >>> Precision.parse("16-mixed").name
        'fp16-mixed'
        >>> str(Precision.parse("fp8-auto"))
        'fp8, layers=auto'
        >>> str(Precision.parse("bf16, master=auto, loss_scale=static:1024"))
        'bf16-mixed, loss_scale=static:1024'
        """
        if isinstance(text, Precision):
            return text
        first, *parts = str(text).split(",")
        if first.partition("=")[0].strip() in RECIPE_KEYS:
            first, parts = "custom", [first, *parts]
        changes: dict[str, str] = {}
        previous = ""
        for part in parts:
            key, equals, value = (word.strip() for word in part.partition("="))
            if key in changes:
                raise FewbitsError(f"{key} is given twice in precision '{text}'. Keep one.")
            if key in (*OVERRIDES, *RECIPE_KEYS) and equals:
                changes[key] = value
                previous = key
            elif key == "fake" and not equals:
                changes[key] = key
            elif previous == "loss_scale" and ":" in changes["loss_scale"]:  # dynamic:initial=1024,interval=100
                changes["loss_scale"] += f",{key}={value}"
            else:
                known = (*OVERRIDES, *RECIPE_KEYS)
                raise FewbitsError(
                    f"'{part.strip()}' in precision '{text}' is not an override.{nearest(key, known)} "
                    f"Write KEY=VALUE with {', '.join(known)}."
                )
        return _named(first)._changed(changes)

    def _changed(self, changes: Mapping[str, str]) -> Precision:
        """With overrides and parts of the recipe given as text."""
        parts = {key: changes[key] for key in (*RECIPE_KEYS, "fake") if key in changes}
        if parts and not self.recipe and self.name != "custom":
            raise FewbitsError(
                f'{self.name} has no recipe to change with {next(iter(parts))}=. Write the recipe alone: "output=e4m3/row, '
                'grad_input=e5m2/tensor" multiplies in few bits over bf16-mixed.'
            )
        start = dataclasses.replace(self.recipe, fake=True) if "fake" in parts else self.recipe
        recipe = start.changed(parts) if parts else self.recipe
        if not recipe and (parts or self.name == "custom"):
            raise FewbitsError(
                "This recipe leaves all three matmuls in 16 bits; write bf16-mixed, or give one of them a format."
            )
        return self.replace(recipe=recipe, **{key: changes[key] for key in OVERRIDES if key in changes})

    def replace(self, **changes: Any) -> Precision:
        """The same precision with other fields; contradictions raise FewbitsError."""
        return dataclasses.replace(self, **changes) if changes else self

    @property
    def head_recipe(self) -> Recipe:
        """How the loss head multiplies; empty where it does so in the working format."""
        return HEADS[self.head]

    @property
    def is_true(self) -> bool:
        """Whether this is a 16-bit precision that keeps no exact weights by its name."""
        return self.name.endswith("-true")

    def resolved_master(self) -> Choice:
        """The kind of master weights, "fp32", "split" or "none", and why."""
        if self.working.bits >= 32:
            return Choice("none", f"the {self.working} working weight is exact")
        if self.master == "none":
            return Choice("none", "asked for: updates smaller than half an ulp of the weight are lost")
        if self.is_true:
            return Choice("none", f"{self.name} keeps no exact weights; updates are rounded to nearest, ties away")
        if self.master != "auto":
            return Choice(self.master, "asked for")
        kind = master_of("auto", self.working)
        if kind == "split":
            return Choice(kind, f"{self.working} and a 16-bit remainder hold fp32 exactly")
        return Choice(kind, f"{self.working} has too few exponent bits for a split master")

    def to_json(self) -> dict[str, str]:
        """Every field as text, with the schema version; `from_json` reads it back."""
        fields = {f.name: str(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"schema": SCHEMA, **fields, "recipe": str(self.recipe) if self.recipe else ""}

    @staticmethod
    def from_json(value: Mapping[str, Any] | str) -> Precision:
        """The precision that `to_json` described, from a mapping or its JSON text. FewbitsError for anything else."""
        try:
            fields = dict(json.loads(value) if isinstance(value, str) else value)
        except (TypeError, ValueError):
            raise FewbitsError("This is no precision: it is not a JSON object. Expected what to_json wrote.") from None
        names = {f.name for f in dataclasses.fields(Precision)}
        if fields.get("schema") in ADDED:
            fields = {**ADDED[fields["schema"]], **fields, "schema": SCHEMA}
        if fields.pop("schema", None) != SCHEMA or set(fields) != names:
            raise FewbitsError(
                f"This is no precision of this version: its fields are {', '.join(sorted(map(str, fields))) or 'none'}."
            )
        if not all(isinstance(field, str) for field in fields.values()):
            raise FewbitsError("This is no precision of this version: every field has to be text.")
        recipe = Recipe.parse(fields["recipe"]) if fields["recipe"] else Recipe()
        parsed = _named(fields["name"]).replace(recipe=recipe, **{key: fields[key] for key in OVERRIDES})
        if parsed.to_json() != {"schema": SCHEMA, **fields}:
            raise FewbitsError(f"The formats stored for precision '{parsed.name}' are not those of this version.")
        return parsed

    def table(self, report: object | None = None, device: object | None = None) -> str:
        """What `fewbits precision NAME` prints; see `fewbits.precision.table.table`."""
        from fewbits.precision.table import table

        return table(self, report, device)


def _precision(
    name: str, operand: str, working: str = "", loss_scale: str = "none", recipe: Recipe | None = None
) -> Precision:
    storage = FORMATS[working or operand]
    wide = FORMATS["fp64" if operand == "fp64" else "fp32"]
    return Precision(
        name=name,
        working=storage,
        operand=FORMATS[operand],
        gradient=storage,
        reduction=wide,
        moments=wide.name,
        loss_scale=loss_scale,
        recipe=recipe or Recipe(),
    )


SCHEMA = "fewbits.precision/4"
ADDED = {  # by an earlier schema -> the fields that came since, as they were then
    "fewbits.precision/1": {"recipe": "", "logits": "auto", "layers": "all", "head": "working"},
    "fewbits.precision/2": {"logits": "auto", "layers": "all", "head": "working"},
    "fewbits.precision/3": {"head": "working"},
}
OVERRIDES = ("master", "moments", "update_rounding", "loss_scale", "logits", "head", "layers")
LOGITS = ("auto", "fp32", "fp16", "bf16")
HEADS = {"working": Recipe(), "fp8": RECIPES["fp8"]}
LAYERS = ("all", "auto")
RECIPE_KEYS = (*MATMULS, "accumulate")

ALIASES: dict[str, str] = {
    "bf16": "bf16-mixed", "bfloat16": "bf16-mixed", "bfloat16-mixed": "bf16-mixed",
    "fp16": "fp16-mixed", "float16": "fp16-mixed", "half": "fp16-mixed", "16-mixed": "fp16-mixed",
    "float16-mixed": "fp16-mixed", "16": "fp16-mixed", "16-true": "fp16-true",
    "float32": "fp32", "float": "fp32", "32": "fp32", "32-true": "fp32", "no": "fp32",
    "float64": "fp64", "double": "fp64", "64": "fp64", "64-true": "fp64", "tensorfloat32": "tf32",
    "fp8-tensor": "fp8", "float8": "fp8", "fp8-tensorwise": "fp8", "fp8-rowwise": "fp8-row", "fp8-blockwise": "fp8-block",
    "mx-fp8": "mxfp8", "fp4": "nvfp4",
}  # fmt: skip


def _named(text: str) -> Precision:
    word = text.strip().lower().removeprefix("torch.").replace("_", "-")
    name = ALIASES.get(word, word)
    if name in (*PRECISIONS, "custom"):
        return PRECISIONS.get(name, _CUSTOM)
    base = word.removesuffix("-auto")
    if base != word and ALIASES.get(base, base) in PRECISIONS:
        return PRECISIONS[ALIASES.get(base, base)].replace(layers="auto")
    raise FewbitsError(
        f"There is no precision '{text.strip()}'.{nearest(word, [*PRECISIONS, *ALIASES])} "
        f"Precisions are {', '.join(PRECISIONS)}."
    )


def _check_layers(precision: Precision) -> None:
    if precision.layers not in LAYERS:
        raise FewbitsError(
            f"layers={precision.layers} is unknown; use all or auto.{nearest(str(precision.layers), LAYERS)}"
        )
    if precision.layers == "auto" and not precision.recipe:
        raise FewbitsError(
            f"{precision.name} has no recipe to leave out where bf16 is faster, so layers=auto decides nothing; give it to one "
            "that has, as in fp8-auto or int8-auto."
        )
    if precision.layers == "auto" and precision.recipe.fake:
        raise FewbitsError(
            f"{precision.name} trains for a quantized checkpoint, whose layers no timing may choose; use layers=all, and "
            "--keep for those that stay out."
        )


def _check_master(precision: Precision) -> None:
    master, working = check_master(precision.master), precision.working.name
    master_of(master, precision.working)
    if (master == "split" and working != "bf16") or (master == "fp32" and working == "fp64"):
        raise FewbitsError(f"{precision.name} needs no {master} masters: its weights are exact; use master=auto.")
    if master in ("fp32", "split") and precision.is_true:
        mixed = precision.name.replace("-true", "-mixed")
        raise FewbitsError(f"{precision.name} keeps no masters, so master={master} contradicts it; use {mixed}.")


def _check_logits(precision: Precision) -> None:
    logits, working = precision.logits, precision.working.name
    if logits not in LOGITS:
        raise FewbitsError(f"There are no logits '{logits}'.{nearest(logits, LOGITS)} Use {', '.join(LOGITS)}.")
    if logits == "fp32" and working == "fp64":
        raise FewbitsError("fp64 has fp64 logits; use logits=auto.")
    if logits in ("fp16", "bf16") and precision.working.bits != 16:
        raise FewbitsError(f"{precision.name} has fp32 logits; logits={logits} goes with 16-bit working weights.")
    if logits == "bf16" and working == "fp16":
        raise FewbitsError("bf16 logits of fp16 weights would lose 3 bits and win none; use logits=fp16.")


def _check_head(precision: Precision) -> None:
    if precision.head not in HEADS:
        raise FewbitsError(
            f"There is no head '{precision.head}'.{nearest(precision.head, HEADS)} Use {', '.join(HEADS)}."
        )
    if precision.head == "fp8" and precision.working.bits != 16:
        raise FewbitsError(
            f"{precision.name} multiplies its head in {precision.operand}; head=fp8 goes with 16-bit working weights, as in "
            "'bf16-mixed, head=fp8'."
        )


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        _precision("fp64", "fp64"),
        _precision("fp32", "fp32"),
        _precision("tf32", "tf32", working="fp32"),
        _precision("fp16-mixed", "fp16", loss_scale="dynamic"),
        _precision("bf16-mixed", "bf16"),
        _precision("fp16-true", "fp16", loss_scale="dynamic"),
        _precision("bf16-true", "bf16"),
        *(
            _precision(name, "bf16", loss_scale="dynamic" if name == "fp8-unit" else "none", recipe=recipe)
            for name, recipe in RECIPES.items()
        ),
    )
}
_CUSTOM = _precision("custom", "bf16")
