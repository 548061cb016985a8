"""Packing loses no prediction, mixes no documents, and equals padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.data.packing import document_ids, pack, pad
from fewbits.errors import FewbitsError

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=20).filter(lambda lengths: max(lengths) > 1)


def _documents(lengths: list[int]) -> list[np.ndarray]:
    """Token 1000 * d + t, so that each token says where it is from."""
    return [1000 * number + np.arange(length) for number, length in enumerate(lengths)]


def _predictions(rows: dict[str, Tensor]) -> list[tuple[int, int, int]]:
    real = rows["labels"] != -100
    return sorted(zip(*(rows[key][real].tolist() for key in ("input_ids", "labels", "positions")), strict=True))


@given(lengths=LENGTHS, context=st.integers(1, 16))
@settings(max_examples=80, deadline=None)
def test_packed_and_padded_rows_make_the_same_predictions_each_once(lengths: list[int], context: int) -> None:
    documents = _documents(lengths)
    packed, padded = pack(documents, context), pad(documents, context)
    expected = sorted((int(d[t]), int(d[t + 1]), t % context) for d in documents for t in range(len(d) - 1))
    assert _predictions(packed) == _predictions(padded) == expected
    assert len(packed["labels"]) <= len(padded["labels"])


@given(lengths=LENGTHS, context=st.integers(1, 16))
@settings(max_examples=80, deadline=None)
def test_a_packed_row_never_mixes_documents(lengths: list[int], context: int) -> None:
    rows = pack(_documents(lengths), context, padding=7)
    assert all(value.shape == rows["labels"].shape for value in rows.values()) and rows["labels"].shape[1] == context
    free = rows["labels"] == -100
    assert torch.equal(free, rows["documents"] == -1) and (rows["input_ids"][free] == 7).all()
    for row in range(len(free)):
        for number in rows["documents"][row].unique().tolist():
            inside = rows["documents"][row] == number
            assert rows["positions"][row][inside].tolist() == list(range(int(inside.sum())))
            if number >= 0:
                assert len((rows["input_ids"][row][inside] // 1000).unique()) == 1
                assert torch.equal(rows["labels"][row][inside] // 1000, rows["input_ids"][row][inside] // 1000)


def test_rows_are_filled() -> None:
    rows = pack(_documents([9, 5, 5, 3, 3, 3]), context=8)
    assert len(rows["labels"]) == 3 and int((rows["labels"] == -100).sum()) == 2  # 22 predictions in 24 places


def test_documents_that_are_empty_in_the_stream_are_counted_too() -> None:
    documents, positions = document_ids(np.array([0, 4, 4, 6]), np.array([2]), 6)
    assert documents.tolist() == [[0, 0, 2, 2, 3, 3]] and positions.tolist() == [[0, 1, 0, 1, 0, 1]]


def test_nothing_to_predict_is_one_sentence() -> None:
    with pytest.raises(FewbitsError, match="nothing to predict"):
        pack(_documents([1, 0, 1]), 8)
    with pytest.raises(FewbitsError, match="Choose at least 1"):
        pack(_documents([9]), 0)
