"""Options as data: every field of a config dataclass with its sentence, type, limits and choices.

The dataclasses are the only place where an option is written down: `--help`, TOML files and every check are made from
them. The sentence of a field is the string below it, or the comment beside it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import math
import textwrap
import tokenize
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any

from fewbits.errors import FewbitsError, nearest

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")
LARGEST = 2**31 - 1  # a whole number without limits of its own: larger ones are slips of the finger


@dataclass(frozen=True)
class Option:
    """One field of one config dataclass, as the command line, a TOML file and the checks see it."""

    name: str
    """Dotted name such as `optim.lr`."""
    kind: type
    """int, float, bool or str."""
    default: Any
    """What holds when nobody says otherwise."""
    sentence: str
    """One sentence for `--help`."""
    choices: tuple[str, ...] = ()
    """The only texts that fit; empty: any."""
    low: float | None = None
    """Smallest value that fits."""
    high: float | None = None
    """Largest value that fits."""
    above: bool = False
    """True: `low` itself does not fit."""
    below: bool = False
    """True: `high` itself does not fit."""
    optional: bool = False
    """True: None fits too, written as `none` or left out."""

    def parse(self, text: str) -> Any:
        """The value that `text` (from the command line) means. Raises FewbitsError."""
        word = text.strip()
        if self.optional and word.lower() in ("none", ""):
            return None
        if self.kind is bool:
            return self._parse_bool(word)
        if self.kind is str:
            return self.check(self._as_choice(text))
        try:
            return self.check(self.kind(word))
        except FewbitsError:
            raise
        except ValueError:
            if self.kind is int:
                return self.check(self._whole(word))
            raise self._misfit(text) from None

    def check(self, value: Any) -> Any:
        """`value`, of the field's type, if it fits. Raises FewbitsError saying what would."""
        if value is None and self.optional:
            return None
        if self.kind is float and type(value) is int:
            value = float(value)
        if set(self.choices) >= {"true", "false"} and type(value) is bool:
            value = str(value).lower()
        if type(value) is not self.kind:
            raise self._misfit(value)
        fitting: Any = value
        if self.choices and fitting not in self.choices:
            raise FewbitsError(
                f"{self.name} is {value!r}, which is none of {', '.join(filter(None, self.choices))}."
                f"{nearest(fitting, self.choices)}"
            )
        if self.kind in (int, float):
            self._check_range(fitting)
        return fitting

    def _check_range(self, value: float) -> None:
        if not math.isfinite(value):
            raise self._misfit(value)
        low, high = self.low, self.high
        if self.kind is int:
            low, high = (0 if low is None else low), (LARGEST if high is None else high)
        too_low = low is not None and (value < low or (self.above and value == low))
        too_high = high is not None and (value > high or (self.below and value == high))
        if too_low or too_high:
            raise self._misfit(value)

    def _as_choice(self, text: str) -> str:
        word = text.strip().lower()
        if set(self.choices) >= {"true", "false"}:
            return "true" if word in TRUE else "false" if word in FALSE else word
        return word if self.choices else text

    def _parse_bool(self, word: str) -> bool:
        if word.lower() in TRUE:
            return True
        if word.lower() in FALSE:
            return False
        raise self._misfit(word)

    def _whole(self, word: str) -> int:
        try:
            number = float(word)  # 1e6 is how people write a million
        except ValueError:
            raise self._misfit(word) from None
        if not math.isfinite(number) or number != int(number):
            raise self._misfit(word)
        return int(number)

    def _misfit(self, value: Any) -> FewbitsError:
        return FewbitsError(f"{self.name} is {value!r}; it must be {self.range()}.")

    def range(self) -> str:
        """What fits, in words.

        >>> Option("optim.lr", float, 1e-3, "", low=0, high=10, above=True).range()
        'a number above 0 and at most 10'
        """
        noun = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[self.kind]
        if self.kind in (bool, str):
            return " or ".join(choice or "empty" for choice in self.choices) or noun
        low = 0 if self.low is None and self.kind is int else self.low
        high = LARGEST if self.high is None and self.kind is int else self.high
        limits = []
        if low is not None:
            limits.append(f"{'above' if self.above else 'at least'} {low:g}")
        if high is not None:
            limits.append(f"{'below' if self.below else 'at most'} {format(high, ',' if self.kind is int else 'g')}")
        return " ".join([noun, " and ".join(limits)]).strip()


def limits(
    low: float | None = None, high: float | None = None, *, above: bool = False, below: bool = False
) -> dict[str, Any]:
    """Metadata for a dataclass field: `field(default=1.0, metadata=limits(0, 10))`."""
    return {"low": low, "high": high, "above": above, "below": below}


@cache
def sentences(cls: type) -> dict[str, str]:
    """The sentence of each field of a dataclass: the string below it, else the comment beside it."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    found = {}
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        text = comments.get(statement.lineno, "")
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        found[statement.target.id] = text
    return found


def options_of(cls: type, prefix: str, extra: dict[str, dict[str, Any]] | None = None) -> list[Option]:
    """The options of one dataclass; fields that are dataclasses themselves are left out.

    `extra` adds or replaces what a field says of itself: {"n_layer": {"low": 1}}.
    """
    hints = typing.get_type_hints(cls)
    options = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            continue
        details: dict[str, Any] = {**field.metadata, **(extra or {}).get(field.name, {})}
        optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
        if optional:
            hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        if typing.get_origin(hint) is typing.Literal:
            details["choices"] = typing.get_args(hint)
            hint = str
        options.append(
            Option(
                name=f"{prefix}.{field.name}" if prefix else field.name,
                kind=hint,
                default=field.default,
                sentence=details.pop("sentence", None) or sentences(cls).get(field.name, ""),
                optional=optional,
                **details,
            )
        )
    return options
