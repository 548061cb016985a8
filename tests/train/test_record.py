"""What a run writes down survives kills, NaN and a resume from earlier."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fewbits.errors import FewbitsError
from fewbits.train.record import Record, environment, read_lines, write_atomically, write_json


def _strict(text: str) -> object:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_nan_is_named_and_the_line_stays_strict_json(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.metrics({"step": 1, "loss": math.nan, "grad_norm": math.inf, "ms": 1.5})
    entry = _strict((tmp_path / "metrics.jsonl").read_text())
    assert entry == {
        "step": 1, "loss": None, "grad_norm": None, "ms": 1.5, "nonfinite": {"loss": "nan", "grad_norm": "inf"}
    }  # fmt: skip


def test_every_line_is_on_disk_when_it_is_written(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.metrics({"step": 1})
    record.event("save", 1, path="x")
    assert [entry["step"] for entry in read_lines(tmp_path / "metrics.jsonl")] == [1]
    assert next(read_lines(tmp_path / "events.jsonl"))["event"] == "save"


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert list(read_lines(tmp_path / "metrics.jsonl")) == [{"step": 1}]


def test_resuming_drops_what_is_about_to_be_run_again(tmp_path: Path) -> None:
    record = Record(tmp_path)
    for step in range(1, 6):
        record.metrics({"step": step})
    record.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "torn')
    resumed = Record(tmp_path, from_step=3)
    resumed.metrics({"step": 4, "again": True})
    resumed.close()
    assert [entry["step"] for entry in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_replaced_file_is_never_half_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / "summary.json", "old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "summary.json", {"bad": object()})
    assert (tmp_path / "summary.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_nested_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": {"b": [math.inf, 1.0]}})
    assert _strict((tmp_path / "x.json").read_text()) == {"a": {"b": [None, 1.0]}}


def test_a_folder_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="Cannot write"):
        write_atomically(tmp_path / "gone" / "x", "text")


def test_the_environment_says_which_versions_ran() -> None:
    found = environment()
    assert found["versions"]["torch"] and found["python"] and found["torch_threads"] >= 1
    assert _strict(json.dumps(found))
