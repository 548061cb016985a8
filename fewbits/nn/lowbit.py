"""The linear layer in few bits: three matmuls of quantized operands, and an autograd graph that keeps codes.

A weight is quantized once for all micro-batches of a step (`held_weights`), outside of one at every forward call, so
codes are never older than the weight. The gradient is quantized once where both of its matmuls want the same codes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewbits.formats import Format
from fewbits.kernels.dispatch import activation_execution, emulated, fused
from fewbits.kernels.layouts import encode_all
from fewbits.kernels.matmul import scaled_matmul
from fewbits.nn.draw import Draw, in_both_layouts
from fewbits.nn.scale_history import ACTIVATION, GRADIENT, WEIGHT, Delayed, ScaleHistory, ScaleStore
from fewbits.numerics.quantize import Quantized
from fewbits.numerics.scaling import Granularity
from fewbits.numerics.wide import widen
from fewbits.precision.recipe import Matmul, Operand, Recipe
from fewbits.ranges import QUANTIZE, span

Codes = tuple[Tensor, Tensor]
"""fp8 codes [N, K] and [K, N], each row by row, of what a layer reads, made under its known scale by who made it."""


class HeldWeight(NamedTuple):
    """A weight as its two matmuls take it: codes and scale of W [O, K] for output, of W.T [K, O] for grad_input (the same
    codes where their blocks agree: views on a CPU, written in both layouts by one kernel on CUDA); all None where a
    matmul stays in the working format."""

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
def hold(weight: Tensor, recipe: Recipe, delayed: Delayed = Delayed()) -> HeldWeight:  # noqa: B008  it has no state
    """The codes of a weight [O, K] for a recipe. delayed: for delayed scaling, `ScaleHistory.of_weight`."""
    weight, draw = weight.detach(), Draw(None, delayed)
    output = back = None
    if recipe.output is not None and shared_weight(recipe):
        output, back, _ = draw.both([weight], recipe.output.right, "output", WEIGHT)
    else:
        if recipe.output is not None:
            output = draw.quantized(weight, recipe.output.right, "output", WEIGHT)
        if recipe.grad_input is not None:
            back = draw.quantized(weight.t(), recipe.grad_input.right, "grad_input", WEIGHT)
    codes = [(q.codes, q.scale) if q is not None else (None, None) for q in (output, back)]
    return HeldWeight(*codes[0], *codes[1])


def lowbit_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_codes: Tensor | None,
    output_scale: Tensor | None,
    grad_input_codes: Tensor | None,
    grad_input_scale: Tensor | None,
    key: Tensor | None,
    maximum: Tensor | None,
    grad_maximum: Tensor | None,
    largest: Tensor | None,
    scale: Tensor | None,
    grad_scale: Tensor | None,
    recipe: str,
    widths: tuple[int, ...] = (),
    codes: Tensor | None = None,
    codes_t: Tensor | None = None,
) -> Any:
    """x [..., K] times weight [O, K] plus bias [O] by a recipe: [..., O] in the dtype of the weight.

    output_codes ... grad_input_scale: a `HeldWeight`; all None makes it here. key: 0-d int64, for recipes that draw random
    numbers. maximum ... grad_scale: for delayed scaling, a `Delayed`. recipe: canonical text of a `Recipe`. widths: gives the
    parts of the last axis that are so wide, views of the one product, instead of the whole; their gradients are quantized
    where they lie, never put side by side, where a kernel can. codes, codes_t: `Codes` of x, which then is not read.
    """
    held = (output_codes, output_scale, grad_input_codes, grad_input_scale)
    if output_codes is None and grad_input_codes is None:
        held = hold(weight, recipe_of(recipe))
    delayed = (maximum, grad_maximum, largest, scale, grad_scale)
    inputs = (x.to(weight.dtype), weight, bias, *held, key, *delayed, recipe, widths, codes, codes_t)
    return _LowBitLinear.apply(*inputs)  # type: ignore[no-untyped-call]


def let_compilers_in(function: Callable[..., Any]) -> None:
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
        maximum: Tensor | None,
        grad_maximum: Tensor | None,
        largest: Tensor | None,
        scale: Tensor | None,
        grad_scale: Tensor | None,
        text: str,
        widths: tuple[int, ...],
        codes: Tensor | None,
        codes_t: Tensor | None,
    ) -> Tensor | tuple[Tensor, ...]:
        recipe = recipe_of(text)
        delayed = (maximum, grad_maximum, largest, scale, grad_scale)
        draw = Draw.of(key, *delayed)
        x_NK = x.reshape(-1, x.shape[-1])
        left = turned = None
        if recipe.output is not None and codes is not None and codes_t is not None:
            left, turned, _ = draw.of_kernel(codes, codes_t, recipe.output.left, ACTIVATION)
        elif recipe.output is not None and ctx.needs_input_grad[1] and shared_activation(recipe):
            left, turned, _ = draw.both([x_NK], recipe.output.left, "output", ACTIVATION)
        elif recipe.output is not None:
            left = draw.quantized(x_NK, recipe.output.left, "output", ACTIVATION)
        if left is None or output_codes is None or output_scale is None or recipe.output is None:
            y_NO = plain(x_NK, weight, bias)
        else:
            y_NO = multiply(left, output_codes, output_scale, recipe.output, weight.dtype, bias)
        if not ctx.needs_input_grad[1]:
            kept: tuple[Tensor | None, Tensor | None] = (None, None)
        elif recipe.grad_weight is None:
            kept = (x_NK, None)
        elif turned is not None:  # in the layout that grad_weight wants
            kept = (turned.codes.t(), turned.scale.t())
        else:
            saved = draw.quantized(x_NK.t(), recipe.grad_weight.right, "grad_weight", ACTIVATION)
            kept = (saved.codes.t(), saved.scale.t())
        backward_weight = weight if recipe.grad_input is None else None
        ctx.save_for_backward(*kept, backward_weight, grad_input_codes, grad_input_scale, key, *delayed[2:])
        ctx.grad_maximum = grad_maximum
        ctx.text, ctx.dtype, ctx.shape = text, weight.dtype, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = y_NO.view(*x.shape[:-1], weight.shape[0])
        return y.split_with_sizes(widths, -1) if widths else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, x_scale, weight, codes, scale, *drawn = ctx.saved_tensors
        draw = Draw.of_backward(ctx.grad_maximum, *drawn)
        recipe: Recipe = recipe_of(ctx.text)
        grad_x = grad_weight = grad_bias = None
        biased = ctx.bias_dtype is not None and ctx.needs_input_grad[2]
        parts = [grad.reshape(-1, grad.shape[-1]) for grad in grads]  # of one that nobody uses, zeros
        if len(parts) > 1 and not apart(parts, recipe, ctx.needs_input_grad[:2]):
            parts = [beside(parts)]
        grad_NO = parts[0]  # all of it, where more than codes and sums is wanted
        left, rows, sums = gradient_codes(draw, parts, recipe, ctx.needs_input_grad[:2], biased)
        if ctx.needs_input_grad[0]:
            if left is None or recipe.grad_input is None:
                grad_x = plain(grad_NO, weight.t())
            else:
                grad_x = multiply(left, codes, scale, recipe.grad_input, ctx.dtype)
            grad_x = grad_x.view(ctx.shape)
        if ctx.needs_input_grad[1]:
            if rows is None or recipe.grad_weight is None:
                grad_weight = plain(grad_NO.t(), x_codes.t())
            else:
                grad_weight = multiply(rows, x_codes.t(), x_scale.t(), recipe.grad_weight, ctx.dtype)
        if biased:
            grad_bias = (column_sums(grad_NO) if sums is None else sums).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, *(None,) * 14


def multiply(
    left: Quantized, codes: Tensor, scale: Tensor, matmul: Matmul, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """left @ right.T (+ bias) as a recipe has that matmul; codes, scale: of right, its right operand."""
    operand = matmul.right
    right = Quantized(codes, scale, operand.format, operand.granularity, operand.scaling)
    return scaled_matmul(left, right, matmul.accumulator, dtype, bias)


def gradient_codes(
    draw: Draw, parts: Sequence[Tensor], recipe: Recipe, needed: tuple[bool, bool], sums: bool
) -> tuple[Quantized | None, Quantized | None, Tensor | None]:
    """The gradient as the left operand of grad_input [N, O] and of grad_weight [O, N], None for what is not needed or not
    in few bits: from one reading where both want the same codes, maybe with the sums of its columns. parts: the gradient,
    or parts of its columns that may stay `apart`."""
    for_input = recipe.grad_input.left if recipe.grad_input is not None and needed[0] else None
    for_weight = recipe.grad_weight.left if recipe.grad_weight is not None and needed[1] else None
    if for_input is not None and for_weight is not None and shared_gradient(recipe):
        return draw.both(parts, for_input, "grad_input", GRADIENT, sums)
    (grad_NO,) = parts
    left = rows = None
    if for_input is not None:
        left = draw.quantized(grad_NO, for_input, "grad_input", GRADIENT)
    if for_weight is not None:
        rows = draw.quantized(grad_NO.t(), for_weight, "grad_weight", GRADIENT)
    return left, rows, None


def apart(parts: Sequence[Tensor], recipe: Recipe, needed: tuple[bool, bool]) -> bool:
    """Whether codes and sums of a gradient are all that is made of it, by a kernel that reads parts of its columns where they
    lie."""
    if recipe.grad_input is None or not all(needed) or not shared_gradient(recipe):
        return False
    return in_both_layouts(parts, recipe.grad_input.left)


def beside(parts: Sequence[Tensor]) -> Tensor:
    """Matrices [N, width] side by side: a view where they lie so already, as a kernel of attention writes gradients; else a
    copy."""
    first, width = parts[0], sum(part.shape[1] for part in parts)
    plain = all(type(part) is Tensor and part.shape[0] == first.shape[0] for part in parts)
    # where gradients of gradients are wanted, a view would have the history of the first part alone
    if plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        places = itertools.accumulate((part.shape[1] for part in parts[:-1]), initial=first.storage_offset())
        memory = first.untyped_storage().data_ptr()
        if all(
            part.untyped_storage().data_ptr() == memory and part.storage_offset() == place
            and part.stride() == first.stride() and part.stride(1) == 1 and part.stride(0) >= width
            for part, place in zip(parts, places, strict=True)
        ):  # fmt: skip
            return first.as_strided((first.shape[0], width), first.stride())
    return torch.cat(tuple(parts), 1)


def limits(recipe: Recipe) -> tuple[float, float, float]:
    """The largest number of the format of each role, 0 where two matmuls take its operand in different formats."""
    output, grad_input, grad_weight = ((m.left, m.right) if m else (None, None) for m in recipe.matmuls)
    return (
        _limit(output[0], grad_weight[1]),  # of the activation, the weight and the gradient
        _limit(output[1], grad_input[1]),
        _limit(grad_input[0], grad_weight[0]),
    )


def _limit(*operands: Operand | None) -> float:
    largest = {operand.format.max for operand in operands if operand is not None}
    return largest.pop() if len(largest) == 1 else 0.0


def column_sums(x: Tensor) -> Tensor:
    """Sums over the rows of a matrix, in fp32 or wider."""
    twin = fused(x)
    return widen(x).sum(0) if twin is None else twin.column_sums(x)


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
    looking_back: dict[torch.device, list[ScaleHistory]] = {}
    for layer in layers:
        if layer.history is not None:
            looking_back.setdefault(layer.weight.device, []).append(layer.history)
    stores = [ScaleStore.of(histories, device) for device, histories in looking_back.items()]
    try:
        for store in stores:
            store.begin()
        with span(QUANTIZE):
            _hold_all(layers)
        yield
        for store in stores:
            store.end()
    finally:
        for layer in layers:
            layer.held, layer.chained = None, False


@torch.no_grad()
def _hold_all(layers: Sequence[Any]) -> None:
    """Gives every layer the codes of its weight: those that `together` allows in three launches, the others one by one."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for layer in layers:
        if together(layer):
            store = None if layer.history is None else layer.history.store
            groups.setdefault((layer.recipe, layer.weight.dtype, layer.weight.device, store), []).append(layer)
        else:
            layer.held = layer.hold()
    for (recipe, *_, store), group in groups.items():
        if store is not None and [layer.history for layer in group] != store.histories:
            for layer in group:
                layer.held = layer.hold()
            continue
        output = recipe_of(recipe).output
        assert output is not None
        earlier = None if store is None else store.largest[:, WEIGHT]
        held, amax = encode_all([layer.weight for layer in group], output.right.format, earlier)
        if store is not None:
            noted = store.maxima[:, WEIGHT, 0]
            noted.copy_(torch.maximum(noted, amax))
        chained = chains(recipe) and activation_execution(group[0].weight.device).value == "kernel"
        for layer, (codes, codes_t, scale) in zip(group, held, strict=True):
            layer.held, layer.chained = HeldWeight(codes, scale, codes_t, scale), chained


def together(layer: Any) -> bool:
    """Whether the weight of a low-bit layer can be quantized with others: one scale and the same codes for both matmuls."""
    operand, weight = _shared_operand(layer.recipe), layer.weight
    if layer.fake or operand is None or not weight.is_contiguous():
        return False
    return in_both_layouts([weight], operand)


@cache
def chains(text: str) -> bool:
    """Whether two matmuls share the codes of every operand, for layers whose weights are quantized `together`: what makes an
    activation or gradient for them may then hand over its maximum, or codes instead of values."""
    recipe = recipe_of(text)
    ways = {(o.scaling, o.rounding, o.granularity, o.format.bits, o.format.kind) for o in recipe.operands}
    fitting = [{(scaling, "nearest-even", Granularity(), 8, "float")} for scaling in ("power-of-two", "delayed")]
    return ways in fitting and shared_weight(recipe) and shared_activation(recipe) and shared_gradient(recipe)


@cache
def activation_format(text: str) -> Format:
    """The format of the activation, by a recipe that `chains`."""
    output = recipe_of(text).output
    assert output is not None
    return output.left.format


@cache
def _shared_operand(text: str) -> Operand | None:
    """The weight as both of its matmuls take it, by a recipe; None where they differ, or its scale hangs on its shape."""
    recipe = recipe_of(text)
    if recipe.output is None or not shared_weight(recipe) or recipe.output.right.scaling == "unit":
        return None
    return recipe.output.right
