"""One whole comparison with real subprocesses, and the command line in front of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewbits.cli.main import run

RECIPE = """
[model]
context = 16
n_layer = 1
n_head = 2
n_embd = 16
[data]
data = "DATA"
tokenizer = "bytes"
[train]
max_steps = 4
batch_size = 4
eval_batches = 2
device = "cpu"
compile = "false"
"""


@pytest.fixture
def recipe(tmp_path: Path, texts: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.replace("DATA", str(texts)))
    return path


def test_a_real_comparison_writes_json_page_and_csv_and_a_second_call_reuses_all(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["compare", str(recipe), "--precisions", "fp32,bf16-true", "--seeds", "1", "--rounds", "1", "--csv"]
    asked += ["--block-seconds", "0.2", "--out-dir", str(tmp_path / "c")]
    assert run(asked) == 0, capsys.readouterr()
    document = json.loads((tmp_path / "c" / "compare.json").read_text())
    first, second = document["rows"]
    assert document["status"] == "complete" and first["losses"][0] > 0 and second["verdict"]["kind"] == "not shown"
    # between steps a bf16 model without masters holds 2 bytes a weight and 8 of moments, an fp32 one 4 and 8
    assert second["memory"]["working weights"] * 2 == first["memory"]["working weights"]
    assert second["memory"]["moments"] == first["memory"]["moments"]
    assert sum(first["memory"].values()) == first["peak_memory_bytes"]
    assert (tmp_path / "c" / "report.html").stat().st_size > 5000
    assert (tmp_path / "c" / "compare.csv").read_text().count("\n") == 3
    written = (tmp_path / "c" / "runs" / "fp32" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert run(asked) == 0 and "block 1" not in capsys.readouterr().out
    assert (tmp_path / "c" / "runs" / "fp32" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--precisions", "fp32,bf17-mixed"], "bf16-mixed"),
        (["--vary", "lr"], "KEY=A,B"),
        (["--vary", "optim.lr=1e-3,fast"], "fast"),
        (["--seeds", "some"], "--seeds"),
        (["--margin", "7"], "margin"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    recipe: Path, tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", str(recipe), "--out_dir", str(tmp_path / "c"), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("fewbits: error: ") and error.count("\n") == 1
    assert not (tmp_path / "c").exists()
