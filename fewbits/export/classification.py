"""How well classes are told apart: accuracy, precision, recall and F1, from logits and labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.numerics.loss import IGNORE


def classification_report(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """What the most likely classes are worth against labels.

    logits: [..., C], any float dtype; labels: [...] integers in 0 .. C - 1, -100 is left out. Returns accuracy, the means
    over classes of precision, recall and f1 ("macro"; "weighted" by how often a class is a label), "samples", and
    "classes": {class: {precision, recall, f1, support}} for those that occur as label or as answer. What would be 0 / 0
    is 0. Without samples everything is None. As scikit-learn defines them.

    Raises FewbitsError for shapes that do not belong together and labels that are no class.

    >>> found = classification_report(torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2]))
    >>> found["accuracy"], round(found["macro"]["f1"], 4), found["classes"][2]["recall"]
    (0.75, 0.7778, 0.5)
    """
    if logits.ndim < 2 or logits.shape[:-1] != labels.shape:
        raise FewbitsError(
            f"logits {list(logits.shape)} and labels {list(labels.shape)} do not belong together; give logits "
            "[..., classes] and labels of the same shape without the last dimension."
        )
    C, real = logits.shape[-1], labels != IGNORE
    truth = labels[real].long()
    if truth.numel() and not (int(truth.min()) >= 0 and int(truth.max()) < C):
        raise FewbitsError(
            f"A label is {int(truth.max())}; with {C} logits, labels lie in 0 to {C - 1}, or are {IGNORE}."
        )
    return counts_report(*count_answers(logits[real].argmax(-1), truth, C))


def count_answers(answers: Tensor, truth: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(right, answered, support), int64 [classes] each: counts that can be summed over batches."""
    right = torch.bincount(truth[answers == truth], minlength=classes)
    return right, torch.bincount(answers, minlength=classes), torch.bincount(truth, minlength=classes)


def counts_report(right: Tensor, answered: Tensor, support: Tensor) -> dict[str, Any]:
    """As `classification_report`, from the counts of `count_answers`."""
    samples = int(support.sum())
    if not samples:
        empty = {"precision": None, "recall": None, "f1": None}
        return {"accuracy": None, "macro": empty, "weighted": dict(empty), "samples": 0, "classes": {}}
    present = ((answered + support) > 0).nonzero().flatten()
    hits, given, real = (counts[present].double() for counts in (right, answered, support))
    scores = {
        "precision": hits / given.clamp(min=1),
        "recall": hits / real.clamp(min=1),
        "f1": 2 * hits / (given + real),
    }
    classes = {
        int(c): {**{name: float(score[i]) for name, score in scores.items()}, "support": int(real[i])}
        for i, c in enumerate(present)
    }
    return {
        "accuracy": float(hits.sum()) / samples,
        "macro": {name: float(score.mean()) for name, score in scores.items()},
        "weighted": {name: float((score * real).sum()) / samples for name, score in scores.items()},
        "samples": samples,
        "classes": classes,
    }
