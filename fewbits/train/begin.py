"""How a training begins: a new one in a directory of its own, one that goes on, and one without the compiler after all."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from fewbits.checkpoint.load import Checkpoint
from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.train.build import Data, Training, build_training, open_data
from fewbits.train.config import Config
from fewbits.train.events import Display
from fewbits.train.execution import check_device, choose_execution, determinism
from fewbits.train.layers import check_layers
from fewbits.train.record import write_atomically
from fewbits.train.resume import (
    continued,
    first_choices,
    has_checkpoint,
    load_for_resume,
    not_taken,
    recorded_choices,
    run_folder,
)
from fewbits.train.rundir import Lock, check_free, check_writable, next_free
from fewbits.train.state import restore


def fresh(config: Config, display: Display, stack: ExitStack) -> tuple[Training, Path]:
    """A new training and its directory, which is made last: nothing is left behind by a mistake in the config."""
    check_device(config.check())
    check_layers(config)
    if config.train.out_dir:
        check_free(Path(config.train.out_dir))
    else:
        check_writable(Path("runs"))
    with display.progress() as progress:
        data = open_data(config, progress)
    config = config.resolve_vocabulary(data.tokenizer.vocab_size)
    with display.progress() as progress:
        choices = choose_execution(config, progress=progress)
    stack.enter_context(determinism(choices.deterministic.value and choices.torch_device().type == "cuda"))
    training = build_training(config, choices, data)
    folder = claim(config, stack)
    training.config = replace(
        training.config,
        precision=choices.precision.value,
        train=replace(
            config.train,
            out_dir=str(folder),
            device=choices.device.value,
            compile="true" if choices.compile.value else "false",
        ),
    )
    write_atomically(folder / "config.toml", training.config.to_toml())
    return training, folder


def claim(config: Config, stack: ExitStack) -> Path:
    """The run directory, made and locked for this process."""
    if config.train.out_dir:
        folder = Path(config.train.out_dir)
        lock = Lock(folder)
        try:
            check_free(folder)  # another run may have begun and ended since it was asked first
        except FewbitsError:
            lock.release()
            raise
        stack.callback(lock.release)
        return folder
    while True:
        folder = next_free(Path("runs"), config.name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise FewbitsError(f"Cannot make {folder}: {error.strerror}. Choose another --out_dir.") from error
        stack.callback(Lock(folder).release)
        return folder


def resumed(config: Config, path: Path, display: Display, stack: ExitStack) -> tuple[Training, Path, Checkpoint | None]:
    """A training brought to the state of the run's newest good checkpoint, and its directory, locked."""
    folder = run_folder(path)
    check_writable(folder)
    stack.callback(Lock(folder).release)
    checkpoint = None
    if has_checkpoint(path, folder):
        checkpoint = load_for_resume(path, folder, config.train.max_steps)
        config = continued(config, checkpoint)
        choices = recorded_choices(config, checkpoint)
        for option in not_taken(config, choices):
            display.note(
                f"{option} is not taken: a resumed run keeps what it began with. Leave it out, or start a new run."
            )
    else:
        display.note(f"{folder} has no checkpoint yet: it begins again, as it began before.")
        choices = first_choices(config, folder)
    stack.enter_context(determinism(choices.deterministic.value and choices.torch_device().type == "cuda"))
    with display.progress() as progress:
        data = open_data(config, progress)
    training = build_training(config, choices, data)
    if checkpoint is not None:
        restore(training, checkpoint)
        _remember_horizon(folder, config.train.max_steps)
    if checkpoint is not None and checkpoint.save_dtype is not None:
        display.note(f"The weights were saved in {checkpoint.save_dtype}: the run goes on, but not bit for bit.")
    return training, folder, checkpoint


def _remember_horizon(folder: Path, max_steps: int) -> None:
    """Writes a `max_steps` given anew into the run's config.toml, so that the next --resume goes on to it as well."""
    file = folder / "config.toml"
    stored = Config.from_toml(file.read_text(encoding="utf-8"), source=str(file))
    if stored.train.max_steps != max_steps:
        write_atomically(file, replace(stored, train=replace(stored.train, max_steps=max_steps)).to_toml())


def eager_again(training: Training, reason: str) -> Training:
    """The same training from its beginning without the compiler, for `reason`: the same weights, from the same seed."""
    choices = replace(training.choices, compile=Choice(False, reason))
    config = replace(training.config, train=replace(training.config.train, compile="false"))
    return build_training(config, choices, Data(training.corpus, training.tokenizer, training.store))
