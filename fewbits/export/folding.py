"""Scaling input channels up before rounding, undone in the layer before: what awq does to a block, exactly but for rounding.

    norm -> layers        norm.weight / s, norm.bias / s                   columns * s
    up -> down (SwiGLU)   rows of up / s, its bias too                     columns * s
    values -> output      rows of the values in qkv / s, their bias too    columns * s

A GELU, and values that several query heads share, do not let a factor through: such layers keep their columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.export.calibration import Inputs
from fewbits.export.methods import awq_channels
from fewbits.nn.packed import Scheme
from fewbits.nn.transformer import Block


@dataclass
class Factors:
    """What the weight of a layer was multiplied by."""

    columns: Tensor = field(default_factory=lambda: torch.ones(()))
    """fp32 [K], or 0-d, which goes with every device."""
    rows: Tensor = field(default_factory=lambda: torch.ones(()))
    """fp32 [O, 1], or 0-d."""
    alpha: float = 0.0
    """The exponent that was chosen."""


def fold_block(
    block: Block, layers: Mapping[str, nn.Linear], inputs: Mapping[str, Inputs], scheme: Scheme, dtype: torch.dtype
) -> dict[str, Factors]:
    """Folds the scales that awq finds into `block`, in place; what happened to each of `layers` (those to be quantized)."""
    factors = {name: Factors() for name in layers}

    def search(names: list[str]) -> Tensor | None:
        """The scales of layers that share an input, multiplied into them; None when one of them is kept."""
        if not all(name in layers for name in names):
            return None
        shared = inputs[names[0]]
        weights = [layers[name].weight.detach().float() for name in names]
        s, alpha = awq_channels(weights, shared.hessian, shared.magnitude, scheme.format, scheme.granularity, dtype)
        for name in names:
            layers[name].weight.data.mul_(s)
            factors[name].columns, factors[name].alpha = s, alpha
        return s

    norm: Any
    for norm, names in ((block.norm1, ["attention.qkv"]), (block.norm2, ["mlp.up", *["mlp.gate"] * _gated(block)])):
        if (s := search(names)) is not None:
            norm.weight.data.div_(s)
            if getattr(norm, "bias", None) is not None:
                norm.bias.data.div_(s)
    if "attention.qkv" in layers and block.attention.heads == block.attention.kv_heads:
        _divide_rows("attention.qkv", search(["attention.output"]), layers, factors)
    if "mlp.up" in layers and _gated(block):
        _divide_rows("mlp.up", search(["mlp.down"]), layers, factors)
    return factors


def _gated(block: Block) -> bool:
    return block.mlp.gate is not None


def _divide_rows(name: str, s: Tensor | None, layers: Mapping[str, nn.Linear], factors: dict[str, Factors]) -> None:
    """The last len(s) rows of a layer divided by s: all of `up`, the values of `qkv`."""
    if s is None:
        return
    layer = layers[name]
    rows = torch.ones(layer.out_features, device=s.device)
    rows[-len(s) :] = 1.0 / s
    layer.weight.data.mul_(rows.unsqueeze(1))
    if layer.bias is not None:
        layer.bias.data.mul_(rows)
    factors[name].rows = rows.unsqueeze(1)
