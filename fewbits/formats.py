"""Number formats as values: what a format can hold follows from a few fields, and a new format is a new value.

Sources: IEEE 754-2019 (fp64, fp32, fp16), the OCP 8-bit specification v1.0 (fp8) and OCP Microscaling (MX) v1.0
(fp6, fp4, e8m0). Rounding a tensor to a format is `fewbits.numerics.rounding.cast`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbits.errors import FewbitsError, nearest

Specials = Literal["ieee", "nan_only", "none"]
Kind = Literal["float", "int", "binary"]

_DTYPES = {  # float4_e2m1fn_x2 packs two values in one element, so it is no dtype of fp4_e2m1
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "e8m0": getattr(torch, "float8_e8m0fnu", None),
    "int8": torch.int8,
}


@dataclass(frozen=True)
class Format:
    """A number format. A float code is sign, exponent field, mantissa field; an integer code is two's complement.

    name: what it prints as, and `Format.parse(str(format)) == format`.
    exponent_bits, mantissa_bits, bias: fields of a float; an integer has exponent_bits 0 and mantissa_bits = bits - 1.
    specials: which codes are not finite numbers: "ieee" (the top exponent holds infinities and NaNs), "nan_only" (only
        the code of all ones is NaN, which buys e4m3 its 448), "none" (every code is a number).
    kind: "float", "int" or "binary" (one bit: code 0 is +1, code 1 is -1).
    signed: False only for scale formats such as e8m0, which hold powers of two and neither zero nor subnormals.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials = "ieee"
    kind: Kind = "float"
    signed: bool = True

    def __str__(self) -> str:
        return self.name

    @staticmethod
    def parse(text: str | torch.dtype | Format) -> Format:
        """The format of that name, alias (bfloat16, half, e5m10, ...), torch dtype, or any eXmY or intN.

        Raises FewbitsError for anything else.

        >>> Format.parse("bfloat16").name, Format.parse("e5m10").name, Format.parse("fp16").max
        ('bf16', 'fp16', 65504.0)
        """
        if isinstance(text, Format):
            return text
        word = str(text).strip().lower().removeprefix("torch.").replace("-", "_")
        name = ALIASES.get(word, word)
        if name in FORMATS:
            return FORMATS[name]
        if match := re.fullmatch(r"e(\d+)m(\d+)", name):
            exponent, mantissa = int(match[1]), int(match[2])
            if 2 <= exponent <= 11 and 1 <= mantissa <= 52:
                return Format(f"e{exponent}m{mantissa}", exponent, mantissa, 2 ** (exponent - 1) - 1)
            raise FewbitsError(
                f"Format '{text}' is out of range: eXmY takes 2 to 11 exponent and 1 to 52 mantissa bits."
            )
        if match := re.fullmatch(r"int(\d+)", name):
            if 2 <= int(match[1]) <= 32:
                return Format(f"int{int(match[1])}", 0, int(match[1]) - 1, 0, "none", "int")
            raise FewbitsError(f"Format '{text}' is out of range: intN takes 2 to 32 bits.")
        raise FewbitsError(
            f"There is no number format '{text}'.{nearest(word, [*FORMATS, *ALIASES])} "
            f"Formats are {', '.join(FORMATS)}, any eXmY such as e5m10, and any intN."
        )

    @property
    def bits(self) -> int:
        """Bits of one code, sign included."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype whose elements are this format, or None."""
        return _DTYPES.get(self.name)

    @property
    def container(self) -> torch.dtype:
        """The narrowest of torch's dtypes for arithmetic that holds every value: the dtype itself, fp32 or fp64."""
        if self.dtype is not None and self.dtype.itemsize >= 2:
            return self.dtype
        return torch.float64 if self.exponent_bits > 8 or self.mantissa_bits > 23 else torch.float32

    @property
    def has_infinity(self) -> bool:
        """Whether a code stands for infinity."""
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:
        """Whether a code stands for NaN."""
        return self.specials != "none"

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite number: 2**max_exponent <= max < 2**(max_exponent + 1)."""
        return (self._max_code >> self.mantissa_bits) - self.bias

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number: smallest_normal = 2**min_exponent."""
        return (1 if self.signed else 0) - self.bias

    @property
    def max(self) -> float:
        """The largest finite number."""
        if self.kind == "binary":
            return 1.0
        if self.kind == "int":
            return 2.0**self.mantissa_bits - 1
        fraction = self._max_code & (2**self.mantissa_bits - 1)
        return math.ldexp(2**self.mantissa_bits + fraction, self.max_exponent - self.mantissa_bits)

    @property
    def min(self) -> float:
        """The lowest finite number: -max, one less for an integer, the smallest power of two for a scale format."""
        if self.kind == "int":
            return -self.max - 1
        return -self.max if self.signed else self.smallest_normal

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with a full mantissa; 1 for integers."""
        return math.ldexp(1.0, self.min_exponent) if self.kind == "float" else 1.0

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number."""
        return math.ldexp(self.smallest_normal, -self.mantissa_bits) if self.kind == "float" else 1.0

    @property
    def finite_count(self) -> int:
        """How many codes are finite numbers, both zeros counted."""
        if self.kind != "float":
            return int(2**self.bits) if self.kind == "int" else 2
        return (self._max_code + 1) * (2 if self.signed else 1)

    @property
    def code_dtype(self) -> torch.dtype:
        """The integer dtype of codes: uint8 up to 8 bits, then int32 and int64. Codes are never negative, but those of
        fp64, which are its bit patterns as int64."""
        return torch.uint8 if self.bits <= 8 else torch.int32 if self.bits <= 31 else torch.int64

    def ulp(self, x: float | Tensor) -> float | Tensor:
        """The gap between neighbouring numbers of this format in the binade of |x|; at 0 and below, of the subnormals.

        x: a float, or a tensor of any shape and float dtype; the answer is a float, or an fp64 tensor of that shape.
        The ulp of NaN and of infinities is NaN.
        """
        if not isinstance(x, Tensor):
            result = self.ulp(torch.tensor(x, dtype=torch.float64))
            assert isinstance(result, Tensor)
            return float(result.item())
        if self.kind != "float":
            return torch.where(x.isfinite(), 2.0 if self.kind == "binary" else 1.0, math.nan).double()
        wide = x.detach().double()
        exponent = self._exponent(wide) - self.mantissa_bits
        return torch.where(wide.isfinite(), _scale(torch.ones_like(wide), exponent), math.nan)

    def finite_codes(self) -> Tensor:
        """All codes of finite numbers, ascending, both zeros included: 1-D, dtype code_dtype. Formats up to tf32."""
        if self.bits > 24:
            raise FewbitsError(f"{self.name} has 2**{self.bits} codes, too many to list; formats up to 24 bits fit.")
        codes = torch.arange(2**self.bits)
        if self.kind == "float":
            codes = codes[(codes & self._magnitude_mask) <= self._max_code]
        return codes.to(self.code_dtype)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of x rounded to nearest even, finite values beyond the range saturating. Shape of x, code_dtype.

        An infinity is kept where the format has one and saturates elsewhere. A NaN becomes the positive quiet NaN, or 0
        where the format has none. A scale format has no zero and no sign: both become its NaN. For another rounding or
        overflow, `cast` first: encoding what is on the grid is exact.
        """
        wide = x.detach().double()
        if self.kind == "binary":
            return (wide < 0).to(self.code_dtype)
        if self.kind == "int":
            clamped = wide.nan_to_num(nan=0.0).round().clamp(self.min, self.max).long()
            return (clamped & ((1 << self.bits) - 1)).to(self.code_dtype)
        magnitude = wide.abs()
        exponent = self._exponent(magnitude)
        in_ulps = _scale(magnitude, self.mantissa_bits - exponent)
        significand = in_ulps.round().nan_to_num(nan=0.0, posinf=0.0).clamp(max=2.0 ** (self.mantissa_bits + 1)).long()
        # a significand that rounds up to the next binade carries into the exponent field
        first = exponent + self.bias - (1 if self.signed else 0)
        code = (first << self.mantissa_bits) + significand - (0 if self.signed else 1)
        code = torch.where(magnitude.isinf(), self._infinity_code, code.clamp(0, self._max_code))
        code = torch.where(wide.isnan(), self._nan_code, code)
        if not self.signed:
            return torch.where(wide <= 0, self._nan_code, code).to(self.code_dtype)
        negative = torch.signbit(wide) & ~wide.isnan()
        return (code | (negative.long() << (self.bits - 1))).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of codes: shape of codes, fp32 (fp64 where fp32 cannot hold the format). Exact."""
        wide = codes.long()
        if self.kind == "binary":
            return 1.0 - 2.0 * wide.float()
        if self.kind == "int":
            return (wide - ((wide >> (self.bits - 1)) << self.bits)).to(torch.float32)
        magnitude = wide & self._magnitude_mask
        field = magnitude >> self.mantissa_bits
        fraction = magnitude & (2**self.mantissa_bits - 1)
        normal = (field > 0) if self.signed else torch.ones_like(field, dtype=torch.bool)
        significand = torch.where(normal, fraction + 2**self.mantissa_bits, fraction).double()
        exponent = (field.clamp(min=1) if self.signed else field) - self.bias - self.mantissa_bits
        value = _scale(significand, exponent)
        if self.has_nan:
            value = torch.where(magnitude > self._max_code, math.nan, value)
        if self.has_infinity:
            value = torch.where(magnitude == self._infinity_code, math.inf, value)
        negative = ((wide >> (self.bits - 1)) & 1).bool() & self.signed
        value = torch.where(negative, -value, value)
        return value if self.container is torch.float64 else value.to(torch.float32)

    def _exponent(self, wide: Tensor) -> Tensor:
        """floor(log2 |wide|) as int64, held inside the exponents of this format; wide is fp64."""
        exponent = torch.frexp(wide).exponent.long() - 1
        exponent = torch.where(wide == 0, self.min_exponent, exponent)  # frexp calls the exponent of 0 zero
        return exponent.clamp(self.min_exponent, self.max_exponent)

    @property
    def _magnitude_mask(self) -> int:
        return (1 << (self.exponent_bits + self.mantissa_bits)) - 1

    @property
    def _max_code(self) -> int:
        if self.specials == "ieee":
            return self._infinity_code - 1
        return self._magnitude_mask - (self.specials == "nan_only")

    @property
    def _infinity_code(self) -> int:
        """The code of infinity; where there is none, that of the largest finite number."""
        if self.specials == "ieee":
            return ((1 << self.exponent_bits) - 1) << self.mantissa_bits
        return self._max_code

    @property
    def _nan_code(self) -> int:
        if self.specials == "ieee":
            return self._infinity_code + (1 << (self.mantissa_bits - 1))
        return self._magnitude_mask if self.has_nan else 0


def _scale(x: Tensor, exponent: Tensor) -> Tensor:
    """x * 2**exponent for fp64 x and int64 exponent in -1200..1200, exact wherever the result is representable.

    The powers are made from bits, because exp2 and ldexp need not be exact, and in two factors, because 2**1074 is
    beyond fp64. Only the second product can round.
    """
    half = exponent >> 1
    return x * ((half + 1023) << 52).view(torch.float64) * ((exponent - half + 1023) << 52).view(torch.float64)


def _registry() -> dict[str, Format]:
    formats = [
        Format("fp64", 11, 52, 1023),
        Format("fp32", 8, 23, 127),
        Format("tf32", 8, 10, 127),
        Format("bf16", 8, 7, 127),
        Format("fp16", 5, 10, 15),
        Format("fp8_e4m3", 4, 3, 7, "nan_only"),
        Format("fp8_e5m2", 5, 2, 15),
        Format("e8m0", 8, 0, 127, "nan_only", signed=False),
        Format("fp6_e2m3", 2, 3, 1, "none"),
        Format("fp6_e3m2", 3, 2, 3, "none"),
        Format("fp4_e2m1", 2, 1, 1, "none"),
        Format("int8", 0, 7, 0, "none", "int"),
        Format("int4", 0, 3, 0, "none", "int"),
        Format("binary", 0, 0, 0, "none", "binary"),
    ]
    return {fmt.name: fmt for fmt in formats}


FORMATS: dict[str, Format] = _registry()

ALIASES: dict[str, str] = {
    "float64": "fp64", "double": "fp64", "f64": "fp64", "e11m52": "fp64",
    "float32": "fp32", "float": "fp32", "single": "fp32", "f32": "fp32", "e8m23": "fp32",
    "tensorfloat32": "tf32", "e8m10": "tf32",
    "bfloat16": "bf16", "e8m7": "bf16",
    "float16": "fp16", "half": "fp16", "f16": "fp16", "e5m10": "fp16",
    "e4m3": "fp8_e4m3", "e4m3fn": "fp8_e4m3", "float8_e4m3": "fp8_e4m3", "float8_e4m3fn": "fp8_e4m3",
    "e5m2": "fp8_e5m2", "float8_e5m2": "fp8_e5m2",
    "float8_e8m0fnu": "e8m0", "e2m3": "fp6_e2m3", "e3m2": "fp6_e3m2", "e2m1": "fp4_e2m1",
    "fp4": "fp4_e2m1", "float4_e2m1fn": "fp4_e2m1",
}  # fmt: skip
