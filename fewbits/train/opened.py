"""A trained model opened for use: evaluation and generation, on any device, in any precision it runs."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from fewbits.checkpoint.hf import load
from fewbits.data.tokenizer import Tokenizer
from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.nn.packed import packed_layers
from fewbits.nn.prepare import prepare
from fewbits.nn.transformer import Transformer
from fewbits.precision.hardware import check, describe
from fewbits.precision.precision import Precision
from fewbits.train.execution import choose_device
from fewbits.train.layers import recorded_layers
from fewbits.train.state import load_learned_scales


def open_model(
    run: Path | str, device: str, precision: str | None
) -> tuple[Transformer, Tokenizer | None, Precision, torch.device]:
    """Model (in evaluation mode), tokenizer, precision and device for using what was trained.

    Raises FewbitsError, also for a quantized model that is asked for in another precision: it runs as it is stored."""
    place = torch.device(choose_device(device).value)
    asked = None if precision in (None, "auto") else Precision.parse(str(precision))
    check(asked or Precision.parse("fp32"), describe(place))
    model, tokenizer = load(Path(run))
    chosen = asked or stored_precision(model)
    if asked is not None and (packed := packed_layers(model)):
        scheme = next(iter(packed.values())).scheme
        raise FewbitsError(
            f"{run} is quantized ({scheme}) and runs as it is stored, not in {asked}. Leave the precision out, or open "
            "the checkpoint that it was made from."
        )
    if asked is not None:
        model = cast(Transformer, prepare(model, asked, layers=recorded_layers(run, asked)))
        load_learned_scales(model, run)
    return model.to(place).eval(), tokenizer, chosen, place


def stored_precision(model: Transformer) -> Precision:
    """The precision that computes in the dtype in which the weights are stored."""
    names = {torch.float64: "fp64", torch.bfloat16: "bf16-true", torch.float16: "fp16-true"}
    return Precision.parse(names.get(next(model.parameters()).dtype, "fp32"))


def running_precision(model: Transformer, chosen: Precision) -> str:
    """What to call the precision in which an opened model runs: for a quantized one its scheme and the dtype around it."""
    packed = packed_layers(model)
    around = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{next(iter(packed.values())).scheme}, in {Format.parse(around)}" if packed else str(chosen)
