"""The same training under several precisions (or values of any option) and seeds: what each costs, saves and loses.

A comparison is a parent that computes nothing: short timing blocks alternate (A B A B), then the loss runs follow one
after the other, seed by seed, each in a process of its own and never two at a time. compare.json grows with every
piece; what is there is never run again, and a run that was cut off is resumed from its checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fewbits.errors import FewbitsError
from fewbits.lab import store
from fewbits.lab.progress import Watch
from fewbits.lab.rows import to_csv
from fewbits.lab.session import Session
from fewbits.lab.variants import Variants, make_variants, measure_of, variant_config
from fewbits.lab.verdict import check_margin
from fewbits.precision.hardware import check as check_hardware
from fewbits.precision.hardware import describe
from fewbits.train.config import Config
from fewbits.train.record import write_atomically
from fewbits.train.rundir import Lock, check_free, check_writable

DEFAULT_PRECISIONS = ("fp32", "bf16-mixed", "fp16-mixed")
DEFAULT_BUDGET = 13.0  # minutes: 15 were promised, and estimates err


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns: the content of compare.json, and where it is."""

    path: Path
    document: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict a variant; see docs/compare.md."""
        return list(self.document["rows"])

    def row(self, variant: str) -> dict[str, Any]:
        """The row of one variant by its label. Raises KeyError."""
        return {row["variant"]: row for row in self.rows}[variant]

    def verdict(self, variant: str) -> str:
        """same, better, worse, not shown or diverged. Raises KeyError for the reference, which has none."""
        judged = self.row(variant)["verdict"]
        if judged is None:
            raise KeyError(f"{variant!r} is the reference; it has no verdict")
        return str(judged["kind"])

    def to_csv(self) -> str:
        """The rows as CSV."""
        return to_csv(self.rows)


def compare(
    config: Config,
    precisions: Sequence[str] | None = None,
    vary: tuple[str, Sequence[str]] | None = None,
    seeds: int | Sequence[int] = 3,
    margin: float = 0.005,
    out_dir: str | Path = "",
    budget: float | None = None,
    rounds: int = 2,
    block_seconds: float = 5.0,
    console: Console | None = None,
    quiet: bool = False,
) -> Comparison:
    """Compare trainings of `config` and write OUT/compare.json.

    Args:
        config: the training that all variants share.
        precisions: names to compare; the first is the reference. Default: fp32 and both mixed kinds.
        vary: (option, values) to compare something else, e.g. ("optim.lr", ["1e-3", "3e-3"]).
        seeds: how many (counted up from the config's seed), or which.
        margin: relative difference of held-out loss that still counts as the same.
        out_dir: where everything goes; an unfinished comparison of the same training there is continued.
        budget: minutes for everything; the horizon of the runs is shortened to fit. None: as long as it takes.
        rounds: timing blocks of each variant; 0 measures no time and no memory.
        block_seconds: timed seconds of a block, after warm-up.

    Raises FewbitsError before anything runs when the request does not fit together or the device cannot run a variant.
    """
    check_margin(margin)
    if not precisions and not vary:
        precisions = DEFAULT_PRECISIONS
    variants = make_variants(config, precisions, vary)
    numbers = seed_list(seeds, config.train.seed)
    _check_numbers(budget, rounds, block_seconds)
    device = _device(config)
    for value in variants.values:
        if variants.key == "precision" or config.precision != "auto":
            changed = variant_config(config, variants, value, numbers[0])
            check_hardware(changed.resolve_precision(), describe(device))
    folder = Path(out_dir) if out_dir else default_folder(config, variants)
    path = folder / "compare.json"
    (check_writable if path.exists() else check_free)(folder)
    fresh = not folder.exists()
    lock = Lock(folder)
    try:
        document = store.open_or_new(path, config, variants)
        document.update(seeds=numbers, margin=margin, measure=measure_of(variants.key), status="running")
        document["commands"] = commands(config, document, budget)
        store.write(path, document)  # before config.toml, by which the folder would pass for a run
        write_atomically(folder / "config.toml", config.to_toml())
        try:
            Session(folder, document, variants, Watch(console, quiet)).run(
                config, budget, rounds, block_seconds, device
            )
        except FewbitsError:
            if fresh and not document["blocks"] and not document["runs"]:
                shutil.rmtree(folder, ignore_errors=True)  # a mistake in what was asked leaves nothing half-written
            raise
    finally:
        lock.release()
    return Comparison(path, document)


def seed_list(seeds: int | Sequence[int], first: int) -> list[int]:
    """The seeds: so many from `first` up, or those given. Raises FewbitsError."""
    numbers = list(range(first, first + seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0 or len(numbers) > 1000:
        raise FewbitsError(f"seeds={seeds} does not fit. Give how many (3 for a verdict), or different seeds >= 0.")
    return numbers


def _check_numbers(budget: float | None, rounds: int, block_seconds: float) -> None:
    if budget is not None and not 0 < budget < 1e6:
        raise FewbitsError(f"budget={budget} does not fit. Give minutes, such as 13, or none.")
    if not 0 <= rounds <= 100 or not 0 < block_seconds < 1e4:
        raise FewbitsError(
            f"rounds={rounds}, block_seconds={block_seconds} do not fit. Give 2 rounds of 5 seconds, say."
        )
    if budget is not None and rounds == 0:
        raise FewbitsError("A budget needs timing blocks to plan by. Give --rounds 1 or more, or no --budget.")


def _device(config: Config) -> torch.device:
    """The device that every run of the comparison uses."""
    if config.train.device != "auto":
        return torch.device(config.train.device)
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def default_folder(config: Config, variants: Variants) -> Path:
    """runs/compare-NAME; or -2, -3, ... where a comparison of something else lies there already."""
    for number in range(1, 1000):
        folder = Path("runs") / f"compare-{config.name}{'' if number == 1 else f'-{number}'}"
        path = folder / "compare.json"
        if not folder.exists() or not any(entry.name != ".lock" for entry in folder.iterdir()):
            return folder
        try:
            store.open_or_new(path, config, variants)
        except FewbitsError:
            continue
        if path.exists():
            return folder
    raise FewbitsError("runs/ holds a thousand comparisons. Give --out_dir.")


def commands(config: Config, document: dict[str, Any], budget: float | None) -> list[str]:
    """The commands that repeat the comparison, config.toml holding the shared settings."""
    values = (";" if any("," in v for v in document["values"]) else ",").join(document["values"])
    what = f"--precisions '{values}'" if document["key"] == "precision" else f"--vary '{document['key']}={values}'"
    seeds = ",".join(map(str, document["seeds"]))
    more = "" if budget is None else f" --budget {budget:g}"
    return [
        f"fewbits compare config.toml {what} --seeds {seeds if len(document['seeds']) > 1 else seeds + ','} "
        f"--margin {document['margin']:g}{more} --out_dir runs/compare-{config.name}"
    ]
