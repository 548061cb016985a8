"""A trained model opened for use: evaluation and generation, on any device, in any precision it runs."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from fewbits.checkpoint.hf import load
from fewbits.data.tokenizer import Tokenizer
from fewbits.nn.prepare import prepare
from fewbits.nn.transformer import Transformer
from fewbits.precision.hardware import check, describe
from fewbits.precision.precision import Precision
from fewbits.train.execution import choose_device


def open_model(
    run: Path | str, device: str, precision: str | None
) -> tuple[Transformer, Tokenizer | None, Precision, torch.device]:
    """Model (in evaluation mode), tokenizer, precision and device for using what was trained. Raises FewbitsError."""
    place = torch.device(choose_device(device).value)
    asked = None if precision in (None, "auto") else Precision.parse(str(precision))
    check(asked or Precision.parse("fp32"), describe(place))
    model, tokenizer = load(Path(run))
    chosen = asked or stored_precision(model)
    if asked is not None:
        model = cast(Transformer, prepare(model, asked))
    return model.to(place).eval(), tokenizer, chosen, place


def stored_precision(model: Transformer) -> Precision:
    """The precision that computes in the dtype in which the weights are stored."""
    names = {torch.float64: "fp64", torch.bfloat16: "bf16-true", torch.float16: "fp16-true"}
    return Precision.parse(names.get(next(model.parameters()).dtype, "fp32"))
