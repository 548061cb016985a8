"""Memory is what was allocated, and each byte has one role."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fewbits.choice import Choice
from fewbits.train.build import Training, build_training, open_data
from fewbits.train.choices import Choices
from fewbits.train.config import Config
from fewbits.train.memory import MemoryMeter, by_role, highest, live_bytes, peak_within, resident_bytes


def _meter(config: Config, choices: Choices) -> tuple[Training, MemoryMeter]:
    choices = replace(choices, precision=Choice(config.precision, "a test"))
    training = build_training(config, choices, open_data(config))
    meter = MemoryMeter(training.model, training.optimizer, training.device, config.train.micro_batches)
    training.take_step()
    meter.measure(training.take_step)
    return training, meter


def test_the_peak_is_the_largest_sum_alive_at_once() -> None:
    def run() -> None:
        a = torch.zeros(1 << 20)  # 4 MiB
        b = torch.zeros(1 << 19)  # 2 MiB
        del a
        c = torch.zeros(1 << 19)
        del b, c

    assert peak_within(run)[1] == 6 << 20
    assert highest([4, 2, -4, 2]) == 6


def test_the_profiler_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    peak_within(lambda: torch.zeros(10))
    assert capfd.readouterr() == ("", "")


def test_storage_that_is_shared_counts_once() -> None:
    a = torch.zeros(8)
    assert live_bytes([a, a[2:], a.view(2, 4)]) == 32


def test_roles_add_up_to_the_peak() -> None:
    assert sum(by_role(100, {"working weights": 30, "moments": 20}, 200).values()) == 100


@pytest.mark.parametrize(
    ("precision", "working", "master"),
    [("fp32", 4, 0), ("bf16-mixed", 2, 2), ("fp16-mixed", 2, 4), ("bf16-true", 2, 0), ("fp64", 8, 0)],
)
def test_each_precision_keeps_the_bytes_a_parameter_that_it_says(
    tiny: Callable[..., Config], choices: Choices, precision: str, working: int, master: int
) -> None:
    training, meter = _meter(tiny(precision=precision), choices)
    count, roles = training.config.model.parameter_count(), meter.roles()
    assert roles is not None and sum(roles.values()) == meter.peak()
    assert roles["working weights"] == working * count
    assert roles["master weights"] == master * count
    assert roles["moments"] == (16 if precision == "fp64" else 8) * count
    assert roles["gradients"] == working * count
    assert roles["activations"] > 0


@pytest.mark.parametrize(("precision", "bytes_each"), [("bf16-mixed", 2 + 4), ("fp32", 4), ("fp64", 8)])
def test_accumulation_adds_fp32_accumulators_to_16_bit_gradients_and_nothing_to_wider_ones(
    tiny: Callable[..., Config], choices: Choices, precision: str, bytes_each: int
) -> None:
    training, meter = _meter(tiny(precision=precision, micro_batches=2), choices)
    roles = meter.roles()
    assert roles is not None and roles["gradients"] == bytes_each * training.config.model.parameter_count()


def test_more_rows_need_more_activations(tiny: Callable[..., Config], choices: Choices) -> None:
    small, large = (_meter(tiny(batch_size=rows), choices)[1].roles() for rows in (4, 16))
    assert small is not None and large is not None
    assert large["activations"] > 2 * small["activations"]


def test_before_anything_is_measured_nothing_is_claimed(tiny: Callable[..., Config], choices: Choices) -> None:
    config = tiny()
    training = build_training(config, choices, open_data(config))
    meter = MemoryMeter(training.model, training.optimizer, training.device, 1)
    assert meter.peak() is None and meter.roles() is None and not meter.measured


def test_the_resident_size_is_known_here() -> None:
    found = resident_bytes()
    assert found is None or found > 1 << 20
