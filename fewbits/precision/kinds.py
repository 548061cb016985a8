"""The kinds of master weights and moments: which there are, and what a weight of some format keeps."""

from __future__ import annotations

from fewbits.errors import FewbitsError, nearest
from fewbits.formats import Format

MASTERS = ("auto", "fp32", "split", "none")
MOMENTS = ("fp32",)
_LATER = {"master": ("split8", "kahan", "stochastic"), "moments": ("bf16", "int8", "fp8", "int4")}
_AUTO = {"bf16": "split", "fp16": "fp32"}  # fp16 has too few exponent bits for a remainder; wider weights are exact


def check_master(kind: str) -> str:
    """`kind` itself, or FewbitsError."""
    return _check("master", kind, MASTERS)


def check_moments(kind: str) -> str:
    """`kind` itself, or FewbitsError."""
    return _check("moments", kind, MOMENTS)


def master_of(kind: str, format: Format) -> str:
    """What a weight stored in `format` keeps where `kind` is asked for: "fp32", "split" or "none".

    Formats of 32 bits and more are exact and keep nothing, whatever is asked for. Raises FewbitsError for a split fp16.
    """
    if kind == "split" and format.name == "fp16":
        raise FewbitsError(
            "master='split' is for bf16 weights: fp16 has 5 exponent bits, too few to carry an fp32 master; "
            "use master=fp32 or auto."
        )
    if format.name not in _AUTO:
        return "none"
    return _AUTO[format.name] if kind == "auto" else kind


def _check(what: str, kind: str, kinds: tuple[str, ...]) -> str:
    if kind in _LATER[what]:
        raise FewbitsError(f"{what}={kind!r} is not in this version; use {', '.join(kinds)}.")
    if kind not in kinds:
        raise FewbitsError(f"{what}={kind!r} is unknown; use {', '.join(kinds)}.{nearest(str(kind), kinds)}")
    return kind
