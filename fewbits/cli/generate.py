"""`fewbits generate`: a run's model continues a text."""

from __future__ import annotations

import click

from fewbits.cli.console import find_model


@click.command(name="generate")
@click.argument("run")
@click.option("--prompt", default="", metavar="TEXT", help="Text to continue. [empty: from the end-of-text token]")
@click.option("--tokens", type=click.IntRange(1, 1_000_000), default=200, show_default=True, help="Tokens to add.")
@click.option(
    "--temperature",
    type=click.FloatRange(0, 100),
    default=0.8,
    show_default=True,
    help="0 always takes the likeliest token.",
)
@click.option(
    "--top_k", type=click.IntRange(0), default=50, show_default=True, help="Draw from the k likeliest; 0 from all."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the draws.")
@click.option("--device", metavar="DEVICE", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
def generate(run: str, prompt: str, tokens: int, temperature: float, top_k: int, seed: int, device: str) -> None:
    """Continue a text with the model of RUN. The same seed gives the same text; half a character is never shown."""
    folder = find_model(run)
    from fewbits.train.generate import generate as continue_text

    click.echo(
        continue_text(folder, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed, device=device)
    )
