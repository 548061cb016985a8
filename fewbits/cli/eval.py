"""`fewbits eval`: the loss of a run's model on held-out or other text."""

from __future__ import annotations

import json

import click

from fewbits.cli.console import find_model


@click.command(name="eval")
@click.argument("run")
@click.option(
    "--data", metavar="TEXT", help="Other text to measure on: a .txt or .jsonl file, a folder, python. [the run's]"
)
@click.option("--device", metavar="DEVICE", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def evaluate(run: str, data: str | None, device: str, as_json: bool) -> None:
    """Measure the model of RUN: loss, perplexity and bits per byte on held-out text.

    Bits per byte compare across tokenizers; loss and perplexity only within one.
    """
    folder = find_model(run)
    from fewbits.train.evaluate import evaluate_run

    found = evaluate_run(folder, data=data, device=device)
    if as_json:
        click.echo(json.dumps(found, default=str))
        return
    for name, value in found.items():
        click.echo(f"{name:<16} {format(value, '.4f') if isinstance(value, float) else value}")
