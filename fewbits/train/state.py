"""The complete state of a training, keyed by parameter name: what a checkpoint holds, and how it comes back exactly.

The model part is exact (the masters in fp32; 16 bits where the precision keeps none) under the names of transformers.
The working weights are its rounding and are not stored. No random generator is stored: nothing hangs on its past.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint.hf import from_hf, to_hf
from fewbits.checkpoint.load import Checkpoint, check_shapes, load_checkpoint
from fewbits.errors import FewbitsError
from fewbits.nn.fake import learned_scales
from fewbits.optim.base import Optimizer
from fewbits.train.build import Training
from fewbits.train.record import environment

EXACT = "exact"  # the last part of the key under which a learned scale is stored beside its moments


def exact_weights(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every parameter by name: its master in fp32, on the host, or itself where none is kept (it is exact as it stands).

    They leave the device one by one: formed there all at once, those of 1.1B parameters take 4.1 GiB beside a training."""
    return {
        name: parameter.detach()
        if optimizer.master_kind(parameter) == "none"
        else optimizer.exact_weight(parameter).cpu()
        for name, parameter in model.named_parameters()
    }


def model_files(training: Training) -> tuple[dict[str, Tensor], dict[str, str | bytes]]:
    """The exact weights as transformers names them, and config.json with the tokenizer's files.

    Learned scales are no weights that anybody else reads: `collect` puts them beside the moments."""
    learned = learned_scales(training.model)
    weights = exact_weights(training.model, training.optimizer)
    weights = {name: tensor for name, tensor in weights.items() if name not in learned}
    config_json, tensors = to_hf(training.config.model, weights)
    if training.tokenizer.end_of_text is not None:
        config_json |= {key: training.tokenizer.end_of_text for key in ("bos_token_id", "eos_token_id")}
    files: dict[str, str | bytes] = {"config.json": json.dumps(config_json, indent=1), **training.tokenizer.files()}
    return tensors, files


def data_identity(training: Training) -> dict[str, str]:
    """What the batches are made of: they are a function of this, the seed and the attempt."""
    return {"corpus": training.corpus.fingerprint(), "tokenizer": training.tokenizer.fingerprint()}


def collect(training: Training, progress: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `save_checkpoint` that make up the state: model, optimizer, state, files.

    progress: counters of the loop (JSON) that are to be continued. Waits for the device.
    """
    model, files = model_files(training)
    optimizer = training.optimizer.named_state(training.model.named_parameters())
    optimizer |= {f"{name}/{EXACT}": scale for name, scale in learned_scales(training.model).items()}
    state = {
        "step": training.step.state_dict(),
        "next_batch": training.step.attempts,
        "precision": str(training.precision),
        "choices": training.choices.to_json(),
        "data": data_identity(training),
        "config": training.config.to_toml(),
        "progress": progress,
        "environment": environment(),
    }
    return {"model": model, "optimizer": _distinct(optimizer), "state": state, "files": files}


def with_learned_scales(
    weights: dict[str, Tensor], optimizer: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights with the learned scales that were stored beside the moments, and the moments without them."""
    ending = f"/{EXACT}"
    learned = {key.removesuffix(ending): value for key, value in optimizer.items() if key.endswith(ending)}
    moments = {key: value for key, value in optimizer.items() if not key.endswith(ending)}
    return {**weights, **learned}, moments


@torch.no_grad()
def load_learned_scales(model: torch.nn.Module, folder: Path | str) -> None:
    """Gives a prepared model the learned scales that the checkpoint in `folder` (or its run) holds, if its precision learns
    any. Raises FewbitsError where they are not there: other scales would make another model."""
    scales = learned_scales(model)
    saved, _ = with_learned_scales({}, load_checkpoint(folder).optimizer) if scales else ({}, {})
    for name, parameter in scales.items():
        if name not in saved or saved[name].shape != parameter.shape:
            raise FewbitsError(
                f"{folder} holds no learned scales '{name}', so it was not trained in this precision. Use the one it was "
                "trained in."
            )
        parameter.copy_(saved[name])


def _distinct(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values; what several names share (such as one birth for all) is written for each of them."""
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def restore(training: Training, checkpoint: Checkpoint) -> None:
    """Brings `training`, freshly built, to the state in `checkpoint`, bit for bit.

    Raises FewbitsError when it is of another model, other data or another precision.
    """
    state = checkpoint.state
    _check_same(training, checkpoint)
    config, tensors = from_hf(json.loads(checkpoint.files["config.json"]), checkpoint.model)
    parameters = dict(training.model.named_parameters())
    tensors, moments = with_learned_scales(tensors, checkpoint.optimizer)
    check_shapes(parameters, tensors)
    if config != training.config.model:
        raise FewbitsError(f"{checkpoint.path} is of another model shape. Leave out the model options to continue it.")
    for name, parameter in parameters.items():
        training.optimizer.load_exact(parameter, tensors[name])
    training.optimizer.load_named_state(parameters.items(), moments)
    training.step.load_state_dict(state["step"])
    training.forget_remainders()


def _check_same(training: Training, checkpoint: Checkpoint) -> None:
    state = checkpoint.state
    missing = {"step", "precision", "choices", "data", "config", "progress"} - set(state)
    if missing or "config.json" not in checkpoint.files:
        what = ", ".join(sorted(missing)) or "config.json"
        raise FewbitsError(f"{checkpoint.path} lacks {what}: it was not saved by `fewbits train`.")
    if state["precision"] != str(training.precision):
        raise FewbitsError(
            f"The run is in {state['precision']} and was to be resumed in {training.precision}. Leave --precision out."
        )
    now = data_identity(training)
    changed = [what for what in now if now[what] != state["data"].get(what)]
    if changed:
        raise FewbitsError(
            f"The {changed[0]} is not the one the run began with (its content changed, or another Python is running). "
            "Put it back, or start a new run."
        )
