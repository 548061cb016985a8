"""What is read is what was written; what is not text, or not in a known encoding, is one sentence."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.data import reading
from fewbits.data.corpus import open_corpus
from fewbits.errors import FewbitsError

CHINESE = "深度学习是机器学习的一个分支，它试图使用多层神经网络对数据进行高层抽象。\n今天天气很好，我们去公园玩。\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030", "gbk"])
def test_chinese_text_is_recognized_in_every_encoding_we_promise(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes((CHINESE * 40).encode(encoding))
    corpus = open_corpus(path)
    assert "".join(d for split in ("train", "val") for d in corpus.documents(split)) == CHINESE * 40


def test_a_guessed_encoding_is_said(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes((CHINESE * 40).encode("gb18030"))
    assert open_corpus(path).notes == ["text.txt is read as gb18030."]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Ceci est un texte français. L'été est passé, à bientôt, où êtes-vous?\n", "latin-1"),
        ("Это русский текст. Сегодня хорошая погода.\n", "koi8-r"),
        ("これは日本語のテキストです。今日は天気がいいですね。\n", "euc_jp"),
        ("これは日本語のテキストです。今日は天気がいいですね。\n", "shift_jis"),
        ("이것은 한국어 텍스트입니다. 오늘은 날씨가 좋습니다.\n", "euc_kr"),
        ("今天天氣很好，我們去公園玩。\n", "big5"),
    ],
)
def test_another_encoding_is_refused_until_it_is_named(tmp_path: Path, text: str, encoding: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes((text * 50).encode(encoding))
    with pytest.raises(FewbitsError, match=r"not UTF-8 text \(byte 0x.. at offset \d+\).*--encoding"):
        open_corpus(path)
    corpus = open_corpus(path, encoding)
    assert "".join(d for split in ("train", "val") for d in corpus.documents(split)) == text * 50


def test_utf_16_without_a_mark_is_named_and_then_read(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(("plain words\n" * 50).encode("utf-16-le"))
    with pytest.raises(FewbitsError, match="--encoding utf-16-le"):
        open_corpus(path)
    assert next(open_corpus(path, "utf-16-le").documents("train")).startswith("plain words\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x7fELF\x02\x01\x01\x00" + bytes(range(256)) * 9, "binary file .a zero byte at offset 7."),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"\x1f\x8b\x08rest", "gzip-compressed"),
        (b"PAR1rest", "a parquet file"),
        (b"good text " * 9000 + b"\xff\xfe\xfd" + b"and on" * 9, "not utf-8 text throughout.*0xff"),
        (b"good text " * 9000 + b"\0" + b"and on" * 9, "zero character"),
        (b"", "is empty"),
    ],
    ids=["elf", "zip", "gzip", "parquet", "late bad byte", "late zero", "empty"],
)
def test_what_is_not_text_is_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(FewbitsError, match=words) as caught:
        open_corpus(path).describe()
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_an_encoding_that_nobody_knows_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("words")
    for encoding in ("klingon", "rot13"):
        with pytest.raises(FewbitsError, match="Unknown text encoding"):
            open_corpus(path, encoding)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "line 3: not JSON"),
        ('{"text": "cut', "line 3: not JSON"),
        ('{"content": "x"}', r"line 3: no text in an object with the fields \['content'\]"),
        ('{"text": 7}', "line 3: the field 'text' is 7, not a text in quotation marks"),
        ('["text"]', "line 3: no text in"),
        ("[" * 100_000, "line 3: not JSON"),
    ],
)
def test_a_bad_line_of_jsonl_is_named_with_file_and_number(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"text": "one"}\n\n' + line + '\n{"text": "two"}\n', encoding="utf-8")
    with pytest.raises(FewbitsError, match=words) as caught:
        open_corpus(path).describe()
    assert str(path) in str(caught.value)


def test_jsonl_keeps_line_breaks_inside_texts_and_half_characters_become_whole(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    lines = [
        '{"text": "a\\nb\u2028c"}',
        '{"text": "half \\ud800 pair \\ud83d\\ude00"}',
        '{"text": ""}',
        '{"text": "end"}',
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    corpus = open_corpus(path)
    assert list(corpus.documents("train")) == ["a\nb\u2028c", "half \ufffd pair \U0001f600"]
    assert list(corpus.documents("val")) == ["end"]


@given(st.text(alphabet="ab \n\t\r.é", max_size=400))
@settings(max_examples=100, deadline=None)
def test_pieces_join_to_the_text_and_cut_only_where_words_end(text: str) -> None:
    old, reading.PIECE = reading.PIECE, 7
    try:
        found = list(reading.pieces(iter([text[i : i + 5] for i in range(0, len(text), 5)])))
    finally:
        reading.PIECE = old
    assert "".join(found) == text and all(found)
    for before, after in pairwise(found):
        assert before[-1] == "\n" and not before[-2].isspace() and not after[0].isspace()


def test_a_text_without_line_ends_still_comes_in_bounded_pieces() -> None:
    found = list(reading.pieces(iter(["x" * reading.PIECE] * 40)))
    assert sum(map(len, found)) == 40 * reading.PIECE
    assert max(map(len, found)) <= reading.LONGEST_PIECE + reading.PIECE


def test_line_ends_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\r\ntwo\rthree\n" * 30)
    corpus = open_corpus(path)
    joined = "".join(d for split in ("train", "val") for d in corpus.documents(split))
    assert joined.encode() == b"one\r\ntwo\rthree\n" * 30
