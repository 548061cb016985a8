"""Evaluation: the mean over real targets, in words and bytes, without touching the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbits.data.batches import eval_batches
from fewbits.nn.prepare import prepare
from fewbits.nn.transformer import ModelConfig, Transformer
from fewbits.train.config import Config
from fewbits.train.evaluate import evaluate, evaluate_run
from fewbits.train.trainer import train

CONFIG = ModelConfig(vocab_size=32, context=16, n_layer=1, n_head=2, n_embd=16, dropout=0.5)


def _batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        tokens = torch.randint(32, (2, 16), generator=generator)
        labels = tokens.roll(-1, 1)
        labels[:, 10:] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return found


def test_the_loss_is_the_mean_over_real_targets_and_bits_are_over_their_bytes() -> None:
    model, batches = Transformer(CONFIG), _batches()
    lengths = np.arange(32, dtype=np.int32) % 5
    found = evaluate(model, batches, lengths)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(batch["input_ids"])[:, :10].flatten(0, 1) for batch in batches]).double()
    labels = torch.cat([batch["labels"][:, :10].flatten() for batch in batches])
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    # Sums of some 20 fp32 losses of about 3.5, each good to about 2^-22: relative 1e-6 holds with room.
    assert found["loss"] == pytest.approx(total / 60, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-12)
    assert found["bytes"] == int(lengths[labels.numpy()].sum()) and found["tokens"] == 60
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / found["bytes"], rel=1e-6)


def test_evaluation_leaves_mode_gradients_and_random_state_alone() -> None:
    model = Transformer(CONFIG).train()
    before = torch.get_rng_state()
    first, second = evaluate(model, _batches()), evaluate(model, _batches())
    assert first == second  # dropout of 0.5 would differ
    assert model.training and torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_never_runs_what_was_compiled_for_training() -> None:
    model: Any = Transformer(CONFIG).train()

    def refuse(*_: Any) -> None:
        raise AssertionError("the training's callable was used")

    model._run_train = refuse
    model._pieces = refuse
    assert evaluate(model, _batches())["loss"] > 0


def test_how_the_text_is_cut_into_batches_does_not_matter() -> None:
    model = prepare(Transformer(CONFIG), "fp64")
    tokens = np.random.default_rng(0).integers(0, 32, 200).astype(np.uint16)
    found = [evaluate(model, eval_batches(tokens, np.array([0]), rows, 16)) for rows in (1, 4, 64)]
    assert {each["tokens"] for each in found} == {199}
    assert max(each["loss"] for each in found) - min(each["loss"] for each in found) < 1e-12  # fp64 sums of 199 terms


def test_nothing_to_predict_is_none_and_not_nan() -> None:
    batch = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "labels": torch.full((1, 4), -100)}
    assert evaluate(Transformer(CONFIG), [batch])["loss"] is None


def test_a_run_is_measured_on_what_it_never_saw(tiny: Callable[..., Config], text: Any, tmp_path: Any) -> None:
    config = tiny(eval_batches=1000)
    summary = train(config, quiet=True)
    found = evaluate_run(tmp_path / "run", device="cpu")
    assert found["part"] == "held out" and found["gzip"] > 0
    # The same windows in other batches: sums of fp32 losses in another order.
    assert found["loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    assert evaluate_run(tmp_path / "run", data=str(text), device="cpu")["loss"] == found["loss"]
    other = tmp_path / "other.txt"
    other.write_text("something else. " * 50)
    found = evaluate_run(tmp_path / "run", data=str(other), device="cpu")
    assert found["part"] == "all" and found["bytes"] == 16 * 50


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed", "fp64"])
def test_a_run_can_be_measured_in_another_precision(tiny: Callable[..., Config], tmp_path: Any, precision: str) -> None:
    train(tiny(), quiet=True)
    exact, other = (evaluate_run(tmp_path / "run", device="cpu", precision=p)["loss"] for p in ("fp32", precision))
    assert other == pytest.approx(exact, rel=0.01)  # weights and activations good to 2^-8 each
