"""The least time that each part of a training step can take on a device: operations over the measured rate of their
format, bytes over the measured rate of a copy.

They are floors of the parts as a step without waste would do them: every matrix multiplied once, every activation read and
written once by one fused pass, every state of the optimizer once. A part can still be better than its floor, by being
fused into another one: then its bytes are not moved at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from fewbits.formats import Format
from fewbits.kernels.dispatch import matmul_execution
from fewbits.lab.ceilings import Ceilings
from fewbits.nn.transformer import ModelConfig, Transformer
from fewbits.precision.hardware import Hardware, native_matmul
from fewbits.precision.precision import Precision
from fewbits.precision.recipe import MATMULS, Recipe
from fewbits.train.attribution import (
    ATTENTION_PART,
    COPIES,
    ELEMENTWISE,
    GAPS,
    LOSS_PART,
    MATMUL,
    OPTIMIZER,
    QUANTIZATION,
)


class Floor(NamedTuple):
    """The least milliseconds of a part, and what they are made of."""

    ms: float
    why: str


class Linears(NamedTuple):
    """Linear layers of one shape that multiply by one recipe (canonical text, "" in the working format)."""

    inputs: int
    outputs: int
    recipe: str
    layers: int


def linears_of(model: Transformer) -> list[Linears]:
    """The linear layers of a prepared model's blocks, as they multiply."""
    layers = (layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear))
    counts = Counter((layer.in_features, layer.out_features, getattr(layer, "recipe", "")) for layer in layers)
    return [Linears(*shape, count) for shape, count in counts.items()]


def floors(
    model: ModelConfig,
    tokens: int,
    precision: Precision,
    hardware: Hardware,
    device: torch.device,
    ceilings: Ceilings,
    optimizer_bytes: int,
    linears: Sequence[Linears],
) -> dict[str, Floor]:
    """Floor by part of a step over `tokens` tokens; optimizer_bytes: what clipping and update read and write. linears: what
    the layers of blocks multiply by."""
    native = matmul_execution(precision.operand, device).value == "native"
    operand = precision.operand if native else Format.parse("fp32")
    width = precision.working.bits // 8
    narrow = 1 if precision.head_recipe else width  # a gradient that is made as codes is never written otherwise
    return {
        MATMUL: _matmuls(model, tokens, precision, linears, hardware, operand, ceilings),
        ATTENTION_PART: _attention(model, tokens, operand, ceilings),
        LOSS_PART: _moved(
            tokens * model.vocab_size * (width + narrow),
            f"{tokens:,} x {model.vocab_size:,} logits read once, their gradient written once, {width} and {narrow} bytes each",
            ceilings,
        ),
        ELEMENTWISE: _moved(
            elementwise_bytes(model, tokens, width), "norms, activation and residuals in one pass each", ceilings
        ),
        QUANTIZATION: _moved(
            quantized_bytes(model, tokens, precision, width, linears),
            "operands read once, 1 byte each written",
            ceilings,
        ),
        OPTIMIZER: _moved(
            optimizer_bytes, "gradients twice (norm, update), weights, masters and moments in and out", ceilings
        ),
        COPIES: Floor(0.0, "nothing has to be copied"),
        GAPS: Floor(0.0, "the device never has to wait"),
    }


def _moved(count: int, why: str, ceilings: Ceilings) -> Floor:
    return Floor(1e3 * count / ceilings.copy, f"{why}: {count / 1e9:,.3g} GB at {ceilings.copy / 1e9:,.4g} GB/s")


def _matmuls(
    model: ModelConfig,
    tokens: int,
    precision: Precision,
    linears: Sequence[Linears],
    hardware: Hardware,
    operand: Format,
    ceilings: Ceilings,
) -> Floor:
    """Three matmuls for every linear layer, each in the format it runs in; the head in the working one, or fp8."""
    multiplied = [(precision.head_recipe, model.vocab_size * model.n_embd)]
    multiplied += [(_recipe(alike), alike.layers * alike.inputs * alike.outputs) for alike in linears]
    flops: dict[str, float] = {}
    for recipe, weights in multiplied:
        for name in MATMULS:
            matmul = getattr(recipe, name)
            few = matmul is not None and native_matmul(matmul, hardware).value
            format = matmul.left.format.name if few else operand.name
            flops[format] = flops.get(format, 0.0) + 2.0 * tokens * weights
    seconds = sum(count / ceilings.matmul_rate(format) for format, count in flops.items())
    shown = " and ".join(
        f"{count / 1e12:,.3g} TFLOP in {format} at {ceilings.matmul_rate(format) / 1e12:,.4g} TFLOP/s"
        for format, count in flops.items()
    )
    return Floor(1e3 * seconds, shown)


def _attention(model: ModelConfig, tokens: int, operand: Format, ceilings: Ceilings) -> Floor:
    """Causal: half of 12 L D T operations a token, forward and backward, without recomputing the scores."""
    flops = 6.0 * model.n_layer * model.n_embd * model.context * tokens
    rate = ceilings.matmul_rate(operand.name)
    return Floor(
        1e3 * flops / rate, f"{flops / 1e12:,.3g} TFLOP (causal) in {operand.name} at {rate / 1e12:,.4g} TFLOP/s"
    )


def elementwise_bytes(model: ModelConfig, tokens: int, width: int) -> int:
    """Bytes that norms, residuals, activation and rotary positions move, forward and backward, each in one pass.

    A block has two passes that add a branch to the stream and normalize the sum (2 D read, 2 D written), two of their
    backward (3 D read, 1 D written), the activation (in and out) and its backward (in, gradient, out); the embedding
    reads and writes D both ways.
    """
    D, ups = model.n_embd, 2 if model.activation == "swiglu" else 1
    norms = 2 * 4 * D + 2 * 4 * D
    activation = (ups + 1) * model.ff + (2 * ups + 1) * model.ff
    rotary = 4 * (model.n_head + model.kv_heads) * model.head_dim if model.positions == "rope" else 0
    return tokens * width * (model.n_layer * (norms + activation + rotary) + 4 * D)


def quantized_bytes(
    model: ModelConfig, tokens: int, precision: Precision, width: int, linears: Sequence[Linears]
) -> int:
    """Bytes that quantizing the operands of few-bit matmuls moves: activations, gradients of outputs, weights, each where a
    matmul wants it; of an fp8 head, whose gradient the loss makes as codes, hidden states and weight."""
    elements = 0
    for alike in linears:
        output, grad_input, grad_weight = (matmul is not None for matmul in _recipe(alike).matmuls)
        activation = tokens * alike.inputs * (output or grad_weight)
        gradient = tokens * alike.outputs * (grad_input or grad_weight)
        weight = alike.inputs * alike.outputs * (output or grad_input)
        elements += alike.layers * (activation + gradient + weight)
    if precision.head_recipe:
        elements += (tokens + model.vocab_size) * model.n_embd
    return (width + 1) * elements


def _recipe(alike: Linears) -> Recipe:
    return Recipe.parse(alike.recipe) if alike.recipe else Recipe()
