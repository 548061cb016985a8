"""Recipes: how the three matmuls of a linear layer multiply in few bits. A recipe is a value, and text.

    output      = x      @ weight.T      activation x weight
    grad_input  = grad   @ weight        gradient   x weight
    grad_weight = grad.T @ x             gradient   x activation

An operand is written FORMAT/GRANULARITY/OPTION..., a matmul OPERAND x OPERAND; "bf16" alone leaves a matmul as it is. One
operand stands for the one that the role brings (the activation of output, the gradient of the others); its partner then
takes the format that it has in `output` (its own, in output itself) and the same granularity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fewbits.errors import FewbitsError, nearest
from fewbits.formats import Format
from fewbits.numerics.quantize import default_scales
from fewbits.numerics.scaling import SCALES, Granularity

ROUNDINGS = ("nearest-even", "stochastic", "toward-zero", "nearest-away")
SCALINGS = (*SCALES, "delayed", "unit", "learned")
ACCUMULATORS = ("fp32", "fast", "14bit", "14bit/128", "fp16", "fp16/128", "bf16", "bf16/128")
MATMULS = ("output", "grad_input", "grad_weight")


@dataclass(frozen=True)
class Operand:
    """One operand of a low-bit matmul, seen as it enters: rows, and the contraction along the columns.

    format, granularity: of its codes and scales. rounding: nearest-even, stochastic, toward-zero, nearest-away.
    scaling: power-of-two, exact or two-level, from the current maximum of the tensor; delayed (from the maxima of the last
    steps), unit (fixed at the size that a unit-variance tensor has) or, in quantization-aware training, learned (a
    parameter of the layer).
    hadamard: whether groups of 16 along the contraction go through a random Hadamard transform first; both operands of
    the matmul must, and the products stay the same.
    """

    format: Format
    granularity: Granularity
    rounding: str = "nearest-even"
    scaling: str = "power-of-two"
    hadamard: bool = False

    @property
    def wide(self) -> bool:
        """Whether this operand of a fake recipe stays as it is: "bf16" beside an operand in few bits."""
        return self.format.name == "bf16"

    def __str__(self) -> str:
        if self == Operand(self.format, Granularity()) and self.wide:
            return "bf16"
        options = [self.rounding] if self.rounding != "nearest-even" else []
        options += [self.scaling] if self.scaling != default_scales(self.format) else []
        options += ["hadamard"] if self.hadamard else []
        return "/".join([self.format.name.removeprefix("fp8_").removeprefix("fp6_"), str(self.granularity), *options])

    @staticmethod
    def parse(text: str) -> Operand:
        """The operand of FORMAT/GRANULARITY/OPTION...; granularity defaults to tensor. Raises FewbitsError.

        >>> str(Operand.parse("e5m2/row/stochastic"))
        'e5m2/row/stochastic'
        """
        first, *rest = (word.strip().lower() for word in text.split("/"))
        format = Format.parse(first)
        if format.bits > 16 or not format.signed:
            raise FewbitsError(
                f"{format.name} is no format to multiply in few bits; use one of at most 16 bits, signed."
            )
        granularity, rounding, scaling, hadamard = Granularity(), "nearest-even", default_scales(format), False
        for word in rest:
            if word in ROUNDINGS:
                rounding = word
            elif word in SCALINGS:
                scaling = word
            elif word == "hadamard":
                hadamard = True
            elif re.match(r"tensor|row|block|group", word):
                granularity = Granularity.parse(word)
            else:
                options = ("tensor", "row", "block(1x128)", "group:128", *ROUNDINGS, *SCALINGS, "hadamard")
                raise FewbitsError(
                    f"'{word}' in operand '{text.strip()}' is not known.{nearest(word, options)} Write "
                    f"FORMAT/GRANULARITY/OPTION with {', '.join(options)}."
                )
        if scaling in ("delayed", "unit") and granularity != Granularity():
            raise FewbitsError(
                f"Operand '{text.strip()}': {scaling} scaling knows one scale a tensor; use granularity tensor."
            )
        if scaling == "full-range" and (format.kind != "int" or granularity not in (Granularity(), Granularity(1, 0))):
            raise FewbitsError(f"Operand '{text.strip()}': full-range scales are for integers, one a row or tensor.")
        return Operand(format, granularity, rounding, scaling, hadamard)


@dataclass(frozen=True)
class Matmul:
    """left @ right.T of two low-bit operands. accumulator: fp32, fast (what the tensor core gives without promotion;
    fp32 where emulated), or a modelled one: 14bit, fp16, bf16, or 14bit/128 with a promotion to fp32 every 128 products (see
    `modelled_matmul`)."""

    left: Operand
    right: Operand
    accumulator: str = "fp32"

    def __str__(self) -> str:
        return f"{self.left} x {self.right}"


@dataclass(frozen=True)
class Recipe:
    """The three matmuls; None leaves one in the working format. `Recipe.parse(str(recipe)) == recipe`.

    fake: quantization-aware training: the forward multiplies rounded values, the backward passes straight through
    rounding and multiplies the same rounded values in the working format; grad_input and grad_weight are then None.
    """

    output: Matmul | None = None
    grad_input: Matmul | None = None
    grad_weight: Matmul | None = None
    fake: bool = False

    def __post_init__(self) -> None:
        for name in MATMULS:
            matmul: Matmul | None = getattr(self, name)
            if matmul is not None and matmul.left.hadamard != matmul.right.hadamard:
                raise FewbitsError(
                    f"{name}={matmul} transforms one operand only; products stay the same only when both have 'hadamard'."
                )
        if self.fake:
            _check_fake(self)
        elif any(operand.scaling == "learned" for operand in self.operands):
            raise FewbitsError(
                "Learned scales belong to quantization-aware training, whose backward leaves them a gradient; add 'fake'."
            )

    def __str__(self) -> str:
        parts = [f"{name}={text}" for name, text in self.texts().items() if (name, text) != ("accumulate", "fp32")]
        return ", ".join([*parts, *(["fake"] if self.fake else [])])

    def __bool__(self) -> bool:
        return bool(self.operands)

    def texts(self) -> dict[str, str]:
        """output, grad_input, grad_weight and accumulate as `changed` takes them."""
        matmuls = {name: getattr(self, name) for name in MATMULS}
        words = ["fp32" if m is None else m.accumulator for m in matmuls.values()]
        present = {m.accumulator for m in matmuls.values() if m is not None} or {"fp32"}
        accumulate = present.pop() if len(present) == 1 else "|".join(words)
        return {**{name: "bf16" if m is None else str(m) for name, m in matmuls.items()}, "accumulate": accumulate}

    @property
    def matmuls(self) -> tuple[Matmul | None, Matmul | None, Matmul | None]:
        """output, grad_input, grad_weight."""
        return self.output, self.grad_input, self.grad_weight

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All operands of all low-bit matmuls, in order."""
        return tuple(operand for m in self.matmuls if m is not None for operand in (m.left, m.right))

    @property
    def stochastic(self) -> bool:
        """Whether any operand draws random numbers: rounding, or the signs of a Hadamard transform."""
        return any(operand.rounding == "stochastic" or operand.hadamard for operand in self.operands)

    @property
    def delayed(self) -> bool:
        """Whether any operand is scaled by what earlier steps have seen."""
        return any(operand.scaling == "delayed" for operand in self.operands)

    @property
    def modelled(self) -> bool:
        """Whether an accumulator is modelled, which no hardware runs: right numbers, no speed."""
        return any(m is not None and m.accumulator not in ("fp32", "fast") for m in self.matmuls)

    def changed(self, changes: Mapping[str, str]) -> Recipe:
        """The recipe with matmuls (or `accumulate`) given as text. Raises FewbitsError."""
        recipe = self
        for name in MATMULS:
            if name in changes:
                matmuls = dict(zip(MATMULS, recipe.matmuls, strict=True))
                matmuls[name] = _matmul(name, changes[name], recipe.output)
                recipe = Recipe(matmuls["output"], matmuls["grad_input"], matmuls["grad_weight"], recipe.fake)
        return recipe if "accumulate" not in changes else _accumulating(recipe, changes["accumulate"])

    @staticmethod
    def parse(text: str) -> Recipe:
        """The recipe of "output=e4m3/row, grad_input=e5m2/tensor, grad_weight=bf16, accumulate=14bit"; what is not named
        stays in the working format. Raises FewbitsError."""
        changes: dict[str, str] = {}
        fake = False
        for part in text.split(","):
            key, equals, value = (word.strip() for word in part.partition("="))
            if key == "fake" and not equals:
                fake = True
            elif equals and key in (*MATMULS, "accumulate"):
                changes[key] = value
            else:
                raise FewbitsError(
                    f"'{part.strip()}' is no part of a recipe.{nearest(key, (*MATMULS, 'accumulate', 'fake'))} Write "
                    f"KEY=VALUE with {', '.join(MATMULS)}, accumulate, or fake."
                )
        return Recipe(fake=fake).changed(changes)


def _matmul(name: str, text: str, output: Matmul | None) -> Matmul | None:
    word = text.strip().lower()
    if word in ("bf16", "16bit", "working", "none", ""):
        return None
    first, *others = re.split(r"\s+x\s+", word)
    if len(others) > 1:
        raise FewbitsError(f"{name}={text.strip()} multiplies {1 + len(others)} operands; a matmul has two: A x B.")
    left = Operand.parse(first)
    if others:
        return Matmul(left, Operand.parse(others[0]))
    if name == "output" or output is None:
        return Matmul(left, replace(left, rounding="nearest-even"))
    partner = output.right if name == "grad_input" else output.left
    scaling = left.scaling if left.scaling in ("delayed", "unit") else default_scales(partner.format)
    return Matmul(
        left,
        replace(
            partner, granularity=left.granularity, rounding="nearest-even", scaling=scaling, hadamard=left.hadamard
        ),
    )


def _check_fake(recipe: Recipe) -> None:
    """Raises FewbitsError for what quantization-aware training cannot do."""
    if recipe.grad_input is not None or recipe.grad_weight is not None:
        raise FewbitsError(
            "A fake recipe rounds the forward only: its backward multiplies the rounded values in 16 bits. Leave "
            "grad_input and grad_weight out, or leave out 'fake' to multiply gradients in few bits."
        )
    if recipe.output is None:
        return
    left, right, accumulator = recipe.output.left, recipe.output.right, recipe.output.accumulator
    if right.wide:
        raise FewbitsError(
            f"output={recipe.output} leaves the weight as it is; give it a format, as in bf16 x int4/row."
        )
    if left.scaling == "learned":
        raise FewbitsError(f"output={recipe.output}: activations take the current maximum; only weights learn a scale.")
    if left.format.kind == "binary" or (not left.wide and left.granularity != Granularity(1, 0)):
        raise FewbitsError(
            f"output={recipe.output}: activations of a fake recipe are bf16, or integers or floats with one scale a row "
            "(a token), which no other token changes."
        )
    fits = {"exact", "power-of-two", "learned"}
    for operand, scalings in ((left, {*fits, "full-range"}), (right, fits)):
        if operand.rounding != "nearest-even" or operand.hadamard or operand.scaling not in scalings:
            raise FewbitsError(
                f"output={recipe.output}: fake recipes round to nearest even with scales {', '.join(sorted(scalings))}."
            )
    if right.granularity.rows != 1:
        raise FewbitsError(
            f"output={recipe.output}: weights of a fake recipe have scales by row or group:N, as stored."
        )
    if accumulator not in ("fp32", "fast"):
        raise FewbitsError(f"accumulate={accumulator} is not modelled in fake recipes; leave it out.")


def _accumulating(recipe: Recipe, text: str) -> Recipe:
    words = [word.strip().lower() for word in text.split("|")]
    words = words * 3 if len(words) == 1 else words
    if len(words) != 3 or any(word not in ACCUMULATORS for word in words):
        raise FewbitsError(
            f"accumulate={text.strip()} does not fit.{nearest(words[0], ACCUMULATORS)} Use one of "
            f"{', '.join(ACCUMULATORS)}, or three of them with | between, for output, grad_input and grad_weight."
        )
    output, grad_input, grad_weight = (
        matmul and replace(matmul, accumulator=word) for word, matmul in zip(words, recipe.matmuls, strict=True)
    )
    return Recipe(output, grad_input, grad_weight, recipe.fake)


# Formats and granularities: Micikevicius et al. 2022 (arXiv 2209.05433) for fp8, DeepSeek-V3 (2412.19437) for fp8-block,
# OCP Microscaling v1.0 and arXiv 2506.08027 (scales rounded up) for mxfp8, arXiv 2509.25149 for nvfp4. int8-qat rounds
# tokens as compressed-tensors does (all 256 codes). Groups of 32 divide every usual width; over groups of 128 they cost
# 0.375 bits a weight (a bf16 scale each) and take a scale from a quarter of the weights.
RECIPES: dict[str, Recipe] = {
    name: Recipe.parse(text)
    for name, text in {
        "fp8": "output=e4m3/tensor, grad_input=e5m2/tensor, grad_weight=e5m2/tensor, accumulate=fast|fp32|fp32",
        "fp8-row": "output=e4m3/row, grad_input=e4m3/row, grad_weight=e4m3/row, accumulate=fast|fp32|fp32",
        "fp8-block": "output=e4m3/block(1x128) x e4m3/block(128x128), grad_input=e4m3/block(1x128) x e4m3/block(128x128), "
        "grad_weight=e4m3/block(1x128)",
        "mxfp8": "output=e4m3/block(1x32), grad_input=e4m3/block(1x32), grad_weight=e4m3/block(1x32)",
        "nvfp4": "output=fp4_e2m1/block(1x16)/two-level x fp4_e2m1/block(16x16)/two-level, "
        "grad_input=fp4_e2m1/block(1x16)/two-level/stochastic x fp4_e2m1/block(16x16)/two-level, "
        "grad_weight=fp4_e2m1/block(1x16)/two-level/stochastic/hadamard x fp4_e2m1/block(1x16)/two-level/hadamard",
        "int8": "output=int8/row, grad_input=int8/row/stochastic x int8/row, grad_weight=int8/row/stochastic x int8/row",
        "fp8-delayed": "output=e4m3/tensor/delayed, grad_input=e5m2/tensor/delayed, grad_weight=e5m2/tensor/delayed, "
        "accumulate=fast|fp32|fp32",
        "fp8-unit": "output=e4m3/tensor/unit, grad_input=e5m2/tensor/unit, grad_weight=e5m2/tensor/unit, "
        "accumulate=fast|fp32|fp32",
        "int8-qat": "output=int8/row/full-range x int8/row, fake",
        "int4-qat": "output=bf16 x int4/group:32, fake",
        "binary-qat": "output=bf16 x binary/row, fake",
        "fp8-qat": "output=e4m3/row, fake",
    }.items()
}
"""The recipes that have a name; any other is text."""
