"""The store is the corpus as ids: complete, built once, undamaged, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewbits.data import tokens as module
from fewbits.data.corpus import Corpus, open_corpus
from fewbits.data.tokenizer import Tokenizer, build_tokenizer
from fewbits.data.tokens import TokenStore
from fewbits.errors import FewbitsError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        lines = (f"\n\ndef f{i}(x):\n    return {number} + x\n\n\n# größe {i * i}\n" for i in range(3000))
        (folder / f"{number}.txt").write_text("".join(lines), encoding="utf-8")  # several pieces each
    (folder / "small.jsonl").write_text("\n".join(json.dumps({"text": f"tiny {i}"}) for i in range(50)))
    return open_corpus(folder)


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return build_tokenizer("bpe:300", corpus, tmp_path_factory.mktemp("cache"))


def _content(store: TokenStore) -> str:
    total = hashlib.sha256()
    for array in (store.train, store.val, store.train_documents, store.val_documents):
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def test_the_store_holds_every_document_as_if_it_had_been_tokenized_whole(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    store = TokenStore.open_or_build(corpus, tokenizer, tmp_path)
    for split, found, starts in (
        ("train", store.train, store.train_documents),
        ("val", store.val, store.val_documents),
    ):
        expected = [np.r_[tokenizer.end_of_text, tokenizer.encode(text)] for text in corpus.documents(split)]
        assert np.array_equal(found, np.concatenate(expected))
        assert np.array_equal(starts, np.cumsum([0, *map(len, expected)])[:-1])


def test_the_store_knows_what_it_holds(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = TokenStore.open_or_build(corpus, tokenizer, tmp_path)
    facts, read = store.describe(), corpus.describe()
    assert facts["corpus"] == corpus.name
    for split, tokens in (("train", store.train), ("val", store.val)):
        assert {key: facts[split][key] for key in ("documents", "characters", "bytes")} == {
            key: read[split][key] for key in ("documents", "characters", "bytes")
        }
        assert facts[split]["tokens"] == len(tokens) and facts[split]["largest_id"] == tokens.max()
        assert tokenizer.token_bytes[tokens].sum() == facts[split]["bytes"]


def test_the_width_of_an_id_follows_the_vocabulary(texts: Path, tmp_path: Path) -> None:
    corpus = open_corpus(texts)
    narrow = build_tokenizer("bytes", corpus)
    assert TokenStore.open_or_build(corpus, narrow, tmp_path).train.dtype == np.uint16
    narrow.vocab_size = (1 << 16) + 1  # as a large foreign tokenizer would say
    assert TokenStore.open_or_build(corpus, narrow, tmp_path / "wide").train.dtype == np.uint32


def test_a_store_is_built_once_and_cannot_be_written(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    first = TokenStore.open_or_build(corpus, tokenizer, tmp_path, lambda *call: calls.append(call))
    assert calls[-1] == (corpus.bytes, corpus.bytes, "tokenizing")
    assert all(0 <= done <= total for done, total, _ in calls)
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    calls.clear()
    second = TokenStore.open_or_build(corpus, tokenizer, tmp_path, lambda *call: calls.append(call))
    assert not calls and _content(first) == _content(second)
    with pytest.raises(ValueError, match="read-only"):
        second.train[0] = 1


def test_another_text_or_tokenizer_has_a_store_of_its_own(texts: Path, tmp_path: Path) -> None:
    one = open_corpus(texts)
    tokenizer = build_tokenizer("bytes", one)
    first = TokenStore.open_or_build(one, tokenizer, tmp_path).folder
    assert TokenStore.open_or_build(one, build_tokenizer("bpe:260", one), tmp_path).folder != first
    (texts / "table0.txt").write_text("something else\n" * 100)
    assert TokenStore.open_or_build(open_corpus(texts), tokenizer, tmp_path).folder != first


def test_a_changed_byte_is_noticed_and_the_store_built_again(texts: Path, tmp_path: Path) -> None:
    corpus = open_corpus(texts)
    tokenizer = build_tokenizer("bytes", corpus)
    store = TokenStore.open_or_build(corpus, tokenizer, tmp_path)
    healthy, folder = _content(store), store.folder
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 5  # two files a split, and the manifest
    random = np.random.default_rng(0)
    for name in names * 3:
        content = bytearray((folder / name).read_bytes())
        content[random.integers(len(content))] ^= 1 << int(random.integers(8))
        (folder / name).write_bytes(content)
        calls: list[Any] = []
        again = TokenStore.open_or_build(corpus, tokenizer, tmp_path, lambda *call: calls.append(call))  # noqa: B023
        assert calls  # it was built again
        assert _content(again) == healthy


def test_a_file_that_is_missing_or_cut_is_noticed(texts: Path, tmp_path: Path) -> None:
    corpus = open_corpus(texts)
    tokenizer = build_tokenizer("bytes", corpus)
    store = TokenStore.open_or_build(corpus, tokenizer, tmp_path)
    healthy = _content(store)
    (store.folder / "val.tokens").unlink()
    assert _content(TokenStore.open_or_build(corpus, tokenizer, tmp_path)) == healthy
    os.truncate(store.folder / "train.tokens", 100)
    assert _content(TokenStore.open_or_build(corpus, tokenizer, tmp_path)) == healthy


PROGRAM = """
import os, signal, sys
from fewbits.data.corpus import open_corpus
from fewbits.data.tokenizer import build_tokenizer
from fewbits.data import tokens

tokens.BATCH_CHARACTERS = 20_000
folder, cache, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0
def progress(done, total, what):
    global calls
    calls += what == "tokenizing"
    if calls == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
corpus = open_corpus(folder)
store = tokens.TokenStore.open_or_build(corpus, build_tokenizer("bytes", corpus), cache, progress)
print(calls, len(store.train))
"""


def _start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_build_that_is_killed_leaves_nothing_that_could_be_opened(texts: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = _start(str(texts), str(cache), "2")
    assert process.wait(60) == -signal.SIGKILL
    assert [path.name for path in cache.glob("tokens-*") if path.is_dir() and ".tmp-" not in path.name] == []
    assert len(list(cache.glob("tokens-*.tmp-*"))) == 1
    corpus = open_corpus(texts)
    store = TokenStore.open_or_build(corpus, build_tokenizer("bytes", corpus), cache)
    assert len(store.train) + len(store.val) == corpus.bytes + 6  # bytes, and the mark before each part of three files
    assert list(cache.glob("*.tmp-*")) == []


def test_two_processes_that_want_the_same_store_build_it_once(texts: Path, tmp_path: Path) -> None:
    both = [_start(str(texts), str(tmp_path / "cache"), "-1") for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(calls != "0" for calls, _ in said) == [False, True]  # one tokenized, the other opened
    assert len({count for _, count in said}) == 1


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    corpus = open_corpus(texts)
    tokenizer = build_tokenizer("bytes", corpus)
    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(FewbitsError, match=r"No space left on device.*FEWBITS_CACHE"):
        TokenStore.open_or_build(corpus, tokenizer, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_made_is_one_sentence(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "file" / "cache"))
    corpus = open_corpus(texts)
    with pytest.raises(FewbitsError, match=r"Cannot write the cache folder .*FEWBITS_CACHE"):
        TokenStore.open_or_build(corpus, build_tokenizer("bytes", corpus))


def test_a_cache_without_rights_is_one_sentence(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    corpus = open_corpus(texts)
    tokenizer = build_tokenizer("bytes", corpus)
    monkeypatch.setattr("tempfile.mkdtemp", refuse)  # root, who often runs tests, may write everywhere
    with pytest.raises(FewbitsError, match=r"Permission denied.*FEWBITS_CACHE"):
        TokenStore.open_or_build(corpus, tokenizer, tmp_path)


def test_a_corpus_of_nothing_but_blanks_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"text": ""}\n\n')
    corpus = open_corpus(path)
    with pytest.raises(FewbitsError, match="no text to train on"):
        TokenStore.open_or_build(corpus, build_tokenizer("bytes", corpus), tmp_path / "cache")


def test_a_model_with_too_small_a_vocabulary_is_refused_in_one_sentence(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    store = TokenStore.open_or_build(corpus, tokenizer, tmp_path)
    store.check_vocabulary(300)
    with pytest.raises(FewbitsError, match=r"hold id 299, but the model has 256 ids.*at least 300"):
        store.check_vocabulary(256)
