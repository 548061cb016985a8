"""Scales: what shares one (granularity), and how the largest magnitude of a group becomes it.

`scale` turns codes into values, value = code * scale; its reciprocal is always `inv_scale`. Matrices are seen as an
operand enters a matmul: [rows, columns] with the contraction along the columns.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.errors import FewbitsError, nearest
from fewbits.formats import Format

SCALES = ("power-of-two", "exact", "two-level", "full-range")
_KINDS = ("tensor", "row", "block(1x128)", "block(128x128)", "block(1x32)", "block(1x16)", "block(16x16)")


@dataclass(frozen=True)
class Granularity:
    """What shares one scale: a block of `rows` x `columns` elements; 0 stands for all of that axis.

    tensor is (0, 0), row is (1, 0), block(1x128) is (1, 128). `Granularity.parse(str(g)) == g`.
    """

    rows: int = 0
    columns: int = 0

    def __str__(self) -> str:
        if (self.rows, self.columns) == (0, 0):
            return "tensor"
        return "row" if (self.rows, self.columns) == (1, 0) else f"block({self.rows}x{self.columns})"

    @staticmethod
    def parse(text: str | Granularity) -> Granularity:
        """The granularity of a text: tensor, row, block(RxC) with sizes from 1 to 65536, or group:C for block(1xC).

        Raises FewbitsError for anything else.

        >>> Granularity.parse("group:128")
        Granularity(rows=1, columns=128)
        """
        if isinstance(text, Granularity):
            return text
        word = str(text).strip().lower().replace(" ", "")
        if word in ("tensor", "row"):
            return Granularity() if word == "tensor" else Granularity(1, 0)
        match = re.fullmatch(r"block\(?(\d+)x(\d+)\)?", word) or re.fullmatch(r"group:?()(\d+)", word)
        if match is None:
            raise FewbitsError(
                f"There is no granularity '{text}'.{nearest(word, _KINDS)} Use tensor, row, group:128, or a block such as "
                "block(1x128)."
            )
        sizes = int(match[1] or 1), int(match[2])
        if not all(1 <= size <= 65536 for size in sizes):
            raise FewbitsError(f"Granularity '{text}' is out of range; a block has 1 to 65536 rows and columns.")
        return Granularity(*sizes)

    def transposed(self) -> Granularity:
        """The granularity of the transposed matrix."""
        return Granularity(self.columns, self.rows)

    def block(self, shape: torch.Size | tuple[int, int]) -> tuple[int, int]:
        """The size of a block in a matrix of that shape; an axis of length 0 counts as 1."""
        return self.rows or max(1, shape[0]), self.columns or max(1, shape[1])

    def grid(self, shape: torch.Size | tuple[int, int]) -> tuple[int, int]:
        """How many blocks lie along each axis of a matrix; the last ones may be cut."""
        rows, columns = self.block(shape)
        return -(-shape[0] // rows), -(-shape[1] // columns)


def blocks(x: Tensor, granularity: Granularity) -> Tensor:
    """A matrix [R, C] as [grid rows, rows, grid columns, columns]: a view where blocks fit, else padded with zeros."""
    rows, columns = granularity.block(x.shape)
    above, across = granularity.grid(x.shape)
    if (above * rows, across * columns) != tuple(x.shape):
        x = torch.nn.functional.pad(x, (0, across * columns - x.shape[1], 0, above * rows - x.shape[0]))
    return x.reshape(above, rows, across, columns)


def times(x: Tensor, values: Tensor, granularity: Granularity) -> Tensor:
    """A matrix multiplied by one value a block, [grid rows, grid columns], in the dtype of both; strides of x."""
    if values.numel() == 1:
        return x * values.view(())
    if _is_transposed(x):
        return times(x.t(), values.t(), granularity.transposed()).t()
    rows, columns = granularity.block(x.shape)
    if columns == x.shape[1] and rows == 1:
        return x * values
    if x.shape[0] % rows or x.shape[1] % columns:  # by look-up: the compiler of torch 2.13 gets cut pads wrong
        above, across = (
            torch.arange(n, device=x.device) // size for n, size in zip(x.shape, (rows, columns), strict=True)
        )
        return x * values[above][:, across]
    return (blocks(x, granularity) * values[:, None, :, None]).view(x.shape)


def block_amax(x: Tensor, granularity: Granularity) -> Tensor:
    """The largest magnitude in every block of a matrix, fp32 [grid rows, grid columns]; NaN where a NaN is inside."""
    if not x.numel():
        return torch.zeros(granularity.grid(x.shape), dtype=torch.float32, device=x.device)
    if _is_transposed(x):
        return block_amax(x.t(), granularity.transposed()).t()
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling():
        # the bits of magnitudes order as integers, infinity and NaN above all: a third of the time in eager code
        magnitude = blocks(x.view(torch.int16).bitwise_and(0x7FFF), granularity).amax(dim=(1, 3))
        return magnitude.view(torch.bfloat16).float()
    if granularity == Granularity() and x.device.type != "cpu":
        # rows first: a compiler for GPUs then finds their maxima in the kernel that makes x, where one reduction over all
        # of x would read it once more
        return x.abs().amax(1).amax().float().view(1, 1)
    return blocks(x, granularity).abs().amax(dim=(1, 3)).float()


def block_mean(x: Tensor, granularity: Granularity) -> Tensor:
    """The mean magnitude in every block of a matrix, fp32 [grid rows, grid columns]: summed in fp64, rounded once."""
    above, across = granularity.grid(x.shape)
    if not x.numel():
        return torch.zeros(above, across, dtype=torch.float32, device=x.device)
    sums = blocks(x.abs().double(), granularity).sum(dim=(1, 3))
    sizes = blocks(torch.ones(x.shape, dtype=torch.float64, device=x.device), granularity).sum(dim=(1, 3))
    return (sums / sizes).float()


def _is_transposed(x: Tensor) -> bool:
    """Whether a matrix lies in memory column by column: it is then worked on as its transpose, at the speed of memory."""
    return x.stride(0) == 1 and x.stride(1) != 1


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """The smallest power of two 2**k, -126 <= k <= 126, with amax / 2**k <= largest; NaN where amax is not finite.

    amax: fp32 >= 0, any shape; largest: the format's largest number. Worked out on the bits, so every device agrees:
    k = exponent(amax) - exponent(largest), one more where amax has the larger mantissa. An amax of 0 gives 2**-126.
    An infinity must not be hidden by saturation, so its scale is NaN and the step that has one is withheld.
    """
    fraction, exponent = math.frexp(largest)
    mantissa = round((2 * fraction - 1) * 2**23)
    bits = amax.view(torch.int32)
    k = (bits >> 23) - 127 - (exponent - 1) + ((bits & 0x7FFFFF) > mantissa).to(torch.int32)
    scale = ((k.clamp(-126, 126) + 127) << 23).view(torch.float32)
    return torch.where(amax.isfinite(), scale, math.nan)


def quotient(x: Tensor, divisor: float) -> Tensor:
    """x / divisor in the dtype of x, the same on every device up to fp32.

    Divided in fp64: torch on CUDA multiplies by the reciprocal of a number, and compilers for GPUs divide fp32
    approximately. An fp32 number over one of up to 24 bits is 2**-49 or more from where fp32 changes its rounding, and
    fp64 less than 2**-51 off, reciprocal or not.
    """
    return (x.double() / divisor).to(x.dtype)


def exact_scale(amax: Tensor, largest: float) -> Tensor:
    """amax / largest, rounded once to fp32; 1 where amax is 0, NaN where it is not finite."""
    scale = quotient(amax, largest).clamp(min=2.0**-126)
    return torch.where(amax.isfinite(), torch.where(amax == 0, 1.0, scale), math.nan)


def two_level_scale(amax: Tensor, largest: float) -> Tensor:
    """Block scales in e4m3 under one power of two for the tensor, as NVFP4 has them; the products, fp32.

    amax: fp32 [grid rows, grid columns]. The tensor's scale brings the largest block scale into e4m3's range (448);
    a block scale is amax / (largest * tensor scale), rounded to e4m3 upwards where nearest would let the largest
    element overflow by more than half a step: nearest-even, as in NVIDIA's recipe (arXiv 2509.25149), and a block whose
    scale would round to 0 keeps the smallest one.
    """
    e4m3 = Format.parse("fp8_e4m3")
    tensor_scale = power_of_two_scale(amax.amax().reshape(1, 1), largest * e4m3.max)
    wanted = (amax.double() / (largest * tensor_scale.double())).float()
    rounded = wanted.clamp(max=e4m3.max).to(torch.float8_e4m3fn).float().clamp(min=e4m3.smallest_subnormal)
    return torch.where(amax.isfinite(), rounded * tensor_scale, math.nan)


def scale_of(amax: Tensor, format: Format, kind: str = "power-of-two") -> Tensor:
    """The scale of every block, fp32 like `amax`: "power-of-two", "exact", "two-level" or "full-range".

    Integers use the symmetric range, -max to max; with "full-range" also -max - 1, and amax falls on max + 1/2, as
    engines that round activations on the fly take it. Raises FewbitsError for a kind that does not exist or fit.
    """
    if kind == "power-of-two":
        return power_of_two_scale(amax, format.max)
    if kind == "exact":
        return exact_scale(amax, format.max)
    if kind == "two-level":
        return two_level_scale(amax, format.max)
    if kind == "full-range":
        if format.kind != "int":
            raise FewbitsError(f"{format.name} has no code that full-range scales could add; only integers have one.")
        return exact_scale(amax, format.max + 0.5)
    raise FewbitsError(f"There is no kind of scale '{kind}'.{nearest(kind, SCALES)} Use {', '.join(SCALES)}.")


def inverse(scale: Tensor) -> Tensor:
    """inv_scale: the reciprocal of fp32 scales, rounded once (exact for powers of two), by a division in fp64."""
    return scale.double().reciprocal().float()


def inverse_power(scale: Tensor) -> Tensor:
    """inv_scale of powers of two from 2**-126 to 2**126, on the bits; a NaN stays one. A compiler for GPUs works it out once
    an element, where a division in fp64 takes longer than reading the element does."""
    return torch.where(scale.isnan(), scale, (0x7F000000 - scale.view(torch.int32)).view(torch.float32))
