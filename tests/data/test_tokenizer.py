"""Tokenizers lose nothing, show nothing half, and open elsewhere to the same ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Foreign
from tokenizers import decoders, models, pre_tokenizers, trainers

from fewbits.data.corpus import Corpus, open_corpus
from fewbits.data.tokenizer import Tokenizer, build_tokenizer
from fewbits.errors import FewbitsError

KINDS = ("bpe:400", "bytes", "chars")
TEXT = 'def größe(x):\r\n\treturn "你好，世界" * x  # \U0001f600 e\u0301 <|endoftext|>\n\n    \x00\x7f\u2028end'


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    path = tmp_path_factory.mktemp("corpus") / "records.jsonl"
    records = [{"text": TEXT}, {"text": "The quick brown fox jumps over the lazy dog. " * 9}] * 20
    path.write_text("\n".join(json.dumps(record) for record in records))
    return open_corpus(path)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return build_tokenizer(request.param, corpus, tmp_path_factory.mktemp("cache"))


def test_the_vocabulary_has_the_size_that_was_asked_for(corpus: Corpus, tmp_path: Path) -> None:
    assert build_tokenizer("bpe:300", corpus, tmp_path).vocab_size == 300
    assert build_tokenizer("bpe:257", corpus, tmp_path).vocab_size == 257
    assert build_tokenizer("bytes", corpus, tmp_path).vocab_size == 257
    everything = {c for split in ("train", "val") for text in corpus.documents(split) for c in text}
    assert build_tokenizer("chars", corpus, tmp_path).vocab_size == len(everything) + 1


def test_decode_undoes_encode(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_token_bytes_add_up_to_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert tokenizer.token_bytes[ids].sum() == len(TEXT.encode())
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,) and tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes[tokenizer.end_of_text] == 0


@pytest.mark.parametrize("kind", ["bpe:400", "bytes"])
@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_text_at_all_is_lost(kind: str, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    if kind not in _KEPT:
        _KEPT[kind] = build_tokenizer(kind, corpus, tmp_path_factory.mktemp("cache"))
    tokenizer = _KEPT[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.token_bytes[ids].sum() == len(text.encode())


_KEPT: dict[str, Tokenizer] = {}


def test_text_that_spells_a_special_token_stays_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_of_text not in tokenizer.encode("<|endoftext|>")


def test_special_tokens_are_hidden_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.end_of_text, *tokenizer.encode("fox"), tokenizer.end_of_text]
    assert tokenizer.decode(ids) == "fox"
    assert tokenizer.decode(ids, special=True) == "<|endoftext|>fox<|endoftext|>"


def test_every_stretch_of_ids_decodes_to_whole_characters_of_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    for begin in range(len(ids)):
        for end in range(begin, min(begin + 9, len(ids)) + 1):
            assert tokenizer.decode(ids[begin:end]) in TEXT
    for end in range(len(ids)):
        assert TEXT.startswith(tokenizer.decode(ids[:end]))


def test_random_ids_never_show_half_a_character(tokenizer: Tokenizer) -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        shown = tokenizer.decode(random.integers(0, tokenizer.vocab_size, 200))
        assert "\ufffd" not in shown
        shown.encode("utf-8")


def test_half_a_character_in_a_prompt_becomes_a_whole_one(corpus: Corpus, tmp_path: Path) -> None:
    tokenizer = build_tokenizer("bytes", corpus, tmp_path)
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a\ufffdb"  # what a console hands over for a bad byte


def test_save_then_load_is_the_same_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for again in (Tokenizer.load(tmp_path), Tokenizer.load(tmp_path / "tokenizer.json")):
        assert again.fingerprint() == tokenizer.fingerprint() and again.kind == tokenizer.kind
        assert np.array_equal(again.encode(TEXT), tokenizer.encode(TEXT))
        assert np.array_equal(again.token_bytes, tokenizer.token_bytes) and again.end_of_text == tokenizer.end_of_text


def test_transformers_opens_what_was_saved_to_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # as in a checkpoint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT.replace("<|endoftext|>", "")
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text).tolist()
    assert theirs.decode(tokenizer.encode(text).tolist()) == text
    assert theirs.eos_token_id == tokenizer.end_of_text


def test_what_was_learned_is_kept_and_learned_once(corpus: Corpus, tmp_path: Path) -> None:
    said: list[str] = []
    first = build_tokenizer("bpe:300", corpus, tmp_path, lambda done, total, what: said.append(what))
    assert set(said) == {"learning the tokenizer"}
    said.clear()
    second = build_tokenizer("bpe:300", corpus, tmp_path, lambda done, total, what: said.append(what))
    assert not said and first.fingerprint() == second.fingerprint()


def test_a_damaged_tokenizer_in_the_cache_is_learned_again(corpus: Corpus, tmp_path: Path) -> None:
    first = build_tokenizer("bpe:300", corpus, tmp_path)
    (path,) = tmp_path.glob("tokenizer-*/tokenizer.json")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert build_tokenizer("bpe:300", corpus, tmp_path).fingerprint() == first.fingerprint()


def test_learning_sees_the_train_split_only(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abc abd abe\n" * 2000 + "zyxw\n" * 10)  # the last lines are held out
    assert "zyxw" not in next(open_corpus(path).documents("train"))
    tokenizer = build_tokenizer("bpe:270", open_corpus(path), tmp_path / "cache")
    assert len(tokenizer.encode("zyxw")) == 4 and len(tokenizer.encode("abc")) == 1


def test_a_character_that_was_never_seen_is_one_sentence(corpus: Corpus, tmp_path: Path) -> None:
    tokenizer = build_tokenizer("chars", corpus, tmp_path)
    with pytest.raises(FewbitsError, match=r"'ж' \(U\+0436\) is not among the \d+ characters"):
        tokenizer.encode("fox ж")


@pytest.mark.parametrize("spec", ["bpe:", "bpe:12", "bpe:1e4", "bpe:-5", "bpe:99999999999", "bpe:４０９６"])
def test_a_size_that_cannot_be_is_one_sentence(corpus: Corpus, tmp_path: Path, spec: str) -> None:
    if spec == "bpe:":
        assert build_tokenizer(spec, corpus, tmp_path).kind == "bpe"  # the default size
        return
    with pytest.raises(FewbitsError, match="needs a whole number of ids from 257"):
        build_tokenizer(spec, corpus, tmp_path)


@pytest.mark.parametrize("spec", ["byts", "gpt2", "missing/tokenizer.json", "bytes:5", "chars:5", ""])
def test_an_unknown_tokenizer_is_one_sentence(corpus: Corpus, tmp_path: Path, spec: str) -> None:
    with pytest.raises(FewbitsError, match="Unknown tokenizer"):
        build_tokenizer(spec, corpus, tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{}", "not json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "\ud800"]
)
def test_a_file_that_is_no_tokenizer_is_one_sentence(corpus: Corpus, tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(FewbitsError) as caught:
        build_tokenizer(str(path), corpus, tmp_path)
    assert str(path) in str(caught.value)


def test_an_id_outside_the_vocabulary_is_one_sentence(tokenizer: Tokenizer) -> None:
    for index in (-1, tokenizer.vocab_size):
        with pytest.raises(FewbitsError, match=f"Token id {index} is outside"):
            tokenizer.decode([index])


def test_a_foreign_tokenizer_of_the_llama_kind_keeps_text_and_counts_bytes(tmp_path: Path) -> None:
    inner = Foreign(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    inner.train_from_iterator([TEXT.replace("好", "")] * 9, trainer)
    layout = json.loads(inner.to_str())
    layout["added_tokens"] = layout["added_tokens"][:3]  # the bytes are ordinary tokens in such files
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    tokenizer = Tokenizer.load(tmp_path)
    text = "return 你好 x"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.end_of_text == 2
    assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + 1  # the space that this kind puts in front
    assert "\ufffd" not in tokenizer.decode(ids[:3])


def test_a_foreign_byte_level_tokenizer_uses_the_end_that_its_settings_name(corpus: Corpus, tmp_path: Path) -> None:
    build_tokenizer("bpe:300", corpus, tmp_path / "cache").save(tmp_path)
    inner = Foreign.from_file(str(tmp_path / "tokenizer.json"))
    inner.add_special_tokens(["<stop>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    tokenizer = build_tokenizer(str(tmp_path), corpus, tmp_path)
    assert tokenizer.end_of_text == 300 and tokenizer.vocab_size == 301
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
