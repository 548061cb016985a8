"""`fewbits compare`: the same training under several precisions or values of an option, with a verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from fewbits.cli.console import make_console
from fewbits.cli.options import ConfigCommand
from fewbits.errors import FewbitsError
from fewbits.train.aliases import apply_options
from fewbits.train.config import load_recipe


@click.command(cls=ConfigCommand, name="compare")
@click.argument("recipe", required=False)
@click.option("--config", "file", metavar="FILE", help="A recipe of your own in place of RECIPE.")
@click.option(
    "--precisions",
    metavar="A,B,C",
    help="Precisions to compare; the first is the reference. ';' separates those with commas.",
)
@click.option(
    "--vary", metavar="KEY=A,B,C", help="Compare values of any option instead; ';' separates values with commas."
)
@click.option(
    "--seeds", default="3", metavar="N", help="How many seeds, or which (0,1,2); under 3 there is no verdict. [3]"
)
@click.option(
    "--margin", default=0.005, metavar="X", help="Relative loss difference that still counts as same. [0.005]"
)
@click.option(
    "--budget", type=float, metavar="MIN", help="Minutes for everything; runs are shortened to fit. 0: no limit."
)
@click.option("--rounds", default=2, metavar="N", help="Timing blocks of each row, alternating; 0 times nothing. [2]")
@click.option("--block_seconds", default=5.0, metavar="X", help="Timed seconds of one block. [5]")
@click.option("--csv", is_flag=True, help="Write compare.csv too.")
def compare(
    recipe: str | None,
    file: str | None,
    precisions: str | None,
    vary: str | None,
    seeds: str,
    margin: float,
    budget: float | None,
    rounds: int,
    block_seconds: float,
    csv: bool,
    given: dict[str, str],
) -> int:
    """Train the same model several times and say what differs: speed, memory, and loss with a verdict.

    Without arguments: nano in fp32, bf16-mixed and fp16-mixed with 3 seeds, shortened to end within 15 minutes.
    Every option of `fewbits train` holds for all runs. Interrupted, the same command goes on where it was.

    \b
    fewbits compare
    fewbits compare gpt2-124m --precisions fp32,bf16-mixed --seeds 3 --max_steps 500
    fewbits compare --precisions "bf16-mixed; bf16-mixed, head=fp8"
    fewbits compare --vary optim.lr=1e-3,3e-3 --precision fp32
    """
    from fewbits.lab.compare import DEFAULT_BUDGET
    from fewbits.lab.compare import compare as run_comparison
    from fewbits.lab.variants import named

    if recipe is not None and file is not None:
        raise FewbitsError(f"RECIPE {recipe!r} and --config {file!r} were both given. Keep one.")
    base = load_recipe(recipe or file or "nano")
    config, notes = apply_options(base, given)
    if budget is None and recipe is None and file is None and config.train.max_steps == base.train.max_steps:
        budget = DEFAULT_BUDGET
    out_dir = config.train.out_dir
    config = replace(config, train=replace(config.train, out_dir=""))
    console = make_console()
    for note in notes:
        console.print(note)
    result = run_comparison(
        config,
        precisions=named("--precisions", precisions),
        vary=None if vary is None else split_vary(vary),
        seeds=parse_seeds(seeds),
        margin=margin,
        out_dir=out_dir,
        budget=budget or None,
        rounds=rounds,
        block_seconds=block_seconds,
        console=console,
    )
    return _show(result.path, result.document, result.to_csv() if csv else None)


def split_vary(text: str) -> tuple[str, list[str]]:
    """("optim.lr", ["1e-3", "3e-3"]) from "optim.lr=1e-3,3e-3". Raises FewbitsError."""
    from fewbits.lab.variants import split_values

    key, equals, values = text.partition("=")
    if not equals or not key.strip():
        raise FewbitsError(f"--vary {text!r} does not fit. Write KEY=A,B such as optim.lr=1e-3,3e-3.")
    return key.strip(), split_values(values)


def parse_seeds(text: str) -> int | list[int]:
    """How many seeds, or which: "3" or "0,1,2". Raises FewbitsError."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise FewbitsError(f"--seeds {text!r} does not fit. Give how many, such as 3, or which, such as 0,1,2.")
    return numbers if "," in text else numbers[0]


def _show(path: Path, document: dict[str, object], csv: str | None) -> int:
    """The table and the files; 1 when a run crashed, as for a crashed training."""
    from fewbits.report.html import write_comparison
    from fewbits.report.terminal import comparison_lines, comparison_table
    from fewbits.train.record import write_atomically

    console = make_console()
    if console.width >= 110:
        console.print(comparison_table(document))
    else:
        for line in comparison_lines(document):
            console.print(line, soft_wrap=True)
    wrote = [path, write_comparison(path)]
    if csv is not None:
        write_atomically(path.with_suffix(".csv"), csv)
        wrote.append(path.with_suffix(".csv"))
    for item in wrote:
        console.print(f"wrote {item}", soft_wrap=True)
    runs = document["runs"]
    assert isinstance(runs, list)
    return 1 if any(run["status"] == "crashed" for run in runs) else 0
