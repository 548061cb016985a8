"""Tokenizers: text to ids and back, without loss and without ever showing half a character.

Three kinds are built here and any `tokenizer.json` is read: "bpe:N" (byte-level byte-pair encoding, N ids in all),
"bytes" and "chars". All are saved as a `tokenizer.json` that the tokenizers and transformers libraries open to the
same ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewbits.data.cache import Progress, cache_folder, entry, silent
from fewbits.data.corpus import SPLITS, Corpus
from fewbits.data.reading import whole_characters
from fewbits.errors import FewbitsError, nearest

END_OF_TEXT = "<|endoftext|>"
SAMPLE_CHARACTERS = 16 << 20  # how much text byte-pair encoding is trained on: more changes few merges at these sizes
ALGORITHM = 1  # part of every cache name; raised whenever building changes what comes out
ENDS = (END_OF_TEXT, "<|end_of_text|>", "<|im_end|>", "</s>", "<eos>", "<|eos|>", "[SEP]")  # in foreign tokenizers

Ids = npt.NDArray[np.integer[Any]]


class Tokenizer:
    """Text to ids and back. Final; made by `build_tokenizer` or `Tokenizer.load`.

    kind: "bytes", "chars", "bpe" (byte-level, any origin) or "other".
    vocab_size: ids are below it. end_of_text: the id that separates documents, or None.
    token_bytes: int32 [vocab_size], UTF-8 bytes of text that each id stands for; 0 for special tokens.
    For the first three kinds `decode(encode(x)) == x` and `token_bytes[encode(x)].sum() == len(x.encode())`, for every
    x ("chars": every x made of its characters). Special tokens are never made from text that merely spells them.
    """

    def __init__(self, text: str, settings: dict[str, Any] | None = None) -> None:
        """text: the content of a tokenizer.json. settings: the content of a tokenizer_config.json beside it."""
        self._text = text
        self._inner = _open(text)
        self._inner.encode_special_tokens = True  # text that spells a special token stays text
        layout = json.loads(text)
        self.kind = _kind(layout)
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        added = {token["id"]: token for token in layout.get("added_tokens", [])}
        self._special = frozenset(index for index, token in added.items() if token["special"])
        self._pieces = _pieces(self.kind, layout, vocabulary, added, self.vocab_size)
        lengths = [0 if i in self._special else len(piece) for i, piece in enumerate(self._pieces)]
        self.token_bytes = np.array(lengths, dtype=np.int32)
        self._spaced = self.kind == "other" and '"Strip"' in json.dumps(layout.get("decoder"))
        self._from_character = _character_table(vocabulary, self._special) if self.kind == "chars" else None
        self._from_byte = _byte_table(self._pieces, self._special) if self.kind == "bytes" else None
        named = (settings or {}).get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        ends = [vocabulary[end] for end in (named, *ENDS) if isinstance(end, str) and end in vocabulary]
        self.end_of_text: int | None = ends[0] if ends else None

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, vocab_size={self.vocab_size})"

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the tokenizer's definition."""
        return hashlib.sha256(f"{self.end_of_text}\n{self._text}".encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The ids of each text, int32, no special tokens added. Parallel over texts for byte-pair encoding.

        Errors: FewbitsError for a character that a "chars" tokenizer does not have.
        """
        texts = [whole_characters(text) for text in texts]
        if self._from_byte is not None:
            return [self._from_byte[np.frombuffer(text.encode("utf-8"), dtype=np.uint8)] for text in texts]
        if self._from_character is not None:
            return [self._encode_characters(text) for text in texts]
        _set_threads()
        found = self._inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """The ids of one text, int32."""
        return self.encode_batch([text])[0]

    def _encode_characters(self, text: str) -> npt.NDArray[np.int32]:
        assert self._from_character is not None
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = np.full(codes.shape, -1, dtype=np.int32)
        inside = codes < len(self._from_character)
        ids[inside] = self._from_character[codes[inside]]
        if (ids < 0).any():
            missing = text[int(np.argmax(ids < 0))]
            raise FewbitsError(
                f"The character {missing!r} (U+{ord(missing):04X}) is not among the "
                f"{self.vocab_size - len(self._special)} characters of this tokenizer. "
                "Leave it out, or train with the tokenizer bytes or bpe:4096."
            )
        return ids

    def decode(self, ids: Iterable[int] | Ids, special: bool = False) -> str:
        """The text of `ids`. Bytes that are not a whole character, at an end or in the middle, are left out.

        special: show special tokens too. Errors: FewbitsError for an id outside the vocabulary.
        """
        indices = [int(index) for index in ids]
        for index in indices:
            if not 0 <= index < self.vocab_size:
                raise FewbitsError(f"Token id {index} is outside this tokenizer's vocabulary of {self.vocab_size} ids.")
        if not special:
            indices = [index for index in indices if index not in self._special]
        if self.kind == "other" and not self._spaced:  # its own rules, such as joining the parts of words
            return str(self._inner.decode(indices, skip_special_tokens=not special)).rstrip("\ufffd")
        text = b"".join(self._pieces[index] for index in indices).decode("utf-8", "ignore")
        return text[1:] if self._spaced and text.startswith(" ") else text

    def files(self) -> dict[str, str]:
        """What `save` writes: file name to content."""
        end = self._inner.id_to_token(self.end_of_text) if self.end_of_text is not None else None
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 30,
        }
        return {"tokenizer.json": self._text, "tokenizer_config.json": json.dumps(settings, indent=1)}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json; `AutoTokenizer.from_pretrained(folder)` opens them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            Path(folder, name).write_text(content, encoding="utf-8", newline="")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Tokenizer:
        """Opens a tokenizer.json, or a folder that holds one. Errors: FewbitsError when it is missing or damaged."""
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            text = file.read_text(encoding="utf-8")
            beside = file.with_name("tokenizer_config.json")
            settings = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
        except (OSError, ValueError) as error:
            raise FewbitsError(
                f"No tokenizer at {str(file)!r} ({error}). "
                "Name a tokenizer.json or its folder, or use bpe:4096, bytes or chars."
            ) from None
        try:
            return Tokenizer(text, settings)
        except FewbitsError as error:
            raise FewbitsError(f"{str(file)!r}: {error}") from None


def build_tokenizer(
    spec: str, corpus: Corpus, cache: str | os.PathLike[str] | None = None, progress: Progress | None = None
) -> Tokenizer:
    """The tokenizer that `spec` names: "bpe:4096" (ids in all), "bytes", "chars", or the path of a tokenizer.json.

    corpus: byte-pair encoding learns from its train split; "chars" takes its alphabet from both splits.
    cache: what `cache_folder` takes; what is learned is kept there by content, and learned once by many processes.
    Errors: FewbitsError for an unknown name, a size that cannot be, a file that is not a tokenizer.
    """
    progress = progress or silent
    kind, _, size = spec.partition(":")
    if kind == "bytes" and not size:
        return Tokenizer(_byte_level({}, []))
    if kind not in ("bpe", "chars") or (kind == "chars" and size):
        if spec and Path(spec).expanduser().exists():
            return Tokenizer.load(spec)
        raise FewbitsError(
            f"Unknown tokenizer {spec!r}: 'bpe:4096' (or another size), 'bytes', 'chars' or the path of a "
            "tokenizer.json fit." + nearest(kind, ["bpe:4096", "bytes", "chars"])
        )
    vocabulary = _size(size or "4096", spec) if kind == "bpe" else 0
    report = progress

    def build(folder: Path) -> dict[str, Any]:
        text = _learn_bpe(corpus, vocabulary, report) if kind == "bpe" else _learn_characters(corpus, report)
        Tokenizer(text).save(folder)
        return {"spec": spec}

    name = hashlib.sha256(f"{ALGORITHM} {kind} {vocabulary} {corpus.fingerprint()}".encode()).hexdigest()[:24]
    folder, _ = entry(cache_folder(cache), f"tokenizer-{name}", build, progress)
    return Tokenizer.load(folder)


def _size(text: str, spec: str) -> int:
    smallest, largest = 257, 1_000_000
    if not text.isascii() or not text.isdigit() or not smallest <= int(text[:8]) <= largest:
        raise FewbitsError(
            f"The tokenizer {spec!r} needs a whole number of ids from {smallest} (256 bytes and the end of a text) to "
            f"{largest}, such as bpe:4096."
        )
    return int(text)


def _set_threads() -> None:
    """Rayon threads: the cores this process may use, at most 16. The user's own settings win.

    A set TOKENIZERS_PARALLELISM also keeps the library quiet when compilers fork this process later.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("RAYON_NUM_THREADS", str(min(cores, 16)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _open(text: str) -> Any:
    from tokenizers import Tokenizer as Inner

    try:
        inner = Inner.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise FewbitsError(
            f"Not a usable tokenizer.json ({str(error)[:200]}). Name a file of the tokenizers library."
        ) from None
    inner.no_padding()
    inner.no_truncation()
    if not inner.get_vocab_size():
        raise FewbitsError("Not a usable tokenizer.json (its vocabulary is empty). Name a trained one.")
    return inner


def _types(part: Any) -> set[str]:
    """The type names in a tokenizer.json component, inside sequences too."""
    if isinstance(part, dict):
        return {str(part.get("type"))}.union(*(_types(value) for value in part.values()))
    return set().union(*(_types(value) for value in part)) if isinstance(part, list) else set()


def _kind(layout: dict[str, Any]) -> str:
    model, decoder = layout["model"], _types(layout.get("decoder"))
    if "ByteLevel" in decoder:
        plain = not model.get("merges") and len(model["vocab"]) - len(layout.get("added_tokens", [])) == 256
        return "bytes" if plain else "bpe"
    return "chars" if decoder == {"Fuse"} and model.get("type") == "BPE" and not model.get("merges") else "other"


def byte_characters() -> dict[str, int]:
    """GPT-2's one visible character for each byte value, as tokenizer.json files spell byte-level tokens."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(value): value for value in visible}
    hidden = [value for value in range(256) if value not in set(visible)]
    return table | {chr(256 + index): value for index, value in enumerate(hidden)}


def _pieces(
    kind: str, layout: dict[str, Any], vocabulary: dict[str, int], added: dict[int, dict[str, Any]], size: int
) -> list[bytes]:
    """The UTF-8 bytes that each id stands for; b"" for an id that no token has."""
    table = byte_characters()
    prefix = layout["model"].get("continuing_subword_prefix") or ""
    spaced = bool(_types([layout.get("decoder"), layout.get("pre_tokenizer")]) & {"Metaspace", "Replace"})
    found = [b""] * size
    for token, index in vocabulary.items():
        if index in added or kind == "chars":
            found[index] = token.encode("utf-8")
        elif kind in ("bytes", "bpe"):
            found[index] = bytes(table[character] for character in token if character in table)
        elif len(token) == 6 and token.startswith("<0x"):
            found[index] = bytes([int(token[3:5], 16)])
        else:
            text = token.removeprefix(prefix).replace("\u2581", " ") if spaced or prefix else token
            found[index] = text.encode("utf-8", "replace")
    return found


def _character_table(vocabulary: dict[str, int], special: frozenset[int]) -> npt.NDArray[np.int32]:
    codes = {ord(token): index for token, index in vocabulary.items() if index not in special}
    table = np.full(max(codes, default=0) + 1, -1, dtype=np.int32)
    for code, index in codes.items():
        table[code] = index
    return table


def _byte_table(pieces: list[bytes], special: frozenset[int]) -> npt.NDArray[np.int32]:
    table = np.zeros(256, dtype=np.int32)
    for index, piece in enumerate(pieces):
        if index not in special and len(piece) == 1:
            table[piece[0]] = index
    return table


def _sample(corpus: Corpus, progress: Progress) -> Iterator[str]:
    """The train split, or evenly spread pieces of it that hold about SAMPLE_CHARACTERS."""
    stride = max(1, round(corpus.bytes / SAMPLE_CHARACTERS))
    done, total = 0, min(corpus.bytes, SAMPLE_CHARACTERS)
    for index, (_, piece) in enumerate(corpus.pieces("train")):
        if index % stride == 0:
            done += len(piece)
            progress(min(done, total), total, "learning the tokenizer")
            yield piece


def _learn_bpe(corpus: Corpus, size: int, progress: Progress) -> str:
    """tokenizer.json of byte-level BPE: 0..255 the bytes by value, then merges, the end of a text last."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    _set_threads()
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = list(byte_characters())
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(_sample(corpus, progress), trainer)
    model = json.loads(inner.to_str())["model"]
    return _byte_level(model["vocab"], model["merges"])


def _byte_level(vocabulary: dict[str, int], merges: list[Any]) -> str:
    """tokenizer.json of a byte-level tokenizer: ids 0..255 are the bytes, then the merges, then END_OF_TEXT."""
    table = byte_characters()
    ordered = sorted(table, key=table.__getitem__)
    ordered += [token for token in sorted(vocabulary, key=vocabulary.__getitem__) if token not in table]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return _layout(ordered, merges, level, level)


def _learn_characters(corpus: Corpus, progress: Progress) -> str:
    """tokenizer.json whose ids are the characters of the whole corpus in code order, then END_OF_TEXT."""
    found: set[str] = set()
    done, total = 0, 2 * corpus.bytes
    for split in SPLITS:
        for _, piece in corpus.pieces(split):
            found |= set(whole_characters(piece))
            done += len(piece)
            progress(min(done, total), total, "collecting characters")
    progress(total, total, "collecting characters")
    return _layout(sorted(found), [], None, {"type": "Fuse"})


def _layout(tokens: list[str], merges: list[Any], pre_tokenizer: Any, decoder: Any) -> str:
    end = {"id": len(tokens), "content": END_OF_TEXT, "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate([*tokens, END_OF_TEXT])},
        "merges": merges,
    }
    layout = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(layout, ensure_ascii=False, indent=1)
