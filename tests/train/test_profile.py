"""`--profile` leaves a trace with our names in it and says where the time went; the run is the same run."""

from __future__ import annotations

import gzip
import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fewbits.errors import FewbitsError
from fewbits.kernels.dispatch import int8_product_execution
from fewbits.ranges import PREFIX
from fewbits.step import StepResult
from fewbits.train.config import Config
from fewbits.train.record import read_lines
from fewbits.train.trainer import Run, train

Make = Callable[..., Config]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_a_profiled_run_writes_a_trace_that_names_every_stage_and_block(tiny: Make, tmp_path: Path) -> None:
    shown = io.StringIO()
    train(tiny(n_layer=2, log_every=1), console=Console(file=shown, width=200), profile=2)
    with gzip.open(tmp_path / "run" / "trace.json.gz", "rt", encoding="utf-8") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    for name in ("step", "data", "forward", "block 0", "block 1", "attention", "loss head", "backward"):
        assert names.count(PREFIX + name) >= 2, name
    assert names.count(PREFIX + "step") == 2 and PREFIX + "clip and update" in names
    found = _json(tmp_path / "run" / "profile.json")
    assert found["steps"] == 2 and found["attributed"] == 1.0
    assert sum(found["parts"].values()) == pytest.approx(found["ms"], rel=1e-6)
    assert set(found["matmul_formats"]) == {"fp32"}
    assert "matmuls" in shown.getvalue() and "trace.json.gz" in shown.getvalue()


def test_profiling_changes_no_loss_and_its_time_is_in_no_speed(tiny: Make, tmp_path: Path) -> None:
    train(tiny("plain", log_every=1), quiet=True)
    train(tiny("profiled", log_every=1), quiet=True, profile=2)
    plain, profiled = (list(read_lines(tmp_path / name / "metrics.jsonl")) for name in ("plain", "profiled"))
    assert [line.get("loss") for line in plain] == [line.get("loss") for line in profiled]
    untimed = [line["step"] for line in profiled if "ms" in line and line["ms"] is None]
    assert untimed == [4, 5]  # after three steps of warm-up


def test_a_run_that_is_stopped_before_its_profile_says_so(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, shown = Run._take_step, io.StringIO()

    def interrupted(run: Run, measure: bool) -> StepResult:
        signal.raise_signal(signal.SIGINT)
        return take(run, measure)

    monkeypatch.setattr(Run, "_take_step", interrupted)
    train(tiny(max_steps=9, warmup_steps=1), console=Console(file=shown, width=200), profile=2)
    assert "not written: the run ended after 0 of 2 steps" in shown.getvalue()
    assert not (tmp_path / "run" / "profile.json").exists()


def test_a_run_that_is_too_short_profiles_what_it_has(tiny: Make, tmp_path: Path) -> None:
    train(tiny(max_steps=2, warmup_steps=1), quiet=True, profile=5)
    assert _json(tmp_path / "run" / "profile.json")["steps"] == 2


def test_a_number_of_steps_below_0_is_refused(tiny: Make) -> None:
    with pytest.raises(FewbitsError, match="--profile -1"):
        train(tiny(), quiet=True, profile=-1)


@pytest.mark.skipif(int8_product_execution().value != "kernel", reason=int8_product_execution().reason)
def test_int8_products_of_our_own_kernel_count_as_matmuls_in_int8(tiny: Make, tmp_path: Path) -> None:
    config = tiny(max_steps=6, warmup_steps=1, precision="int8", n_embd=128, n_head=2, context=64, batch_size=8)
    train(config, quiet=True, profile=2)
    found = _json(tmp_path / "run" / "profile.json")
    assert found["matmul_formats"]["int8"] > 0
