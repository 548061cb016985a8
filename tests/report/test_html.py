"""The pages: one file, no network, and readable whatever became of the run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fewbits.errors import FewbitsError
from fewbits.report.html import write_comparison, write_report
from fewbits.report.record import read_run
from fewbits.report.terminal import comparison_lines, comparison_table
from fewbits.train.config import Config

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Balance(HTMLParser):
    """Collects what an HTML page loads, and whether its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


def page(path: Path) -> str:
    """The text of a page, after checking that it is whole and loads nothing."""
    text = path.read_text(encoding="utf-8")
    balance = Balance()
    balance.feed(text)
    assert balance.open == [] and balance.loads == []
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert set(re.findall(r"https?://[^\"'<\s]+", text)) <= {"http://www.w3.org/2000/svg"}
    return text


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished fp16 run of 40 steps with skipped steps, two evaluations and a sample."""
    folder = tmp_path / "run-1"
    folder.mkdir()
    (folder / "config.toml").write_text(Config(name="nano", precision="fp16-mixed").to_toml())
    lines: list[dict[str, Any]] = []
    for step in range(1, 41):
        lines.append({
            "step": step, "tokens": step * 512, "loss": 6.0 - step / 20, "lr": 1e-3, "grad_norm": 1.0 / step,
            "loss_scale": 65536.0 if step < 7 else 32768.0, "skipped": int(step >= 7), "ms": 30.0, "tok_per_s": 17e3,
            "mfu": None, "memory_bytes": 12_000_000,
        })  # fmt: skip
        if step % 20 == 0:
            lines.append({"step": step, "val_loss": 6.1 - step / 20, "perplexity": 60.0, "bits_per_byte": 2.5})
    write_lines(folder / "metrics.jsonl", lines)
    events = [
        {"event": "start", "step": 0, "precision": "fp16-mixed", "precision_table": "precision  fp16-mixed\nrole",
         "environment": {"python": "3.11"}, "choices": [{"what": "device", "value": "cpu", "reason": "no CUDA"}]},
        {"event": "skipped", "step": 7, "steps": [7]},
        {"event": "sample", "step": 40, "prompt": "def ", "text": "<script>alert(1)</script> & \u4e2d\u6587"},
    ]  # fmt: skip
    write_lines(folder / "events.jsonl", events)
    summary = {
        "schema": 1, "status": "finished", "precision": "fp16-mixed", "params": 4_000_000, "steps": 40, "tokens": 20480,
        "distinct_tokens": 3_500_000, "epochs": 0.006, "final_loss": 4.0, "val_loss": 4.1, "perplexity": 60.3,
        "bits_per_byte": 2.5, "tok_per_s": 17e3, "ms_per_step": 30.0, "peak_memory_bytes": 12_000_000, "wall_s": 75.0,
        "memory": {"working weights": 8_000_000, "moments": 4_000_000}, "skipped_steps": 1,
        "compression": {"gzip": 1.91, "xz": 1.52}, "environment": {"python": "3.11", "versions": {"torch": "2"}},
        "choices": [{"what": "compile", "value": False, "reason": "too short to be worth it"}],
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_the_page_says_what_was_trained_on_what_and_how_to_repeat_it(run: Path) -> None:
    text = page(write_report(run))
    for word in (
        "nano",
        "4M",
        "python",
        "fp16-mixed",
        "too short to be worth it",
        "gzip needs 1.910",
        "--config",
        "3.11",
    ):
        assert word in text
    for title in ("Loss", "Learning rate", "Gradient norm", "Loss scale", "Throughput", "Peak memory"):
        assert f'aria-label="{title}' in text


def test_text_of_the_model_cannot_become_markup(run: Path) -> None:
    text = page(write_report(run))
    assert "&lt;script&gt;" in text and "\u4e2d\u6587" in text


def test_a_crashed_run_with_a_torn_line_has_a_page_that_says_so(run: Path) -> None:
    (run / "summary.json").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "lo')
    text = page(write_report(run))
    assert "crashed" in text and "the last line is cut off" in text and "The last logged step is 40" in text
    assert "precision  fp16-mixed" in text  # from the event that a run writes when it starts


@pytest.mark.parametrize("missing", ["metrics.jsonl", "events.jsonl", "summary.json", "config.toml"])
def test_any_file_may_be_missing_or_empty(run: Path, missing: str) -> None:
    (run / missing).write_text("")
    page(write_report(run))
    (run / missing).unlink()
    page(write_report(run))


def test_a_nan_loss_is_told_and_never_drawn(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 50, "loss": None, "nonfinite": {"loss": "nan"}}) + "\n")
    text = page(write_report(run))
    assert "not a finite number at step 50" in text and not re.search(r' (d|x|y|cx|cy)="[^"]*nan', text)


def test_skipped_steps_are_marked_where_they_were(run: Path) -> None:
    from fewbits.report.runcharts import skipped_steps

    assert skipped_steps(read_run(run)) == [7.0]
    (run / "events.jsonl").unlink()
    assert skipped_steps(read_run(run)) == [7.0]  # the count in the metrics tells it too


def test_after_a_resume_the_later_record_of_a_step_counts(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 40, "loss": 1.25}) + "\n")
    assert read_run(run).metrics[-1]["loss"] == 1.25


def test_what_is_no_run_is_one_sentence(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FewbitsError, match="run"):
            write_report(folder)


@pytest.fixture
def comparison(tmp_path: Path, run: Path) -> Path:
    """A compare.json with a same, a worse and a diverged row; the first run has metrics on disk."""
    from fewbits.lab.rows import make_rows

    labels, seeds = ["fp32", "bf16-mixed", "bf16-true", "fp16-mixed, loss_scale=none"], [0, 1, 2]
    factor = {"fp32": 1.0, "bf16-mixed": 1.0002, "bf16-true": 1.02}
    runs = [
        {"variant": v, "seed": s, "folder": "run-1", "status": "finished" if v in factor else "diverged", "tokens": 9,
         "val_loss": (2.0 + 0.01 * s) * factor[v] * (1 + 1e-5 * s) if v in factor else None, "skipped_steps": 2,
         "steps": 40, "reason": None if v in factor else "the loss is nan at step 3"}
        for s in seeds for v in labels
    ]  # fmt: skip
    blocks = [
        {"variant": v, "round": r, "status": "ok", "ms_per_step": 10.0 + i, "tok_per_s": 1e5 / (10 + i),
         "device": "cpu", "peak_memory_bytes": 1000 * (i + 1),
         "memory": {"working weights": 400 * (i + 1), "activations": 600 * (i + 1)},
         "resident_bytes": 2**28, "steps": 9, "skipped": i, "choices": []}
        for r in range(2) for i, v in enumerate(labels)
    ]  # fmt: skip
    document = {
        "schema": "fewbits.comparison/1", "status": "complete", "key": "precision", "measure": "val_loss",
        "values": labels, "variants": labels, "seeds": seeds, "margin": 0.005, "asked": "schema = 1\n", "config": None,
        "choices": [{"what": "device", "value": "cpu", "reason": "no CUDA"}], "blocks": blocks, "runs": runs,
        "rows": make_rows(labels, seeds, blocks, runs, 0.005, "val_loss"), "commands": ["fewbits compare config.toml"],
        "wall_s": 100.0, "environment": {"python": "3.11"},
    }  # fmt: skip
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(document))
    return path


def test_the_page_of_a_comparison_shows_every_verdict_and_every_lost_run(comparison: Path) -> None:
    text = page(write_comparison(comparison))
    for word in (
        "same",
        "worse",
        "diverged",
        "the loss is nan at step 3",
        "fewbits compare config.toml",
        "activations",
    ):
        assert word in text
    assert 'aria-label="Training loss"' in text and 'aria-label="Tokens a second"' in text


def test_an_unfinished_comparison_has_a_page_too(comparison: Path) -> None:
    document = json.loads(comparison.read_text())
    empty = {"status": "running", "runs": [], "blocks": []}
    document.update(empty)
    from fewbits.lab.rows import make_rows

    document["rows"] = make_rows(document["variants"], [0, 1, 2], [], [], 0.005, "val_loss")
    comparison.write_text(json.dumps(document))
    assert "not finished yet" in page(write_comparison(comparison))


def test_the_report_of_a_folder_with_a_comparison_is_that_of_the_comparison(comparison: Path) -> None:
    assert "Comparison of precision" in page(write_report(comparison.parent))


def test_terminal_and_page_use_the_same_words(comparison: Path) -> None:
    from rich.console import Console

    document = json.loads(comparison.read_text())
    lines = comparison_lines(document)
    assert [line.split(":")[1].split(",")[0].strip() for line in lines] == ["reference", "same", "worse", "diverged"]
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table(document))
    table = console.export_text()
    assert all(word in table for word in ("same", "worse", "diverged", "0.91x"))
    assert table.isascii()  # any console can show it
