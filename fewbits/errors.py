"""One error for everything a user can put right, and the nearest-name hint that goes with it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FewbitsError(ValueError):
    """A mistake that the user can put right. The message says what came, what fits and what to do."""


def nearest(word: str, options: Iterable[str]) -> str:
    """A hint such as " Did you mean 'bf16-mixed'?", or "" when nothing is close.

    >>> nearest("bf16-mixd", ["bf16-mixed", "fp32"])
    " Did you mean 'bf16-mixed'?"
    """
    close = get_close_matches(word, list(options), n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
