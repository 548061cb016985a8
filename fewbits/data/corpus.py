"""Corpora: text that every machine has, a file, or a folder; each with a held-out part that training never sees.

The held-out part is a property of the text alone, not of a seed: of many files about 5 % by a hash of their names, of a
few files the last 5 % of each. No file above 1 % of all bytes is held out whole, so that none dominates the measure.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fewbits.data.cache import sha256
from fewbits.data.reading import (
    blocks,
    count_lines,
    find_encoding,
    json_lines,
    pieces,
    readable,
    source_encoding,
    split_text,
)
from fewbits.errors import FewbitsError, nearest

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
NAMED = ("python", "python-all")
HELD_OUT = 0.05  # share of the files, or of each file, that is held out
FEW_FILES = 20  # below this, whole files are too coarse a measure: the end of each is held out instead
LARGEST_HELD_OUT = 0.01  # share of all bytes above which a file is never held out whole
RULES = 1  # part of every fingerprint; raised whenever reading or splitting changes what a corpus yields
NOT_SOURCE = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class TextFile:
    """One file of a corpus. part: "train", "val", or "tail" when its own last 5 % are held out."""

    path: Path
    name: str  # relative, with forward slashes: the same on every system
    bytes: int
    encoding: str
    kind: Literal["text", "jsonl"] = "text"
    part: Literal["train", "val", "tail"] = "train"
    digest: str | None = None  # SHA-256 of the content, where it is known already


@dataclass
class Corpus:
    """Documents in two splits. Made by `open_corpus`; iterating reads the files again, nothing is kept in memory."""

    name: str
    files: list[TextFile]
    notes: list[str] = field(default_factory=list)  # what was left out or guessed, one sentence each
    _sizes: dict[Path, int] = field(default_factory=dict, repr=False)
    _description: dict[str, Any] | None = field(default=None, repr=False)
    _fingerprint: str | None = field(default=None, repr=False)

    def documents(self, split: Split) -> Iterator[str]:
        """The texts of a split ("train" or "val"), in a fixed order. A file is a document, a line of .jsonl is one."""
        held: list[str] = []
        for starts, piece in self.pieces(split):
            if starts and held:
                yield "".join(held)
                held = []
            held.append(piece)
        if held:
            yield "".join(held)

    def pieces(self, split: Split) -> Iterator[tuple[bool, str]]:
        """The same texts in pieces of bounded size, none empty: (whether a document starts here, characters)."""
        if split not in SPLITS:
            raise FewbitsError(f"No split {split!r}: 'train' and 'val' fit.{nearest(str(split), SPLITS)}")
        for file in self.files:
            if file.part not in (split, "tail"):
                continue
            for document in self._documents_of(file, split):
                starts = True
                for piece in pieces(document):
                    yield starts, piece
                    starts = False

    def _documents_of(self, file: TextFile, split: Split) -> Iterator[Iterator[str]]:
        if file.kind == "jsonl":
            first, last = 0, None
            if file.part == "tail":
                total = self._size(file)
                cut = max(1, min(int(total * (1 - HELD_OUT)), total - 1))
                first, last = (0, cut) if split == "train" else (cut, total)
            for text in json_lines(file.path, file.encoding, first, last):
                if text:
                    yield iter((text,))
        elif file.part == split:
            yield blocks(file.path, file.encoding)
        else:
            total = self._size(file)
            cut = int(total * (1 - HELD_OUT))
            reach = min(1000, (total - cut) // 2)
            labelled = split_text(blocks(file.path, file.encoding), cut, reach)
            yield (text for label, text in labelled if label == split and text)

    def _size(self, file: TextFile) -> int:
        """Characters of a text file, documents of a .jsonl file; counted once."""
        if file.path not in self._sizes:
            if file.kind == "jsonl":
                self._sizes[file.path] = count_lines(file.path, file.encoding)
            else:
                self._sizes[file.path] = sum(len(block) for block in blocks(file.path, file.encoding, 1 << 20))
        return self._sizes[file.path]

    @property
    def bytes(self) -> int:
        """Size of all files together, in their own encodings."""
        return sum(file.bytes for file in self.files)

    def describe(self) -> dict[str, Any]:
        """JSON facts: name, files, encodings, notes, and for each split its documents, characters and UTF-8 bytes.

        Reads the whole corpus once; a `TokenStore` knows the same numbers without reading.
        """
        if self._description is None:
            facts: dict[str, Any] = {
                "name": self.name,
                "files": len(self.files),
                "encodings": dict(Counter(file.encoding for file in self.files)),
                "notes": list(self.notes),
            }
            for split in SPLITS:
                documents = characters = size = 0
                for starts, piece in self.pieces(split):
                    documents += starts
                    characters += len(piece)
                    size += len(piece.encode("utf-8"))
                files = sum(file.part in (split, "tail") for file in self.files)
                facts[split] = {"files": files, "documents": documents, "characters": characters, "bytes": size}
            self._description = facts
        return self._description

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of everything that decides what the corpus yields: contents, encodings, splits, order."""
        if self._fingerprint is None:
            total = hashlib.sha256(f"rules {RULES}".encode())
            for file in self.files:
                with readable(file.path):
                    digest = file.digest or sha256(file.path)
                total.update(f"\n{file.kind} {file.encoding} {file.part} {digest}".encode())
            self._fingerprint = total.hexdigest()
        return self._fingerprint


def open_corpus(spec: str | os.PathLike[str], encoding: str | None = None) -> Corpus:
    """The corpus that `spec` names: "python", "python-all", a text file, a .jsonl file, or a folder of .txt and .jsonl.

    encoding: what to read files with; None recognizes UTF-8, UTF-16 and UTF-32 with a byte order mark, and GB18030.
    Errors: FewbitsError for a missing, empty, binary or unrecognized file, a folder without text, an unknown name.
    """
    text = os.fspath(spec)
    if text == "python":
        return _sources("python", [(_standard_library(), "", NOT_SOURCE)])
    if text == "python-all":
        roots = [(root, "site-packages/", frozenset({"__pycache__"})) for root in _package_folders()]
        return _sources("python-all", [(_standard_library(), "", NOT_SOURCE), *roots])
    path = Path(text).expanduser()
    if text and path.is_dir():
        return _folder(path, encoding)
    if text and path.is_file():
        return _single(path, encoding)
    raise FewbitsError(
        f"No corpus {text!r}: it is neither a built-in name ({', '.join(NAMED)}) nor an existing file or folder. "
        f"Name one of these, or a file or folder of .txt or .jsonl.{nearest(text, NAMED)}"
    )


def _single(path: Path, encoding: str | None) -> Corpus:
    if path.suffix.lower() == ".json":
        raise FewbitsError(
            f"{str(path)!r} is a .json file. "
            'Write one object a line, like {"text": "..."}, into a .jsonl file instead.'
        )
    file = _text_file(path, path.name, encoding)
    if not file.bytes:
        raise FewbitsError(f"{str(path)!r} is empty. Name a file with text in it.")
    notes = [] if file.encoding == "utf-8" or encoding else [f"{path.name} is read as {file.encoding}."]
    return Corpus(str(path), [replace(file, part="tail")], notes)


def _text_file(path: Path, name: str, encoding: str | None) -> TextFile:
    kind: Literal["text", "jsonl"] = "jsonl" if path.suffix.lower() in (".jsonl", ".ndjson") else "text"
    with readable(path):
        size = path.stat().st_size
    return TextFile(path, name, size, find_encoding(path, encoding), kind)


def _folder(folder: Path, encoding: str | None) -> Corpus:
    files: list[TextFile] = []
    others: Counter[str] = Counter()
    empty = 0
    for path in _walk(folder, frozenset()):
        if path.suffix.lower() not in (".txt", ".jsonl", ".ndjson"):
            others[path.suffix.lower() or "no suffix"] += 1
        elif path.stat().st_size == 0:
            empty += 1
        else:
            files.append(_text_file(path, path.relative_to(folder).as_posix(), encoding))
    found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
    if not files:
        found = ", ".join(filter(None, [f"{empty} empty .txt or .jsonl" if empty else "", found])) or "no files"
        raise FewbitsError(
            f"The folder {str(folder)!r} holds no .txt or .jsonl file with text (found: {found}). Add some."
        )
    notes = [f"Left out {empty} empty files."] if empty else []
    notes += [f"Left out other kinds of files: {found}."] if found else []
    guessed = Counter(file.encoding for file in files if file.encoding != "utf-8")
    notes += [f"{count} files are read as {name}." for name, count in guessed.items() if not encoding]
    return Corpus(str(folder), _hold_out(files), notes)


def _walk(folder: Path, without: frozenset[str]) -> Iterator[Path]:
    """The files below a folder in the order of their relative names, hidden ones and the folders `without` left out."""

    def refuse(error: OSError) -> None:
        raise FewbitsError(f"Cannot read the folder {error.filename!r} ({error.strerror}). Check its rights.")

    found: list[tuple[str, Path]] = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name not in without and not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            if not name.startswith(".") and path.is_file():
                found.append((path.relative_to(folder).as_posix(), path))
    yield from (path for _, path in sorted(found))


def _hold_out(files: list[TextFile]) -> list[TextFile]:
    """Decides what is held out, by names and sizes alone."""
    limit = LARGEST_HELD_OUT * sum(file.bytes for file in files)
    if len(files) >= FEW_FILES:
        chosen = [replace(f, part="val") if _draw(f.name) < HELD_OUT and f.bytes <= limit else f for f in files]
        if any(file.part == "val" for file in chosen):
            return chosen
    return [replace(file, part="tail") for file in files]


def _draw(name: str) -> float:
    """A number in [0, 1) that only the name decides."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _package_folders() -> list[Path]:
    """The folders that hold this interpreter's installed packages, each once, in a fixed order."""
    paths = sysconfig.get_paths()
    named = [paths["purelib"], paths["platlib"]]
    named += [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return [path for path in dict.fromkeys(Path(entry) for entry in named) if path.is_dir()]


def _sources(name: str, roots: list[tuple[Path, str, frozenset[str]]]) -> Corpus:
    """The .py files below each (folder, prefix of their names, folders left out), each content once."""
    files: list[TextFile] = []
    seen: set[str] = set()
    unreadable = 0
    for root, prefix, without in roots:
        for path in _walk(root, without):
            if path.suffix != ".py":
                continue
            with readable(path):
                content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            encoding = source_encoding(content)
            unreadable += encoding is None or b"\0" in content
            if not content.strip() or encoding is None or b"\0" in content or digest in seen:
                continue
            seen.add(digest)
            relative = prefix + path.relative_to(root).as_posix()
            files.append(TextFile(path, relative, len(content), encoding, digest=digest))
    if not files:
        raise FewbitsError(
            f"This Python has no source files in {str(roots[0][0])!r}. Name a text file or folder with --data."
        )
    notes = [f"Left out {unreadable} files whose declared encoding does not fit."] if unreadable else []
    return Corpus(name, _hold_out(files), notes)
