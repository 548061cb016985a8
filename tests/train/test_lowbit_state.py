"""A training in few bits goes on bit for bit: random roundings, and scales that look back on earlier steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewbits.checkpoint.load import load_checkpoint
from fewbits.checkpoint.save import save_checkpoint
from fewbits.choice import Choice
from fewbits.nn.scale_history import scale_history
from fewbits.train.build import Training, build_training, open_data
from fewbits.train.choices import Choices
from fewbits.train.config import Config
from fewbits.train.state import collect, exact_weights, restore


@pytest.mark.parametrize(
    "precision", ["fp8", "fp8-row", "fp8-block", "mxfp8", "nvfp4", "int8", "fp8-delayed", "fp8-unit"]
)
def test_2n_steps_equal_n_steps_saved_loaded_and_n_more(
    tiny: Callable[..., Config], choices: Choices, tmp_path: Path, precision: str
) -> None:
    config = tiny(precision=precision, n_embd=64, dropout=0.2, micro_batches=2, lr=0.01)
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
    left, right = (exact_weights(t.model, t.optimizer) for t in (whole, resumed))
    assert all(torch.equal(value, right[name]) for name, value in left.items())
    state, other = (t.optimizer.named_state(t.model.named_parameters()) for t in (whole, resumed))
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert scale_history(whole.model) == scale_history(resumed.model)
    assert bool(scale_history(whole.model)) == (precision == "fp8-delayed")


def test_what_is_drawn_depends_on_the_attempt_and_the_layer(tiny: Callable[..., Config], choices: Choices) -> None:
    config = tiny(precision="int8", n_embd=64, lr=0.0, weight_decay=0.0)  # the same weights at every step
    training = build_training(config, replace(choices, precision=Choice("int8", "a test")), open_data(config))
    batch = training.micro_batches(0)
    norms = {float(training.step(batch).grad_norm) for _ in range(3)}
    assert len(norms) == 3  # only the random roundings of the gradients differ
    sites = [int(m.site) for m in training.model.modules() if getattr(m, "site", None) is not None]
    assert len(set(sites)) == len(sites) > 1
