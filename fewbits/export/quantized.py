"""A model with packed layers in place of linear ones: which method where, and what it did to each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.export.calibration import Inputs, walk_blocks
from fewbits.export.folding import Factors, fold_block
from fewbits.export.methods import Rounded, gptq, output_error, round_weight, scales
from fewbits.export.options import DTYPES, QuantizeOptions, linear_layers
from fewbits.nn.packed import PackedLinear, Scheme, refuse_packed, replace_module
from fewbits.nn.transformer import Block, Transformer
from fewbits.numerics.measure import cosine, sqnr


@dataclass
class Quantization:
    """What `quantize_model` did."""

    scheme: Scheme
    granularity: Choice
    kept: list[str]
    """Linear layers that stayed as they were."""
    layers: list[dict[str, Any]]
    """One row a layer: name, shape, method, sqnr_db, cosine, output_sqnr_db (None without a text), bytes, bytes_before."""


@torch.no_grad()
def quantize_model(
    model: Transformer, options: QuantizeOptions, batches: Sequence[Mapping[str, Tensor]] = ()
) -> Quantization:
    """Quantizes the linear layers of `model` in place, block by block; the rest is rounded to `options.dtype`.

    batches: texts to calibrate on, as `Transformer.loss_sum` takes them; needed by gptq and awq, and with any method they
    make the errors of the outputs known. Model and batches may be on any device.

    Raises FewbitsError, before anything is changed, for options that do not fit the model, weights that are not finite, a
    model that is quantized already, and a method that misses its text.
    """
    options.check()
    refuse_packed(model, "be quantized again")
    refuse_not_finite(model)
    if options.plain:
        raise FewbitsError(f"{options.format} needs no codes: store the checkpoint in it instead.")
    layers, kept = linear_layers(model, options.keep)
    scheme, granularity = options.scheme_for(layers.items())
    if options.calibrated and not batches:
        raise FewbitsError(f"Method {options.method} needs a text to calibrate on. Give one, or use nearest or mse.")
    worker = _Worker(model, options, scheme, set(layers))
    model.eval()
    if batches:
        walk_blocks(model, batches, worker.visit)
    else:
        for i, block in enumerate(model.blocks):
            worker.visit(i, block, {})  # type: ignore[arg-type]
    for name in layers:
        if not name.startswith("blocks."):  # the head sees no block's inputs: its scales are searched instead
            worker.quantize(name, layers[name], None, None)
    model.to(DTYPES[options.dtype])
    model.requires_grad_(False)
    return Quantization(scheme, granularity, kept, worker.rows)


def refuse_not_finite(model: nn.Module) -> None:
    """Raises FewbitsError naming the first tensor of the model that holds a NaN or an infinity, and where."""
    for name, parameter in model.named_parameters():
        wrong = ~torch.isfinite(parameter.detach())
        if bool(wrong.any()):
            place = [int(i) for i in wrong.nonzero()[0]]
            raise FewbitsError(
                f"'{name}' holds {float(parameter.detach()[tuple(place)])} at {place} ({int(wrong.sum())} in all), so it has "
                "no scale. Quantize a sound checkpoint."
            )


class _Worker:
    """Quantizes layers one after the other and keeps a row about each."""

    def __init__(self, model: Transformer, options: QuantizeOptions, scheme: Scheme, names: set[str]):
        self.model, self.options, self.scheme, self.names = model, options, scheme, names
        self.dtype = DTYPES[options.dtype]
        self.rows: list[dict[str, Any]] = []

    def visit(self, i: int, block: Block, inputs: dict[str, Inputs]) -> None:
        """All layers of block i."""
        prefix = f"blocks.{i}."
        layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear) and prefix + n in self.names}
        originals = {name: layer.weight.detach().float().clone() for name, layer in layers.items()}
        factors: dict[str, Factors] = {}
        if self.options.method == "awq":
            factors = fold_block(block, layers, inputs, self.scheme, self.dtype)
        for name, layer in layers.items():
            self.quantize(prefix + name, layer, originals[name], inputs.get(name), factors.get(name))

    def quantize(
        self,
        name: str,
        layer: nn.Linear,
        original: Tensor | None,
        inputs: Inputs | None,
        factors: Factors | None = None,
    ) -> None:
        """One layer: rounded, replaced, measured against the weight it had before anything was folded."""
        weight = layer.weight.detach().float()
        original = weight.clone() if original is None else original
        factors = factors or Factors()
        rounded = self._round(weight, inputs, factors)
        bias = None if layer.bias is None else layer.bias.detach().to(self.dtype)
        packed = PackedLinear.from_values(
            rounded.values,
            rounded.scale,
            bias,
            self.scheme,
        )
        replace_module(self.model, name, packed)
        effective = packed.weight.float() / factors.columns / factors.rows
        row: dict[str, Any] = {"layer": name, "shape": list(weight.shape), "method": self._method(inputs)}
        if self.options.method == "awq":
            row["alpha"] = factors.alpha
        before = weight.numel() * layer.weight.element_size() + (0 if layer.bias is None else layer.bias.nbytes)
        self.rows.append(
            {**row, **weight_errors(original, effective, inputs), "bytes": packed.bytes, "bytes_before": before}
        )

    def _method(self, inputs: Inputs | None) -> str:
        return self.options.method if inputs is not None or not self.options.calibrated else "mse"

    def _round(self, weight: Tensor, inputs: Inputs | None, factors: Factors) -> Rounded:
        format, granularity, method = self.scheme.format, self.scheme.granularity, self._method(inputs)
        if method == "gptq" and inputs is not None:
            return gptq(weight, inputs.hessian, format, granularity, self.dtype, self.options.act_order)
        importance = None
        if method == "awq" and inputs is not None:
            importance = inputs.hessian.diagonal() / (factors.columns * factors.columns)
        scale = scales(weight, format, granularity, self.dtype, method != "nearest", importance)
        return round_weight(weight, scale, format)


def weight_errors(original: Tensor, effective: Tensor, inputs: Inputs | None) -> dict[str, float | None]:
    """sqnr_db and cosine of a weight; output_sqnr_db, over the inputs of the layer, where they are known. None where there
    is no noise, or no signal."""
    output = None
    if inputs is not None:
        signal, noise = (float(output_error(d, inputs.hessian)) for d in (original, effective - original))
        output = 10.0 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
    weight = float(sqnr(original, effective))
    return {
        "sqnr_db": weight if math.isfinite(weight) else None,
        "cosine": float(cosine(original, effective)),
        "output_sqnr_db": output,
    }
