"""The linear layer of quantization-aware training: the forward multiplies what a quantized checkpoint would, the backward
passes straight through the rounding and multiplies the same rounded values in the working format.

Codes are kept for the backward, not 16-bit copies. A learned scale is held as its base-2 logarithm: an optimizer such as
Adam, whose steps have the size of the learning rate, then changes it by a proportion (Jain et al. 2020, section 3.2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.kernels.dispatch import quantize
from fewbits.kernels.matmul import scaled_matmul
from fewbits.nn.lowbit import HeldWeight, plain, recipe_of
from fewbits.numerics.fake import scale_gradient, stored_weight, straight_through, values
from fewbits.numerics.quantize import Quantized
from fewbits.numerics.wide import widen
from fewbits.precision.recipe import Operand

LEARNED = "log_scale"
"""Name of the parameter of a layer that learns its scales: fp32 [O * G], log2 of each; one axis, so that no weight decay
reaches it."""


def quantized_weight(weight: Tensor, log_scale: Tensor | None, recipe: str) -> Quantized:
    """The weight [O, K] of a layer as it is multiplied now and as a quantized checkpoint holds it."""
    operand = _weight_operand(recipe)
    scale = None if log_scale is None else log_scale.detach().exp2().view(weight.shape[0], -1)
    return stored_weight(weight, operand.format, operand.granularity, _scales(operand), scale)


@torch.no_grad()
def hold_fake(weight: Tensor, log_scale: Tensor | None, recipe: str) -> HeldWeight:
    """Codes and scale of `quantized_weight`, for a step that holds the weight still."""
    q = quantized_weight(weight, log_scale, recipe)
    return HeldWeight(q.codes, q.scale)


@torch.no_grad()
def first_log_scale(weight: Tensor, recipe: str) -> nn.Parameter | None:
    """The parameter of a layer whose recipe learns its scales, starting at those of the current maximum (the mean magnitude
    for binary); None for other recipes. Esser's start, 2 mean|w| / sqrt(max), covers 18 deviations of a weight in int8."""
    operand = _weight_operand(recipe)
    if operand.scaling != "learned":
        return None
    q = stored_weight(weight.float(), operand.format, operand.granularity, "exact")
    return nn.Parameter(q.scale.log2().flatten())


def learned_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learned scales of a model by their full names; they belong to its training and are no weights."""
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == LEARNED}


def fake_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    log_scale: Tensor | None,
    codes: Tensor | None,
    scale: Tensor | None,
    recipe: str,
) -> Tensor:
    """x [..., K] times weight [O, K] plus bias [O], both rounded by a fake recipe: [..., O] in the dtype of the weight.

    log_scale: as `LEARNED` says, or None. codes, scale: of `hold_fake`; None makes them here.
    """
    if codes is None or scale is None:
        codes, scale, *_ = hold_fake(weight, log_scale, recipe)
    return _FakeLinear.apply(x.to(weight.dtype), weight, bias, log_scale, codes, scale, recipe)  # type: ignore[no-any-return, no-untyped-call]


class _FakeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_scale: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        text: str,
    ) -> Tensor:
        output = recipe_of(text).output
        assert output is not None
        x_NK, right = x.reshape(-1, x.shape[-1]), _restored(codes, scale, text)
        kept: tuple[Tensor, Tensor | None]
        if output.left.wide:
            y_NO, kept = plain(x_NK, values(right, weight.dtype), bias), (x_NK, None)
        else:
            left = quantize(x_NK, output.left.format, output.left.granularity, "nearest-even", 0, output.left.scaling)
            y_NO, kept = scaled_matmul(left, right, output.accumulator, weight.dtype, bias), (left.codes, left.scale)
        ctx.save_for_backward(*kept, weight, log_scale, codes, scale)
        ctx.text, ctx.shape, ctx.bias_dtype = text, x.shape, None if bias is None else bias.dtype
        return y_NO.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, x_scale, weight, log_scale, codes, scale = ctx.saved_tensors
        output = recipe_of(ctx.text).output
        assert output is not None
        grad_NO, right = grad.reshape(-1, grad.shape[-1]), _restored(codes, scale, ctx.text)
        grad_x = grad_weight = grad_bias = grad_log = None
        if ctx.needs_input_grad[0]:
            grad_x = plain(grad_NO, values(right, weight.dtype).t()).view(ctx.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            left = output.left
            x_NK = x_codes
            if not left.wide:
                x_NK = values(Quantized(x_codes, x_scale, left.format, left.granularity, left.scaling), weight.dtype)
            grad_values = plain(grad_NO.t(), x_NK.t())
            limits = None if log_scale is None else scale
            grad_weight = straight_through(grad_values, weight, limits, right.format, right.granularity)
            if log_scale is not None:
                grad_scale = scale_gradient(grad_values, weight, codes, scale, right.format, right.granularity)
                grad_log = (grad_scale * scale * math.log(2.0)).flatten()  # d scale / d log2(scale)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = widen(grad_NO).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, grad_log, None, None, None


def _restored(codes: Tensor, scale: Tensor, recipe: str) -> Quantized:
    operand = _weight_operand(recipe)
    kind = "exact" if operand.scaling == "learned" else operand.scaling
    return Quantized(codes, scale, operand.format, operand.granularity, kind)


def _weight_operand(recipe: str) -> Operand:
    output = recipe_of(recipe).output
    assert output is not None
    return output.right


def _scales(operand: Operand) -> str:
    return "exact" if operand.scaling == "learned" else operand.scaling
