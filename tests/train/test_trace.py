"""A trace is read right: overlaps, gaps, launches on another thread, nested operators."""

from __future__ import annotations

from typing import Any

import pytest

from fewbits.ranges import PREFIX
from fewbits.train.attribution import COPIES, ELEMENTWISE, GAPS, MATMUL, OPTIMIZER, UNKNOWN
from fewbits.train.trace import read_trace


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def ours(name: str, ts: float, dur: float) -> dict[str, Any]:
    return event("user_annotation", PREFIX + name, ts, dur)


def test_kernels_belong_to_the_range_that_was_open_when_they_were_launched() -> None:
    trace = {
        "traceEvents": [
            ours("step", 0, 100),
            ours("backward", 10, 20),
            ours("clip and update", 40, 10),
            event("cuda_runtime", "cudaLaunchKernel", 15, 1, tid=2, correlation=1),  # autograd's own thread
            event("cuda_runtime", "cudaLaunchKernel", 45, 1, correlation=2),
            event("cuda_driver", "cuLaunchKernel", 60, 1, correlation=3),
            event("kernel", "nvjet_tst_64x64", 1000, 2000, tid=7, correlation=1),
            event("kernel", "triton_poi_fused_mul_0", 4000, 1000, tid=7, correlation=2),
            event("kernel", "strange", 4500, 1000, tid=8, correlation=3),
            {"ph": "M", "name": "process_name"},
        ]
    }
    found = read_trace(trace)
    assert found.on == "cuda" and found.steps == 1
    assert found.parts == pytest.approx({MATMUL: 2.0, OPTIMIZER: 1.0, UNKNOWN: 1.0, GAPS: 1.0})
    assert found.ms == pytest.approx(4.5) and found.busy == pytest.approx(4.0)
    assert found.attributed == pytest.approx(0.75) and found.unknown == ["strange"]
    assert (found.tensor_cores, found.matmul_formats) == (1.0, {"bf16": 2.0})
    assert found.stages == pytest.approx({"step": 4.0, "backward": 2.0, "clip and update": 1.0})


def test_operators_count_with_their_own_time_and_what_is_between_them_is_the_hosts() -> None:
    trace = {
        "traceEvents": [
            ours("step", 0, 1000),
            ours("step", 1000, 1000),
            event("cpu_op", "aten::linear", 100, 500),
            event("cpu_op", "aten::addmm", 150, 400, **{"Input type": ["float", "float", "float"]}),
            event("cpu_op", "aten::copy_", 160, 40, **{"Input type": ["float", "float"]}),
            event("cpu_op", "aten::gelu", 1100, 300),
            event("cpu_op", "aten::mm", 5000, 300),  # outside of a step
        ]
    }
    found = read_trace(trace)
    assert found.on == "cpu" and found.steps == 2 and found.tensor_cores is None
    assert found.ms == pytest.approx(1.0)
    assert found.parts == pytest.approx({MATMUL: 0.18, ELEMENTWISE: 0.15, COPIES: 0.02, GAPS: 0.65})
    assert found.matmul_formats == pytest.approx({"fp32": 0.18})
