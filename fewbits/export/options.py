"""What a user may ask of `fewbits quantize`, and what of it does not fit together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast, get_args

import torch
from torch import nn

from fewbits.choice import Choice
from fewbits.errors import FewbitsError, nearest
from fewbits.export.methods import CALIBRATED, METHODS
from fewbits.formats import Format
from fewbits.nn.packed import Activations, Scheme
from fewbits.numerics.affine import group_width
from fewbits.numerics.scaling import Granularity

# what people type -> the format
FORMATS = {
    "auto": "int8",
    "fp16": "fp16",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int4",
    "fp8": "fp8_e4m3",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
    "fp4": "fp4_e2m1",
    "fp4_e2m1": "fp4_e2m1",
    "binary": "binary",
}
PLAIN = ("fp16", "bf16")  # a smaller checkpoint, with neither codes nor scales
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROW, GROUPS = "row", (128, 64, 32, 16)


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """How to make a model small. Texts as on the command line."""

    format: str = "auto"
    """auto (what a run was trained for, else int8), fp16, bf16, int8, int4, fp8, fp4 or binary."""
    method: str = "nearest"
    """nearest, mse, gptq or awq."""
    granularity: str = "auto"
    """row, or group:N; auto is row for 8 bits and binary, the widest of group:128 .. group:16 that fits for 4."""
    activations: str = "none"
    """none, int8 (multiply in integers) or fp8, with weights in the same format."""
    keep: tuple[str, ...] = ("head",)
    """Name patterns of linear layers that stay as they are. Embeddings, norms and biases always do."""
    dtype: str = "bf16"
    """What stays is stored in it, and the layers compute in it: bf16, fp16 or fp32."""
    act_order: bool = True
    """gptq: the columns with the largest inputs first."""

    @property
    def number_format(self) -> Format:
        """The format, parsed."""
        return Format.parse(FORMATS[self.format])

    @property
    def plain(self) -> bool:
        """Whether the result is a plain checkpoint in 16 bits."""
        return self.format in PLAIN

    def check(self) -> QuantizeOptions:
        """Itself. Raises FewbitsError for a name that does not exist, and for what does not fit together."""
        for what, value, known in (
            ("format", self.format, FORMATS),
            ("method", self.method, METHODS),
            ("activations", self.activations, get_args(Activations)),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in known:
                raise FewbitsError(
                    f"There is no {what} {value!r} to quantize with.{nearest(value, known)} There are {', '.join(known)}."
                )
        if self.granularity != "auto":
            if not re.fullmatch(r"row|tensor|group:\d+|block\(\d+x\d+\)", self.granularity):
                raise FewbitsError(
                    f"There is no granularity {self.granularity!r}.{nearest(self.granularity, (ROW, 'group:128'))} "
                    "Use row, or group:N such as group:128."
                )
            group_width(self.granularity, 0)
        if self.plain and self.method != "nearest":
            raise FewbitsError(
                f"Method {self.method} does not apply to {self.format}, which rounds every weight by itself. Leave --method "
                "out, or choose a format with scales, such as int8 or int4."
            )
        if self.plain and (self.granularity != "auto" or self.activations != "none"):
            raise FewbitsError(
                f"{self.format} has no scales and no integers; leave --granularity and --activations out."
            )
        if self.format == "binary" and self.method != "nearest":
            raise FewbitsError(
                "binary takes method nearest only: signs and mean magnitudes, which is the smallest squared error already."
            )
        if not self.plain and self.granularity != "auto":
            self._scheme(self.granularity)
        return self

    @property
    def calibrated(self) -> bool:
        """Whether the method needs a text."""
        return self.method in CALIBRATED

    def scheme_for(self, layers: Iterable[tuple[str, nn.Linear]]) -> tuple[Scheme, Choice]:
        """The scheme for these layers, and why its granularity. Raises FewbitsError when it does not divide one."""
        columns = {name: layer.in_features for name, layer in layers}
        if self.granularity != "auto":
            for name, width in columns.items():
                group_width(self.granularity, width, name)
            return self._scheme(self.granularity), Choice(self.granularity, "--granularity was given")
        if self.number_format.bits != 4:
            return self._scheme(ROW), Choice(ROW, f"one scale a row is enough for {self.format}, and the fastest")
        fitting = [n for n in GROUPS if all(width % n == 0 for width in columns.values())]
        if not fitting:
            return self._scheme(ROW), Choice(ROW, "no group of 16 or more divides the width of every layer")
        reason = "4 bits need a scale for few weights; the widest usual group that divides every layer"
        return self._scheme(f"group:{fitting[0]}"), Choice(f"group:{fitting[0]}", reason)

    def _scheme(self, granularity: str) -> Scheme:
        shared = Granularity.parse(granularity)
        return Scheme(self.number_format, granularity_text(shared), cast(Activations, self.activations)).check()


def granularity_text(granularity: Granularity) -> str:
    """row, or group:N for blocks of a row: as a scheme says it."""
    return f"group:{granularity.columns}" if granularity.columns else ROW


def linear_layers(model: nn.Module, keep: Iterable[str]) -> tuple[dict[str, nn.Linear], list[str]]:
    """(the linear layers of a model to be quantized, by name; the names of those that `keep` keeps).

    A pattern names a layer or a module above it. Raises FewbitsError for a pattern that matches no module at all (but
    "head", which a tied model has not), and when nothing is left."""
    every = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept: list[str] = []
    for pattern in keep:
        matched = [name for name in every if any(fnmatchcase(prefix, pattern) for prefix in _prefixes(name))]
        if not matched and pattern not in ("head", "none"):
            hint = nearest(pattern, every) or f" Linear layers are {', '.join(list(every)[:6])}."
            raise FewbitsError(f"keep {pattern!r} matches no linear layer of the model.{hint}")
        kept += matched
    left = {name: module for name, module in every.items() if name not in kept}
    if not left:
        raise FewbitsError(f"keep {','.join(keep)!r} keeps every linear layer, so nothing is quantized. Keep fewer.")
    return left, kept


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
