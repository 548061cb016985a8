"""Going on with a run: which checkpoint, whether it may be continued, and with which choices."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from fewbits.checkpoint.load import Checkpoint, list_checkpoints, load_checkpoint
from fewbits.checkpoint.manifest import step_of
from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.train.choices import Choices
from fewbits.train.config import Config, options
from fewbits.train.execution import choose_device, choose_execution, prepare_determinism
from fewbits.train.record import read_lines
from fewbits.train.rundir import refuse_small, run_of

# What moves no weight, or only says how far to go. Everything else stays what it was when the run began.
FREE = {"out_dir", "max_steps", "stop_at", "log_every", "eval_every", "eval_batches", "sample_every", "sample_tokens"}
FREE |= {"prompt", "save_every", "keep_checkpoints", "save_dtype", "device", "compile", "deterministic", "graph"}
FREE = {f"train.{name}" for name in FREE} | {"name", "data.cache", "precision"}


def run_folder(path: Path) -> Path:
    """The run directory that `path` (itself, its checkpoints folder or one of its checkpoints) belongs to."""
    if (folder := run_of(path)) is not None:
        return folder
    if not path.exists():
        raise FewbitsError(f"{path} does not exist. Name a run directory that `fewbits train` made.")
    refuse_small(path)
    found = sorted(entry.name for entry in path.iterdir())[:4] if path.is_dir() else []
    holds = f"it holds {', '.join(found)}" if found else "it is empty" if path.is_dir() else "it is a file"
    raise FewbitsError(f"{path} is not a run of fewbits: it has no config.toml ({holds}). Name a run directory.")


def has_checkpoint(path: Path, folder: Path) -> bool:
    """Whether there is anything to load: a run that was killed before its first save has none and begins again."""
    return path.absolute() != folder.absolute() or bool(list_checkpoints(folder))


def first_choices(config: Config, folder: Path) -> Choices:
    """The choices that a run without a checkpoint recorded when it began, or new ones."""
    events = [event for event in read_lines(folder / "events.jsonl") if event.get("event") == "start"]
    if events and "choices" in events[0]:
        return Choices.from_json(events[0]["choices"])
    return choose_execution(config)


def load_for_resume(path: Path, folder: Path, max_steps: int) -> Checkpoint:
    """The newest good checkpoint of the run, or the one that `path` names. FewbitsError when the run is finished."""
    checkpoint = load_checkpoint(path if path.absolute() != folder.absolute() else folder)
    if "progress" not in checkpoint.state:
        raise FewbitsError(f"{checkpoint.path} was not saved by `fewbits train`, so it cannot be continued.")
    if checkpoint.step >= max_steps:
        raise FewbitsError(
            f"{folder} is finished: {checkpoint.step} steps are done and max_steps is {max_steps}{_result(folder)}. "
            "Use it with fewbits report, eval or generate, go on with a larger --max_steps, or start a new run."
        )
    return checkpoint


def _result(folder: Path) -> str:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return f", held-out loss {summary['val_loss']:.4f}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def refuse_passed(stop_at: int, path: Path) -> None:
    """Raises FewbitsError when the checkpoint to go on from is at `stop_at` already, or beyond; 0 refuses nothing."""
    steps = [step for folder in (path, *list_checkpoints(path)) if (step := step_of(folder)) is not None]
    if stop_at and steps and stop_at <= steps[0]:
        raise FewbitsError(
            f"{path} is at step {steps[0]}, so it cannot stop at {stop_at}. Give a larger --stop_at, or leave it out."
        )


def continued(config: Config, checkpoint: Checkpoint) -> Config:
    """The config to go on with. Raises FewbitsError when `config` differs from the run's in what moves weights."""
    began = Config.from_toml(checkpoint.state["config"], source=str(checkpoint.path))
    began_values, values = _flat(began), _flat(config)
    for name, value in values.items():
        old = began_values[name]
        if name == "model.vocab_size" and value == 0:
            continue
        if value != old and name not in FREE:
            raise FewbitsError(
                f"{name} was {old!r} when the run began and is {value!r} now; a resumed run keeps it. Leave it out, or "
                "start a new run."
            )
    if config.precision not in ("auto", began.precision):
        raise FewbitsError(
            f"The run is in {began.precision} and --precision {config.precision} was asked for; a resumed run keeps "
            "its precision. Leave it out, or start a new run."
        )
    stop = config.train.stop_at if config.train.stop_at > checkpoint.step else 0
    return replace(config, precision=began.precision, model=began.model, train=replace(config.train, stop_at=stop))


def _flat(config: Config) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in options():
        value: object = config
        for part in name.split("."):
            value = getattr(value, part)
        found[name] = value
    return found


def recorded_choices(config: Config, checkpoint: Checkpoint) -> Choices:
    """The choices of the run, as they were; nothing is timed again. Raises FewbitsError when its device is not here."""
    choices = Choices.from_json(checkpoint.state["choices"])
    wanted = config.train.device
    if wanted not in ("auto", choices.device.value):
        device = choose_device(wanted)
        moved = f"--device was given; the run began on {choices.device.value}, so sums may differ in order from here"
        return replace(choices, device=Choice(device.value, moved), matmuls={})
    if choices.deterministic.value:
        prepare_determinism()
    choose_device(choices.device.value)
    return choices


def not_taken(config: Config, choices: Choices) -> list[str]:
    """Options of `config` that ask for something else than the run's recorded choices, which hold all the same."""
    found = []
    if config.train.compile != "auto" and (config.train.compile == "true") != choices.compile.value:
        found.append(f"--compile {config.train.compile}")
    if config.train.deterministic and not choices.deterministic.value:
        found.append("--deterministic")
    return found
