"""Where files lie that nobody names: no import of torch, because reading data needs none."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The folder for what can be built again: `FEWBITS_CACHE`, else `~/.cache/fewbits`."""
    return Path(os.environ.get("FEWBITS_CACHE") or Path.home() / ".cache" / "fewbits").expanduser()
