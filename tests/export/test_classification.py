"""Accuracy, precision, recall and F1 as scikit-learn defines them."""

from __future__ import annotations

import pytest
import torch

from fewbits.errors import FewbitsError
from fewbits.export.classification import classification_report, count_answers, counts_report


def test_scores_of_a_small_case_worked_by_hand():
    # labels 0 0 0 1 1 2, answers 0 0 1 1 2 0: class 3 does not occur and counts nowhere
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 2, 0]), 4).float()
    found = classification_report(logits, labels)
    assert found["accuracy"] == 3 / 6 and found["samples"] == 6 and sorted(found["classes"]) == [0, 1, 2]
    assert found["classes"][0] == {"precision": 2 / 3, "recall": 2 / 3, "f1": pytest.approx(2 / 3), "support": 3}
    assert found["classes"][1] == {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2}
    assert found["classes"][2] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert found["macro"]["f1"] == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert found["weighted"]["precision"] == pytest.approx((3 * 2 / 3 + 2 / 2) / 6)


def test_the_same_numbers_as_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = torch.randn(500, 7), torch.randint(0, 6, (500,))
    found = classification_report(logits, labels)
    for average in ("macro", "weighted"):
        scores = metrics.precision_recall_fscore_support(labels, logits.argmax(-1), average=average, zero_division=0)
        assert [found[average][name] for name in ("precision", "recall", "f1")] == pytest.approx(list(scores[:3]))


def test_ignored_labels_are_left_out_and_batches_add_up():
    logits, labels = torch.randn(2, 50, 5), torch.randint(0, 5, (2, 50))
    labels[:, ::3] = -100
    whole = classification_report(logits, labels)
    assert whole["samples"] == int((labels != -100).sum())
    parts = []
    for row, answers in zip(labels, logits.argmax(-1), strict=True):
        parts.append(torch.stack(count_answers(answers[row != -100], row[row != -100], 5)))
    assert counts_report(*(parts[0] + parts[1])) == whole
    assert classification_report(logits, torch.full((2, 50), -100))["accuracy"] is None


def test_shapes_and_labels_that_do_not_fit_are_refused():
    with pytest.raises(FewbitsError, match="do not belong together"):
        classification_report(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(FewbitsError, match="A label is 2; with 2 logits, labels lie in 0 to 1"):
        classification_report(torch.zeros(1, 2), torch.tensor([2]))
