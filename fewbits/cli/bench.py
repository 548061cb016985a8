"""`fewbits bench`: what this device allows, and where a training step loses it."""

from __future__ import annotations

from pathlib import Path

import click

from fewbits.cli.console import make_console
from fewbits.cli.options import ConfigCommand
from fewbits.errors import FewbitsError
from fewbits.train.aliases import apply_options
from fewbits.train.config import load_recipe, override


@click.command(cls=ConfigCommand, name="bench")
@click.argument("recipe", required=False)
@click.option("--config", "file", metavar="FILE", help="A recipe of your own in place of RECIPE.")
@click.option(
    "--precisions",
    metavar="A,B,C",
    help="Which to time; default: all that run natively here. ';' separates those with commas.",
)
@click.option("--seconds", type=float, default=3.0, metavar="X", help="Timed seconds for each precision. [3]")
def bench(recipe: str | None, file: str | None, precisions: str | None, seconds: float, given: dict[str, str]) -> int:
    """Measure what this device allows and where a training step's time goes.

    RECIPE is nano (the default) or another recipe; one of its micro-batches is timed on random tokens: tokens a second in
    each precision, and each part of the step beside its floor. Writes bench.json, report.html and traces.

    \b
    fewbits bench
    fewbits bench gpt2-124m --precisions bf16-mixed,fp8
    fewbits bench gpt2-124m --precisions "fp8; fp8, head=fp8"
    """
    if recipe is not None and file is not None:
        raise FewbitsError(f"RECIPE {recipe!r} and --config {file!r} were both given. Keep one.")
    config, notes = apply_options(load_recipe(recipe or file or "nano"), given)
    folder = config.train.out_dir
    config = override(config, "train.out_dir", "")
    from fewbits.lab.bench import bench as run_bench
    from fewbits.lab.variants import named
    from fewbits.report.bench import bench_tables
    from fewbits.report.html import write_bench

    console = make_console()
    for note in notes:
        console.print(note)
    found = run_bench(config, named("--precisions", precisions), folder, seconds, console)
    for part in bench_tables(found.document):
        console.print(part)
    console.print(f"wrote       {found.path}")
    console.print(f"page        {write_bench(Path(found.path))}")
    return 0 if any(row["status"] == "ok" for row in found.rows) else 1
