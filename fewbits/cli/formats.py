"""`fewbits formats`: every number format as a table; one as a number line; what values become in it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import click

from fewbits.cli.console import can_show
from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.formats import Format

WIDTH = 97  # columns of a number line: odd, so that zero has one
MOST_ROWS = 24  # of the list of binades
HEADINGS = ("format", "bits", "exp", "man", "bias", "max", "smallest normal", "subnormal", "ulp(1)",
            "specials", "finite codes", "torch dtype")  # fmt: skip
SPECIALS = {"ieee": "inf, NaN", "nan_only": "NaN", "none": "-"}


@click.command(context_settings={"ignore_unknown_options": True})  # -1e-9 is a value
@click.argument("format", required=False)
@click.argument("values", nargs=-1, type=click.UNPROCESSED)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def formats(format: str | None, values: tuple[str, ...], as_json: bool) -> None:
    """Print the number formats as a table, or draw one FORMAT, or say what VALUES become in it.

    \b
    fewbits formats
    fewbits formats e4m3
    fewbits formats e4m3 0.3 500 1e-9 -2^-7
    """
    from fewbits.formats import FORMATS, Format

    if format is None or format.startswith("--"):
        _refuse_options((format,) if format else ())
        shown = list(FORMATS.values())
        click.echo(json.dumps([facts(fmt) for fmt in shown], indent=1) if as_json else table(shown))
        return
    fmt = Format.parse(format)
    _refuse_options(values)
    results = [becomes(fmt, parse_value(text), text) for text in values]
    if as_json:
        click.echo(json.dumps(_plain({**facts(fmt), **({"values": results} if values else {})}), indent=1))
    elif values:
        click.echo("\n".join(line for result in results for line in _sentences(fmt, result)))
    else:
        click.echo("\n".join([table([fmt]), "", *number_line(fmt), "", *binades(fmt)]))


def parse_value(text: str) -> float:
    """A number as people type it: 0.3, 1e-9, inf, nan, 0x1p-9, 2^-9, -2**-9. Raises FewbitsError."""
    word = text.strip().lower().replace("**", "^")
    try:
        if "^" in word:
            base, _, exponent = word.partition("^")
            value = math.copysign(math.pow(abs(float(base)), float(exponent)), float(base))
        else:
            value = float.fromhex(word) if "0x" in word else float(word)
    except OverflowError:
        value = math.inf
    except ValueError:
        raise FewbitsError(f"{text!r} is not a number. Give values such as 0.3, -1e-9, 2^-9, inf or nan.") from None
    if math.isinf(value) and "inf" not in word:
        raise FewbitsError(f"{text!r} is beyond fp64, in which values are read; give at most 1.8e308, or inf.")
    return value


def facts(fmt: Format) -> dict[str, Any]:
    """What a format is, in names and numbers."""
    return {
        "name": fmt.name,
        "kind": fmt.kind,
        "bits": fmt.bits,
        "exponent_bits": fmt.exponent_bits,
        "mantissa_bits": fmt.mantissa_bits,
        "bias": fmt.bias,
        "signed": fmt.signed,
        "max": fmt.max,
        "min": fmt.min,
        "smallest_normal": fmt.smallest_normal,
        "smallest_subnormal": fmt.smallest_subnormal,
        "ulp_of_one": fmt.ulp(1.0),
        "infinity": fmt.has_infinity,
        "nan": fmt.has_nan,
        "finite_codes": fmt.finite_count,
        "torch_dtype": None if fmt.dtype is None else str(fmt.dtype).removeprefix("torch."),
    }


def table(shown: Sequence[Format]) -> str:
    """Formats as rows of plain text, about 110 characters wide."""
    rows = []
    for fmt in shown:
        real = fmt.kind == "float"
        layout = [str(fmt.exponent_bits), str(fmt.mantissa_bits), str(fmt.bias)] if real else ["-"] * 3
        numbers = [show(fmt.max), show(fmt.smallest_normal), show(fmt.smallest_subnormal), show(_ulp(fmt, 1.0))]
        if not fmt.signed:
            numbers[2] = "-"
        dtype = "-" if fmt.dtype is None else str(fmt.dtype).removeprefix("torch.")
        count = str(fmt.finite_count) if fmt.bits <= 32 else f"{fmt.finite_count:.3g}"
        rows.append([fmt.name, str(fmt.bits), *layout, *numbers, SPECIALS[fmt.specials], count, dtype])
    return "\n".join(_aligned([list(HEADINGS), *rows], left={0, 9, 11}))


def show(value: float) -> str:
    """A number for people: a power of two far from 1 as such, others with six digits.

    >>> show(2.0**-133), show(448.0), show(0.25), show(3.4028234663852886e38), show(math.inf)
    ('2^-133', '448', '0.25', '3.40282e+38', 'inf')
    """
    mantissa, exponent = math.frexp(abs(value))
    if mantissa == 0.5 and not -4 <= exponent - 1 <= 20:
        return f"{'-' if value < 0 else ''}2^{exponent - 1}"
    return f"{value:.0f}" if value == round(value, 0) and abs(value) < 1e6 else f"{value:.6g}"


def number_line(fmt: Format) -> list[str]:
    """The line from the lowest to the largest number, and for floats the positive half by powers of two."""
    lines = _linear(fmt)
    if fmt.kind == "float":
        lines += ["", *_logarithmic(fmt)]
    return lines


def binades(fmt: Format) -> list[str]:
    """The positive numbers binade by binade: from, to, how many, how far apart."""
    if fmt.kind != "float":
        return [f"{fmt.finite_count} numbers, {show(fmt.max - fmt.min if fmt.kind == 'binary' else 1)} apart"]
    rows = [["from", "to", "numbers", "apart"]]
    if fmt.signed:
        gap = show(fmt.smallest_subnormal)
        last = _last(fmt, fmt.min_exponent, fmt.smallest_subnormal)
        rows.append([gap, last, str(2**fmt.mantissa_bits - 1), f"{gap}  (subnormal)"])
    for exponent in range(fmt.min_exponent, fmt.max_exponent + 1):
        low, ulp = math.ldexp(1.0, exponent), math.ldexp(1.0, exponent - fmt.mantissa_bits)
        full = low + ulp * (2**fmt.mantissa_bits - 1)
        high = min(full, fmt.max)
        last = show(high) if high < full else _last(fmt, exponent + 1, ulp)
        rows.append([show(low), last, str(round((high - low) / ulp) + 1), show(ulp)])
    if len(rows) > MOST_ROWS:
        one = len(rows) - 1 - fmt.max_exponent  # the row of the binade of 1
        hidden = [["..."] * 4]
        rows = rows[:5] + hidden + rows[one - 2 : one + 4] + hidden + rows[-3:]
    return _aligned(rows, left={3})


def _last(fmt: Format, exponent: int, ulp: float) -> str:
    """The number one ulp below 2**exponent; as a difference where six digits would not tell them apart."""
    return f"2^{exponent} - {show(ulp)}" if fmt.mantissa_bits > 10 else show(math.ldexp(1.0, exponent) - ulp)


def becomes(fmt: Format, value: float, text: str) -> dict[str, Any]:
    """What one value becomes: to nearest even, toward zero, at random; with codes, the error in ulp, and what happened."""
    import torch

    from fewbits.numerics.rounding import cast

    x = torch.tensor([value], dtype=torch.float64)
    ulp = _ulp(fmt, value)
    found: dict[str, Any] = {"text": text, "value": value, "ulp": ulp}
    for name, rounding in (("nearest_even", "nearest-even"), ("toward_zero", "toward-zero")):
        rounded = cast(x, fmt, rounding)
        error = rounded.item() - value if math.isfinite(value) and rounded.isfinite() else 0.0
        code = int(fmt.encode(rounded).item()) & (2**fmt.bits - 1)
        found[name] = {"value": rounded.item(), "code": code, "error_in_ulp": error / ulp if error else 0.0}
    found["stochastic"] = _chances(fmt, value, found["toward_zero"]["value"])
    overflowed = cast(x, fmt, overflow="inf").item()
    found["event"] = _event(fmt, value, found["nearest_even"]["value"], overflowed)
    found["overflow_inf"] = overflowed
    return found


def _is_read_exactly(text: str) -> bool:
    """Whether what was typed is an fp64 number, in which it is read: 0.1 is not."""
    try:
        return Fraction(text) == Fraction(float(text))
    except ValueError:  # written as 2^-9 or in hexadecimal
        return True


def _plain(data: Any) -> Any:
    """Data as JSON has it, which knows no infinities and NaN: those become text."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_plain(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def _chances(fmt: Format, value: float, down: float) -> list[dict[str, float]]:
    """The outcomes of stochastic rounding with their probabilities, overflow saturating."""
    if not math.isfinite(value) or not math.isfinite(down):
        return [{"value": down, "probability": 1.0}]
    if fmt.kind == "binary":
        up, down, share = 1.0, -1.0, min(max((1 + value) / 2, 0.0), 1.0)
    else:
        ulp = _ulp(fmt, value)
        share = min(abs(value - down) / ulp, 1.0)
        up = math.copysign(min(abs(down) + ulp, -fmt.min if value < 0 and fmt.signed else fmt.max), value)
        if down == up or (not fmt.signed and value < down):
            share = 0.0
    pairs = [(down, 1 - share), (up, share)]
    return [{"value": outcome, "probability": chance} for outcome, chance in pairs if chance > 0]


def _event(fmt: Format, value: float, rounded: float, overflowed: float) -> str:
    """What happened to a value: exact, rounded, subnormal, underflow, overflow, infinite, NaN, or only its sign kept."""
    if math.isnan(rounded):
        return "NaN"
    if math.isinf(value):
        return "infinite" if math.isinf(rounded) else "overflow"
    if fmt.kind == "binary":
        return "exact" if rounded == value else "sign"
    half = _ulp(fmt, fmt.max) / 2
    highest = fmt.max + half  # a tie that goes up, to the even code beyond
    inside = fmt.min - half <= value < highest if fmt.kind == "int" else abs(value) < highest
    if not math.isfinite(overflowed) or (fmt.specials == "none" and not inside):
        return "overflow"
    if rounded == value:
        return "exact"
    if rounded == 0 or (not fmt.signed and value < fmt.min):
        return "underflow"
    return "subnormal" if fmt.kind == "float" and abs(rounded) < fmt.smallest_normal else "rounded"


def _sentences(fmt: Format, found: dict[str, Any]) -> list[str]:
    """One value's fate as a few lines."""
    smallest = show(fmt.smallest_subnormal)
    event = found["event"]
    remark = {
        "exact": f"exact: {fmt.name} has this number"
        if _is_read_exactly(found["text"])
        else f"the fp64 number nearest to it, and {fmt.name} has that",
        "underflow": f"underflow: too small for {fmt.name}, whose smallest positive number is {smallest}",
        "overflow": f"overflow: beyond {show(fmt.max if found['value'] > 0 else fmt.min)}; saturates"
        + ("" if fmt.specials == "none" else f", or becomes {show(found['overflow_inf'])} with overflow=\"inf\""),
        "subnormal": f"subnormal: fewer than {fmt.mantissa_bits} mantissa bits are left",
        "sign": f"{fmt.name} keeps the sign only",
        "infinite": f"infinity: {fmt.name} has a code for it",
        "NaN": "NaN stays NaN" + ("" if fmt.has_nan else f", though {fmt.name} has no code for it: encoded it is 0"),
        "rounded": f"rounded: neighbours here are {show(found['ulp'])} apart",
    }[event]  # fmt: skip
    if event == "NaN" and not math.isnan(found["value"]):
        remark = f"{fmt.name} holds positive numbers only: zero and what is below become NaN"
    chances = [(_precisely(each["value"]), f"{100 * each['probability']:.6g} %") for each in found["stochastic"]]
    drawn = ", ".join(f"{outcome} in {share}" for outcome, share in chances)
    lines = [f"{found['text']}  {remark}"]
    for name in ("nearest_even", "toward_zero"):
        result = found[name]
        error = f"off by {result['error_in_ulp']:+.4g} ulp" if result["error_in_ulp"] else ""
        heading = name.replace("_", " ") if name == "toward_zero" else "nearest even"
        lines.append(
            f"  {heading:<13} {_precisely(result['value']):<14} {_code(fmt, result['code']):<24} {error}".rstrip()
        )
    return [*lines, f"  {'stochastic':<13} {drawn if len(chances) > 1 else f'{chances[0][0]:<14} always'}"]


def _precisely(value: float) -> str:
    return show(value) if math.isfinite(value) and show(value).startswith(("2^", "-2^")) else f"{value:.9g}"


def _code(fmt: Format, code: int) -> str:
    """A code in hexadecimal and, up to 16 bits, its fields: 0x2a = 0 0101 010."""
    digits = f"0x{code:0{-(-fmt.bits // 4)}x}"
    if fmt.bits > 16 or fmt.kind != "float":
        return digits
    bits = f"{code:0{fmt.bits}b}"
    start = int(fmt.signed)
    fields = (bits[:start], bits[start : start + fmt.exponent_bits], bits[start + fmt.exponent_bits :])
    return f"{digits} = {' '.join(field for field in fields if field)}"


def _linear(fmt: Format) -> list[str]:
    """All numbers from the lowest to the largest: a mark each where columns suffice, else their density."""
    span = fmt.max - fmt.min if fmt.signed else math.inf
    if math.isinf(span) or fmt.bits > 24:  # too wide to divide into columns, or too many to count
        return [f"{fmt.finite_count:.3g} numbers from {show(fmt.min)} to {show(fmt.max)}"]
    import torch

    values = torch.unique(fmt.decode(fmt.finite_codes()).double())
    columns = ((values - fmt.min) / span * (WIDTH - 1)).round().long()
    counts = columns.bincount(minlength=WIDTH).tolist()
    ends = [(0, show(fmt.min)), (WIDTH - 1, show(fmt.max)), (round(-fmt.min / span * (WIDTH - 1)), "0")]
    if max(counts) == 1:
        others = [(int(column), show(value)) for column, value in zip(columns.tolist(), values.tolist(), strict=True)]
        return ["every number:", "".join("|" if count else "-" for count in counts), _place(ends + others)]
    return [f"all numbers, {_legend('how many')}:", _bars([math.log2(1 + count) for count in counts]), _place(ends)]


def _logarithmic(fmt: Format) -> list[str]:
    """The positive numbers with the same width for every binade: how many bits of significand each has."""
    lowest = fmt.min_exponent - (fmt.mantissa_bits if fmt.signed else 0)
    total = fmt.max_exponent - lowest + 1
    numbers = fmt.mantissa_bits + 1
    heights = []
    for column in range(WIDTH):
        exponent = lowest + column * total // WIDTH
        heights.append(float(numbers - max(fmt.min_exponent - exponent, 0)))
    named = [lowest, fmt.max_exponent, fmt.min_exponent, 0]
    labels = [((exponent - lowest) * WIDTH // total, f"2^{exponent}" if exponent else "1") for exponent in named]
    return [
        f"positive numbers by powers of two, {_legend('how many bits of significand')}:",
        _bars(heights),
        _place(labels),
    ]


def _ulp(fmt: Format, value: float) -> float:
    return float(fmt.ulp(value))


def _legend(what: str) -> str:
    return f"{what} by height" if can_show(BARS) else f"{what} by character, few {PLAIN_BARS[1:]} many"


BARS, PLAIN_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*%#"


def _bars(heights: Sequence[float]) -> str:
    """One character a height, from nothing at 0 to a full block at the highest; anything above 0 shows."""
    characters = BARS if can_show(BARS) else PLAIN_BARS
    top = max(heights) or 1.0
    return "".join(characters[math.ceil(height / top * 8)] for height in heights).rstrip()


def _place(labels: Sequence[tuple[int, str]]) -> str:
    """Labels under their columns of a line, the first ones first; one that would touch another is left out."""
    line = [" "] * (WIDTH + 12)
    for column, text in labels:
        start = min(max(column - len(text) // 2, 0), WIDTH - len(text))
        if all(character == " " for character in line[max(start - 1, 0) : start + len(text) + 1]):
            line[start : start + len(text)] = text
    return "".join(line).rstrip()


def _aligned(rows: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    """Rows as lines with columns aligned: those in `left` to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _refuse_options(words: Sequence[str]) -> None:
    """Options are let through as values for the sake of -1e-9; here the others are refused."""
    for word in words:
        if word.startswith("--"):
            raise FewbitsError(f"There is no option {word!r}. Did you mean '--json'? See fewbits formats --help.")
