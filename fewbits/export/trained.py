"""From quantization-aware training to real codes: the weights as they were multiplied in training, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fewbits.checkpoint.hf import Stored, build_model
from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.export.options import FORMATS, QuantizeOptions, granularity_text
from fewbits.export.quantized import Quantization, weight_errors
from fewbits.nn.fake import LEARNED, quantized_weight
from fewbits.nn.packed import Activations, PackedLinear, Scheme, replace_module
from fewbits.nn.prepare import prepare
from fewbits.nn.transformer import Transformer
from fewbits.numerics.quantize import Quantized
from fewbits.precision.precision import Precision
from fewbits.precision.recipe import Recipe
from fewbits.train.evaluate import run_config
from fewbits.train.state import load_learned_scales


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
def pack_trained(model: nn.Module) -> Quantization:
    """Replaces the layers of a model that was prepared with a fake recipe by packed ones of the same codes, in place; the
    model is for use then. Raises FewbitsError as `convert` and `scheme_of`."""
    quantized = convert(model)
    precision = cast(Any, model).fewbits_precision
    scheme = scheme_of(precision.recipe)
    rows: list[dict[str, Any]] = []
    layers = fake_layers(model)
    kept = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n not in layers]
    for name, q in quantized.items():
        layer = layers[name]
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        packed = PackedLinear.from_values(q.codes.float(), q.scale.to(weight.dtype), bias, scheme)
        replace_module(model, name, packed)
        before = weight.nbytes + (0 if bias is None else bias.nbytes)
        row = {"layer": name, "shape": list(weight.shape), "method": "trained"}
        errors = weight_errors(weight.float(), packed.weight.float(), None)
        rows.append({**row, **errors, "bytes": packed.bytes, "bytes_before": before})
    model.eval().requires_grad_(False)
    return Quantization(scheme, Choice(scheme.granularity, f"as it was trained, in {precision}"), kept, rows)


def scheme_of(recipe: Recipe) -> Scheme:
    """How the layers of a fake recipe are stored. Raises FewbitsError for one that no layout on disk holds."""
    if not recipe.fake or recipe.output is None:
        raise FewbitsError("This recipe is not one of quantization-aware training, so it says nothing about storing.")
    left, right = recipe.output.left, recipe.output.right
    activations: dict[tuple[str, str], Activations] = {
        ("int8", "full-range"): "int8",
        ("fp8_e4m3", "power-of-two"): "fp8",
    }
    kind = "none" if left.wide else activations.get((left.format.name, left.scaling))
    if kind is None or right.format.name not in FORMATS.values():
        raise FewbitsError(
            f"output={recipe.output} can be trained, but no checkpoint holds it: weights are stored in int8, int4, fp8, "
            "fp4 or binary, and activations rounded as int8/row/full-range or e4m3/row, or left in bf16."
        )
    return Scheme(right.format, granularity_text(right.granularity), kind).check()


def trained_precision(source: Path) -> Precision | None:
    """The precision of a run that trained for a quantized checkpoint; None for any other source."""
    config = run_config(source)
    if config is None or config.precision == "auto":
        return None
    precision = config.resolve_precision()
    return precision if precision.recipe.fake else None


def options_for(source: Path, options: QuantizeOptions) -> QuantizeOptions:
    """The options with what "auto" leaves open: what the run was trained for, or int8. Raises FewbitsError for options
    that contradict the precision of a run that was trained for a quantized checkpoint."""
    precision = trained_precision(source)
    if precision is None:
        return replace(options, format="int8" if options.format == "auto" else options.format)
    scheme = scheme_of(precision.recipe)
    name = next(short for short, full in FORMATS.items() if full == scheme.format.name and short != "auto")
    wanted = {
        "format": (options.format, "auto", name),
        "granularity": (options.granularity, "auto", scheme.granularity),
        "activations": (options.activations, "none", scheme.activations),
        "method": (options.method, "nearest", "nearest"),
        "dtype": (options.dtype, "bf16", "bf16"),
        "keep": (options.keep, ("head",), ("head",)),
    }
    for option, (given, left_open, trained) in wanted.items():
        same = given == trained or (option == "format" and FORMATS.get(str(given)) == scheme.format.name)
        if given != left_open and not same:
            shown = ",".join(given) if isinstance(given, tuple) else given
            raise FewbitsError(
                f"{source} was trained in {precision} and becomes the codes it was trained with ({scheme}), so "
                f"--{option} {shown} contradicts it. Leave it out, or quantize a run that was trained in bf16-mixed."
            )
    return replace(options, format=name, granularity=scheme.granularity, activations=scheme.activations)


def build_trained(source: Path, stored: Stored, precision: Precision) -> Transformer:
    """The model of a run as it was trained: prepared, with its learned scales, in evaluation mode."""
    config = run_config(source)
    model = prepare(build_model(stored), precision, [] if config is None else config.keep_patterns())
    load_learned_scales(model, stored.folder)
    return cast(Transformer, model.eval())
