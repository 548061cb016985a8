"""Quantization-aware training goes on bit for bit, learned scales too, and its checkpoints stay open to everybody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewbits.checkpoint.hf import load
from fewbits.checkpoint.load import load_checkpoint
from fewbits.checkpoint.save import save_checkpoint
from fewbits.choice import Choice
from fewbits.nn.fake import learned_scales
from fewbits.train.build import Training, build_training, open_data
from fewbits.train.choices import Choices
from fewbits.train.config import Config
from fewbits.train.state import collect, exact_weights, restore

TEXTS = ("int8-qat", "int4-qat", "binary-qat", "fp8-qat", "int4-qat, output=bf16 x int4/group:32/learned")


def _everything(training: Training) -> dict[str, Any]:
    named = list(training.model.named_parameters())
    state = training.optimizer.named_state(named, masters=True)
    return {
        **dict(named),
        **{f"exact/{k}": v for k, v in exact_weights(training.model, training.optimizer).items()},
        **state,
    }


@pytest.mark.parametrize("precision", TEXTS)
def test_2n_steps_equal_n_steps_saved_loaded_and_n_more(
    tiny: Callable[..., Config], choices: Choices, tmp_path: Path, precision: str
) -> None:
    config = tiny(precision=precision, n_embd=32, dropout=0.2, micro_batches=2, lr=0.01)
    choices = replace(choices, precision=Choice(precision, "a test"))
    data = open_data(config)

    def build() -> Training:
        return build_training(config, choices, data)

    whole = build()
    for _ in range(4):
        whole.take_step()
    saved = save_checkpoint(tmp_path / "checkpoints", 4, **collect(whole, {}), keep=1)
    for _ in range(4):
        whole.take_step()
    resumed = build()
    restore(resumed, load_checkpoint(saved))
    for _ in range(4):
        resumed.take_step()
    left, right = _everything(whole), _everything(resumed)
    assert left.keys() == right.keys() and len(learned_scales(whole.model)) == (4 if "learned" in precision else 0)
    for name, value in left.items():
        assert value.dtype == right[name].dtype and torch.equal(value, right[name]), name
    model, _ = load(saved)  # the exact weights, under everybody's names: learned scales are kept apart
    assert not learned_scales(model)


def test_learned_scales_get_no_weight_decay(tiny: Callable[..., Config], choices: Choices) -> None:
    config = tiny(precision=TEXTS[-1], n_embd=32)
    training = build_training(config, replace(choices, precision=Choice(TEXTS[-1], "a test")), open_data(config))
    decayed = {id(p) for g in training.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert not decayed & {id(p) for p in learned_scales(training.model).values()}
