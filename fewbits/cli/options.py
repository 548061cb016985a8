"""Every option of a `Config` on a command line, made from the dataclasses: names, help, switches, nearest names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import click

from fewbits.cli.main import underscores
from fewbits.errors import FewbitsError, nearest
from fewbits.train.aliases import CONVERSIONS, canonical, known_names, spellings
from fewbits.train.config import load_recipe, options, recipes
from fewbits.train.fields import FALSE, TRUE, Option

SECTIONS = {"": "Run", "model": "Model", "data": "Data", "optim": "Optimizer", "train": "Training"}
_GIVEN = "fewbits.given"


class ConfigCommand(click.Command):
    """A command that takes, beside its own parameters, every option of a Config.

    The callback gets them as `given: dict[str, str]`, dotted name or alias to text, in the order they were declared:
    `config, notes = apply_options(load_recipe("nano"), given)`.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters, then one for each option of a Config."""
        return [*super().get_params(ctx), *_parameters()]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with switches that need no value, and the nearest names for an unknown option."""
        ctx.meta[_GIVEN] = {}
        try:
            rest = super().parse_args(ctx, _spell_out(args))
        except click.NoSuchOption as error:
            own = [name for param in self.params for name in param.opts if name.startswith("--")]
            word = f"--{underscores(error.option_name.lstrip('-'))}"
            hint = nearest(word, [*own, "--help", *(f"--{name}" for name in known_names())])
            raise FewbitsError(
                f"There is no option {error.option_name!r}.{hint} See {ctx.command_path} --help."
            ) from None
        ctx.params["given"] = ctx.meta[_GIVEN]
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options, then those of a Config in their groups."""
        own = [param for param in super().get_params(ctx) if isinstance(param, click.Option)]
        rows = [row for param in own if (row := param.get_help_record(ctx)) is not None]
        with formatter.section("Options"):
            formatter.write_dl(rows)
        default = load_recipe("nano")
        for group, title in SECTIONS.items():
            prefix = f"; --{group}.NAME works too" if group else ""
            with formatter.section(f"{title} (in brackets: the value in nano{prefix})"):
                formatter.write_dl([_help(option, default) for option in options().values() if _group(option) == group])
        with formatter.section("Names of nanoGPT and Hugging Face whose values are converted"):
            formatter.write_dl([(f"--{name}", conversion.meaning + ".") for name, conversion in CONVERSIONS.items()])


def _group(option: Option) -> str:
    return option.name.rpartition(".")[0]


def _help(option: Option, recipe: Any) -> tuple[str, str]:
    value = recipe
    for part in option.name.split("."):
        value = getattr(value, part)
    shown = "" if value in ("", None) else f" [{str(value).lower() if isinstance(value, bool) else value}]"
    names = ", ".join(f"--{name}" for name in spellings(option.name))
    return f"{names} {_metavar(option)}", option.sentence + shown


def _metavar(option: Option) -> str:
    if option.choices:
        return "|".join(choice for choice in option.choices if choice)
    return {int: "N", float: "X", bool: "[true|false]", str: "TEXT"}[option.kind]


@cache
def _parameters() -> tuple[click.Option, ...]:
    """One click option for each option of a Config and each name that needs a conversion."""

    def keep(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.meta[_GIVEN][parameter.metavar] = value

    made = []
    for name in [*options(), *CONVERSIONS]:
        spelled = dict.fromkeys([name, *spellings(name)] if name in options() else [name])
        declarations = [*(f"--{each}" for each in spelled), name.replace(".", "__")]
        made.append(click.Option(declarations, metavar=name, callback=keep, expose_value=False, hidden=True))
    return tuple(made)


@cache
def _is_switch(name: str) -> bool:
    """Whether the option may stand without a value, and then means true."""
    try:
        word = canonical(name)
    except FewbitsError:
        return False
    if word in CONVERSIONS:
        return CONVERSIONS[word].switch
    return options()[word].kind is bool or set(options()[word].choices) >= {"true", "false"}


def _is_stray(word: str) -> bool:
    """Whether a word after a switch can only be a value of it, a wrong one: it is no option, recipe or file."""
    is_file = "." in word or "/" in word or "\\" in word
    return bool(word) and not word.startswith("-") and not is_file and not nearest(word, recipes())


def _spell_out(arguments: Sequence[str]) -> list[str]:
    """Switches with a value: `--deterministic nano` as `--deterministic=true nano`, `--no-bias` as `--bias=false`."""
    found: list[str] = []
    for position, word in enumerate(arguments):
        if word == "--":
            return [*found, *arguments[position:]]
        following = arguments[position + 1].lower() if position + 1 < len(arguments) else ""
        if word.startswith("--") and "=" not in word:
            name = underscores(word[2:])
            if _is_switch(name) and following not in (*TRUE, *FALSE, "auto") and not _is_stray(following):
                word = f"{word}=true"
            elif name.startswith("no_") and _is_switch(name[3:]):
                word = f"--{name[3:]}=false"
        found.append(word)
    return found
