"""Ranges name the stretches of a step while somebody looks, and are nothing otherwise."""

from __future__ import annotations

import time

import torch
from torch._dynamo.testing import CompileCounter
from torch.profiler import ProfilerActivity, profile

from fewbits import ranges
from fewbits.ranges import recording, span


def test_a_span_is_one_shared_empty_context_while_nobody_looks() -> None:
    assert span("forward") is span("block", 3)


def test_a_thousand_spans_cost_less_than_a_hundredth_of_a_step_while_nobody_looks() -> None:
    began = time.perf_counter()
    for number in range(1000):
        with span("block", number):
            pass
    assert time.perf_counter() - began < 0.02  # 1 to 2 us each on a busy core; the smallest step here takes 2 ms


def test_recorded_spans_carry_our_prefix_and_number_and_recording_ends() -> None:
    with recording(), profile(activities=[ProfilerActivity.CPU]) as profiled, span("block", 7):
        torch.ones(3).sum()
    names = {event.name for event in profiled.events() or ()}
    assert ranges.PREFIX + "block 7" in names
    assert span("block", 7) is span("block", 8)


def test_a_compiled_function_holds_no_span_and_is_not_compiled_again_when_recording_begins() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        with span("forward"):
            return x * 2

    counter = CompileCounter()
    compiled = torch.compile(double, backend=counter, fullgraph=True)
    x = torch.ones(3)
    compiled(x)
    with recording():
        assert torch.equal(compiled(x), 2 * x)
    assert counter.frame_count == 1
