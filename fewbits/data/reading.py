"""Reading text files: which encoding, whether it is text at all, in pieces that bound memory and change no token.

Nothing here is silent: a file that is not text, or text in an encoding that is not recognized, is one sentence.
"""

from __future__ import annotations

import codecs
import io
import json
import re
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewbits.errors import FewbitsError

HEAD = 1 << 16  # bytes looked at to tell what a file is
PIECE = 1 << 16  # characters of one piece: enough pieces to keep all cores busy, few enough to cost nothing
LONGEST_PIECE = 1 << 20  # characters after which a text without a good place to cut is cut anywhere

KNOWN_BINARIES = {
    b"PK\x03\x04": "a zip archive (or .docx, .xlsx)",
    b"\x1f\x8b": "gzip-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"BZh": "bzip2-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"%PDF": "a PDF",
    b"PAR1": "a parquet file",
}
BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# The most frequent characters of Chinese prose; one in four of its characters is among them, chance gives one in fifty.
COMMON_CHINESE = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去"
    "法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点"
    "正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿"
    "原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德"
    "\uff0c\u3002\u3001\uff1a\uff1b\uff1f\uff01\u201c\u201d"  # and its punctuation
)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what the system says about a file that cannot be read into one sentence."""
    try:
        yield
    except OSError as error:
        raise FewbitsError(
            f"Cannot read {str(path)!r} ({error.strerror or error}). Check the path and its rights."
        ) from error


def find_encoding(path: Path, named: str | None = None) -> str:
    """The encoding to read `path` with, checked against its first bytes only; `named` wins when given.

    Recognized: UTF-8 (with or without a byte order mark), UTF-16 and UTF-32 with one, GB18030 by its frequent
    characters.
    Errors: FewbitsError for a file that is not text, or whose encoding is not recognized.
    """
    with readable(path), path.open("rb") as file:
        head = file.read(HEAD)
    for magic, kind in KNOWN_BINARIES.items():
        if head.startswith(magic):
            raise FewbitsError(f"{str(path)!r} is {kind}, not text. Unpack or convert it to .txt or .jsonl first.")
    if named is not None:
        return _known(named)
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    if b"\0" in head:
        raise FewbitsError(_zero_byte(path, head))
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD)
    except UnicodeDecodeError as error:
        return _not_utf8(path, head, error)
    return "utf-8"


def _known(encoding: str) -> str:
    try:
        name = codecs.lookup(encoding).name
        "".encode(name)
    except LookupError:
        raise FewbitsError(
            f"Unknown text encoding {encoding!r}. Python's names fit, such as utf-8, gb18030, utf-16-le, latin-1, big5."
        ) from None
    return name


def _zero_byte(path: Path, head: bytes) -> str:
    odd, even = head[1::2].count(0), head[0::2].count(0)
    if max(odd, even) > len(head) / 8 and min(odd, even) * 20 < max(odd, even):
        name = "utf-16-le" if odd > even else "utf-16-be"
        return f"{str(path)!r} looks like UTF-16 without a byte order mark. If it is, say so with --encoding {name}."
    return (
        f"{str(path)!r} is a binary file (a zero byte at offset {head.index(0)}), not text. "
        "Name a .txt or .jsonl file, a folder of them, or its --encoding if it is text."
    )


def _not_utf8(path: Path, head: bytes, error: UnicodeDecodeError) -> str:
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(head, final=len(head) < HEAD)
    except UnicodeDecodeError:
        text = ""
    foreign = [character for character in text if character > "\x7f"]
    kana = sum("\u3040" <= character <= "\u30ff" for character in foreign)  # EUC-JP's kana look the same in GB18030
    common = sum(character in COMMON_CHINESE for character in foreign)
    if foreign and common >= 0.08 * len(foreign) > kana:
        return "gb18030"
    raise FewbitsError(
        f"{str(path)!r} is not UTF-8 text (byte 0x{head[error.start]:02x} at offset {error.start}). "
        "Name its encoding with --encoding, for example gb18030, latin-1 or big5, or convert it to UTF-8."
    )


def source_encoding(content: bytes) -> str | None:
    """The encoding of Python source by its own declaration (PEP 263); None when it declares or holds nonsense."""
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(content).readline)[0]
        content.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None
    return encoding


def blocks(path: Path, encoding: str, size: int = PIECE) -> Iterator[str]:
    """The characters of a file, `size` at a time, line ends untouched. Errors: FewbitsError names the bad byte."""
    with readable(path), path.open("r", encoding=encoding, newline="") as file:
        first = True
        try:
            while block := file.read(size):
                block = block.removeprefix("\ufeff") if first else block  # a byte order mark is never text
                first = False
                if "\0" in block:
                    raise FewbitsError(
                        f"{str(path)!r} holds a zero character when read as {encoding}: it is binary, or --encoding is "
                        "another one. Name a text file or its encoding."
                    )
                yield block
        except UnicodeError as error:
            raise FewbitsError(
                f"{str(path)!r} is not {encoding} text throughout ({error}). "
                "Name its encoding with --encoding, for example gb18030 or latin-1, or convert it to UTF-8."
            ) from None


_PLACE = re.compile(r"(?<=\S)\n(?=\S)")  # a lone line end between two marks: GPT-2's pre-tokenizer always cuts there


def pieces(text: Iterator[str]) -> Iterator[str]:
    """Regroups `text` into pieces of about PIECE characters whose tokens are those of the whole text.

    A piece ends after a single line end between two non-space characters, where byte-level pre-tokenizers cut anyway;
    only a text without such a place for LONGEST_PIECE characters is cut elsewhere (the characters stay the same).
    """
    held = ""
    for block in text:
        held += block
        if len(held) < PIECE:
            continue
        place = 0
        for match in _PLACE.finditer(held):
            place = match.end()
        if place == 0 and len(held) >= LONGEST_PIECE:
            place = len(held)
        if place:
            yield held[:place]
            held = held[place:]
    if held:
        yield held


def split_text(text: Iterator[str], cut: int, reach: int = 0) -> Iterator[tuple[str, str]]:
    """Labels the blocks of a text "train" up to character `cut`, or a line start within `reach` of it, then "val"."""
    position, done = 0, False
    for block in text:
        if done or position + len(block) <= cut:
            yield ("val" if done else "train"), block
        else:
            local = cut - position
            line_end = block.find("\n", local, local + reach)
            local = local if line_end < 0 else line_end + 1
            yield "train", block[:local]
            yield "val", block[local:]
            done = True
        position += len(block)


def count_lines(path: Path, encoding: str) -> int:
    """How many lines of a file are not blank: the documents of a .jsonl file."""
    return sum(1 for line in _lines(blocks(path, encoding, 1 << 20)) if line.strip())


def json_lines(path: Path, encoding: str, first: int = 0, last: int | None = None) -> Iterator[str]:
    """The `text` fields of the documents first..last-1 of a .jsonl file, one document a line, blank lines skipped.

    Errors: FewbitsError with file and line for a line that is not a JSON object with a string in `text`.
    """
    index = -1
    for number, line in enumerate(_lines(blocks(path, encoding)), start=1):
        index += bool(line.strip())
        if not line.strip() or index < first:
            continue
        if last is not None and index >= last:
            return
        where = f"{str(path)!r}, line {number}:"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise FewbitsError(
                f'{where} not JSON ({reason}). Each line must be an object like {{"text": "..."}}.'
            ) from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise FewbitsError(
                f'{where} {_textless(record, line)}. Each line must be an object like {{"text": "..."}}.'
            )
        yield whole_characters(record["text"])


def _textless(record: object, line: str) -> str:
    """What a JSON value holds in place of a text, in words."""
    if not isinstance(record, dict):
        return f"no text in {line.strip()[:40]!r}"
    if "text" in record:
        return f"the field 'text' is {json.dumps(record['text'])[:40]}, not a text in quotation marks"
    return f"no text in an object with the fields {sorted(record)[:8]}"


def _lines(text: Iterator[str]) -> Iterator[str]:
    """Lines that end with a line feed: other line breaks are legal inside a JSON string."""
    held: list[str] = []
    for block in text:
        *ended, rest = block.split("\n")
        for line in ended:
            yield "".join([*held, line])
            held = []
        held.append(rest)
    if any(held):
        yield "".join(held)


def whole_characters(text: str) -> str:
    """`text` with lone surrogates (half a character, legal in JSON escapes) replaced by U+FFFD.

    >>> whole_characters("a\\ud800b") == "a\\ufffdb"
    True
    """
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
