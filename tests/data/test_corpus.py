"""Corpora: what is found, what is held out, and what is said when there is nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewbits.data import corpus as module
from fewbits.data.corpus import open_corpus
from fewbits.errors import FewbitsError


def _both(corpus: module.Corpus) -> tuple[list[str], list[str]]:
    return list(corpus.documents("train")), list(corpus.documents("val"))


def test_python_is_the_standard_library_without_its_tests() -> None:
    corpus = open_corpus("python")
    names = [file.name for file in corpus.files]
    assert names == sorted(names) and "ast.py" in names and "json/decoder.py" in names
    assert not any(
        {"test", "tests", "idle_test", "site-packages", "__pycache__"} & set(name.split("/")) for name in names
    )
    facts = corpus.describe()
    assert facts["train"]["bytes"] > 5_000_000
    # By file about 5 %: 734 files of very different sizes, so between 2 and 9 % of the bytes on any version of Python.
    assert 0.02 < facts["val"]["bytes"] / (facts["train"]["bytes"] + facts["val"]["bytes"]) < 0.09
    assert facts["val"]["documents"] == sum(file.part == "val" for file in corpus.files)


def test_no_single_file_dominates_what_is_held_out_of_python() -> None:
    corpus = open_corpus("python")
    held_out = [file.bytes for file in corpus.files if file.part == "val"]
    assert max(held_out) <= 0.01 * corpus.bytes


def test_python_is_the_same_in_another_process() -> None:
    program = "from fewbits.data.corpus import open_corpus; print(open_corpus('python').fingerprint())"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == open_corpus("python").fingerprint()


def test_python_all_holds_the_installed_packages_each_content_once_and_holds_out_what_python_does() -> None:
    corpus = open_corpus("python-all")
    digests = [file.digest for file in corpus.files]
    names = {file.name for file in corpus.files}
    assert len(set(digests)) == len(digests)
    assert "ast.py" in names and any(name.startswith("site-packages/numpy/") for name in names)
    parts = {file.name: file.part for file in corpus.files}
    held_out = {file.name for file in open_corpus("python").files if file.part == "val"}
    assert all(parts[name] == "val" for name in held_out if name in parts)


def test_data_is_read_and_tokenized_without_importing_torch() -> None:
    program = (
        "import sys, fewbits.data.corpus, fewbits.data.tokenizer, fewbits.data.tokens; print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == "False"


def test_one_file_holds_out_its_last_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    text = "".join(f"line {i:05d} of the text\n" for i in range(4000))
    path.write_text(text)
    (train,), (val,) = _both(open_corpus(path))
    assert train + val == text and train.endswith("\n")
    assert 0.048 < len(val) / len(text) <= 0.05


@pytest.mark.parametrize("size", [2, 10, 100, 1000])
def test_even_a_tiny_file_splits_without_losing_a_character(tmp_path: Path, size: int) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ab\n" * size)
    (train,), (val,) = _both(open_corpus(path))
    assert train + val == "ab\n" * size


def test_a_large_file_comes_in_bounded_pieces_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    text = "".join(f"number {i} and é\n" for i in range(120_000))
    path.write_text(text, encoding="utf-8")
    corpus = open_corpus(path)
    pieces = list(corpus.pieces("train"))
    assert max(len(piece) for _, piece in pieces) < 1 << 18
    assert [starts for starts, _ in pieces] == [True] + [False] * (len(pieces) - 1)
    assert "".join(piece for _, piece in pieces) + "".join(corpus.documents("val")) == text


def test_jsonl_holds_out_its_last_documents(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": f"document {i}", "id": i}) for i in range(200)))
    train, val = _both(open_corpus(path))
    assert train + val == [f"document {i}" for i in range(200)] and len(val) == 10


def test_a_folder_of_many_files_holds_out_whole_files(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i % 7}").mkdir(exist_ok=True)
        (tmp_path / f"{i % 7}" / f"{i}.txt").write_text(f"file {i} " * 20)
    train, val = _both(open_corpus(tmp_path))
    # 300 draws at 5 %: 15 expected, standard deviation 3.8; within four of it
    assert len(train) + len(val) == 300 and 0 < len(val) < 31
    again = open_corpus(tmp_path)
    assert _both(again) == (train, val) and not set(train) & set(val)


def test_what_is_held_out_hangs_on_names_and_not_on_neighbours(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text(f"file {i} " * 20)
    before = {file.name: file.part for file in open_corpus(tmp_path).files}
    for i in range(200, 230):
        (tmp_path / f"{i}.txt").write_text(f"file {i} " * 20)
    after = {file.name: file.part for file in open_corpus(tmp_path).files}
    assert all(after[name] == part for name, part in before.items())


def test_a_folder_of_few_files_holds_out_the_end_of_each(texts: Path) -> None:
    train, val = _both(open_corpus(texts))
    assert len(train) == len(val) == 3
    for number in range(3):
        assert train[number] + val[number] == (texts / f"table{number}.txt").read_text()


def test_a_folder_mixes_txt_and_jsonl_and_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "c.pdf").write_bytes(b"%PDF")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden.txt").write_text("no")
    corpus = open_corpus(tmp_path)
    assert [file.name for file in corpus.files] == ["a.txt", "b.jsonl"]
    assert corpus.notes == ["Left out 1 empty files.", "Left out other kinds of files: 1 .pdf."]


def test_the_fingerprint_follows_the_content_and_nothing_else(tmp_path: Path) -> None:
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("some text\n" * 50)
    (tmp_path / "three" / "a.txt").write_text("some texd\n" * 50)
    os.utime(tmp_path / "two" / "a.txt", (1, 1))
    one, two, three = (open_corpus(tmp_path / folder).fingerprint() for folder in ("one", "two", "three"))
    assert one == two != three


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("pythn", "No corpus 'pythn'.*Did you mean 'python'"),
        ("", "No corpus ''"),
        ("missing.txt", "nor an existing file or folder"),
        ("folder", r"no .txt or .jsonl file with text \(found: 1 .csv\)"),
        ("nothing", r"found: no files"),
        ("empties", r"found: 1 empty .txt or .jsonl"),
        ("array.json", "one object a line"),
    ],
)
def test_a_corpus_that_is_not_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "nothing", "empties"):
        (tmp_path / folder).mkdir()
    (tmp_path / "folder" / "table.csv").write_text("a,b\n")
    (tmp_path / "empties" / "a.txt").touch()
    (tmp_path / "array.json").write_text("[]")
    with pytest.raises(FewbitsError, match=words) as caught:
        open_corpus(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_rights_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("text")
    path.chmod(0)
    with pytest.raises(FewbitsError, match=r"Cannot read .*Permission denied"):
        open_corpus(path)


def test_a_split_that_does_not_exist_is_named(texts: Path) -> None:
    with pytest.raises(FewbitsError, match="'train' and 'val' fit"):
        list(open_corpus(texts).documents("test"))  # type: ignore[arg-type]
