"""The state of a training is complete: what is saved and loaded goes on bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.checkpoint.load import load_checkpoint
from fewbits.checkpoint.save import save_checkpoint
from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.train.build import Data, Training, build_training, open_data
from fewbits.train.choices import Choices
from fewbits.train.config import Config
from fewbits.train.state import collect, exact_weights, restore

PRECISIONS = ("fp64", "fp32", "tf32", "fp16-mixed", "bf16-mixed", "fp16-true", "bf16-true")
MASTERS = ("auto", "fp32", "split", "none")
REFUSED = {
    *((precision, "split") for precision in PRECISIONS if precision != "bf16-mixed"),
    *((precision, "fp32") for precision in ("fp64", "fp16-true", "bf16-true")),
}


def _build(config: Config, choices: Choices, data: Data) -> Training:
    return build_training(config, replace(choices, precision=Choice(config.precision, "a test")), data)


def _everything(training: Training) -> dict[str, Tensor]:
    """Working weights, exact weights, masters, moments and counters, by name."""
    named = list(training.model.named_parameters())
    state = {f"state/{k}": v for k, v in training.optimizer.named_state(named, masters=True).items()}
    exact = {f"exact/{k}": v for k, v in exact_weights(training.model, training.optimizer).items()}
    return {**{f"working/{name}": p.detach() for name, p in named}, **exact, **state}


def _assert_same(a: Training, b: Training) -> None:
    left, right = _everything(a), _everything(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype and torch.equal(value, right[name]), name
    assert a.step.state_dict() == b.step.state_dict()


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_2n_steps_equal_n_steps_saved_loaded_and_n_more(
    tiny: Callable[..., Config], choices: Choices, tmp_path: Path, precision: str, master: str, optimizer: str
) -> None:
    # fp16 starts at 2^24, so that skipped steps and back-offs lie on both sides of the save.
    scale = "dynamic:initial=16777216,interval=2" if precision.startswith("fp16") else "auto"
    config = tiny(
        precision=precision, master=master, optimizer=optimizer, loss_scale=scale, dropout=0.2, micro_batches=2, lr=0.01
    )
    if (precision, master) in REFUSED:
        with pytest.raises(FewbitsError, match="master"):
            config.check().resolve_precision()
        return
    data = open_data(config)
    whole = _build(config, choices, data)
    for _ in range(5):
        whole.take_step()
    saved = save_checkpoint(tmp_path / "checkpoints", whole.step.attempts, **collect(whole, {}), keep=2)
    for _ in range(5):
        whole.take_step()
    resumed = _build(config, choices, data)
    restore(resumed, load_checkpoint(saved))
    for _ in range(5):
        resumed.take_step()
    _assert_same(whole, resumed)
    assert int(whole.optimizer.applied_steps) > 0


def test_a_restored_state_equals_the_saved_one_before_any_step(
    tiny: Callable[..., Config], choices: Choices, tmp_path: Path
) -> None:
    config = tiny(precision="bf16-mixed")
    data = open_data(config)
    before = _build(config, choices, data)
    for _ in range(3):
        before.take_step()
    save_checkpoint(tmp_path, 3, **collect(before, {}), keep=1)
    after = _build(config, choices, data)
    restore(after, load_checkpoint(tmp_path))
    _assert_same(before, after)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("fp32", torch.float32),
        ("bf16-mixed", torch.float32),
        ("fp16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
    ],
)
def test_a_checkpoint_holds_exact_weights_and_16_bits_only_where_no_master_is_kept(
    tiny: Callable[..., Config], choices: Choices, precision: str, dtype: torch.dtype
) -> None:
    config = tiny(precision=precision)
    training = _build(config, choices, open_data(config))
    training.take_step()
    collected = collect(training, {})
    assert {tensor.dtype for tensor in collected["model"].values()} == {dtype}
    assert not any(name.endswith("/master") for name in collected["optimizer"])


def test_the_working_weights_are_the_rounding_of_what_is_saved(tiny: Callable[..., Config], choices: Choices) -> None:
    config = tiny(precision="bf16-mixed", lr=0.01)
    training = _build(config, choices, open_data(config))
    for _ in range(3):
        training.take_step()
    exact = exact_weights(training.model, training.optimizer)
    for name, parameter in training.model.named_parameters():
        bits = exact[name].view(torch.int32)
        away = ((bits + 0x8000) >> 16 << 16).view(torch.float32).bfloat16()  # nearest, ties away from zero
        assert torch.equal(parameter.detach(), away), name


def test_the_same_weights_come_from_the_same_seed_in_every_precision(
    tiny: Callable[..., Config], choices: Choices
) -> None:
    config = tiny()
    data = open_data(config)
    first: Any = None
    for precision in ("fp32", "bf16-mixed", "fp16-mixed"):
        training = _build(replace(config, precision=precision), choices, data)
        exact = exact_weights(training.model, training.optimizer)
        first = first or exact
        assert all(torch.equal(first[name], exact[name]) for name in first), precision


def test_other_text_than_the_run_began_with_is_refused(
    tiny: Callable[..., Config], choices: Choices, tmp_path: Path
) -> None:
    config = tiny()
    training = _build(config, choices, open_data(config))
    training.take_step()
    save_checkpoint(tmp_path / "saved", 1, **collect(training, {}), keep=1)
    other = tmp_path / "other.txt"
    other.write_text("something else entirely, again and again. " * 200)
    config = replace(config, data=replace(config.data, data=str(other)))
    changed = _build(config, choices, open_data(config))
    with pytest.raises(FewbitsError, match="corpus is not the one the run began with"):
        restore(changed, load_checkpoint(tmp_path / "saved"))


def test_another_precision_than_the_run_began_with_is_refused(
    tiny: Callable[..., Config], choices: Choices, tmp_path: Path
) -> None:
    config = tiny(precision="bf16-mixed")
    training = _build(config, choices, open_data(config))
    training.take_step()
    save_checkpoint(tmp_path / "saved", 1, **collect(training, {}), keep=1)
    config = tiny(precision="fp32")
    with pytest.raises(FewbitsError, match="bf16-mixed and was to be resumed in fp32"):
        restore(_build(config, choices, open_data(config)), load_checkpoint(tmp_path / "saved"))


def test_remainders_are_freed_once_the_optimizer_has_adopted_them(
    tiny: Callable[..., Config], choices: Choices
) -> None:
    config = tiny(precision="fp16-mixed")
    training = _build(config, choices, open_data(config))
    remainders: Any = training.model.fewbits_remainders
    assert remainders
    training.take_step()
    assert not remainders


def test_weight_decay_reaches_matrices_and_embeddings_only(tiny: Callable[..., Config], choices: Choices) -> None:
    config = tiny()
    training = _build(config, choices, open_data(config))
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    decayed = [names[id(p)] for g in training.optimizer.param_groups if g["weight_decay"] for p in g["params"]]
    spared = [names[id(p)] for g in training.optimizer.param_groups if not g["weight_decay"] for p in g["params"]]
    assert "embed.weight" in decayed and "blocks.0.mlp.up.weight" in decayed
    assert sorted(decayed + spared) == sorted(names.values())
    assert set(spared) == {name for name in names.values() if "norm" in name or name.endswith("bias")}
