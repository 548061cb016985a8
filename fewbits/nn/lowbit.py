"""The linear layer in few bits: three matmuls of quantized operands, and an autograd graph that keeps codes.

A weight is quantized once for all micro-batches of a step (`held_weights`), outside of one at every forward call, so
codes are never older than the weight. The gradient is quantized once where both of its matmuls want the same codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.kernels.dispatch import emulated, fused, quantize
from fewbits.kernels.matmul import scaled_matmul
from fewbits.numerics.hadamard import random_hadamard
from fewbits.numerics.quantize import Quantized, encode
from fewbits.numerics.scaling import block_amax, power_of_two_scale
from fewbits.numerics.wide import widen
from fewbits.precision.recipe import Operand, Recipe

ACTIVATION, WEIGHT, GRADIENT = range(3)
# added to a layer's key, so that each of its operands draws its own numbers; the Hadamard signs of a pair are the same
_SITES = {"output": 0x1F3, "grad_input": 0x2E5, "grad_weight": 0x4C9, "hadamard": 0x8B7}


class HeldWeight(NamedTuple):
    """A weight as its two matmuls take it: codes and scale of W [O, K] for output, of W.T [K, O] for grad_input (views of
    the same codes where their blocks agree); all None where a matmul stays in the working format."""

    output_codes: Tensor | None = None
    output_scale: Tensor | None = None
    grad_input_codes: Tensor | None = None
    grad_input_scale: Tensor | None = None


@cache
def recipe_of(text: str) -> Recipe:
    """The recipe of a canonical text. A text, and not the value, goes through autograd and the compiler."""
    return Recipe.parse(text)


def shared_weight(recipe: Recipe) -> bool:
    """Whether output and grad_input can use the same codes of the weight."""
    if recipe.output is None or recipe.grad_input is None:
        return False
    ours, theirs = recipe.output.right, recipe.grad_input.right
    return ours.granularity == theirs.granularity.transposed() and _alike(ours, theirs)


def shared_gradient(recipe: Recipe) -> bool:
    """Whether grad_input and grad_weight can use the same codes of the gradient."""
    if recipe.grad_input is None or recipe.grad_weight is None:
        return False
    first, second = recipe.grad_input.left, recipe.grad_weight.left
    return first.granularity == second.granularity.transposed() and _alike(first, second)


def shared_activation(recipe: Recipe) -> bool:
    """Whether output and grad_weight can use the same codes of the activation."""
    if recipe.output is None or recipe.grad_weight is None:
        return False
    first, second = recipe.output.left, recipe.grad_weight.right
    return first.granularity == second.granularity.transposed() and _alike(first, second)


def _alike(a: Operand, b: Operand) -> bool:
    same = (a.format, a.rounding, a.scaling) == (b.format, b.rounding, b.scaling)
    return same and not (a.hadamard or b.hadamard)


@torch.no_grad()
def hold(weight: Tensor, recipe: Recipe, scales: Tensor | None = None, maxima: Tensor | None = None) -> HeldWeight:
    """The codes of a weight [O, K] for a recipe. scales, maxima: for delayed scaling, see `ScaleHistory`."""
    weight, draw = weight.detach(), _Draw(None, scales, maxima)
    output = None if recipe.output is None else draw.quantized(weight, recipe.output.right, "output", WEIGHT)
    if recipe.grad_input is None:
        back = None
    elif output is not None and shared_weight(recipe):
        back = transposed(output)
    else:
        back = draw.quantized(weight.t(), recipe.grad_input.right, "grad_input", WEIGHT)
    codes = [(q.codes, q.scale) if q is not None else (None, None) for q in (output, back)]
    return HeldWeight(*codes[0], *codes[1])


def transposed(q: Quantized) -> Quantized:
    """The transposed matrix, sharing codes and scales."""
    return Quantized(q.codes.t(), q.scale.t(), q.format, q.granularity.transposed(), q.scales)


def lowbit_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_codes: Tensor | None,
    output_scale: Tensor | None,
    grad_input_codes: Tensor | None,
    grad_input_scale: Tensor | None,
    key: Tensor | None,
    scales: Tensor | None,
    maxima: Tensor | None,
    recipe: str,
) -> Tensor:
    """x [..., K] times weight [O, K] plus bias [O] by a recipe: [..., O] in the dtype of the weight.

    output_codes ... grad_input_scale: a `HeldWeight`; all None makes it here. key: 0-d int64, for recipes that draw random
    numbers. scales, maxima: for delayed scaling, what `ScaleHistory` gives and takes. recipe: canonical text of a `Recipe`.
    """
    held = (output_codes, output_scale, grad_input_codes, grad_input_scale)
    if output_codes is None and grad_input_codes is None:
        held = hold(weight, recipe_of(recipe), scales, maxima)
    inputs = (x.to(weight.dtype), weight, bias, *held, key, scales, maxima, recipe)
    return _LowBitLinear.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


def let_compilers_in(function: Callable[..., Tensor]) -> None:
    """Lets torch.compile take `lowbit_linear` or its like as one call: what is inside is traced by autograd, not read by
    dynamo, which would stumble over parsing and caches. Imports the compiler, so only models with a recipe ask for it."""
    torch.compiler.allow_in_graph(function)  # type: ignore[no-untyped-call]


class _LowBitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_codes: Tensor | None,
        output_scale: Tensor | None,
        grad_input_codes: Tensor | None,
        grad_input_scale: Tensor | None,
        key: Tensor | None,
        scales: Tensor | None,
        maxima: Tensor | None,
        text: str,
    ) -> Tensor:
        recipe = recipe_of(text)
        draw = _Draw(key, scales, maxima)
        x_NK = x.reshape(-1, x.shape[-1])
        left = None if recipe.output is None else draw.quantized(x_NK, recipe.output.left, "output", ACTIVATION)
        if left is None or output_codes is None or output_scale is None or recipe.output is None:
            y_NO = plain(x_NK, weight, bias)
        else:
            right = _restored(output_codes, output_scale, recipe.output.right)
            y_NO = scaled_matmul(left, right, recipe.output.accumulator, weight.dtype, bias)
        if not ctx.needs_input_grad[1]:
            kept: tuple[Tensor | None, Tensor | None] = (None, None)
        elif recipe.grad_weight is None:
            kept = (x_NK, None)
        elif left is not None and shared_activation(recipe):
            kept = (left.codes, left.scale)
        else:
            saved = draw.quantized(x_NK.t(), recipe.grad_weight.right, "grad_weight", ACTIVATION)
            kept = (saved.codes.t(), saved.scale.t())
        backward_weight = weight if recipe.grad_input is None else None
        ctx.save_for_backward(*kept, backward_weight, grad_input_codes, grad_input_scale, key, scales, maxima)
        ctx.text, ctx.dtype, ctx.shape = text, weight.dtype, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y_NO.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, x_scale, weight, codes, scale, *drawn = ctx.saved_tensors
        draw = _Draw(*drawn)
        recipe: Recipe = recipe_of(ctx.text)
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        left = None
        if ctx.needs_input_grad[0]:
            if recipe.grad_input is None:
                grad_x = plain(grad_NO, weight.t())
            else:
                left = draw.quantized(grad_NO, recipe.grad_input.left, "grad_input", GRADIENT)
                right = _restored(codes, scale, recipe.grad_input.right)
                grad_x = scaled_matmul(left, right, recipe.grad_input.accumulator, ctx.dtype)
            grad_x = grad_x.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            if recipe.grad_weight is None:
                grad_weight = plain(grad_NO.t(), x_codes.t())
            else:
                if left is not None and shared_gradient(recipe):
                    rows = transposed(left)
                else:
                    rows = draw.quantized(grad_NO.t(), recipe.grad_weight.left, "grad_weight", GRADIENT)
                right = _restored(x_codes.t(), x_scale.t(), recipe.grad_weight.right)
                grad_weight = scaled_matmul(rows, right, recipe.grad_weight.accumulator, ctx.dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            twin = fused(grad_NO)
            sums = widen(grad_NO).sum(0) if twin is None else twin.column_sums(grad_NO)
            grad_bias = sums.to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, *(None,) * 8


class _Draw(NamedTuple):
    """What quantizing an operand draws from beside the operand: random numbers, and the maxima of earlier steps."""

    key: Tensor | None
    scales: Tensor | None
    maxima: Tensor | None

    def quantized(self, x: Tensor, operand: Operand, site: str, role: int) -> Quantized:
        """A matrix as an operand of the matmul named `site`, in the role ACTIVATION, WEIGHT or GRADIENT."""
        if operand.hadamard and self.key is not None:
            x = random_hadamard(x, self.key ^ _SITES["hadamard"])
        seed = 0 if self.key is None else self.key ^ _SITES[site]
        if operand.scaling not in ("delayed", "unit"):
            return quantize(x, operand.format, operand.granularity, operand.rounding, seed, operand.scaling)
        amax = block_amax(x, operand.granularity)
        if operand.scaling == "unit":
            fixed = (
                2.0 ** round(-0.5 * math.log2(max(1, x.shape[1 - (site == "grad_input")]))) if role == WEIGHT else 1.0
            )
            scale = torch.full_like(amax, fixed)
        else:
            scale = power_of_two_scale(amax, operand.format.max)
            if self.scales is not None and self.maxima is not None:
                self.maxima[role] = torch.maximum(self.maxima[role], amax.view(()))
                earlier = power_of_two_scale(self.scales[role].view(1, 1), operand.format.max)
                scale = torch.where(self.scales[role] > 0, earlier, scale)  # nothing is known before the first step
        scale = torch.where(amax.isfinite(), scale, math.nan)  # saturating must not hide an infinity
        codes = encode(x, scale, operand.format, operand.granularity, operand.rounding, seed, operand.scaling)
        return Quantized(codes, scale, operand.format, operand.granularity, operand.scaling)


class ScaleHistory:
    """Delayed scaling: the largest magnitudes of a layer's activation, weight and gradient over the last steps.

    Within a step, operands are scaled by the largest of the steps before it and the maxima of this one are noted (NVIDIA's
    delayed scaling, as in Micikevicius et al. 2022). window: fp32 [3, steps], newest last.
    """

    STEPS = 16

    def __init__(self) -> None:
        self.window = torch.zeros(3, self.STEPS)
        self.largest = torch.zeros(3)
        self.maxima = torch.zeros(3)

    def begin(self, device: torch.device) -> None:
        """A step begins on `device`, that of the layer: its scales come from the window."""
        if self.window.device != device:
            self.window, self.largest, self.maxima = (
                tensor.to(device) for tensor in (self.window, self.largest, self.maxima)
            )
        self.largest.copy_(self.window.amax(1))
        self.maxima.zero_()

    def end(self) -> None:
        """A step is over: its maxima join the window, but for those that are not finite."""
        finite = torch.where(self.maxima.isfinite(), self.maxima, self.largest)
        self.window.copy_(torch.cat((self.window[:, 1:], finite.unsqueeze(1)), 1))


def _restored(codes: Tensor, scale: Tensor, operand: Operand) -> Quantized:
    return Quantized(codes, scale, operand.format, operand.granularity, operand.scaling)


def plain(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left @ right.T (+ bias) of a matmul that stays in the working format, bf16."""
    if emulated("bf16", left.device.type):
        wide = None if bias is None else bias.float()
        return torch.nn.functional.linear(left.float(), right.float(), wide).to(left.dtype)
    return torch.nn.functional.linear(left, right, bias)


@contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Within, every low-bit layer of `model` multiplies the codes that its weight has now: quantized once, for all
    micro-batches. Nothing may change a weight meanwhile; afterwards codes are made at every call again."""
    layers: list[Any] = [module for module in model.modules() if getattr(module, "recipe", "")]
    try:
        for layer in layers:
            if layer.history is not None:
                layer.history.begin(layer.weight.device)
            layer.held = layer.hold()
        yield
        for layer in layers:
            if layer.history is not None:
                layer.history.end()
    finally:
        for layer in layers:
            layer.held = None


def scale_history(model: nn.Module) -> dict[str, list[list[float]]]:
    """The windows of all layers with delayed scaling by name, as plain numbers (exact: fp32 in Python's floats)."""
    return {
        name: module.history.window.tolist()
        for name, module in model.named_modules()
        if isinstance(getattr(module, "history", None), ScaleHistory)
    }


def load_scale_history(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Restores what `scale_history` gave. Raises FewbitsError where it is of another model."""
    for name, module in model.named_modules():
        history = getattr(module, "history", None)
        if isinstance(history, ScaleHistory):
            if name not in saved:
                raise FewbitsError(
                    f"the saved state has no scale history of {name}; resume with the model that wrote it."
                )
            history.window.copy_(torch.tensor(saved[name]))
