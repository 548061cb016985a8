"""compare.json: written after every block and run, so that an interrupted comparison continues where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewbits.checkpoint.schema import read_json
from fewbits.errors import FewbitsError
from fewbits.lab.variants import Variants
from fewbits.train.config import Config, options
from fewbits.train.record import environment, write_json

SCHEMA = "fewbits.comparison/1"
_SHAPE = {
    "status": ("running", "complete"),
    "key": str,
    "measure": str,
    "values": [str],
    "variants": [str],
    "seeds": [int],
    "margin": float,
    "asked": str,
    "config": (str, None),
    "choices": [{"what": str, "value": object, "reason": str}],
    "blocks": [object],
    "runs": [object],
    "rows": [object],
    "commands": [str],
    "wall_s": float,
    "environment": object,
}


def new(asked: Config, variants: Variants) -> dict[str, Any]:
    """The document of a comparison in which nothing has run yet."""
    return {
        "schema": SCHEMA,
        "status": "running",
        "key": variants.key,
        "measure": "val_loss",
        "values": list(variants.values),
        "variants": list(variants.labels),
        "seeds": [],
        "margin": 0.005,
        "asked": asked.to_toml(),
        "config": None,
        "choices": [],
        "blocks": [],
        "runs": [],
        "rows": [],
        "commands": [],
        "wall_s": 0.0,
        "environment": environment(),
    }


def load(path: Path) -> dict[str, Any]:
    """Read a compare.json. Raises FewbitsError when it is missing, damaged, or of another version."""
    return read_json(path, _SHAPE, SCHEMA)


def write(path: Path, document: dict[str, Any]) -> None:
    """Replace compare.json atomically. Raises FewbitsError when it cannot be written."""
    write_json(path, document)


def open_or_new(path: Path, asked: Config, variants: Variants) -> dict[str, Any]:
    """The comparison in `path` if it is the one that is asked for, or a new one.

    Seeds, values and margin may change from one session to the next (more seeds decide what was not shown); the
    training itself and the varied option may not. Raises FewbitsError naming the first setting that differs.
    """
    if not path.exists():
        return new(asked, variants)
    document = load(path)
    other = "Choose another --out_dir, or remove that one."
    if document["key"] != variants.key:
        raise FewbitsError(f"{path} compares values of {document['key']}, not of {variants.key}. {other}")
    difference = first_difference(Config.from_toml(document["asked"]), asked)
    if difference:
        raise FewbitsError(f"{path} holds a comparison of another training: {difference}. {other}")
    kept = [label for label in variants.labels if label in document["variants"]]
    if kept and document["variants"][0] != variants.labels[0]:
        raise FewbitsError(
            f"{path} compares with {document['variants'][0]} as the reference, not with {variants.labels[0]}. {other}"
        )
    document.update(values=list(variants.values), variants=list(variants.labels))
    document["runs"] = [run for run in document["runs"] if run["status"] != "crashed"]  # those are tried again
    return document


def first_difference(recorded: Config, asked: Config) -> str:
    """The first option in which two configs differ, in words, or ""; directories and names do not count."""
    recorded, asked = (replace(c, name="", train=replace(c.train, out_dir="")) for c in (recorded, asked))
    for name in options():
        before, now = (_value(config, name) for config in (recorded, asked))
        if before != now:
            return f"{name} was {json.dumps(before)} and is now {json.dumps(now)}"
    return ""


def _value(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
