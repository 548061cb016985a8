"""The token store: a corpus as ids on disk, built once in a stream, opened as memory maps."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fewbits.data.cache import Progress, cache_folder, entry, silent
from fewbits.data.corpus import SPLITS, Corpus, Split
from fewbits.data.tokenizer import Tokenizer
from fewbits.errors import FewbitsError

BATCH_CHARACTERS = 2 << 20  # characters tokenized together: some 30 pieces keep the cores busy; bounds the memory
LAYOUT = 1  # part of every cache name; raised whenever what is stored changes


class TokenStore:
    """The ids of both splits on disk. Final; made by `TokenStore.open_or_build`.

    train, val: read-only ids, uint16 (vocabulary up to 65,536) or uint32, documents one after the other. Each document
    begins with the tokenizer's end-of-text id (if it has one), which marks its start and the end of the one before.
    train_documents, val_documents: int64, ascending positions at which documents begin; the first is 0.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """folder: an entry of the cache, verified already. facts: what `describe` gives."""
        self.folder = folder
        self._facts = facts
        dtype = np.dtype(facts["dtype"])
        self.train = _map(folder / "train.tokens", dtype)
        self.val = _map(folder / "val.tokens", dtype)
        self.train_documents = np.asarray(_map(folder / "train.documents", np.dtype("<i8"))).astype(np.int64)
        self.val_documents = np.asarray(_map(folder / "val.documents", np.dtype("<i8"))).astype(np.int64)

    @staticmethod
    def open_or_build(
        corpus: Corpus,
        tokenizer: Tokenizer,
        cache: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> TokenStore:
        """Opens the store of this corpus under this tokenizer; builds it when it is missing or a byte of it changed.

        cache: what `cache_folder` takes. Two processes may ask at once: one builds, both open the result.
        Errors: FewbitsError for text that cannot be read, a cache that cannot be written, or a full disk.
        """
        report = progress or silent
        key = f"{LAYOUT} {corpus.fingerprint()} {tokenizer.fingerprint()}"
        name = f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
        folder, facts = entry(cache_folder(cache), name, lambda place: _build(place, corpus, tokenizer, report), report)
        return TokenStore(folder, {"corpus": corpus.name, "notes": list(corpus.notes), **facts})

    def describe(self) -> dict[str, Any]:
        """JSON facts: corpus, notes, dtype, vocab_size, seconds (to build), and for each split its tokens, documents,
        characters, bytes (UTF-8) and largest_id."""
        return dict(self._facts)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Errors: FewbitsError when an id in the store does not fit a model with `vocab_size` ids. Reads no tokens."""
        largest = max(self._facts[split]["largest_id"] for split in SPLITS)
        if largest >= vocab_size:
            raise FewbitsError(
                f"The tokens hold id {largest}, but the model has {vocab_size} ids (0 to {vocab_size - 1}). "
                f"Set --model.vocab_size to at least {self._facts['vocab_size']}, or choose a smaller tokenizer."
            )


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _build(folder: Path, corpus: Corpus, tokenizer: Tokenizer, progress: Progress) -> dict[str, Any]:
    began = time.perf_counter()
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    facts: dict[str, Any] = {"dtype": dtype.str, "vocab_size": tokenizer.vocab_size}
    done, total = 0, max(1, corpus.bytes)
    for split in SPLITS:
        with (folder / f"{split}.tokens").open("wb") as tokens, (folder / f"{split}.documents").open("wb") as documents:
            known = {"tokens": 0, "documents": 0, "characters": 0, "bytes": 0, "largest_id": -1}
            for batch in _batches(corpus, split):
                _write(batch, tokenizer, dtype, tokens, documents, known)
                done += sum(len(text) for _, text in batch)
                progress(min(done, total), total, "tokenizing")
            facts[split] = known
    progress(total, total, "tokenizing")
    if not facts["train"]["tokens"]:
        raise FewbitsError(
            f"The corpus {corpus.name!r} has no text to train on. Name a file or folder with text in it."
        )
    facts["seconds"] = round(time.perf_counter() - began, 3)
    return facts


def _batches(corpus: Corpus, split: Split) -> Iterator[list[tuple[bool, str]]]:
    batch: list[tuple[bool, str]] = []
    size = 0
    for starts, piece in corpus.pieces(split):
        batch.append((starts, piece))
        size += len(piece) + 64  # many tiny documents are bounded too
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(
    batch: list[tuple[bool, str]],
    tokenizer: Tokenizer,
    dtype: np.dtype[Any],
    tokens: BinaryIO,
    documents: BinaryIO,
    known: dict[str, int],
) -> None:
    """Appends one batch of pieces to the files of a split and to its counts."""
    separator = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    parts: list[npt.NDArray[Any]] = []
    begins: list[int] = []
    position = known["tokens"]
    for (starts, text), ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
        if starts:
            begins.append(position)
            parts.append(np.array(separator, dtype=dtype))
        parts.append(ids)
        position += len(ids) + len(separator) * starts
        known["characters"] += len(text)
        known["bytes"] += len(text.encode("utf-8"))
    joined = np.concatenate(parts).astype(dtype)
    tokens.write(joined.tobytes())
    documents.write(np.array(begins, dtype="<i8").tobytes())
    known["largest_id"] = max(known["largest_id"], int(joined.max(initial=0)))
    known["documents"] += len(begins)
    known["tokens"] = position
