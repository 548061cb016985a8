"""Generation: repeatable, within the context, never half a character, in any precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fewbits.train.generate as generation
from fewbits.data.corpus import open_corpus
from fewbits.data.tokenizer import Tokenizer, build_tokenizer
from fewbits.errors import FewbitsError
from fewbits.nn.prepare import prepare
from fewbits.nn.transformer import ModelConfig, Transformer
from fewbits.train.config import Config
from fewbits.train.generate import generate, sample
from fewbits.train.trainer import train


@pytest.fixture(scope="module")
def tokenizer(text: Path) -> Tokenizer:
    return build_tokenizer("bytes", open_corpus(str(text)))


def _model(tokenizer: Tokenizer) -> Transformer:
    return Transformer(ModelConfig(vocab_size=tokenizer.vocab_size + 7, context=8, n_layer=1, n_head=2, n_embd=16))


def test_the_same_seed_gives_the_same_text_whatever_was_drawn_before(tokenizer: Tokenizer) -> None:
    model = _model(tokenizer)
    first = sample(model, tokenizer, "a", 20, seed=3)
    torch.rand(100)
    state = torch.get_rng_state()
    assert sample(model, tokenizer, "a", 20, seed=3) == first != sample(model, tokenizer, "a", 20, seed=4)
    assert torch.equal(state, torch.get_rng_state()) and model.training


def test_temperature_0_takes_the_likeliest_token(tokenizer: Tokenizer) -> None:
    model = _model(tokenizer)
    texts = {sample(model, tokenizer, "a", 12, temperature=0, seed=seed) for seed in range(3)}
    assert texts == {sample(model, tokenizer, "a", 12, temperature=1, top_k=1, seed=9)}


def test_a_tiny_temperature_is_nearly_0_and_the_largest_is_100(tokenizer: Tokenizer) -> None:
    model = _model(tokenizer)
    likeliest = sample(model, tokenizer, "th", tokens=8, temperature=0)
    assert sample(model, tokenizer, "th", tokens=8, temperature=1e-300) == likeliest
    assert sample(model, tokenizer, "th", tokens=8, temperature=100) != likeliest


def test_prompts_and_texts_longer_than_the_context_are_fine(tokenizer: Tokenizer) -> None:
    sample(_model(tokenizer), tokenizer, "a long prompt " * 10, 20)


def test_half_a_character_is_never_shown(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [int(i) for i in tokenizer.encode("\u4e16\u754c")]
    for count in range(len(ids) + 1):
        plan = iter(ids)

        def logits(model: Transformer, window: Tensor, plan=plan) -> Tensor:  # type: ignore[no-untyped-def]
            return torch.nn.functional.one_hot(torch.tensor(next(plan)), tokenizer.vocab_size).float()

        monkeypatch.setattr(generation, "_last_logits", logits)
        shown = sample(_model(tokenizer), tokenizer, "", count, temperature=0)
        assert shown == "\u4e16\u754c"[: count // 3]


def test_end_of_text_ends_the_sample(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = iter([*(int(i) for i in tokenizer.encode("ab")), tokenizer.end_of_text, *tokenizer.encode("cd")])
    monkeypatch.setattr(
        generation,
        "_last_logits",
        lambda *_: torch.nn.functional.one_hot(torch.tensor(int(next(ids) or 0)), tokenizer.vocab_size).float(),
    )
    if tokenizer.end_of_text is not None:
        assert sample(_model(tokenizer), tokenizer, "", 5, temperature=0) == "ab"


def test_tokens_that_the_tokenizer_does_not_have_are_never_drawn(tokenizer: Tokenizer) -> None:
    model = _model(tokenizer)
    with torch.no_grad():
        model.head_weight[tokenizer.vocab_size :] = 100.0 * model.head_weight.abs().max()
    sample(model, tokenizer, "", 30, temperature=5.0, top_k=0)  # decoding a foreign id would raise


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-true", "tf32", "fp64"])
def test_a_prepared_model_generates_emulated_or_not(tokenizer: Tokenizer, precision: str) -> None:
    model = prepare(_model(tokenizer), precision)
    assert isinstance(model, Transformer)
    assert sample(model, tokenizer, "a", 5, seed=1) == sample(model, tokenizer, "a", 5, seed=1)


def test_a_run_continues_its_prompt(tiny: Callable[..., Config], tmp_path: Path) -> None:
    train(tiny(), quiet=True)
    shown = generate(tmp_path / "run", "the ", tokens=5, device="cpu")
    assert shown.startswith("the ")
    assert generate(tmp_path / "run", "the ", tokens=5, device="cpu") == shown
    assert generate(tmp_path / "run" / "checkpoints" / "step-00000006", "the ", tokens=5, device="cpu") == shown


def test_a_model_that_holds_nan_is_named_and_writes_nothing(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny(max_steps=1), quiet=True)
    opened = generation.open_model

    def spoilt(*arguments: Any) -> Any:
        model, *rest = opened(*arguments)
        with torch.no_grad():
            model.blocks[0].mlp.up.weight[0, 0] = float("nan")
        return model, *rest

    monkeypatch.setattr(generation, "open_model", spoilt)
    with pytest.raises(FewbitsError, match=r"'blocks\.0\.mlp\.up\.weight' holds NaN or infinity \(1 such"):
        generate(tmp_path / "run", "the ", tokens=5, device="cpu")


@pytest.mark.parametrize(
    "settings", [{"tokens": -1}, {"temperature": -0.1}, {"top_k": -2}, {"temperature": float("nan")}, {"seed": 2**64}]
)
def test_settings_that_mean_nothing_are_refused(tokenizer: Tokenizer, settings: dict[str, float]) -> None:
    with pytest.raises(FewbitsError, match="0 or more"):
        sample(_model(tokenizer), tokenizer, "", **settings)  # type: ignore[arg-type]
