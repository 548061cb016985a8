"""Small parts of a comparison: variants, rows, CSV, children."""

from __future__ import annotations

import csv
import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from fewbits.errors import FewbitsError
from fewbits.lab.budget import horizon, run_seconds, shorten
from fewbits.lab.child import run_child
from fewbits.lab.rows import make_rows, speed_row, to_csv
from fewbits.lab.variants import Variants, named, split_values
from fewbits.train.config import Config


def block(variant: str, number: int, tokens: float) -> dict[str, object]:
    return {"variant": variant, "round": number, "status": "ok", "tok_per_s": tokens, "ms_per_step": 1e3 / tokens}


def test_a_machine_that_slows_down_between_rounds_does_not_change_the_ratio() -> None:
    blocks = [block("a", 0, 100.0), block("b", 0, 200.0), block("a", 1, 50.0), block("b", 1, 100.0)]
    row = speed_row(blocks, "b", "a")
    assert row["speed_ratio"] == pytest.approx(2.0, rel=1e-12) and row["speed_ratio_range"] == [2.0, 2.0]


def test_a_failed_block_is_told_and_not_counted() -> None:
    blocks = [block("a", 0, 100.0), {"variant": "b", "round": 0, "status": "failed", "reason": "out of memory"}]
    row = speed_row(blocks, "b", "a")
    assert row["speed_ratio"] is None and row["block_failure"] == "out of memory"


def test_csv_has_one_line_a_row_that_a_csv_reader_reads_back() -> None:
    runs = [{"variant": v, "seed": s, "status": "finished", "val_loss": 2.0 + s} for v in "ab" for s in range(3)]
    rows = make_rows(["a", "b"], [0, 1, 2], [block("a", 0, 10.0)], runs, 0.005, "val_loss")
    read = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [r["variant"] for r in read] == ["a", "b"]
    assert [r["verdict"] for r in read] == ["reference", "same"] and float(read[1]["mean_loss"]) == 3.0


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-3,3e-3", ["1e-3", "3e-3"]),
        ("none, static:1024 ,dynamic:initial=4,interval=5", ["none", "static:1024", "dynamic:initial=4,interval=5"]),
        ("bf16-mixed,master=fp32,fp32", ["bf16-mixed,master=fp32", "fp32"]),
        ("a,b;c", ["a,b", "c"]),
        (",", []),
    ],
)
def test_values_are_split_where_a_reader_would(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_an_option_that_names_nothing_is_told_from_one_that_was_not_given() -> None:
    assert named("--precisions", None) is None and named("--precisions", "fp8, layers=auto") == ["fp8,layers=auto"]
    with pytest.raises(FewbitsError, match="--precisions '' names nothing"):
        named("--precisions", "")


def test_every_variant_has_a_folder_of_its_own() -> None:
    folders = Variants("data.tokenizer", ("bpe:512", "bpe/512", "bpe:512", "../..", "")).folders
    assert len(set(folders)) == 5
    assert all("/" not in name and not name.startswith(".") for name in folders)


def test_a_shortened_comparison_is_estimated_to_fit() -> None:
    config = Config.from_toml("[train]\nmax_steps = 1000\neval_every = 100\neval_batches = 10\n")
    costs = [(100.0, 4.0), (60.0, 5.0)]
    shorter, choice = shorten(config, costs, seeds=3, seconds=300.0)
    assert choice.value == shorter.train.max_steps < 1000
    assert 3 * sum(run_seconds(shorter, *cost) for cost in costs) <= 300.0
    assert shorten(config, costs, seeds=3, seconds=1e6)[0] == config


def test_horizon_keeps_the_parts_of_the_schedule() -> None:
    text = '[optim]\nschedule = "wsd"\nwarmup_steps = 100\ndecay_steps = 200\n[train]\nmax_steps = 1000\n'
    shorter = horizon(Config.from_toml(text), 100)
    assert (shorter.optim.warmup_steps, shorter.optim.decay_steps) == (10, 20)
    shorter.check()


def test_a_child_reports_its_code_output_and_last_words(tmp_path: Path) -> None:
    code = "import sys; print('out'); print('first\\nlast', file=sys.stderr); sys.exit(5)"
    ended = run_child(["-c", code], tmp_path / "log")
    assert (ended.code, ended.output.strip(), ended.last_words) == (5, "out", "first / last")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_on_sigterm_the_child_is_asked_to_end_and_awaited(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time, pathlib\n"
        "def stop(*_):\n    time.sleep(0.3); pathlib.Path(sys.argv[1]).write_text('saved'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop); pathlib.Path(sys.argv[2]).write_text('up'); time.sleep(60)\n"
    )
    saved, up = tmp_path / "saved", tmp_path / "up"

    def watch() -> None:
        if up.exists():
            os.kill(os.getpid(), signal.SIGTERM)

    assert threading.current_thread() is threading.main_thread()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_child(["-c", code, str(saved), str(up)], tmp_path / "log", watch, every=0.05)
    assert saved.read_text() == "saved" and time.monotonic() - began < 30
