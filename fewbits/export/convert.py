"""From quantization-aware training to real codes: the weights as they were multiplied in training, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.nn.fake import LEARNED, quantized_weight
from fewbits.nn.lowbit import HeldWeight
from fewbits.numerics.quantize import Quantized


@torch.no_grad()
def convert(model: nn.Module) -> dict[str, Quantized]:
    """The weight of every layer that a fake recipe takes as codes and scales, by the layer's name.

    They are those of the forward of training, from the working weights and the scales that were learned or follow from
    them: nothing is calibrated, and the scales are numbers of the working format, in which they are stored. Formats and
    granularity are those of the precision.

    Raises FewbitsError for a model that was not prepared for quantization-aware training, and for weights that hold NaN
    or infinity.
    """
    layers = fake_layers(model)
    if not layers:
        precision = getattr(model, "fewbits_precision", None)
        raise FewbitsError(
            f"The model {'is not prepared' if precision is None else f'is prepared as {precision}'}, so it has no scales that "
            "it was trained with. Prepare it with int8-qat, int4-qat, binary-qat or fp8-qat, or quantize it after training."
        )
    for name, layer in layers.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise FewbitsError(f"'{name}.weight' holds NaN or infinity, so it has no scale. Use a sound checkpoint.")
    return {
        name: quantized_weight(layer.weight, getattr(layer, LEARNED, None), layer.recipe)
        for name, layer in layers.items()
    }


def fake_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a prepared model that multiply by a fake recipe, by name."""
    return {name: module for name, module in model.named_modules() if getattr(module, "fake", False)}


@torch.no_grad()
def use(model: nn.Module, quantized: Mapping[str, Quantized]) -> nn.Module:
    """Makes a model that was prepared with a fake recipe multiply these codes, in place: its weights of those layers are
    emptied, so that nothing else can. For evaluation and generation. Raises FewbitsError for names that do not fit."""
    layers = fake_layers(model)
    if set(layers) != set(quantized):
        odd = sorted(set(layers) ^ set(quantized))
        raise FewbitsError(f"Codes and layers do not fit: {odd[0]} is only in one of them. Convert this very model.")
    for name, layer in layers.items():
        layer.held = HeldWeight(quantized[name].codes, quantized[name].scale)
        layer.weight.requires_grad_(False).zero_()
    return model.eval()
