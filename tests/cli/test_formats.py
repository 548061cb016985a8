"""`fewbits formats`: what it prints is what the formats are and what `cast` does, on any console."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
import torch

from fewbits.cli import formats as command
from fewbits.cli.console import can_show
from fewbits.cli.formats import becomes, parse_value, show
from fewbits.cli.main import run
from fewbits.errors import FewbitsError
from fewbits.formats import FORMATS, Format
from fewbits.numerics.rounding import cast


def printed(capsys, *arguments: str) -> str:
    assert run(["formats", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_table_has_every_format_and_its_numbers(capsys):
    rows = {line.split()[0]: line.split() for line in printed(capsys).splitlines()}
    assert list(rows) == ["format", *FORMATS]
    assert rows["fp8_e4m3"][1:] == ["8", "4", "3", "7", "448", "2^-6", "2^-9", "0.125", "NaN", "254", "float8_e4m3fn"]
    assert rows["fp16"][1:] == [
        "16",
        "5",
        "10",
        "15",
        "65504",
        "2^-14",
        "2^-24",
        "2^-10",
        "inf,",
        "NaN",
        "63488",
        "float16",
    ]
    assert rows["int4"][1:] == ["4", "-", "-", "-", "7", "1", "1", "1", "-", "16", "-"]
    assert rows["e8m0"][5:8] == ["2^127", "2^-127", "-"]


def test_json_of_the_table_is_what_the_formats_say(capsys):
    table = json.loads(printed(capsys, "--json"))
    assert [row["name"] for row in table] == list(FORMATS)
    for row in table:
        fmt = FORMATS[row["name"]]
        assert (row["max"], row["min"], row["bits"], row["bias"]) == (fmt.max, fmt.min, fmt.bits, fmt.bias)
        assert row["smallest_subnormal"] == fmt.smallest_subnormal and row["ulp_of_one"] == fmt.ulp(1.0)
        assert row["torch_dtype"] is None or getattr(torch, row["torch_dtype"]) == fmt.dtype
        if fmt.bits <= 19:
            assert row["finite_codes"] == len(fmt.finite_codes())


def test_every_number_of_a_small_format_has_its_mark(capsys):
    lines = printed(capsys, "fp4").splitlines()
    marks = lines[lines.index("every number:") + 1]
    assert marks.count("|") == 15 and marks == marks[::-1]
    assert lines[lines.index("every number:") + 2].split() == [
        "-6", "-4", "-3", "-2", "-1.5", "-1", "-0.5", "0", "0.5", "1", "1.5", "2", "3", "4", "6",
    ]  # fmt: skip


def test_binades_are_listed_with_their_count_and_distance(capsys):
    lines = [line.split() for line in printed(capsys, "e4m3").splitlines()]
    assert ["2^-9", "0.0136719", "7", "2^-9", "(subnormal)"] in lines
    assert ["1", "1.875", "8", "0.125"] in lines
    assert ["256", "448", "7", "32"] in lines  # 480 is NaN
    text = printed(capsys, "fp32")
    assert "2^1 - 2^-23" in text and "..." in text and len(text.splitlines()) < 40


@pytest.mark.parametrize("name", [*FORMATS, "e3m4", "int20", "int32", "e2m1"])
def test_any_format_is_drawn_within_the_width_of_a_console(name, capsys, monkeypatch):
    for can in (True, False):
        monkeypatch.setattr(command, "can_show", lambda characters, can=can: can)
        text = printed(capsys, name)
        assert text.isascii() or can
        assert max(map(len, text.splitlines())) <= 120
        assert text.splitlines()[1].startswith(Format.parse(name).name)


def test_a_console_is_asked_what_it_can_show(monkeypatch):
    for encoding, expected in (("utf-8", True), ("ascii", False), ("latin-1", False)):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert can_show("▁█") is expected


def test_values_are_said_to_become_what_cast_makes_of_them(capsys):
    text = printed(capsys, "e4m3", "0.3", "500", "1e-9", "-2^-7")
    blocks = [line for line in text.splitlines() if not line.startswith(" ")]
    assert [line.split("  ")[0] for line in blocks] == ["0.3", "500", "1e-9", "-2^-7"]
    assert [line.split("  ")[1].split(":")[0] for line in blocks] == ["rounded", "overflow", "underflow", "exact"]
    assert "nearest even  0.3125         0x2a = 0 0101 010        off by +0.4 ulp" in text
    assert "0.28125 in 40 %, 0.3125 in 60 %" in text
    assert 'saturates, or becomes nan with overflow="inf"' in text


@pytest.mark.parametrize(
    ("name", "value", "event"),
    [
        ("e4m3", 464.0, "rounded"),  # the tie goes to the even code, 448
        ("e4m3", 464.5, "overflow"),
        ("e4m3", math.inf, "overflow"),
        ("e4m3", math.nan, "NaN"),
        ("e4m3", 2.0**-10, "underflow"),  # the tie goes to 0
        ("e4m3", 0.01, "subnormal"),
        ("e4m3", 0.0, "exact"),
        ("e5m2", math.inf, "infinite"),
        ("e5m2", 61440.0, "overflow"),
        ("fp4", 6.9, "rounded"),
        ("fp4", 7.0, "overflow"),
        ("fp4", -7.0, "overflow"),
        ("int8", 127.5, "overflow"),
        ("int8", -128.5, "rounded"),
        ("int8", -129.0, "overflow"),
        ("int8", 0.4, "underflow"),
        ("e8m0", 0.0, "NaN"),
        ("e8m0", 1e-45, "underflow"),
        ("e8m0", 3.0, "rounded"),
        ("binary", 0.3, "sign"),
        ("fp16", 1e5, "overflow"),
    ],
)
def test_what_happened_has_its_name(name, value, event):
    assert becomes(Format.parse(name), value, repr(value))["event"] == event


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "fp4", "bf16", "int8", "int4", "e8m0", "binary"])
def test_the_chances_are_those_of_stochastic_rounding(name):
    fmt = Format.parse(name)
    draws = 4000
    for value in (0.3, -0.3, 2.75, 0.001, 449.0, -130.0, 5.9, 1e6):
        chances = {each["value"]: each["probability"] for each in becomes(fmt, value, str(value))["stochastic"]}
        x = torch.full((draws,), value, dtype=torch.float64)
        rounded = cast(x, fmt, "stochastic", seed=1)
        for outcome, chance in chances.items():
            same = rounded.isnan() if math.isnan(outcome) else rounded == outcome
            assert abs(same.double().mean().item() - chance) <= 4.5 * math.sqrt(chance * (1 - chance) / draws)
        assert math.isclose(sum(chances.values()), 1.0)


def test_results_as_json_are_strict_json(capsys):
    found = json.loads(printed(capsys, "e4m3", "inf", "0.3", "--json"), parse_constant=pytest.fail)
    assert found["values"][0]["value"] == "inf"
    assert found["values"][1]["nearest_even"] == {"value": 0.3125, "code": 0x2A, "error_in_ulp": pytest.approx(0.4)}


def test_numbers_are_read_as_people_write_them():
    written = {"0.3": 0.3, "-1e-9": -1e-9, "2^-9": 2.0**-9, "-2**3": -8.0, "0x1p-3": 0.125, " INF ": math.inf}
    assert all(parse_value(text) == value for text, value in written.items())
    assert math.isnan(parse_value("nan"))


def test_numbers_are_shown_short():
    assert [show(x) for x in (0.0, -0.5, 2.0**-20, -(2.0**30), 1e6, 65504.0, math.inf)] == [
        "0", "-0.5", "2^-20", "-2^30", "1e+06", "65504", "inf",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("e4m53",), "out of range"),
        (("bf61",), "'bf16'"),
        (("e4m3", "abc"), "'abc' is not a number"),
        (("e4m3", "2^x"), "is not a number"),
        (("e4m3", "1e400"), "beyond fp64"),
        (("e4m3", "2^99999"), "beyond fp64"),
        (("--jsno",), "no option '--jsno'"),
        (("e4m3", "1", "--jsno"), "no option '--jsno'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exits_with_2(arguments, message, capsys):
    assert run(["formats", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    with pytest.raises(FewbitsError, match=message):
        raise FewbitsError(captured.err)
