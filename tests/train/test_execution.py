"""How a run is executed is decided by timing, with reasons, and only where the user left it open."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.kernels import dispatch
from fewbits.precision.hardware import Hardware
from fewbits.precision.precision import Precision
from fewbits.train import execution
from fewbits.train.choices import Choices
from fewbits.train.config import Config
from fewbits.train.execution import check_device, choose_device, choose_execution, determinism

Runner = tuple[Precision, bool]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds a step by precision ("fp32", or "fp32 compiled"), in place of a clock; a missing one does not fit."""
    seconds: dict[str, float] = {}

    def once(self: Any, precision: Precision, compile: bool) -> float:
        name = f"{precision.name} compiled" if compile else precision.name
        if name not in seconds:
            raise torch.OutOfMemoryError(name)
        return seconds[name]

    def race(self: Any, runners: Sequence[Runner], rounds: int = 3) -> list[float]:
        return [once(self, *runner) for runner in runners]

    monkeypatch.setattr(execution._Trials, "once", once)
    monkeypatch.setattr(execution._Trials, "race", race)
    return seconds


def _native(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    answers: Callable[..., Choice] = lambda format, hardware: Choice(format.name in names, "a faked device")  # noqa: E731
    monkeypatch.setattr(execution, "native", answers)


def test_what_is_given_is_taken_and_nothing_is_timed(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(execution._Trials, "once", refuse)
    chosen = choose_execution(tiny(precision="bf16-mixed"))
    assert [chosen.device.value, chosen.precision.value, chosen.compile.value] == ["cpu", "bf16-mixed", False]
    assert all(choice.reason for choice in (chosen.device, chosen.precision, chosen.compile, chosen.deterministic))


def test_where_16_bits_would_be_emulated_fp32_is_taken_and_the_reason_said(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    _native(monkeypatch)
    chosen = choose_execution(tiny(precision="auto")).precision
    assert chosen.value == "fp32" and "emulated" in chosen.reason and "a faked device" in chosen.reason


@pytest.mark.parametrize(("bf16", "wins"), [(0.5, "bf16-mixed"), (0.99, "fp32"), (1.5, "fp32")])
def test_the_fastest_wins_if_it_is_clearly_faster_than_what_is_more_exact(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, timed: dict[str, float], bf16: float, wins: str
) -> None:
    _native(monkeypatch, "bf16")
    timed.update({"fp32": 1.0, "bf16-mixed": bf16})
    chosen = choose_execution(tiny(precision="auto")).precision
    assert chosen.value == wins and "fp32 1000 ms" in chosen.reason and "bf16-mixed" in chosen.reason


def test_a_precision_that_does_not_fit_into_memory_is_left_out(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, timed: dict[str, float]
) -> None:
    _native(monkeypatch, "bf16")
    timed["bf16-mixed"] = 9.0
    assert choose_execution(tiny(precision="auto")).precision.value == "bf16-mixed"
    timed.clear()
    with pytest.raises(FewbitsError, match="No precision fits into memory"):
        choose_execution(tiny(precision="auto"))


def test_the_race_times_real_steps(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    _native(monkeypatch, "bf16")
    chosen = choose_execution(tiny(precision="auto")).precision
    assert chosen.value in ("fp32", "bf16-mixed") and "ms" in chosen.reason


def test_a_short_run_is_not_compiled(tiny: Callable[..., Config]) -> None:
    chosen = choose_execution(tiny(compile="auto")).compile
    assert chosen.value is False and "too short" in chosen.reason


@pytest.mark.parametrize(
    ("eager", "compiled", "wins"), [(1.0, 0.8, True), (1.0, 0.99999, False), (0.001, 0.0001, False)]
)
def test_a_long_run_is_compiled_when_that_wins_back_its_time(
    tiny: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    timed: dict[str, float],
    eager: float,
    compiled: float,
    wins: bool,
) -> None:
    timed.update({"fp32": eager, "fp32 compiled": compiled})
    first = iter([20.0 + compiled])
    monkeypatch.setattr(execution._Trials, "once", lambda *_: next(first))
    config = tiny(compile="auto", max_steps=10_000, n_embd=256, context=256)
    chosen = choose_execution(config).compile
    assert chosen.value is wins and chosen.reason


def test_a_compiler_that_fails_leaves_the_run_eager(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, timed: dict[str, float]
) -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("InvalidCxxCompiler")

    timed["fp32"] = 1.0
    monkeypatch.setattr(execution._Trials, "once", fail)
    chosen = choose_execution(tiny(compile="auto", max_steps=10_000, n_embd=256, context=256)).compile
    assert chosen.value is False and "compiling failed here (RuntimeError)" in chosen.reason


def test_without_a_compiler_auto_is_eager_and_true_is_refused(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution.shutil, "which", lambda name: None)
    chosen = choose_execution(tiny(compile="auto")).compile
    assert chosen.value is False and "no C++ compiler" in chosen.reason
    with pytest.raises(FewbitsError, match=r"no C\+\+ compiler .* --compile false"):
        check_device(tiny(compile="true"))


def test_a_large_model_is_timed_on_a_small_part_of_it(tiny: Callable[..., Config]) -> None:
    config = tiny(n_layer=48, n_embd=2048, n_head=16, context=2048, batch_size=64, micro_batches=2, vocab_size=32000)
    small = execution._shrink(config, 6e10)
    assert small.model.n_layer == 2 and small.train.batch_size == 1 and small.model.context < 2048
    assert small.model.n_embd == 2048
    assert execution._shrink(tiny(vocab_size=99), 6e10).model == tiny(vocab_size=99).model


def test_a_device_that_is_not_there_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").value == "cpu" and "no CUDA device" in choose_device("auto").reason
    with pytest.raises(FewbitsError, match=r"no CUDA device here\. Use --device cpu"):
        choose_device("cuda")
    with pytest.raises(FewbitsError, match="must be auto, cpu, cuda"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(FewbitsError, match="2 CUDA devices here"):
        choose_device("cuda:5")


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_accelerators_are_refused_with_one_sentence(tiny: Callable[..., Config], kind: str) -> None:
    with pytest.raises(FewbitsError, match="not supported"):
        check_device(tiny(device=kind))


def test_a_precision_that_the_device_lacks_is_refused_with_what_works(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "choose_device", lambda wanted: Choice("cuda:0", "a test"))
    monkeypatch.setattr(execution, "describe", lambda device: Hardware("cuda", "Tesla V100", (7, 0)))
    with pytest.raises(FewbitsError, match="fp16-mixed"):
        check_device(tiny(precision="bf16-mixed"))


def test_determinism_is_switched_on_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with determinism(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with determinism(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()


def test_choices_survive_being_recorded(choices: Choices) -> None:
    entries = choices.to_json()
    again = Choices.from_json(entries)
    assert again.to_json() == entries and replace(again, matmuls={}) == choices
    with pytest.raises(FewbitsError, match="lack 'device'"):
        Choices.from_json([])


def test_recorded_ways_of_multiplying_are_put_into_force_and_not_timed_again(
    choices: Choices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "native", lambda *_: pytest.fail("asked again"))
    entries = choices.to_json()
    for way in ("native", "emulated"):  # whatever this machine would choose
        entry = {"what": "matmul bf16 on cpu", "value": way, "reason": "as it was recorded"}
        Choices.from_json([*entries, entry]).replay()
        assert dispatch.emulated("bf16", "cpu") == (way == "emulated")
        assert dispatch.matmul_execution(Format.parse("bf16"), torch.device("cpu")).reason == "as it was recorded"
