"""The command `fewbits`: finds the subcommand, and turns what a user can put right into one sentence and exit code 2.

Subcommands are imported when they are called, so that `fewbits --help` answers before torch is imported.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn, TextIO

import click

from fewbits import __version__
from fewbits.errors import FewbitsError, nearest
from fewbits.train.ranks import refuse_ranks

# command -> (module, one line of help); the module holds a click command of the same name
COMMANDS = {
    "Train": {
        "train": ("fewbits.cli.train", "Train a language model, at once or from a recipe."),
        "compare": ("fewbits.cli.compare", "Train under several precisions or options, and give a verdict."),
    },
    "Look at a device": {
        "bench": ("fewbits.cli.bench", "Measure what this device allows, and where a step's time goes."),
    },
    "Look at a run": {
        "report": ("fewbits.cli.report", "Write one HTML page about a run."),
        "eval": ("fewbits.cli.eval", "Measure a run's model on held-out or other text."),
        "generate": ("fewbits.cli.generate", "Continue a text with a run's model."),
    },
    "Make it small": {
        "quantize": ("fewbits.cli.quantize", "Quantize a trained model, and measure what it cost."),
    },
    "Look at a format": {
        "formats": ("fewbits.cli.formats", "Print the number formats, or one, or what values become in it."),
        "precision": ("fewbits.cli.precision", "Print what a precision means on this machine."),
    },
}
MISUSE, INTERRUPTED = 2, 130


def underscores(name: str) -> str:
    """Option names with dashes are the same names."""
    return name.replace("-", "_")


class Commands(click.Group):
    """The group `fewbits`: a table of subcommands, each imported on its first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the subcommands, in the order of the help page."""
        return [name for group in COMMANDS.values() for name in group]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand, imported; None for a name that is none."""
        for group in COMMANDS.values():
            if cmd_name in group:
                module = import_module(group[cmd_name][0])
                return next(
                    value
                    for value in vars(module).values()
                    if isinstance(value, click.Command) and value.name == cmd_name
                )
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest names for a word that is no command."""
        known = self.list_commands(ctx)
        if args and args[0] not in known:
            raise FewbitsError(
                f"There is no command {args[0]!r}; there are {', '.join(known)}.{nearest(args[0], known)}"
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands in their groups."""
        for title, group in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name, line) for name, (_, line) in group.items()])


@click.command(cls=Commands, context_settings={"token_normalize_func": underscores, "max_content_width": 120})
@click.version_option(__version__, prog_name="fewbits")
def fewbits() -> None:
    """Train language models in few bits, and show that nothing was lost.

    `fewbits train` trains at once, on this machine, on text that every machine has.
    """


def main() -> NoReturn:
    """Entry point of the console script."""
    sleep_soon(os.environ)
    sys.exit(run(sys.argv[1:]))


def sleep_soon(environment: MutableMapping[str, str]) -> None:
    """Has the threads of OpenMP wait awake for some 50 microseconds and then asleep, unless `environment` says how to wait.

    Threads that spin at every barrier starve each other as soon as anything else runs: on two cores with one busy neighbour a
    step of nano took 4,200 to 6,200 ms spinning and 1,400 ms sleeping. But to wake one takes as long as those turns do: in int8
    a step takes 258 ms with them and 313 without, beside a neighbour 463 and 431. Read once, when torch is loaded.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        environment.setdefault("GOMP_SPINCOUNT", "1000")


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; its exit code: 0 done, 1 crashed, 2 misuse, 3 diverged, 130 interrupted."""
    arguments = arguments or ["--help"]
    with _forgiving(sys.stdout), _forgiving(sys.stderr), _short_warnings():
        try:
            if "--help" not in arguments:
                refuse_ranks()
            result = fewbits.main(list(arguments), prog_name="fewbits", standalone_mode=False)
            sys.stdout.flush()
            return result if isinstance(result, int) else 0
        except (KeyboardInterrupt, click.Abort):
            return _complain("interrupted", INTERRUPTED)
        except BrokenPipeError:  # the reader of a pipe has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except click.NoSuchOption as error:
            return _complain(_no_such_option(error), MISUSE)
        except click.ClickException as error:
            return _complain(_usage(error), MISUSE)
        except FewbitsError as error:
            return _complain(str(error), MISUSE)
        except Exception as error:
            sentence, code = explain(error)
            if not sentence:
                raise
            return _complain(sentence, code)


def explain(error: BaseException) -> tuple[str, int]:
    """(one sentence, exit code) for an error of the system that a user can put right; ("", 1) for a bug of ours."""
    if (
        type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, MemoryError)
        or "can't allocate memory" in str(error)
    ):
        return "Out of memory. Raise --micro_batches, or lower --batch_size, --context or the model's size.", 1
    if isinstance(error, OSError) and error.filename is not None:
        reasons = {
            errno.EACCES: "no permission",
            errno.EPERM: "no permission",
            errno.EROFS: "the file system is read-only",
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the quota is used up",
            errno.ENAMETOOLONG: "the name is too long",
        }
        if error.errno in reasons:
            return f"Cannot use {os.fspath(error.filename)}: {reasons[error.errno]}.", MISUSE
    return "", 1


def _complain(sentence: str, code: int) -> int:
    print(f"fewbits: error: {sentence}", file=sys.stderr, flush=True)
    return code


def _usage(error: click.ClickException) -> str:
    """click's message as one sentence with the way to the help page."""
    context = getattr(error, "ctx", None)
    where = f" See {context.command_path} --help." if context is not None else ""
    message = error.format_message()
    return f"{message}{'' if message.endswith('.') else '.'}{where}"


def _no_such_option(error: click.NoSuchOption) -> str:
    known: list[str] = []
    if error.ctx is not None:
        known = [
            name for param in error.ctx.command.get_params(error.ctx) for name in param.opts if name.startswith("--")
        ]
    path = error.ctx.command_path if error.ctx is not None else "fewbits"
    word = f"--{underscores(error.option_name.lstrip('-'))}"
    return f"There is no option {error.option_name!r}.{nearest(word, known)} See {path} --help."


@contextmanager
def _forgiving(stream: TextIO) -> Iterator[None]:
    """A console that cannot show a character gets a plain one instead of an exception."""
    before = getattr(stream, "errors", None)
    if before == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
        try:
            yield
        finally:
            stream.reconfigure(errors=before)
    else:
        yield


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Our own warnings as one line each, as errors are; those of other packages stay as they are."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category.__module__.partition(".")[0] == "fewbits":
            print(f"fewbits: warning: {message}", file=sys.stderr, flush=True)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
