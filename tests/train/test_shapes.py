"""Slow shapes are named with what to do about them, and fast ones are not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fewbits.choice import Choice
from fewbits.kernels import dispatch
from fewbits.nn.transformer import ModelConfig
from fewbits.precision.precision import Precision
from fewbits.train.config import load_recipe, recipes
from fewbits.train.shapes import slow_shapes

FAST = ModelConfig(vocab_size=50304, context=1024, n_layer=2, n_head=12, n_embd=768)
FP8 = Precision.parse("fp8")


@pytest.fixture(autouse=True)
def plain_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel of the loss head, which would align its rows."""
    choice = Choice("definition", "a test")
    monkeypatch.setattr(dispatch, "_choices", {("loss", "cuda"): choice})


def test_a_head_that_aligns_its_rows_has_no_slow_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_choices", {("loss", "cuda"): Choice("kernel", "a test")})
    assert slow_shapes(replace(FAST, vocab_size=50257), 32, "cuda") == []


def test_fast_shapes_are_not_named() -> None:
    assert slow_shapes(FAST, 32, "cuda") == slow_shapes(FAST, 32, "cuda", FP8) == []


def test_on_a_cpu_nothing_is_named() -> None:
    assert slow_shapes(replace(FAST, vocab_size=50257), 3, "cpu") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 50257}, "--vocab_size 50304"),
        ({"n_head": 8}, "heads of 96 are none"),
        ({"n_head": 8}, "--n_head 12 or 6"),
        ({"n_head": 64}, "heads of 12 are no multiple of 8"),
        ({"context": 1023}, "1 x 1023 = 1,023 tokens"),
        ({"n_embd": 780, "n_head": 13}, "n_embd=780 is no multiple of 8, which 16-bit matmuls want: 784 is"),
        ({"n_ff": 3001}, "n_ff=3001"),
    ],
)
def test_what_costs_speed_is_named_with_what_to_do(change: dict[str, int], words: str) -> None:
    found = slow_shapes(replace(FAST, **change), 1, "cuda")
    assert any(words in sentence for sentence in found), found


def test_few_bits_want_multiples_of_16() -> None:
    narrow = replace(FAST, n_ff=3080)
    assert slow_shapes(narrow, 1, "cuda") == []
    (sentence,) = slow_shapes(narrow, 1, "cuda", FP8)
    assert "n_ff=3080 is no multiple of 16" in sentence and "stay in 16 bits" in sentence


@pytest.mark.parametrize("name", sorted(recipes()))
def test_shipped_recipes_have_fast_shapes_but_for_the_heads_of_minimind(name: str) -> None:
    config = load_recipe(name)
    known = replace(config.model, vocab_size=config.model.vocab_size or 4096)
    found = slow_shapes(known, config.train.batch_size // config.train.micro_batches, "cuda")
    assert len(found) == (name == "minimind-64m") and all("heads of 96" in sentence for sentence in found)
