"""Speeds are tokens over time, and utilization is null where the peak is not known."""

from __future__ import annotations

import time

import pytest
import torch

from fewbits.nn.transformer import ModelConfig
from fewbits.precision.hardware import Hardware
from fewbits.precision.precision import Precision
from fewbits.train import throughput
from fewbits.train.throughput import Stopwatch, device_peak, mfu


def test_mfu_is_null_without_a_peak_or_a_speed() -> None:
    assert mfu(1e9, 1e5, None) is None and mfu(1e9, None, 1e15) is None
    assert device_peak(Precision.parse("fp32"), torch.device("cpu")) is None


def test_the_strongest_published_step_is_below_its_peak() -> None:
    # 476,417 tokens/s of GPT-2 124M in bf16 on an H100: 0.41 of 989 TFLOP/s by the usual count of 6 N with N the
    # matrices that are multiplied (124M), plus causal attention.
    flops = ModelConfig(vocab_size=50304).flops_per_token(1024)
    assert 6 * 123e6 < flops < 6 * 140e6
    assert mfu(flops, 476_417, 989.4e12) == pytest.approx(0.385, abs=0.01)


def test_the_peak_is_that_of_the_format_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
    monkeypatch.setattr(throughput, "describe", lambda device: h100)
    monkeypatch.setattr(throughput, "running_format", lambda precision, device: precision.operand)
    peaks = [device_peak(Precision.parse(name), torch.device("cuda")) for name in ("fp32", "tf32", "bf16-mixed")]
    assert all(peaks) and peaks == sorted(peaks)  # type: ignore[type-var]


def test_what_is_emulated_counts_as_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.choice import Choice

    monkeypatch.setattr(throughput, "matmul_execution", lambda *_: Choice("emulated", "a test"))
    assert throughput.running_format(Precision.parse("bf16-mixed"), torch.device("cpu")).name == "fp32"


def test_the_stopwatch_counts_steps_and_not_what_lies_between() -> None:
    watch = Stopwatch()
    watch.start()
    time.sleep(0.02)
    watch.pause()
    time.sleep(0.2)
    watch.start()
    watch.pause()
    assert 0.02 <= watch.take() < 0.2
    assert watch.take() == 0.0
