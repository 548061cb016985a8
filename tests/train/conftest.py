"""A tiny training on a small file of text: fractions of a second, every part of the real thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewbits.choice import Choice
from fewbits.train.choices import Choices
from fewbits.train.config import Config, full_name, load_recipe

LINE = "the quick brown fox jumps over a lazy dog while seven wizards boil h\u00e9rbs and \u4e16\u754c waits"
WORDS = LINE.split()
TINY: dict[str, Any] = {
    "data.tokenizer": "bytes",
    "model.vocab_size": 0,
    "model.n_layer": 1,
    "model.n_embd": 16,
    "model.n_head": 2,
    "model.context": 16,
    "train.batch_size": 4,
    "train.max_steps": 6,
    "train.device": "cpu",
    "train.compile": "false",
    "train.log_every": 2,
    "train.eval_every": 0,
    "train.eval_batches": 1,
    "train.sample_every": 0,
    "train.sample_tokens": 4,
    "train.save_every": 0,
    "optim.warmup_steps": 2,
    "precision": "fp32",
}
CHOICES = Choices(
    Choice("cpu", "a test"), Choice("fp32", "a test"), Choice(False, "a test"), Choice(True, "a test"),
    Choice(1, "a test"),
)  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of some 8 kB."""
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text("\n".join(" ".join(WORDS[i % 7 :] + WORDS[: i % 5]) for i in range(90)), encoding="utf-8")
    return path


@pytest.fixture
def tiny(text: Path, tmp_path: Path) -> Callable[..., Config]:
    """A function that makes the config of a tiny run; keywords are options by their short names."""

    def make(out: str = "run", **options: Any) -> Config:
        config = load_recipe("nano")
        given = {**TINY, "data.data": str(text), "train.out_dir": str(tmp_path / out) if out else ""}
        given.update({full_name(name): value for name, value in options.items()})
        for name, value in given.items():
            group, _, key = name.rpartition(".")
            if group:
                config = replace(config, **{group: replace(getattr(config, group), **{key: value})})
            else:
                config = replace(config, **{key: value})
        return config

    return make


@pytest.fixture
def choices() -> Choices:
    """Choices that need no timing: CPU, fp32, eager."""
    return CHOICES
