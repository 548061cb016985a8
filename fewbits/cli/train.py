"""`fewbits train`: from the command line to a config, then to the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from fewbits.cli.console import find_run, make_console
from fewbits.cli.options import ConfigCommand
from fewbits.errors import FewbitsError
from fewbits.train.aliases import apply_options
from fewbits.train.config import Config, load_recipe, override, recipes
from fewbits.train.room import host_bytes, refuse_oversize
from fewbits.train.rundir import is_run

PROFILED = 5  # steps, where --profile has no number


class TrainCommand(ConfigCommand):
    """`fewbits train`, whose `--profile` takes a number or none: `--profile nano` profiles the recipe nano."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _number_of_steps(args))


def _number_of_steps(args: Sequence[str]) -> list[str]:
    found = list(args)
    for position, word in enumerate(found):
        following = found[position + 1] if position + 1 < len(found) else ""
        if word == "--profile" and not following.lstrip("-").isdecimal():
            found[position] = f"--profile={PROFILED}"
    return found


@click.command(cls=TrainCommand, name="train")
@click.argument("recipe", required=False)
@click.option(
    "--config", "file", metavar="FILE", help="A recipe of your own, or a run's config.toml, in place of RECIPE."
)
@click.option("--resume", "run", metavar="RUN", help="Go on with a run from its last checkpoint, bit for bit.")
@click.option(
    "--profile",
    type=int,
    default=0,
    metavar="[STEPS]",
    help=f"Profile some steps ({PROFILED}) after a warm-up: a trace, and where the time went.",
)
def train(recipe: str | None, file: str | None, run: str | None, profile: int, given: dict[str, str]) -> int:
    """Train a language model.

    RECIPE is nano (the default), shakespeare-char, gpt2-124m, llama-1b, minimind-64m, or the path of a TOML file.
    Any option below overrides it; dash or underscore, `--lr 3e-4` or `--optim.lr=3e-4`.

    \b
    fewbits train
    fewbits train --data my_texts/ --max_steps 2000
    fewbits train gpt2-124m --data corpus.jsonl --precision bf16-mixed
    fewbits train --resume runs/nano-1
    fewbits train --max_steps 20 --profile
    """
    if run is not None:
        return _resume(run, recipe or file, given, profile)
    config, notes = apply_options(_base(recipe, file), given)
    config.check()
    refuse_oversize(config, _available(config.train.device))
    return _train(config, None, notes, profile)


def _base(recipe: str | None, file: str | None) -> Config:
    if recipe is not None and file is not None:
        raise FewbitsError(f"RECIPE {recipe!r} and --config {file!r} were both given. Keep one.")
    if recipe is not None and recipe not in recipes() and is_run(Path(recipe)):
        raise FewbitsError(
            f"{recipe!r} is a run, not a recipe. To go on with it: fewbits train --resume {recipe}; to repeat it in a new "
            f"run: fewbits train {Path(recipe) / 'config.toml'}"
        )
    looks_like_text = recipe is not None and (Path(recipe).suffix in (".txt", ".jsonl") or Path(recipe).is_dir())
    if looks_like_text and recipe not in recipes():
        raise FewbitsError(f"{recipe!r} is text, not a recipe. To learn it: fewbits train --data {recipe}")
    chosen = recipe or file or "nano"
    config = load_recipe(chosen)
    if config.train.out_dir and Path(config.train.out_dir).absolute() == Path(chosen).absolute().parent:
        config = override(config, "train.out_dir", "")  # a run's own config.toml: repeat it, in a new directory
    return config


def _resume(text: str, base: str | None, given: dict[str, str], profile: int) -> int:
    """Goes on with a run under its own config; the trainer knows which options may be given anew."""
    if base is not None:
        raise FewbitsError(f"--resume takes everything from the run itself; leave out {base!r}.")
    run = find_run(text)
    file = run / "config.toml"
    stored = Config.from_toml(file.read_text(encoding="utf-8"), source=str(file))
    config, notes = apply_options(stored, given)
    config.check()
    from fewbits.train.resume import refuse_passed

    path = Path(text) if Path(text).exists() else run
    refuse_passed(apply_options(override(stored, "train.stop_at", "0"), given)[0].train.stop_at, path)
    return _train(config, path, notes, profile)


def _train(config: Config, resume: Path | None, notes: list[str], profile: int) -> int:
    from fewbits.report.html import write_report
    from fewbits.train.trainer import exit_code
    from fewbits.train.trainer import train as run_training

    console = make_console()
    for note in notes:
        console.print(note)
    summary = run_training(config, resume=resume, console=console, profile=profile)
    console.print(f"page        {write_report(Path(summary['out_dir']))}")
    return exit_code(summary)


def _available(device: str) -> int | None:
    """Bytes for a training on `device` as the user wrote it; None where that cannot be known yet."""
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        index = int(device.partition(":")[2] or 0)
        known = index < torch.cuda.device_count()
        return torch.cuda.get_device_properties(index).total_memory if known else None
    return host_bytes()
