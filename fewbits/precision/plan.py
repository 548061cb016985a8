"""A plan: a precision, and the modules that are excepted from it, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from fewbits.choice import Choice
from fewbits.formats import Format
from fewbits.precision.precision import Precision


class Exceptional(NamedTuple):
    """Modules whose name matches `pattern` run in `format`."""

    pattern: str
    format: Format
    reason: str


@dataclass(frozen=True)
class Plan:
    """A precision plus exceptions by module name; the first exception that matches decides."""

    precision: Precision
    exceptions: tuple[Exceptional, ...] = ()

    def format_of(self, module: str) -> Choice:
        """The working format of a module by its name, and why."""
        for exception in self.exceptions:
            if fnmatchcase(module, exception.pattern):
                return Choice(exception.format, exception.reason)
        return Choice(self.precision.working, f"the working format of {self.precision.name}")
