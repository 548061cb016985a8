"""What torch keeps globally about matmuls, set for a precision and put back, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fewbits.precision.precision import Precision

# Both accumulate in 16 bits somewhere inside the matmul; neither may happen unasked.
_REDUCED = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@contextmanager
def torch_switches(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """Within: TF32 for matmul and cuDNN exactly when the precision multiplies tf32 on a CUDA device, fp32 products
    otherwise, and no reductions in 16 bits. Afterwards every switch is as it was, also after an exception.

    torch has two interfaces for TF32, and reading the old one raises once the new one has said something else (2.9 to
    2.13 at least). Only the old setters keep both in agreement, so those are used to set; the strings of the new one,
    which can always be read, are put back last.
    """
    tf32 = precision.operand.name == "tf32" and torch.device(device).type == "cuda"
    saved = _read()
    try:
        _set("high" if tf32 else "highest", tf32)
        for name in _REDUCED:
            if getattr(torch.backends.cuda.matmul, name, False):
                setattr(torch.backends.cuda.matmul, name, False)
        yield
    finally:
        _restore(saved)


def _new_style() -> list[tuple[Any, str]]:
    """(object, its fp32_precision now) for the switches of torch's newer interface; none before torch 2.9."""
    backends: Any = torch.backends
    owners = (backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    return [(owner, owner.fp32_precision) for owner in owners if hasattr(owner, "fp32_precision")]


def _old_style() -> tuple[str | None, bool | None]:
    """(float32 matmul precision, TF32 in cuDNN), each None where the newer interface has made it unreadable."""

    def read(get: Callable[[], Any]) -> Any:
        try:
            return get()
        except RuntimeError:
            return None

    return read(torch.get_float32_matmul_precision), read(lambda: torch.backends.cudnn.allow_tf32)


def _read() -> tuple[tuple[str | None, bool | None], list[tuple[Any, str]], dict[str, Any]]:
    matmul = torch.backends.cuda.matmul
    return _old_style(), _new_style(), {name: getattr(matmul, name) for name in _REDUCED if hasattr(matmul, name)}


def _set(matmul: str, cudnn: bool) -> None:
    """The old setters first, then the strings, which would otherwise inherit from torch.backends.fp32_precision."""
    wanted = "tf32" if cudnn else "ieee"
    if _old_style() == (matmul, cudnn) and all(value in (wanted, "none") for _, value in _new_style()):
        return
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn
    for owner, value in _new_style():
        if value != wanted:
            owner.fp32_precision = wanted


def _restore(saved: tuple[tuple[str | None, bool | None], list[tuple[Any, str]], dict[str, Any]]) -> None:
    (matmul, cudnn), new, reduced = saved
    if _old_style() != (matmul, cudnn):
        torch.set_float32_matmul_precision(matmul or "highest")  # torch's defaults where it was unreadable
        torch.backends.cudnn.allow_tf32 = True if cudnn is None else cudnn
    for owner, value in new:
        if owner.fp32_precision != value:
            owner.fp32_precision = value
    for name, value in reduced.items():
        if getattr(torch.backends.cuda.matmul, name) != value:
            setattr(torch.backends.cuda.matmul, name, value)
