"""What a person sees fits the terminal, and survives any text and any encoding."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from fewbits.train.events import HEADING, Display, clock, power, printable, size, step_line

ENTRY = {
    "step": 12345, "loss": 10.83123, "lr": 5.88e-05, "grad_norm": 0.9481, "loss_scale": 65536.0, "skipped": 3,
    "ms": 1234.5, "tok_per_s": 476417.3, "mfu": 0.4131, "memory_bytes": 23 * 2**30,
}  # fmt: skip


def _console(width: int, terminal: bool, encoding: str = "utf-8") -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    return Console(file=file, width=width, force_terminal=terminal, color_system=None, legacy_windows=False), raw


def test_the_time_that_is_left_goes_by_steps_and_not_by_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("fewbits.train.events.time.monotonic", lambda: now[0])
    display = Display(quiet=True)
    display.begin(0, 10)
    assert display.eta() is None
    now[0] += 30.5
    display.advance(1, compiling_s=30.0)
    assert display.eta() == pytest.approx(4.5)
    now[0] += 0.5
    display.advance(2, compiling_s=30.0)
    assert display.eta() == pytest.approx(4.0)


def test_a_logged_step_fits_80_columns_and_its_heading_stands_above_it() -> None:
    line = step_line(ENTRY)
    assert len(line) == len(HEADING) <= 80
    assert line.split() == [
        "12345",
        "10.8312",
        "5.88e-05",
        "0.948",
        "2^16",
        "3",
        "1234",
        "476,417",
        "41.3%",
        "23.0",
        "GiB",
    ]


def test_unknown_values_are_dashes_and_infinite_ones_are_named() -> None:
    line = step_line({**ENTRY, "mfu": None, "memory_bytes": None, "grad_norm": math.inf, "loss": math.nan})
    assert line.split()[1] == "nan" and line.split()[3] == "inf" and line.split()[-2:] == ["-", "-"]


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    console, raw = _console(width, terminal=True)
    display = Display(console)
    display.fact("precision", "fp32", "a long reason " * 12)
    display.table("working weight  bf16       " + "prepare() rounded them all " * 6, indent=27)
    display.step(ENTRY)
    display.evaluation(
        {"step": 123456, "val_loss": 2.1, "perplexity": 812.4, "bits_per_byte": 1.712}, {"gzip": 1.9, "xz": 1.5}
    )
    lines = raw.getvalue().decode().splitlines()
    assert max(len(line) for line in lines) <= width
    assert all(line.startswith(" " * 12) for line in lines if "reason" in line and "precision" not in line)


def test_a_pipe_gets_plain_lines_with_an_eta_each_and_no_bar() -> None:
    console, raw = _console(80, terminal=False)
    display = Display(console)
    display.begin(0, 100)
    display.advance(10)
    display.step(ENTRY)
    display.end()
    lines = raw.getvalue().decode().splitlines()
    assert lines[0].endswith("eta") and len(lines) == 2
    assert re.search(r" \d+:\d\d$", lines[1])
    assert "\x1b" not in raw.getvalue().decode()


def test_a_terminal_gets_a_bar_with_an_eta() -> None:
    console, raw = _console(80, terminal=True)
    display = Display(console)
    display.begin(0, 4)
    display.advance(2)
    display.end()
    assert "ETA" in raw.getvalue().decode()


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(quiet=True)
    display.begin(0, 2)
    display.fact("device", "cpu")
    display.step(ENTRY)
    display.sample(1, "", "text")
    display.end()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "ascii", "latin-1"])
def test_any_sample_can_be_shown_on_any_console(encoding: str) -> None:
    console, raw = _console(80, terminal=False, encoding=encoding)
    Display(console).sample(3, "h\u00e9llo \u4e16", "a \U0001f600 \x1b[2J\x07 b\tc\x85\u2028d")
    shown = raw.getvalue().decode(encoding)
    assert "\x1b" not in shown and "\x07" not in shown and "a " in shown
    assert ("\u4e16" in shown) == (encoding in ("utf-8", "gbk"))


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31m\r\nb\x00") == "a?[31m\nb?"


def test_numbers_read_as_people_write_them() -> None:
    assert [power(x) for x in (1.0, 2.0, 65536.0, 2.0**-3, 3.0, 0.0)] == ["1", "2^1", "2^16", "2^-3", "3", "0"]
    assert [size(x) for x in (0, 1023, 2**20, 12.34 * 2**30)] == ["0 B", "1023 B", "1.00 MiB", "12.3 GiB"]
    assert [clock(x) for x in (0, 59.6, 3600)] == ["0:00", "1:00", "1:00:00"]
