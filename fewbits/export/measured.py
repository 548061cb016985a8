"""What quantizing cost and saved: held-out loss before and after on the same batches, bytes, tokens a second."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from fewbits.export.classification import count_answers, counts_report
from fewbits.lab.verdict import half_width
from fewbits.nn.head import loss_sum
from fewbits.nn.linear import linear
from fewbits.nn.transformer import Transformer
from fewbits.numerics.loss import IGNORE
from fewbits.train.evaluate import evaluating

ROUNDS, TOKENS = 3, 8  # generation is timed in turns, so that a busy neighbour hurts all alike


def measure(
    model: Transformer, batches: Iterable[Mapping[str, Tensor]], token_bytes: npt.NDArray[Any] | None
) -> dict[str, Any]:
    """Held-out results: loss (nats a token), perplexity, bits_per_byte, tokens, and of the most likely next token
    accuracy, precision, recall and f1 (means over tokens, weighted by how often each occurs); batch_losses, one a batch.

    batches: as `fewbits.train.evaluate.evaluate`."""
    lengths = None if token_bytes is None else torch.as_tensor(token_bytes).to(torch.int64)
    losses, tokens, counts = [], [], torch.zeros(3, model.config.vocab_size, dtype=torch.int64)
    size = 0
    for batch in batches:
        real = batch["labels"][batch["labels"] != IGNORE].cpu()
        if not real.numel():
            continue
        loss, answers = _one_pass(model, batch)
        losses.append(loss / real.numel())
        tokens.append(real.numel())
        counts += answers
        size += 0 if lengths is None else int(lengths[real].sum())
    total = math.fsum(loss * count for loss, count in zip(losses, tokens, strict=True))
    mean, report = (total / sum(tokens) if tokens else math.nan), counts_report(*counts)
    return {
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "bits_per_byte": total / math.log(2) / size if size else None,
        "tokens": sum(tokens),
        "accuracy": report["accuracy"],
        **report["weighted"],
        "batch_losses": losses,
    }


def _one_pass(model: Transformer, batch: Mapping[str, Tensor]) -> tuple[float, Tensor]:
    """The sum of the losses over the real targets of a batch, as `Transformer.loss_sum` gives it, and right, answered and
    support of every token [3, V]; for those the logits of one row at a time are held."""
    place = next(model.parameters()).device
    moved = {key: value.to(place) for key, value in batch.items()}
    counts = torch.zeros(3, model.config.vocab_size, dtype=torch.int64)
    with evaluating(model):
        hidden = model.hidden(moved["input_ids"], moved.get("documents"), moved.get("positions"))
        total = loss_sum(hidden, model.head_weight, moved["labels"], model.tf32, None)
        for row, labels in zip(hidden, moved["labels"], strict=True):
            real = labels != IGNORE
            answers = linear(row[real], model.head_weight, None, model.tf32).argmax(-1)
            counts += torch.stack(count_answers(answers, labels[real], model.config.vocab_size)).cpu()
    return float(total), counts


def paired_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Relative difference of the loss and its 95 % t-interval over batches, paired: {"mean", "interval", "batches"}.

    The mean is that of the whole (what `loss` says), the spread that of the batches; the interval is None for fewer than
    two. Neighbouring windows of a text are not independent, so take it for the precision of this text, not of any text."""
    pairs = list(zip(before["batch_losses"], after["batch_losses"], strict=True))
    mean = (after["loss"] - before["loss"]) / before["loss"]
    differences = [(b - a) / before["loss"] for a, b in pairs]
    if len(pairs) < 2 or not all(map(math.isfinite, differences)):
        return {"mean": mean, "interval": None, "batches": len(pairs)}
    half = half_width(statistics.stdev(differences), len(pairs))
    return {"mean": mean, "interval": [mean - half, mean + half], "batches": len(pairs)}


def generation_speed(models: Mapping[str, Transformer], window: Tensor) -> dict[str, float]:
    """Tokens a second of greedy generation after `window` (ids [T], at most the context), by the name of each model.

    Each token is one forward pass over the whole window, as `fewbits generate` does it. The median of rounds in turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for round in range(ROUNDS + 1):
        for name, model in models.items():
            spent = _generate(model, window, TOKENS if round else 1)
            if round:  # the first warms up
                times[name].append(spent)
    return {name: TOKENS / statistics.median(found) for name, found in times.items()}


def _generate(model: Transformer, window: Tensor, tokens: int) -> float:
    """Seconds for so many tokens."""
    ids = window.to(next(model.parameters()).device)
    with evaluating(model):
        start = time.perf_counter()
        for _ in range(tokens):
            hidden = model.hidden(ids[-model.config.context :].unsqueeze(0))[:, -1]
            chosen = linear(hidden, model.head_weight, None, model.tf32)[0].argmax()
            ids = torch.cat((ids, chosen.unsqueeze(0)))
        int(ids[-1])  # waits for the device
        return time.perf_counter() - start
