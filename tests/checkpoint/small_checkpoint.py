"""A small checkpoint with every kind of tensor that training stores, and what must come back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint.load import Checkpoint
from fewbits.checkpoint.save import save_checkpoint

FILES: dict[str, str | bytes] = {"config.json": '{"model_type": "gpt2"}\n', "tokenizer.json": b'{"version": "1.0"}'}
STATE: dict[str, Any] = {
    "attempts": 7,
    "loss": 2.7182818284590451,
    "best": float("inf"),
    "names": ["a", "é", None, True],
}


def model(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(6, 4, generator=generator),
        "half": torch.randn(3, generator=generator).half(),
        "brain": torch.randn(2, 3, generator=generator).bfloat16(),
        "double": torch.randn(5, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(float(seed)),
        "empty": torch.zeros(0, 3),
    }


def optimizer(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "remainder": torch.randint(-(2**15), 2**15, (6, 4), generator=generator).to(torch.int16),
        "applied": torch.tensor(2**53 + 1),
        "latched": torch.tensor(True),
        "moment": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
    }


def save(folder: Path, step: int, keep: int = 2) -> Path:
    """Saves a checkpoint whose tensors depend on the step."""
    return save_checkpoint(folder, step, model(step), optimizer(step), {**STATE, "step": step}, FILES, keep)


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """All that can differ between two tensors: -0.0 and the payload of a NaN too."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def is_step(checkpoint: Checkpoint, step: int) -> bool:
    """Whether everything `save(folder, step)` was given came back."""
    return (
        checkpoint.step == step
        and same(checkpoint.model, model(step))
        and same(checkpoint.optimizer, optimizer(step))
        and checkpoint.state == {**STATE, "step": step}
        and checkpoint.files == {k: v.encode() if isinstance(v, str) else v for k, v in FILES.items()}
    )
