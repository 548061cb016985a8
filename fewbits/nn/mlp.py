"""A feed-forward layer in few bits as one node of autograd: what lies between its matmuls is made once, by one kernel.

Layer by layer, the activation is written in 16 bits, read for its largest magnitude and read again for its codes, and so is
its gradient. Here the kernel that makes them hands over the maximum too, or, under delayed scales that are known, nothing
but codes, and those of the activation that grad_weight wants are made in the backward pass: a byte less to keep for every
element of the widest tensor of a layer. The operands, and so the products, are those of layer by layer: of the same values,
the same codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewbits.kernels.activation import activate
from fewbits.nn.draw import Draw, coded, coded_backward
from fewbits.nn.linear import Linear
from fewbits.nn.lowbit import Codes, column_sums, gradient_codes, multiply, recipe_of
from fewbits.nn.scale_history import ACTIVATION, GRADIENT, Delayed
from fewbits.numerics.quantize import Quantized
from fewbits.precision.recipe import Recipe

_ACTIVATIONS = {2: "gelu", 3: "swiglu"}  # by the number of layers: up and down; gate, up and down


class Part(NamedTuple):
    """What a linear layer brings: weight [O, K], bias [O], its codes (`HeldWeight`), and for delayed scaling what is
    `Delayed`."""

    weight: Tensor
    bias: Tensor | None
    output_codes: Tensor
    output_scale: Tensor
    grad_input_codes: Tensor
    grad_input_scale: Tensor
    maximum: Tensor | None
    grad_maximum: Tensor | None
    largest: Tensor | None
    scale: Tensor | None
    grad_scale: Tensor | None

    @property
    def draw(self) -> Draw:
        """What quantizing its operands draws from."""
        return Draw.of(None, self.maximum, self.grad_maximum, *self._earlier)

    @property
    def kept(self) -> tuple[Tensor | None, ...]:
        """What the backward pass wants of it: codes and scale of the weight, and what earlier steps say."""
        return self.grad_input_codes, self.grad_input_scale, *self._earlier

    @property
    def _earlier(self) -> tuple[Tensor | None, ...]:
        return self.largest, self.scale, self.grad_scale


_SIZE = len(Part._fields)


def together(layers: Sequence[Linear]) -> bool:
    """Whether `lowbit_mlp` takes these layers now: within a step, in training, nobody listening in between."""
    first = layers[0]
    return all(
        getattr(layer, "chained", False)  # a layer may have been replaced by one of another class
        and layer.recipe == first.recipe
        and layer.knows_scales() == first.knows_scales()
        and layer.learns_unheard()
        for layer in layers
    )


def mlp(layers: Sequence[Linear], x: Tensor, again: Tensor | None = None, codes: Codes | None = None) -> Tensor:
    """`lowbit_mlp` of layers that `together` allows: x [..., D] -> [..., D]. codes: those of x under the scale of the first
    layer, where it `takes_codes`."""
    parts: list[Tensor | None] = []
    for layer in layers:
        history = layer.history
        delayed = Delayed() if history is None else history.delayed
        parts += [layer.weight, layer.bias, *(layer.held or ()), *delayed]
    again, (ours, turned) = x if again is None else again, codes or (None, None)
    return lowbit_mlp(x, again, layers[0].recipe, ours, turned, *parts)


def lowbit_mlp(
    x: Tensor,
    again: Tensor,
    recipe: str,
    codes: Tensor | None,
    codes_t: Tensor | None,
    *parts: Tensor | None,
) -> Tensor:
    """down(gelu(up(x))) of two `Part`s, up and down, or down(silu(gate(x)) * up(x)) of three, gate, up and down, one after
    the other: x [..., D] -> [..., D] in the dtype of the weights. again: x once more; it has the gradient of x by way of up
    where there is a gate. recipe: canonical text of a `Recipe` that `chains`. codes, codes_t: as `lowbit_linear` takes them."""
    weight = parts[0]
    assert weight is not None
    inputs = (x.to(weight.dtype), again.to(weight.dtype), recipe, codes, codes_t, *parts)
    return _LowBitMLP.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]


def _split(flat: Sequence[Any]) -> list[Part]:
    return [Part(*flat[i : i + _SIZE]) for i in range(0, len(flat), _SIZE)]


class _LowBitMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        _again: Tensor,
        text: str,
        codes: Tensor | None,
        codes_t: Tensor | None,
        *flat: Tensor | None,
    ) -> Tensor:
        parts, output = _split(flat), recipe_of(text).output
        assert output is not None
        down, draws = parts[-1], [part.draw for part in parts]
        if codes is None or codes_t is None:
            left, turned, _ = draws[0].both([x.reshape(-1, x.shape[-1])], output.left, "output", ACTIVATION)
        else:
            left, turned, _ = draws[0].of_kernel(codes, codes_t, output.left, ACTIVATION)
        for draw in draws[1:-1]:  # the same input, so the same maxima, in every step since the first
            draw.copy_maximum(draws[0], ACTIVATION)
        inner = [
            multiply(left, part.output_codes, part.output_scale, output, part.weight.dtype, part.bias)
            for part in parts[:-1]
        ]
        name, hidden_codes = _ACTIVATIONS[len(parts)], None
        if draws[0].known:
            hidden = coded(name, inner, output.left, draws[-1])
        else:
            ((value, amax),) = activate(name, *inner)
            hidden, hidden_t, _ = draws[-1].both([value], output.left, "output", ACTIVATION, False, amax)
            hidden_codes = hidden_t.codes.t()
        y = multiply(hidden, down.output_codes, down.output_scale, output, down.weight.dtype, down.bias)
        kept = (turned.codes.t(), turned.scale.t(), hidden_codes, hidden.scale)
        ctx.save_for_backward(*kept, *inner, *(tensor for part in parts for tensor in part.kept))
        ctx.text, ctx.shape = text, x.shape
        ctx.grad_maxima = [part.grad_maximum for part in parts]
        ctx.biases = [None if part.bias is None else part.bias.dtype for part in parts]
        ctx.dtype = down.weight.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count, recipe = len(ctx.biases), recipe_of(ctx.text)
        x_codes, x_scale, h_codes, h_scale, *rest = ctx.saved_tensors
        inner, kept = rest[: count - 1], rest[count - 1 :]
        size = len(kept) // count
        weights = [kept[size * i :][:size] for i in range(count)]
        draws = [
            Draw.of_backward(maximum, None, *earlier)
            for maximum, (_, _, *earlier) in zip(ctx.grad_maxima, weights, strict=True)
        ]
        biased = [dtype is not None for dtype in ctx.biases]
        grad_NO = grad.reshape(-1, grad.shape[-1])
        left, rows, sums = gradient_codes(draws[-1], [grad_NO], recipe, (True, True), biased[-1])
        assert left is not None and rows is not None and recipe.grad_input is not None
        grads: list[Tensor | None] = [None] * (_SIZE * count)
        if biased[-1]:
            grads[1 - _SIZE] = (column_sums(grad_NO) if sums is None else sums).to(ctx.biases[-1])
        codes, scale = weights[-1][:2]
        inputs = [multiply(left, codes, scale, recipe.grad_input, ctx.dtype), *inner]
        name, operand = _ACTIVATIONS[count] + "_backward", recipe.grad_input.left
        if draws[0].known:
            assert recipe.output is not None
            hidden_t, made = coded_backward(name, inputs, recipe.output.left, draws[-1], operand, draws[:-1], biased[0])
            h_codes = hidden_t.t()
        else:
            made = [
                draw.both([value], operand, "grad_input", GRADIENT, biased[0], amax)
                for draw, (value, amax) in zip(draws[:-1], activate(name, *inputs), strict=True)
            ]
        grads[-_SIZE] = _grad_weight(rows, h_codes, h_scale, recipe, ctx.dtype)
        grads_x: list[Tensor | None] = [None, None]
        for i, (matrix, transpose, found) in enumerate(made):
            grads[_SIZE * i] = _grad_weight(transpose, x_codes, x_scale, recipe, ctx.dtype)
            if found is not None and biased[i]:
                grads[_SIZE * i + 1] = found.to(ctx.biases[i])
            if ctx.needs_input_grad[i]:
                codes, scale = weights[i][:2]
                grads_x[i] = multiply(matrix, codes, scale, recipe.grad_input, ctx.dtype).view(ctx.shape)
        return *grads_x, None, None, None, *grads


def _grad_weight(rows: Quantized, codes: Tensor, scale: Tensor, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    assert recipe.grad_weight is not None
    return multiply(rows, codes.t(), scale.t(), recipe.grad_weight, dtype)
