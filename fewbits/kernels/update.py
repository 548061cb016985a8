"""The update of many tensors, and the norm of their gradients, each as one launch: the fast twin of numerics/update.py.

A `Table` holds the addresses of tensors that share rule, master kind and dtypes. It outlives a step: as long as no
tensor moves, an update costs the host one launch. Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewbits.kernels.recording import keep
from fewbits.numerics.update import adam_, adamw_, sgd_

RULES: dict[Callable[..., None], str] = {adamw_: "adamw", adam_: "adam", sgd_: "sgd"}
FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
WIDTH = 8
"""Scalars that a tensor may have; the rules of numerics/update.py take up to eight."""


class Cut(NamedTuple):
    """How tensors are cut into programs: elements of an update and its warps, elements of a norm, repeats and warps."""

    block: int = 1024
    warps: int = 4
    norm_block: int = 2048
    norm_repeat: int = 8
    norm_warps: int = 4


class Variant(NamedTuple):
    """What the tensors of one table share; each is compiled once. Formats are those of FORMATS."""

    rule: str
    kind: str
    working: str
    gradient: str
    moments: int


class Row(NamedTuple):
    """One tensor of a table, all of one shape, each contiguous: see `update_flat` of optim/engine.py for the dtypes.

    scalars: the row that its scalars have among those of a step.
    """

    gradient: Tensor
    working: Tensor
    kept: Tensor | None
    moments: tuple[Tensor, ...]
    scalars: int

    def addresses(self) -> list[int]:
        kept = 0 if self.kept is None else self.kept.data_ptr()
        moments = [moment.data_ptr() for moment in self.moments]
        return [self.gradient.data_ptr(), self.working.data_ptr(), kept, *moments, *[0] * (2 - len(moments))]


@cache
def installed() -> bool:
    """Whether Triton is there to be imported; asking imports nothing."""
    return importlib.util.find_spec("triton") is not None


def why_not(rule: Callable[..., None], kind: str, row: Row) -> str:
    """What keeps a tensor out of a table, or "" where it fits."""
    tensors = [row.gradient, row.working, *([] if row.kept is None else [row.kept]), *row.moments]
    if rule not in RULES:
        return f"the rule {getattr(rule, '__name__', rule)} has no kernel"
    if row.working.dtype not in FORMATS or row.gradient.dtype not in FORMATS:
        return f"{row.working.dtype} weights with {row.gradient.dtype} gradients; bf16, fp16 and fp32 fit"
    if kind == "split" and row.working.dtype != torch.bfloat16:
        return f"split masters of {row.working.dtype}; bf16 fits"
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return "a tensor is of a class of its own"
    if any(tensor.shape != row.working.shape or not tensor.is_contiguous() for tensor in tensors):
        return "weight, gradient and state must be contiguous and of one shape"
    if any(tensor.device != row.working.device for tensor in tensors):
        return "weight, gradient and state lie on several devices"
    return ""


class Table:
    """Tensors of one variant on one device, ready for one launch.

    Raises FewbitsError nowhere: rows are checked with `why_not` before.
    """

    def __init__(self, variant: Variant, rows: Sequence[Row], cut: Cut = Cut()) -> None:  # noqa: B008  # immutable
        self.variant, self.cut, self.device = variant, cut, rows[0].working.device
        sizes = [row.working.numel() for row in rows]
        host = [[*row.addresses(), size, 0, row.scalars] for row, size in zip(rows, sizes, strict=True)]
        self._host = torch.tensor(host, dtype=torch.int64)
        self._recorded = torch.empty_like(self._host, pin_memory=self.device.type == "cuda")
        self._chunks = _chunks(sizes, cut.block, self.device)
        self._wide_chunks = _chunks(sizes, cut.norm_block * cut.norm_repeat, self.device)
        self._upload()

    def move_gradients(self, addresses: Sequence[int]) -> None:
        """The gradients lie elsewhere now, everything else where it was."""
        self._host[:, 0] = torch.tensor(addresses, dtype=torch.int64)
        self._upload()

    def _upload(self) -> None:
        self._host[:, 6] = (self._host[:, :5] % 16 == 0).all(dim=1)  # a warp then loads 16 bytes a thread
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # a graph copies anew at every replay: from memory of its own, which no later step changes or lets go
            keep(self._recorded)
            self._table = torch.empty_like(self._host, device=self.device)
            self._table.copy_(self._recorded.copy_(self._host), non_blocking=True)
        else:
            self._table = to_device(self._host.clone(), self.device)

    def update(self, scalars: Tensor, factor: Tensor, clip_value: Tensor | None, applied: Tensor) -> None:
        """One update of all tensors in place; where `applied` is false every bit stays.

        scalars: fp32 [rows, 8], what the rule takes, by the rows' `scalars`. factor: 0-d fp32, multiplied into every
        gradient. clip_value: 0-d fp32, or None. applied: 0-d bool. All on the device of the tensors.
        """
        if not len(self._chunks):
            return
        from fewbits.kernels.update_triton import update_kernel

        v = self.variant
        with _on(self.device):
            update_kernel[(len(self._chunks),)](
                self._table, self._chunks, scalars, factor, factor if clip_value is None else clip_value,
                applied.view(torch.uint8), v.rule, v.kind, v.working, v.gradient, v.moments, clip_value is not None,
                self.cut.block, num_warps=self.cut.warps, **_exact(),
            )  # fmt: skip

    def partial_norms(self, infinity: bool) -> Tensor:
        """fp32, 1-D: sums of squares of pieces of the gradients, or the largest magnitudes of them; one reading.

        NaN and infinity come through. The sum of a piece is over cut.norm_block * cut.norm_repeat elements, in a tree.
        """
        partials = torch.empty(len(self._wide_chunks), dtype=torch.float32, device=self.device)
        if not len(self._wide_chunks):
            return partials
        from fewbits.kernels.update_triton import norm_kernel

        with _on(self.device):
            norm_kernel[(len(self._wide_chunks),)](
                self._table, self._wide_chunks, partials, self.variant.gradient, infinity,
                self.cut.norm_block, self.cut.norm_repeat, num_warps=self.cut.norm_warps,
            )  # fmt: skip
        return partials


def norm(tables: Sequence[Table], kind: str) -> Tensor:
    """The norm of the gradients of all tables, which lie on one device, 0-d fp32: "inf" is the largest magnitude, any
    other kind the 2-norm.

    Summed in fp32 within a piece and in fp64 across, in an order that depends on the sizes alone. It is finite exactly
    when every gradient is and no piece has a 2-norm beyond sqrt(fp32 max) = 1.8e19.
    """
    found = [table.partial_norms(kind == "inf") for table in tables]
    partials = torch.cat(found) if len(found) > 1 else found[0]
    if kind == "inf":
        return partials.amax() if len(partials) else partials.new_zeros(())
    return partials.sum(dtype=torch.float64).sqrt().float()


def failure(device: torch.device) -> str:
    """Why the kernel gives no right update on `device`, or "" where it does; compiles it and waits, so ask once."""
    try:
        values = torch.tensor([1.0, -3.0, 0.5], device=device)
        working, (left, *moments) = values.bfloat16(), (torch.zeros_like(values) for _ in range(3))
        row = Row(values.bfloat16(), working, left.to(torch.int16), tuple(moments), 0)
        scalars = [0.5, 0.0, 0.5, 0.5, 0.5, 1.0, 0.0, 2.0**-0.5]  # weight / 2 - sign(gradient) / 2
        wanted = values / 2 - values.sign() / 2
        table = Table(Variant("adamw", "split", "bf16", "bf16", 2), [row])
        one = torch.ones((), device=device)
        table.update(torch.tensor([scalars], device=device), one, None, one.bool())
        right = torch.allclose(working.float(), wanted, rtol=0, atol=2.0**-7)
    except Exception as error:  # no C compiler, a card that Triton does not know: anything a launch may meet
        return f"the update kernel failed here: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    return "" if right else f"the update kernel gave {working.tolist()} for {wanted.tolist()}"


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy of a small CPU tensor on `device`, without waiting for it: from page-locked memory, which torch keeps until
    the copy is done.
    """
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _chunks(sizes: Sequence[int], length: int, device: torch.device) -> Tensor:
    """int32 [chunks, 2]: row and number of every piece of `length` elements; filled on the device, 8 bytes a piece."""
    counts = [-(-size // length) for size in sizes]
    total = sum(counts)
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()][:-1]
    both = to_device(torch.tensor([counts, starts], dtype=torch.int64), device)
    rows = torch.repeat_interleave(both[0], output_size=total)
    numbers = torch.arange(total, device=device) - both[1].index_select(0, rows)
    return torch.stack([rows, numbers], dim=1).to(torch.int32)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@cache
def _exact() -> dict[str, Any]:
    """Launch options: no fused multiply-add, and subnormal numbers survive division and square root."""
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if torch.cuda.is_available():
        with contextlib.suppress(ImportError):
            from triton.backends.nvidia.compiler import CUDAOptions

            if "enable_reflect_ftz" in CUDAOptions.__dataclass_fields__:  # Triton 3.4 and newer
                options["enable_reflect_ftz"] = False
    return options
