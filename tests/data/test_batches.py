"""Batches are a function of their number: pure, complete, in constant time, and the same everywhere."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.data.batches import Batches, _keys, document_ids, eval_batches, permute
from fewbits.errors import FewbitsError

ONE_DOCUMENT = np.zeros(1, dtype=np.int64)


def _stream(length: int) -> np.ndarray:
    """Each token is its own position, so that a window says where it begins."""
    return np.arange(length, dtype=np.uint32)


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def _starts(batches: Batches, epoch: int) -> list[int]:
    """Where the windows of one epoch begin, in order."""
    first, last = epoch * batches.windows, (epoch + 1) * batches.windows
    numbers = range(first // batches.batch_size, -(-last // batches.batch_size))
    joined = torch.cat([batches.batch(i)["input_ids"][:, 0] for i in numbers])
    begin = first - numbers[0] * batches.batch_size
    return joined[begin : begin + batches.windows].tolist()


@given(size=st.integers(1, 600), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_the_keyed_permutation_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    found = permute(np.arange(size), size, _keys(seed, epoch))
    assert np.array_equal(np.sort(found), np.arange(size))


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    # Resuming an old run leans on this: the numbers may never change.
    assert permute(np.arange(10), 10, _keys(0, 0)).tolist() == PINNED
    assert Batches(_stream(1001), ONE_DOCUMENT, 4, 10, seed=7).batch(3)["input_ids"][:, 0].tolist() == PINNED_BATCH


PINNED = [8, 0, 2, 6, 9, 1, 7, 3, 5, 4]
PINNED_BATCH = [770, 20, 420, 410]


@given(length=st.integers(5, 400), context=st.integers(1, 30), batch_size=st.integers(1, 7), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_an_epoch_visits_every_window_exactly_once(length: int, context: int, batch_size: int, seed: int) -> None:
    if length < context + 1:
        return
    batches = Batches(_stream(length), ONE_DOCUMENT, batch_size, context, seed)
    for epoch in (0, 1, 5):
        starts = sorted(_starts(batches, epoch))
        assert np.array_equal(np.diff(starts), np.full(batches.windows - 1, context))  # no overlap, no gap
        assert starts[0] >= 0 and starts[-1] + context + 1 <= length
    assert length - 1 - batches.windows * context < 2 * context  # less than two windows are left out of an epoch


def test_labels_are_the_tokens_that_follow() -> None:
    batch = Batches(_stream(1000), ONE_DOCUMENT, 8, 16, seed=1).batch(5)
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)
    assert batch["input_ids"].shape == batch["labels"].shape == (8, 16)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].is_contiguous() and batch["labels"].is_contiguous()


def test_any_batch_alone_equals_the_one_reached_in_sequence() -> None:
    arguments = (_stream(5000), np.arange(0, 5000, 37), 6, 20, 3, True)
    sequence = [Batches(*arguments).batch(i) for i in range(120)]  # three epochs
    order = list(range(120))
    random.shuffle(order)
    again = Batches(*arguments)
    assert all(_same(again.batch(i), sequence[i]) for i in order)


def test_batches_touch_no_random_state() -> None:
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    Batches(_stream(500), ONE_DOCUMENT, 4, 10, seed=0).batch(77)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_batch_far_away_is_found_at_once() -> None:
    batches = Batches(_stream(200_000), ONE_DOCUMENT, 32, 64, seed=0)
    batches.batch(0)
    began = time.perf_counter()
    batches.batch(10**12)
    assert time.perf_counter() - began < 1.0  # walking there would take days; a millisecond is usual
    assert batches.epoch_of(10**12) == 10**12 * 32 // batches.windows


def test_seeds_and_epochs_give_other_orders() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return _starts(Batches(_stream(3000), ONE_DOCUMENT, 5, 10, seed), epoch)

    found = [tuple(order(seed, epoch)) for seed in range(4) for epoch in range(3)]
    assert len(set(found)) == len(found)
    assert len({starts[0] % 10 for starts in found}) > 3  # the cuts move too


def test_neighbours_in_the_order_are_not_neighbours_in_the_text() -> None:
    starts = np.array(_starts(Batches(_stream(100_001), ONE_DOCUMENT, 10, 10, seed=0), 0))
    adjacent = (np.abs(np.diff(starts)) == 10).mean()
    # Of a random order of W = 9,999 windows two neighbours stay so with probability 2 / W: 2 expected, 10 is 5.7 sigma.
    assert adjacent * len(starts) < 10
    # and place and window are uncorrelated: |r| below 5 / sqrt(W)
    assert abs(np.corrcoef(np.arange(len(starts)), starts)[0, 1]) < 5 / np.sqrt(len(starts))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12])
def test_micro_batches_are_the_batch_cut_into_equal_parts(count: int) -> None:
    batches = Batches(_stream(5000), np.arange(0, 5000, 37), 12, 20, 3, mask_documents=True)
    parts = batches.micro_batches(9, count)
    assert len(parts) == count and all(part["input_ids"].shape == (12 // count, 20) for part in parts)
    assert _same({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, batches.batch(9))


def test_micro_batches_that_do_not_divide_are_one_sentence() -> None:
    batches = Batches(_stream(500), ONE_DOCUMENT, 12, 20, 3)
    for count in (0, -1, 5, 24):
        with pytest.raises(FewbitsError, match=f"{count} micro-batches do not divide a batch of 12 sequences"):
            batches.micro_batches(0, count)


def test_document_ids_and_restarting_positions_are_right() -> None:
    offsets = np.array([0, 3, 4, 30, 31, 55, 90])
    batch = Batches(_stream(100), offsets, 9, 10, seed=0, mask_documents=True).batch(0)
    assert batch["documents"].dtype == torch.int32 and batch["positions"].dtype == torch.int64
    for row in range(9):
        first = int(batch["input_ids"][row, 0])
        number, position, before = 0, 0, None
        for column in range(10):
            at = first + column
            number += at in offsets and before is not None
            position = 0 if at in offsets or before is None else position + 1
            assert batch["documents"][row, column] == number and batch["positions"][row, column] == position
            before = at


def test_without_a_separator_no_label_crosses_a_document() -> None:
    offsets = np.array([0, 7, 8, 50])
    batch = Batches(_stream(100), offsets, 9, 10, seed=0, mask_documents=True).batch(0)
    crossing = torch.isin(batch["input_ids"] + 1, torch.tensor([7, 8, 50]))
    assert crossing.any() and torch.equal(batch["labels"] == -100, crossing)


def test_with_a_separator_the_end_of_each_document_is_learned() -> None:
    tokens = _stream(100)
    offsets = np.array([0, 7, 8, 50])
    tokens[offsets] = 999
    batch = Batches(tokens, offsets, 9, 10, seed=0, mask_documents=True).batch(0)
    assert (batch["labels"] != -100).all() and (batch["labels"] == 999).any()


def test_without_masks_a_batch_has_no_documents() -> None:
    assert Batches(_stream(100), np.array([0, 7]), 2, 10, seed=0).batch(0).keys() == {"input_ids", "labels"}


def test_the_visible_context_counts_the_pairs_that_the_masks_let_through() -> None:
    offsets = np.array([0, 7, 20, 31, 32, 64, 90])
    batches = Batches(_stream(97), offsets, 1, 16, 0, mask_documents=True)
    documents, _ = document_ids(offsets, np.arange(batches.windows) * 16, 16)
    pairs = int((documents[:, :, None] == documents[:, None]).sum())  # both halves, as in 6 L D T
    assert batches.visible_context == pairs / documents.size < 16
    assert Batches(_stream(97), offsets, 1, 16, 0).visible_context == 16


def test_tokens_and_epochs_are_counted() -> None:
    batches = Batches(_stream(1001), ONE_DOCUMENT, 5, 10, seed=0)
    assert batches.windows == 99 and batches.distinct_tokens == 1001
    assert batches.epochs(99) == 5.0 and batches.epoch_of(0) == 0 and batches.epoch_of(20) == 1
    assert batches.tokens_seen(3) == 150 and batches.tokens_seen(300) == 1001


@pytest.mark.parametrize(("length", "context"), [(2, 1), (11, 10), (12, 10), (21, 10), (31, 10)])
def test_a_stream_of_one_window_is_enough(length: int, context: int) -> None:
    batch = Batches(_stream(length), ONE_DOCUMENT, 3, context, seed=0).batch(2)
    assert batch["labels"].max() < length


@pytest.mark.parametrize("context", [10, 100])
def test_a_corpus_shorter_than_one_context_is_one_sentence(context: int) -> None:
    with pytest.raises(
        FewbitsError, match=rf"10 training tokens, fewer than one context of {context}.*context 9 or less"
    ):
        Batches(_stream(10), ONE_DOCUMENT, 4, context, seed=0)


@pytest.mark.parametrize(("dtype", "bad"), [(np.uint16, 300), (np.int64, -5)])
def test_ids_beyond_the_vocabulary_are_one_sentence(dtype: type, bad: int) -> None:
    tokens = np.zeros(100, dtype=dtype)
    tokens[57] = bad
    with pytest.raises(FewbitsError, match=f"Token id {bad} is beyond the vocabulary of 300 ids"):
        Batches(tokens, ONE_DOCUMENT, 4, 10, seed=0, vocab_size=300)
    with pytest.raises(FewbitsError, match=f"Token id {bad} is beyond the vocabulary of 300 ids"):
        eval_batches(tokens, ONE_DOCUMENT, 4, 10, vocab_size=300)
    if bad > 0:
        Batches(tokens, ONE_DOCUMENT, 4, 10, seed=0, vocab_size=301)


def test_sizes_that_hold_nothing_are_one_sentence() -> None:
    for batch_size, context in ((0, 10), (-3, 10), (4, 0), (4, -1)):
        with pytest.raises(FewbitsError, match=r"holds nothing\. Choose at least 1"):
            Batches(_stream(100), ONE_DOCUMENT, batch_size, context, seed=0)
    with pytest.raises(FewbitsError, match="There is no batch -1"):
        Batches(_stream(100), ONE_DOCUMENT, 4, 10, seed=0).batch(-1)


@pytest.mark.parametrize("length", [2, 5, 10, 11, 12, 41, 99, 100, 101])
@pytest.mark.parametrize("masked", [False, True])
def test_evaluation_makes_every_prediction_exactly_once_in_one_shape(length: int, masked: bool) -> None:
    found = list(eval_batches(_stream(length), ONE_DOCUMENT, 4, 10, mask_documents=masked))
    assert all(batch["input_ids"].shape == (4, 10) for batch in found)
    labels = torch.cat([batch["labels"].flatten() for batch in found])
    inputs = torch.cat([batch["input_ids"].flatten() for batch in found])
    assert labels[labels != -100].tolist() == list(range(1, length))
    assert torch.equal(inputs[labels != -100] + 1, labels[labels != -100])
    if masked:
        documents = torch.cat([batch["documents"].flatten() for batch in found])
        assert torch.equal(documents == -1, labels == -100)


def test_a_limited_evaluation_spreads_over_the_whole_stream_and_never_changes() -> None:
    first = list(eval_batches(_stream(10_000), ONE_DOCUMENT, 4, 10, limit=5))
    second = list(eval_batches(_stream(10_000), ONE_DOCUMENT, 4, 10, limit=5))
    assert len(first) == 5 and all(_same(a, b) for a, b in zip(first, second, strict=True))
    starts = torch.cat([batch["input_ids"][:, 0] for batch in first])
    assert starts.tolist() == [500 * n for n in range(20)]
    assert len(list(eval_batches(_stream(100), ONE_DOCUMENT, 4, 10, limit=50))) == 3


def test_nothing_held_out_is_one_sentence() -> None:
    with pytest.raises(FewbitsError, match="held-out part"):
        eval_batches(_stream(1), ONE_DOCUMENT, 4, 10)
