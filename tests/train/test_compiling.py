"""Compiling is timed apart, kept between runs, and a compiler that fails leaves the run eager with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.kernels import cpp
from fewbits.nn.transformer import Transformer
from fewbits.train import begin
from fewbits.train.choices import Choices
from fewbits.train.compiling import CompileClock, compiler_failure, keep_compiled_code
from fewbits.train.config import Config
from fewbits.train.record import read_lines
from fewbits.train.trainer import train

Make = Callable[..., Config]


def test_compiled_code_is_kept_in_our_cache_unless_the_user_says_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    folder = keep_compiled_code(str(tmp_path))
    assert folder.is_relative_to(tmp_path / "compiled") and torch.__version__ in folder.name
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert Path(os.environ["TRITON_CACHE_DIR"]).is_relative_to(folder)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "theirs")
    assert keep_compiled_code(str(tmp_path)) == tmp_path / "mine" and os.environ["TRITON_CACHE_DIR"] == "theirs"


def test_the_clock_counts_the_compiler_and_stops_listening(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    with CompileClock() as clock:
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        assert clock.seconds > 0 and clock.take() == clock.seconds and clock.take() == 0.0
    before = clock.seconds
    torch.compile(lambda x: x + 2, backend="eager")(torch.ones(2))
    assert clock.seconds == before


def test_the_clock_counts_our_own_cpp_once_and_only_while_it_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not cpp.compiler():
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()

    def build(x: torch.Tensor, name: str) -> torch.Tensor:
        monkeypatch.setattr(cpp, "cache_root", lambda: tmp_path / name)
        cpp.library("update_cpu", {})
        return x

    def backend(graph: Any, inputs: Any) -> Any:
        build(inputs[0], "inside")
        return graph

    build(torch.ones(2), "before")
    with CompileClock() as clock:
        began, built = time.perf_counter(), cpp.compiling_s()
        build(torch.ones(2), "within")
        assert clock.seconds == cpp.compiling_s() - built > 0
        build(torch.ones(2), "within")
        assert clock.seconds == cpp.compiling_s() - built
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
        assert cpp.compiling_s() - built <= clock.seconds <= time.perf_counter() - began
    before = clock.seconds
    build(torch.ones(2), "after")
    assert clock.seconds == before


def test_the_clock_counts_kernels_of_ours_by_tritons_listener_and_leaves_it_to_who_had_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    heard: list[bool] = []
    compilation = SimpleNamespace(listener=lambda *, times, cache_hit: heard.append(cache_hit))
    theirs = compilation.listener
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(knobs=SimpleNamespace(compilation=compilation)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    times = SimpleNamespace(total=2_500_000)  # microseconds
    with CompileClock() as clock:
        compilation.listener(times=times, cache_hit=False)
        assert clock.take() == clock.seconds == 2.5 and heard == [False]
        clock._begin()
        compilation.listener(times=times, cache_hit=False)
        clock._end()
        assert clock.take() < 2.5  # torch's own time has it already
    assert compilation.listener is theirs
    with CompileClock():
        compilation.listener = other = lambda **_: None  # somebody else's, set meanwhile
    assert compilation.listener is other


def test_a_clock_without_torchs_compiler_does_not_import_it() -> None:
    code = (
        "import sys\nfrom fewbits.train.trainer import CompileClock\nwith CompileClock(False) as clock: clock.take()\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_compiler_that_is_reset_while_the_clock_runs_is_no_error() -> None:
    with CompileClock() as clock:
        torch._dynamo.reset()
    assert clock.seconds >= 0


def test_a_run_counts_its_own_compiling_and_not_that_of_the_process_before_it(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp, "_compiling_s", 1e6)
    summary = train(tiny(), quiet=True)
    assert summary["compile_s"] is None or summary["compile_s"] < 1e3


def test_a_resumed_run_adds_up_its_compiling_as_it_does_its_time(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CompileClock, "seconds", property(lambda _: 7.0))
    first = train(tiny(stop_at=3), quiet=True)
    assert first["compile_s"] == 7.0
    assert train(tiny(), resume=tmp_path / "run", quiet=True)["compile_s"] == 14.0


def test_only_failures_of_the_compiler_are_taken_for_such() -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        raise RuntimeError("wrapped") from InvalidCxxCompiler()
    except RuntimeError as error:
        assert compiler_failure(error).startswith("InvalidCxxCompiler")
    assert compiler_failure(ValueError("a shape")) == "" and compiler_failure(torch.OutOfMemoryError("full")) == ""


def _broken(self: Transformer, evaluation: bool = False) -> None:
    def run(*_: Any) -> torch.Tensor:
        raise torch._dynamo.exc.Unsupported("no such thing\nand more")

    self._run_train = run


def _compiled(config: Config, choices: Choices) -> Choices:
    return replace(choices, compile=Choice(True, "a test"))


def test_a_compiler_that_fails_at_the_first_step_leaves_the_run_eager_with_the_reason(
    tiny: Make, choices: Choices, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = train(tiny("plain", n_layer=2), quiet=True)
    monkeypatch.setattr(Transformer, "compile_blocks", _broken)
    monkeypatch.setattr(begin, "choose_execution", lambda config, **_: _compiled(config, choices))
    summary = train(tiny("fallen", n_layer=2, compile="auto"), quiet=True)
    compile = next(choice for choice in summary["choices"] if choice["what"] == "compile")
    assert compile["value"] is False and "Unsupported: no such thing" in compile["reason"]
    assert summary["status"] == "finished" and summary["final_loss"] == plain["final_loss"]
    assert 'compile = "false"' in (tmp_path / "fallen" / "config.toml").read_text(encoding="utf-8")
    assert any(event["event"] == "eager" for event in read_lines(tmp_path / "fallen" / "events.jsonl"))
    with pytest.raises(FewbitsError, match=r"torch\.compile failed here: Unsupported: no such thing.* --compile false"):
        train(tiny("forced", n_layer=2, compile="true"), quiet=True)


def test_the_time_of_compiling_is_apart_from_that_of_the_steps(tiny: Make, tmp_path: Path) -> None:
    """The first step of a compiled run takes seconds, its logged time does not."""
    torch._dynamo.reset()
    summary = train(tiny(compile="true", log_every=1, max_steps=4), quiet=True)
    first = next(line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["step"] == 1)
    assert summary["compile_s"] > 0.1
    assert first["ms"] < 1000 * summary["compile_s"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["compile_s"] > 0.1
