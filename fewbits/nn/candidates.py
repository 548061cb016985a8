"""What a linear layer may multiply in under layers=auto: its shape, and the ways of multiplying that are worth timing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from fewbits.nn.plan import takes
from fewbits.precision.precision import Precision
from fewbits.precision.recipe import MATMULS, Recipe

BF16 = "bf16"
"""The way of a layer that stays in the working format."""


class Shape(NamedTuple):
    """What decides how fast a linear layer is: rows that enter it in one call, contraction K, outputs O, and its bias."""

    tokens: int
    inputs: int
    outputs: int
    bias: bool

    def __str__(self) -> str:
        return f"{self.tokens} x {self.inputs} x {self.outputs}" + (" with bias" if self.bias else "")


def shapes(model: nn.Module, precision: Precision, tokens: int, keep: Iterable[str] = ()) -> dict[Shape, list[str]]:
    """The linear layers of `model`, not prepared yet, that the recipe of `precision` takes, by shape, in their order.

    tokens: rows that enter each of them in one call. Raises FewbitsError where no layer is taken, as `prepare` does.
    """
    found: dict[Shape, list[str]] = {}
    for name in takes(model, precision, keep):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        shape = Shape(tokens, layer.in_features, layer.out_features, layer.bias is not None)
        found.setdefault(shape, []).append(name)
    return found


def candidates(recipe: Recipe, shape: Shape) -> tuple[str, ...]:
    """The ways to multiply that are timed, as canonical recipe texts, "bf16" first, then the recipe as it is.

    Of the parts of a recipe two more: without grad_weight, which is alone in wanting both large operands in few bits, and
    the one matmul whose large operand is the smaller: output quantizes the activation [tokens, K], grad_input the gradient
    [tokens, O]. Whoever quantizes both already has what grad_weight needs, so no part has grad_weight alone.
    """
    alone = "output" if shape.inputs <= shape.outputs else "grad_input"
    parts = (MATMULS, ("output", "grad_input"), (alone,))
    texts = [_text(recipe, part) for part in parts]
    return tuple(dict.fromkeys([BF16, *(text for text in texts if text)]))


def _text(recipe: Recipe, part: Sequence[str]) -> str:
    kept = Recipe(**{name: getattr(recipe, name) for name in part})
    return str(kept) if kept else ""


def matmuls_of(text: str) -> str:
    """Which matmuls a candidate multiplies in few bits, in words: "output and grad_input"; "" for bf16."""
    recipe = Recipe() if text == BF16 else Recipe.parse(text)
    names = [name for name, matmul in zip(MATMULS, recipe.matmuls, strict=True) if matmul is not None]
    return "all three matmuls" if len(names) == len(MATMULS) else " and ".join(names)
