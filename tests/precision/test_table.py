"""The table of a precision: every role has a row, and what was decided carries its reason."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from fewbits.cli.precision import precision as command
from fewbits.errors import FewbitsError
from fewbits.precision.hardware import Hardware
from fewbits.precision.precision import PRECISIONS, Precision

ROLES = ["precision", "role", "working weight", "master weight", "moments", "output", "grad_input", "grad_weight",
         "gradients", "logits", "kept", "reductions", "loss scale", "runs"]  # fmt: skip
OLD_CPU = Hardware("cpu", "an old CPU", measured=(("fp32", 60.0), ("bf16", 2.5), ("fp16", 0.5)))
H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0))


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_role_has_a_row_of_readable_width(name):
    lines = Precision.parse(name).table(device=OLD_CPU).splitlines()
    heads = [line[:16].strip() for line in lines if line[:16].strip()]
    assert heads == ROLES
    assert all(len(line) <= 120 for line in lines)


def row(text: str, role: str) -> str:
    """A row and its continuation lines in one line."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(role))
    rest = lines[start + 1 :]
    count = next((i for i, line in enumerate(rest) if not line.startswith(" ")), len(rest))
    return " ".join(line.strip() for line in lines[start : start + 1 + count])


def test_it_says_what_is_emulated_and_why_with_figures():
    text = Precision.parse("bf16-mixed").table(device=OLD_CPU)
    assert "emulated" in row(text, "runs")
    assert "24 times slower than fp32" in row(text, "runs")
    assert "native" in row(Precision.parse("bf16-mixed").table(device=H100), "runs")


def test_it_says_which_masters_and_which_loss_scale_and_why():
    text = Precision.parse("fp16-mixed").table()
    assert "fp32 copy (why: fp16 has too few exponent bits" in row(text, "master weight")
    assert "dynamic" in row(text, "loss scale")
    assert "split 16+16" in row(Precision.parse("bf16-mixed").table(), "master weight")
    assert "asked for" in row(Precision.parse("bf16-mixed, master=fp32").table(), "master weight")
    assert "vanish" in row(Precision.parse("fp16-mixed, loss_scale=none").table(), "loss scale")
    assert "runs" not in Precision.parse("fp32").table()


def test_it_says_what_an_fp8_head_multiplies_and_where():
    shown = Precision.parse("bf16, head=fp8").table(device="cpu")
    assert "e5m2" in row(shown, "head") and "bf16 in evaluation" in row(shown, "head")
    assert "head emulated" in row(shown, "runs")
    assert "\nhead " not in Precision.parse("bf16").table()
    assert "embedding, head, router" in row(Precision.parse("fp8").table(), "kept")
    assert "embedding, router" in row(Precision.parse("fp8, head=fp8").table(), "kept")


def test_it_says_what_logits_are_rounded_to_and_where():
    assert "fp16 on CUDA, rounded once" in row(Precision.parse("bf16").table(), "logits")
    assert "fp32, as their sums are" in row(Precision.parse("fp16, logits=fp32").table(), "logits")
    assert "fp64, as their sums are" in row(Precision.parse("fp64").table(), "logits")
    assert "asked for: 8 significant bits" in row(Precision.parse("bf16, logits=bf16").table(), "logits")


def test_it_tells_what_prepare_did():
    kept = [("head", "Linear", "kept in fp32", "named by keep 'head'")]
    report = SimpleNamespace(rounded=147, parameters=148, kept=kept)
    text = Precision.parse("bf16").table(report)
    assert "prepare() rounded 147 of 148 parameters, ties away" in text
    assert "head (why: named by keep 'head')" in row(text, "kept")


def test_the_command_prints_the_table_of_this_machine():
    result = CliRunner().invoke(command, ["bf16, master=fp32", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("precision       bf16-mixed, master=fp32")
    assert "runs" in result.output


def test_the_command_leaves_mistakes_to_the_command_line():
    result = CliRunner().invoke(command, ["bf61"])
    assert isinstance(result.exception, FewbitsError)
