"""bench/train_step.py with processes that only pretend: turns, trouble, memory, budget, the file and its ratios."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from fleet import CONTEXT, Case, Fleet  # noqa: E402
from train_step import Results, best_peer, main, missing, names_of, table  # noqa: E402

FAKE = """
import json, os, sys, time
case, log = sys.argv[1:]
say = lambda **what: print(json.dumps(what), flush=True)
note = lambda what: open(log, "a").write(f"{case} {what}\\n")
note("start")
taken = 0
for line in sys.stdin:
    order = json.loads(line)
    if order.get("quit"):
        break
    if case == "refuses":
        say(skipped="not here"); break
    if case == "crashes" or case == "crashes later" and taken:
        sys.stderr.write("went wrong\\n"); sys.exit(3)
    if case == "hangs":
        time.sleep(60)
    if case == "too large" and not os.path.exists(log + ".oom"):
        open(log + ".oom", "w").close()
        say(error="out of memory", oom=True); break
    taken += order["skip"] + order["steps"]
    ms = {"ours fp8": 2.0}.get(case, 4.0)  # by the wall clock; steps alone take half a millisecond less
    note(f"{order['steps']}")
    memory = {"peak_bytes": 10, "reserved_bytes": 1000, "rest_bytes": 100}
    say(ms=[ms - 0.5] * order["steps"], wall_ms=ms, loss=1.5, taken=taken, order_s=0, **memory)
"""


def fleet(tmp_path: Path, names: list[str], **options) -> Fleet:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return Fleet(
        {name: Case(name, 1000) for name in names},
        lambda name: [sys.executable, str(script), name, str(tmp_path / "log")],
        dict(os.environ),
        parallel=2,
        warmup=2,
        skip=1,
        block_s=0.02,
        **options,
    )


def ran(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


def run(found: Fleet, rounds: int = 2, seconds: float = 20) -> Fleet:
    try:
        found.prepare(time.monotonic() + seconds)
        found.rounds(rounds, time.monotonic() + seconds)
    finally:
        found.close()
    return found


def test_blocks_alternate_and_processes_stay_alive(tmp_path):
    found = run(fleet(tmp_path, ["A", "ours fp8"]))
    assert [[block["ms"] for block in case.blocks] for case in found.cases.values()] == [[3.5, 3.5], [1.5, 1.5]]
    lines = ran(tmp_path)
    assert sum("start" in line for line in lines) == 2
    assert lines[-4:] == ["A 6", "ours fp8 13", "A 6", "ours fp8 13"]  # 20 ms of steps, after the warm-up of both


def test_a_case_in_trouble_costs_itself_only(tmp_path):
    found = run(fleet(tmp_path, ["crashes", "refuses", "crashes later", "A"]))
    cases = found.cases
    assert "exit code 3" in cases["crashes"].trouble["error"] and "went wrong" in cases["crashes"].trouble["error"]
    assert cases["refuses"].trouble == {"skipped": "not here"}
    assert "error" in cases["crashes later"].trouble and cases["crashes later"].blocks == []
    assert len(cases["A"].blocks) == 2


def test_time_that_is_over_leaves_what_there_is(tmp_path):
    found = fleet(tmp_path, ["A", "hangs"])
    try:
        found.prepare(time.monotonic() + 3)
        found.rounds(1, time.monotonic() + 5)
    finally:
        found.close()
    assert "time" in found.cases["hangs"].trouble["skipped"]
    assert len(found.cases["A"].blocks) == 1


def test_no_block_begins_that_would_end_too_late(tmp_path):
    found = fleet(tmp_path, ["A"])
    try:
        found.prepare(time.monotonic() + 20)
        found.rounds(3, time.monotonic())
    finally:
        found.close()
    assert found.cases["A"].blocks == []


def test_what_does_not_fit_beside_others_starts_again_for_its_block(tmp_path):
    one = (1000 + CONTEXT) / 0.97
    found = run(fleet(tmp_path, ["A", "B"], memory=int(one * 1.05)))
    assert [len(case.blocks) for case in found.cases.values()] == [2, 2]
    # A and B to warm up; then A (B goes), B (A goes), A, B
    assert [line for line in ran(tmp_path) if "start" in line].count("A start") == 3


def test_out_of_memory_beside_others_is_tried_again_alone(tmp_path):
    found = run(fleet(tmp_path, ["A", "too large"]), rounds=1)
    assert [case.trouble for case in found.cases.values()] == [{}, {}]
    assert [len(case.blocks) for case in found.cases.values()] == [1, 1]


@pytest.fixture
def results(tmp_path):
    found = run(fleet(tmp_path, ["ours fp8", "compact bf16", "refuses"]))
    made = Results(tmp_path / "table.json", add=False)
    made.sit("gpt2-124m", found.cases, {"rounds": 2, "warmup": 2})
    return made


def test_the_file_holds_blocks_and_rows_and_the_table_shows_them(results):
    work = json.loads(results.path.read_text())["works"]["gpt2-124m"]
    row = work["rows"]["ours fp8"]
    assert row["tokens_per_s"] == 32 * 1024 / 2e-3 and row["median_step_ms"] == 1.5
    assert (row["best_peer"], row["ratio"], row["ratio_range"]) == ("compact bf16", 2.0, [2.0, 2.0])
    assert row["rounds"] == 2 and row["spread"] == 0
    assert work["rows"]["refuses"] == {"skipped": "not here"}
    assert len(work["sittings"][0]["cases"]["compact bf16"]["blocks"]) == 2
    assert work["sittings"][0]["device"] and work["sittings"][0]["torch"]
    text = table("gpt2-124m", work)
    assert text.index("ours fp8") < text.index("compact bf16") < text.index("refuses")
    assert "x2.000 (2.000 to 2.000)" in text


def test_what_is_added_stands_beside_the_first_case_and_the_best_peer(results):
    again = Results(results.path, add=True)
    wanted = ["ours fp8", "compact bf16", "Trainer bf16"]
    assert missing(again.works["gpt2-124m"], wanted) == ["ours fp8", "compact bf16", "Trainer bf16"]
    assert missing(again.works["gpt2-124m"], wanted[:2]) == []
    assert missing(None, wanted) == wanted
    assert Results(results.path, add=False).works == {}


def test_the_best_peer_is_never_ours(results):
    assert best_peer(results.works["gpt2-124m"]["sittings"][0]["cases"]) == "compact bf16"


def test_cases_are_named_as_they_are_by_default():
    for given in ("ours fp8-delayed,head=fp8; compact bf16", "ours fp8-delayed, head=fp8, compact bf16"):
        assert names_of("gpt2-124m", given) == ["ours fp8-delayed, head=fp8", "compact bf16"]


def test_every_default_case_has_a_builder():
    from step_cases import CASES, WORKS, Skip, drive_of, why_not

    assert set(CASES) == set(WORKS)
    assert [name for cases in CASES.values() for name in cases if why_not(name)] == []
    with pytest.raises(Skip, match=r"no case 'nobody'; there are ours PRECISION, compact bf16, .*Lightning bf16-mixed"):
        drive_of("nobody", argparse.Namespace())


@pytest.mark.parametrize(
    ("cases", "said"), [(",", "names no case"), ("compact", "no case 'compact'"), ("ours bf61", "bf61")]
)
def test_names_of_cases_are_checked_before_anything_starts(cases, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--works", "gpt2-124m", "--cases", cases])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and said in capsys.readouterr().err
