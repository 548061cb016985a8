"""How good a model is on text it has not seen: loss in nats a token, perplexity, bits per byte of text.

Evaluation runs without gradients or dropout, and never through a callable compiled for training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewbits.numerics.loss import IGNORE


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within: evaluation mode, no gradients. The mode of the model is put back afterwards."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def evaluate(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], token_bytes: np.ndarray | Tensor | None = None
) -> dict[str, Any]:
    """Mean loss over the real targets of `batches`: {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}.

    Args:
        model: has `loss_sum(micro_batch)`, the sum of losses in nats, as `fewbits.nn.transformer.Transformer`.
        batches: {"input_ids", "labels", ...} int64 [B, T], labels aligned, -100 ignored; moved to the model's device.
        token_bytes: int [V], bytes of text that each token stands for (0 for special tokens, whose loss still counts);
            without it "bits_per_byte" is None.

    Every value is None when there is no target at all.
    """
    device = next(model.parameters()).device
    sums: list[Tensor] = []
    tokens = count = 0
    lengths = None if token_bytes is None else torch.as_tensor(token_bytes).to(torch.int64)
    loss_sum: Any = model.loss_sum
    with evaluating(model):
        for batch in batches:
            real = batch["labels"][batch["labels"] != IGNORE].cpu()
            tokens += real.numel()
            count += 0 if lengths is None else int(lengths[real].sum())
            sums.append(loss_sum({key: value.to(device) for key, value in batch.items()}).double())
    if not tokens:
        return {"loss": None, "perplexity": None, "bits_per_byte": None, "tokens": 0, "bytes": 0}
    total = float(torch.stack(sums).sum())
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": total / math.log(2) / count if count else None,
        "tokens": tokens,
        "bytes": count,
    }
