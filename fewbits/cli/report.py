"""`fewbits report`: one HTML page about a run."""

from __future__ import annotations

import click

from fewbits.cli.console import find_run


@click.command(name="report")
@click.argument("run")
def report(run: str) -> None:
    """Write RUN/report.html: one file that needs no network and can be read by somebody who was not there.

    RUN is a run directory, finished, stopped or crashed.
    """
    folder = find_run(run)
    from fewbits.report.html import write_report

    click.echo(str(write_report(folder)))
