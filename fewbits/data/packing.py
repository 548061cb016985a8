"""Rows that hold several documents: which token belongs to which, at which position, and what may be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.numerics.loss import IGNORE

NO_DOCUMENT = -1  # the document id of padding; padding sees padding only

Array = npt.NDArray[Any]


def document_ids(starts: Array, first: Array, length: int) -> tuple[Array, Array]:
    """Which document each token of some windows belongs to, and its position within that document.

    starts: int64 [documents], ascending positions in the token stream at which documents begin.
    first: int64 [B], where each window begins in the stream. length: T, tokens of a window.
    Returns documents int32 [B, T], counted from 0 in each window, and positions int64 [B, T], which restart at each
    document (and at the window's start for the document that is under way there).
    """
    index = first[:, None] + np.arange(length, dtype=np.int64)
    number = np.searchsorted(starts, index, side="right") - 1
    begin = np.where(number >= 0, starts[np.maximum(number, 0)], 0) if len(starts) else np.zeros_like(index)
    positions = index - np.maximum(begin, first[:, None])
    return (number - number[:, :1]).astype(np.int32), positions.astype(np.int64)


def pack(documents: Sequence[Array], context: int, padding: int = 0) -> dict[str, Tensor]:
    """Documents packed into as few rows of `context` tokens as first-fit finds, longest first; every prediction once.

    documents: 1-D integer arrays; n tokens make n - 1 predictions, so documents below two tokens are left out, and
    those above context + 1 are cut into parts that overlap by one token. padding: the id that fills what stays free.
    Returns input_ids, labels int64 [B, T], documents int32 [B, T], positions int64 [B, T]. Labels are aligned with the
    inputs and never cross a document; padding has label -100 and document -1.
    """
    parts = sorted(_parts(documents, context), key=len, reverse=True)
    rows: list[list[Array]] = []
    free: list[int] = []
    for part in parts:
        need = len(part) - 1
        row = next((index for index, space in enumerate(free) if space >= need), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(context)
        rows[row].append(part)
        free[row] -= need
    return _rows(rows, context, padding)


def pad(documents: Sequence[Array], context: int, padding: int = 0) -> dict[str, Tensor]:
    """The same predictions as `pack`, with one document (or part) in each row and padding behind it."""
    return _rows([[part] for part in _parts(documents, context)], context, padding)


def _parts(documents: Sequence[Array], context: int) -> list[Array]:
    if context < 1:
        raise FewbitsError(f"A context of {context} tokens holds nothing. Choose at least 1.")
    found = []
    for document in documents:
        for begin in range(0, len(document) - 1, context):
            found.append(np.asarray(document[begin : begin + context + 1], dtype=np.int64))
    if not found:
        raise FewbitsError("No document has two tokens or more: there is nothing to predict. Check the text.")
    return found


def _rows(rows: list[list[Array]], context: int, padding: int) -> dict[str, Tensor]:
    shape = (len(rows), context)
    inputs = np.full(shape, padding, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    documents = np.full(shape, NO_DOCUMENT, dtype=np.int32)
    positions = np.zeros(shape, dtype=np.int64)
    for row, parts in enumerate(rows):
        at = 0
        for number, part in enumerate(parts):
            where = slice(at, at + len(part) - 1)
            inputs[row, where] = part[:-1]
            labels[row, where] = part[1:]
            documents[row, where] = number
            positions[row, where] = np.arange(len(part) - 1)
            at += len(part) - 1
        positions[row, at:] = np.arange(context - at)
    arrays = {"input_ids": inputs, "labels": labels, "documents": documents, "positions": positions}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
