"""What the commands share: a console that any terminal can show, and finding a run by path or name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fewbits.errors import FewbitsError, nearest
from fewbits.train.rundir import refuse_small, run_of

if TYPE_CHECKING:
    from rich.console import Console


def make_console() -> Console:
    """A rich console on stdout; where the encoding is not a Unicode one, boxes and spinners are drawn in ASCII."""
    from rich.console import Console

    return Console(highlight=False, emoji=False, markup=False)


def can_show(characters: str) -> bool:
    """Whether stdout's encoding has all these characters."""
    try:
        characters.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeError:
        return False
    return True


def find_run(text: str) -> Path:
    """The run directory that `text` names: a path, or the name of a directory under runs/. Raises FewbitsError.

    A checkpoint inside a run leads to its run.
    """
    for start in (Path(text), Path("runs") / text):
        if start.exists() and (folder := run_of(start)) is not None:
            return folder
    refuse_small(Path(text))
    known = [str(path.parent) for path in sorted(Path("runs").glob("*/config.toml"))]
    listed = f" There are {', '.join(known[-5:])}.{nearest(text, known)}" if known else ""
    if Path(text).exists():
        raise FewbitsError(f"{text} is not a run: it holds no config.toml.{listed} `fewbits train` makes one.")
    raise FewbitsError(f"There is no run {text!r}.{listed} `fewbits train` makes one.")


def find_model(text: str) -> Path:
    """What `text` names, of what holds a model: a checkpoint or a Hugging Face folder as it is, else as `find_run`.

    A checkpoint that is named is the one that is meant, not the newest of its run. Raises FewbitsError.
    """
    folder = Path(text)
    named = folder.is_dir() and (folder.name.startswith("step-") or (folder / "config.json").is_file())
    return folder if named else find_run(text)
