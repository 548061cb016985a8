"""Batches are a function: batch i depends on the seed, i and the global batch size, and needs none before it.

The token stream is cut into windows of `context` predictions; each epoch visits every window once, in an order given
by a keyed permutation (a Feistel network with cycle walking: O(1) memory and time), the cuts shifted by a keyed offset.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fewbits.data.packing import NO_DOCUMENT, document_ids
from fewbits.errors import FewbitsError
from fewbits.numerics.loss import IGNORE

ROUNDS = 6  # of the Feistel network; four already make neighbours independent
CHECK_AT_ONCE = 1 << 24  # tokens looked at together when ids are checked: bounds the memory

Array = npt.NDArray[Any]
Hashes = npt.NDArray[np.uint64]


def mix(values: Hashes) -> Hashes:
    """splitmix64's finalizer: uint64 in, uint64 out, every input bit moves about half of the output bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _keys(*words: int) -> Hashes:
    """ROUNDS + 1 keys, uint64, decided by the words: one a round, and one for the offset of the epoch."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = mix(state ^ np.uint64(word % 2**64)) + np.uint64(0x9E3779B97F4A7C15)
    return mix(state + np.arange(1, ROUNDS + 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def permute(index: Array, size: int, keys: Hashes) -> Array:
    """Where each index in [0, size) goes under a keyed permutation of [0, size). int64 in, int64 out.

    A Feistel network permutes the next power of four; what leaves [0, size) walks on along its cycle until it is back
    (fewer than four steps on average), which is a permutation of [0, size) again.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    found = index.astype(np.uint64)
    outside = np.ones(found.shape, dtype=bool)
    while outside.any():
        value = found[outside]
        left, right = value >> half, value & mask
        for key in keys[:ROUNDS]:
            left, right = right, left ^ (mix(right + key) & mask)
        found[outside] = (left << half) | right
        outside = found >= np.uint64(size)
    return found.astype(np.int64)


class Batches:
    """The training batches of a token stream, as a function of their number. Final.

    tokens: [N] integers (a memory map is read where it is needed). offsets: int64, where documents begin.
    batch_size: sequences of a step over all micro-batches and ranks. context: predictions of a sequence.
    mask_documents: add `documents` and `positions`, so that no token sees another document.
    vocab_size: checked against every token when given.
    Errors: FewbitsError for a stream shorter than one window, ids beyond the vocabulary, sizes below 1.
    """

    def __init__(
        self,
        tokens: Array,
        offsets: Array,
        batch_size: int,
        context: int,
        seed: int,
        mask_documents: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        _check(tokens, batch_size, context, vocab_size)
        self.tokens, self.offsets = tokens, np.asarray(offsets, dtype=np.int64)
        self.batch_size, self.context, self.seed = batch_size, context, seed
        self.mask_documents = mask_documents
        self._separated = _separated(tokens, self.offsets)
        self.windows = max(1, (len(tokens) - context) // context)  # of one epoch, whatever its offset
        spare = len(tokens) - 1 - self.windows * context
        self._offsets = min(context, spare + 1)  # how many offsets an epoch may have

    @property
    def distinct_tokens(self) -> int:
        """Tokens of the stream: what endless training would see, again and again."""
        return len(self.tokens)

    @cached_property
    def visible_context(self) -> float:
        """Tokens of causal context that cost attention as much as these windows do: the mean of a token's document in its
        window, where documents do not see each other (of an epoch that begins with the first token)."""
        if not self.mask_documents:
            return float(self.context)
        end = self.windows * self.context
        edges = np.union1d(np.arange(0, end + 1, self.context), self.offsets[self.offsets < end])
        return float(np.square(np.diff(edges)).sum() / end)

    def tokens_seen(self, batches: int) -> int:
        """How many different tokens the first `batches` batches predict (an estimate from the first epoch on)."""
        return min(batches * self.batch_size * self.context, len(self.tokens))

    def epoch_of(self, i: int) -> int:
        """The epoch, from 0, in which batch i begins."""
        return i * self.batch_size // self.windows

    def epochs(self, batches: int) -> float:
        """How many times the first `batches` batches go through the stream."""
        return batches * self.batch_size / self.windows

    def batch(self, i: int) -> dict[str, Tensor]:
        """Batch i: input_ids, labels int64 [B, T]; with mask_documents also documents int32 and positions int64 [B, T].

        Labels are aligned with the inputs: labels[b, t] is the token that follows input_ids[b, t].
        """
        if i < 0:
            raise FewbitsError(f"There is no batch {i}: batches are numbered from 0.")
        first = self._first(np.arange(self.batch_size, dtype=np.int64) + i * self.batch_size)
        return _windows(self.tokens, self.offsets, first, self.context, self.mask_documents, self._separated)

    def micro_batches(self, i: int, count: int) -> list[dict[str, Tensor]]:
        """Batch i split into `count` micro-batches of equally many rows, in order. Errors: count must divide it."""
        if count < 1 or self.batch_size % count:
            fitting = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            best = min(fitting, key=lambda n: abs(n - count))
            raise FewbitsError(
                f"{count} micro-batches do not divide a batch of {self.batch_size} sequences. "
                f"Choose a divisor such as {best}."
            )
        batch, rows = self.batch(i), self.batch_size // count
        return [{k: v[n * rows : (n + 1) * rows] for k, v in batch.items()} for n in range(count)]

    def _first(self, sample: Array) -> Array:
        """Where the window of each sample (numbered through all epochs) begins in the stream, int64."""
        epoch, place = np.divmod(sample, self.windows)
        first = np.empty_like(sample)
        for number in np.unique(epoch):
            keys = _keys(self.seed, int(number))
            chosen = epoch == number
            shift = int(keys[ROUNDS] % np.uint64(self._offsets))
            first[chosen] = permute(place[chosen], self.windows, keys) * self.context + shift
        return first


def eval_batches(
    tokens: Array,
    offsets: Array,
    batch_size: int,
    context: int,
    limit: int | None = None,
    mask_documents: bool = False,
    vocab_size: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """The same batches at every evaluation: consecutive windows over a stream, each prediction once.

    limit: at most this many batches, their windows spread evenly over the stream. Batches are as `Batches.batch` makes
    them, of shape [batch_size, context] always: what is missing at the end is filled with label -100.
    Errors: FewbitsError, at the call, for a stream without a prediction, ids beyond the vocabulary, sizes below 1.
    """
    if len(tokens) < 2:
        raise FewbitsError("The held-out part of the corpus has no tokens to predict. Name a larger corpus.")
    _check(tokens, batch_size, context, vocab_size, shortest=2)
    windows = -(-(len(tokens) - 1) // context)
    chosen = np.arange(windows, dtype=np.int64)
    if limit is not None and limit * batch_size < windows:
        count = max(1, limit) * batch_size
        chosen = np.arange(count, dtype=np.int64) * windows // count
    starts = np.asarray(offsets, dtype=np.int64)
    separated = _separated(tokens, starts)
    return (
        _filled(tokens, starts, chosen[at : at + batch_size] * context, batch_size, context, mask_documents, separated)
        for at in range(0, len(chosen), batch_size)
    )


def _filled(
    tokens: Array, starts: Array, first: Array, batch_size: int, context: int, masked: bool, separated: bool
) -> dict[str, Tensor]:
    """A batch of windows of which the last may reach beyond the stream, filled to batch_size rows."""
    whole = first[first + context < len(tokens)]
    rows = [_windows(tokens, starts, whole, context, masked, separated)] if len(whole) else []
    for begin in first[len(whole) :]:
        short = len(tokens) - 1 - int(begin)
        part = _windows(tokens, starts, np.array([begin]), short, masked, separated)
        rows.append({name: _extend(value, (1, context), name) for name, value in part.items()})
    joined = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return {name: _extend(value, (batch_size, context), name) for name, value in joined.items()}


def _extend(value: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    if value.shape == shape:
        return value
    filler = {"labels": IGNORE, "documents": NO_DOCUMENT}.get(name, 0)
    filled = torch.full(shape, filler, dtype=value.dtype)
    filled[: value.shape[0], : value.shape[1]] = value
    return filled


def _windows(
    tokens: Array, starts: Array, first: Array, length: int, masked: bool, separated: bool
) -> dict[str, Tensor]:
    rows = np.stack([np.asarray(tokens[begin : begin + length + 1]) for begin in first]).astype(np.int64)
    inputs, labels = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
    found = {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
    if masked:
        documents, positions = document_ids(starts, first, length + 1)
        if not separated:  # what follows is the next document's first word, which this one cannot know
            labels[documents[:, 1:] != documents[:, :-1]] = IGNORE
        found["documents"] = torch.from_numpy(np.ascontiguousarray(documents[:, :-1]))
        found["positions"] = torch.from_numpy(np.ascontiguousarray(positions[:, :-1]))
    return found


def _separated(tokens: Array, starts: Array) -> bool:
    """Whether every document begins with the same id: then predicting it means that the one before ends."""
    inside = starts[starts < len(tokens)]
    return len(inside) > 1 and bool((tokens[inside] == tokens[inside[0]]).all())


def _check(tokens: Array, batch_size: int, context: int, vocab_size: int | None, shortest: int | None = None) -> None:
    for name, value in (("batch size", batch_size), ("context", context)):
        if value < 1:
            raise FewbitsError(f"A {name} of {value} holds nothing. Choose at least 1.")
    if len(tokens) < (shortest or context + 1):
        raise FewbitsError(
            f"The corpus has {len(tokens)} training tokens, fewer than one context of {context} and the token after "
            f"it. Name more text, or choose --model.context {max(1, len(tokens) - 1)} or less."
        )
    if vocab_size is None:
        return
    for at in range(0, len(tokens), CHECK_AT_ONCE):
        part = tokens[at : at + CHECK_AT_ONCE]
        worst = int(part.max()) if int(part.min()) >= 0 else int(part.min())
        if not 0 <= worst < vocab_size:
            raise FewbitsError(
                f"Token id {worst} is beyond the vocabulary of {vocab_size} ids (0 to {vocab_size - 1}). "
                "Set --model.vocab_size to the tokenizer's, or tokenize again with a smaller one."
            )
