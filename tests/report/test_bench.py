"""The page and the tables of a bench show every number that was measured, and say what was not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from fewbits.cli.main import run
from fewbits.errors import FewbitsError
from fewbits.report.bench import bench_charts, bench_tables, every_chart, left_out, parts_chart
from fewbits.report.html import write_report


def row(precision: str, ms: float, **more: Any) -> dict[str, Any]:
    return {
        "precision": precision,
        "status": "ok",
        "ms_per_step": ms,
        "tok_per_s": 1e5 / ms,
        "floor_ms": 0.75 * ms,
        "mfu": 0.41,
        "peak_memory_bytes": 3 << 30,
        "compile_s": 31.0,
        "parts": [
            {"part": "matmuls", "ms": 0.5 * ms, "floor_ms": 0.6 * ms, "floor": "5 TFLOP in bf16"},
            {"part": "attention", "ms": 0.25 * ms, "floor_ms": 0.15 * ms, "floor": "1 TFLOP"},
            {"part": "quantization", "ms": 0.0, "floor_ms": 0.0, "floor": "none"},
            {"part": "copies", "ms": 0.125 * ms, "floor_ms": 0.0, "floor": "none"},
            {"part": "unknown", "ms": 0.125 * ms, "floor_ms": 0.0, "floor": "no rule"},
        ],
        "profile": {
            "matmul_formats": {"bf16": 0.5 * ms},
            "tensor_cores": 0.997,
            "kernels": [{"name": "nvjet_tst" + "x" * 200, "part": "matmuls", "ms": 3.0, "calls": 12.0}],
        },
        **more,
    }


@pytest.fixture
def document() -> dict[str, Any]:
    return {
        "schema": 1,
        "status": "finished",
        "name": "gpt2-124m",
        "device": "NVIDIA H100 (sm_90)",
        "kind": "cuda",
        "model": {"n_layer": 12, "n_embd": 768},
        "params": 124_000_000,
        "batch_size": 32,
        "context": 1024,
        "tokens_per_step": 32768,
        "flops_per_token": 855_000_000,
        "flops_formula": "6 N",
        "compile": {"value": True, "reason": "a test"},
        "notes": ["<b>a note</b>"],
        "ceilings": {"copy": 3.03e12, "matmul": {"bf16": 7e14, "fp8_e4m3": 1.3e15}, "left_out": {}},
        "rows": [
            row("fp32", 500.0),
            row("bf16-mixed", 60.0),
            {"precision": "fp8", "status": "failed", "reason": "refused"},
        ],
        "left_out": {"mxfp8": "too old", "nvfp4": "too old"},
        "environment": {"torch": "2.11", "command": "fewbits bench"},
    }


def printed(document: dict[str, Any], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    for part in bench_tables(document):
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_terminal_shows_speeds_parts_failures_and_what_was_left_out(document: dict[str, Any]) -> None:
    text = printed(document)
    for words in ("1,667", "8.33x", "41.00 %", "fp8         failed: refused", "100 % on tensor cores", "matmuls",
                  "36.00", "mxfp8, nvfp4: too old", "a note"):  # fmt: skip
        assert words in text, words
    assert max(map(len, text.splitlines())) <= 80
    for cells in document["rows"][:2]:
        cells["mfu"] = None
    assert "mfu" not in printed(document)


def test_the_bars_of_the_parts_have_the_lengths_of_the_times(document: dict[str, Any]) -> None:
    svg = ElementTree.fromstring(parts_chart(document["rows"][1]))
    bars = [float(e.get("width", 0)) for e in svg.iter() if e.tag.endswith("rect") and e.get("height") == "20"]
    low, above = bars[0::2], bars[1::2]
    whole = [a + b for a, b in zip(low, above, strict=True)]
    assert whole[1] / whole[0] == pytest.approx(0.5, abs=0.01)  # 15 ms to 30 ms
    assert above[0] == 0.0 and low[1] / whole[1] == pytest.approx(0.6, abs=0.01)  # below its floor; 9 of 15 ms
    assert len(whole) == 4  # quantization took no time and has no floor


def test_small_parts_share_a_colour_and_nothing_is_lost(document: dict[str, Any]) -> None:
    svg = every_chart(document["rows"][:2])
    assert "copies and other: 15" in svg and "unknown" not in svg


def test_the_page_is_one_file_and_escapes_what_it_shows(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(document), encoding="utf-8")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count('<svg class="chart"') == len(bench_charts(document)) == 4
    assert "&lt;b&gt;a note" in page and "src=" not in page and "failed: refused" in page
    assert "5 TFLOP in bf16" in page and "interrupted" not in page
    document["status"] = "running"
    (tmp_path / "bench.json").write_text(json.dumps(document), encoding="utf-8")
    assert "interrupted" in write_report(tmp_path).read_text(encoding="utf-8")


def test_nothing_timed_still_gives_a_page(document: dict[str, Any], tmp_path: Path) -> None:
    document["rows"] = document["rows"][2:]
    (tmp_path / "bench.json").write_text(json.dumps(document), encoding="utf-8")
    assert "failed: refused" in write_report(tmp_path).read_text(encoding="utf-8")
    assert "failed: refused" in printed(document)
    assert left_out(document) == [("mxfp8, nvfp4", "too old")]


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FewbitsError, match="no bench"):
        write_report(tmp_path)


def test_the_command_writes_what_the_function_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b"
    words = "bench --n_layer 1 --n_embd 32 --n_head 2 --context 16 --batch_size 2 --vocab_size 64 --device cpu --seconds 0.01"
    assert run([*words.split(), "--precisions", "fp32", "--out_dir", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "tokens/s" in shown and "ceilings" in shown and str(out / "report.html") in shown.replace("\n", "")
    assert json.loads((out / "bench.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert run(["report", str(out)]) == 0
