"""The first signal is noted, a second Ctrl+C stops at once."""

from __future__ import annotations

import signal

import pytest

from fewbits.train.signals import Interrupts


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_first_signal_is_noted_and_nothing_stops(name: str) -> None:
    with Interrupts() as interrupts:
        assert interrupts.received is None
        signal.raise_signal(signal.Signals[name])
        assert interrupts.received == name


def test_a_second_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interrupts, "SAME_PRESS_S", 0.0)
    with pytest.raises(KeyboardInterrupt), Interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_ctrl_c_that_a_wrapper_hands_on_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interrupts, "SAME_PRESS_S", 60.0)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interrupts.received == "SIGINT"


def test_ctrl_c_after_sigterm_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interrupts, "SAME_PRESS_S", 0.0)
    with pytest.raises(KeyboardInterrupt), Interrupts():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def test_the_end_of_a_run_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interrupts, "SAME_PRESS_S", 0.0)
    with Interrupts() as interrupts:
        interrupts.ending()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts():
        pass
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
