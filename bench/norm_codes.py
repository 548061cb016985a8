"""Residual sum, norm and the fp8 codes of its result in both layouts under a known scale: one kernel, two, and what compiled
models do, which is one kernel of the compiler's and one that turns codes.

    OUT=/tmp python bench/norm_codes.py                     # a GPU; a minute
    python bench/norm_codes.py --smoke                      # tiny matrices, the interpreter; checks, writes nothing

"whole rows": a program has some rows in registers, writes their sum, and the codes of what it normalizes. "two passes": it
reads the sum again for its codes, tile by tile, from the cache. "two kernels": `add_norm_codes` of kernels/norm.py, where the
second has the tiles of `encode_both`.
Results are checked against definitions (in fp16 without a GPU: the interpreter cuts bf16, not rounds); TB/s counts every tensor
once: two read and one written in 16 bits, codes twice.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import Any

import torch
from blocks import milliseconds, save
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl  # noqa: E402
from triton import jit  # noqa: E402

from fewbits.formats import Format  # noqa: E402
from fewbits.kernels import norm as kernel  # noqa: E402
from fewbits.kernels.layouts import Known, _constants, turn_into  # noqa: E402
from fewbits.kernels.layouts_triton import _inverse_power, _most, _raise, _store_rows, _store_words, _word  # noqa: E402
from fewbits.kernels.norm_triton import _normal  # noqa: E402
from fewbits.numerics.norm import statistics  # noqa: E402
from fewbits.numerics.quantize import encode  # noqa: E402
from fewbits.numerics.scaling import Granularity  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
E4M3 = Format.parse("fp8_e4m3")
SHAPES = {"gpt2-124m": (32768, 768, True), "llama-1b": (16384, 2048, False)}
WHOLE_ROWS = ((16, 4), (16, 8), (32, 8), (32, 16), (64, 16), (64, 32))  # rows x warps
TWO_PASSES = (
    (32, 128, 4),
    (32, 128, 8),
    (64, 64, 4),
    (64, 128, 8),
    (32, 256, 8),
    (128, 64, 8),
)  # rows x columns x warps
TWO_KERNELS = ((128, 64, 4), (64, 64, 4), (64, 128, 4))


@jit
def _sum(x, branch, total, place, mask):
    """x + branch, rounded to their dtype and written, in fp32; zeros beyond the mask."""
    both = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) + tl.load(branch + place, mask=mask, other=0.0)
    both = both.to(total.dtype.element_ty)
    tl.store(total + place, both, mask=mask)
    return both.to(tl.float32)


@jit
def _whole_rows(
    x, branch, total, w, b, means, rstds, first: tl.constexpr, r0, eps, D: tl.constexpr, CENTERED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every fourth row of the norm, its sum and statistics written."""
    rows = r0 + 4 * tl.arange(0, ROWS // 4) + first
    columns = tl.arange(0, BLOCK)
    inside = (columns < D)[None, :]
    both = _sum(x, branch, total, rows[:, None] * D + columns[None, :], inside)
    mean, rstd = _moments(both, inside, D, eps, CENTERED)
    tl.store(rstds + rows, rstd)
    if CENTERED:
        tl.store(means + rows, mean)
    return _normal_row(both, mean, rstd, w, b, total, CENTERED)


@jit
def _moments(x, inside, D: tl.constexpr, eps, CENTERED: tl.constexpr):
    """Mean and reciprocal root of rows that lie in registers as a whole."""
    mean = tl.sum(x, axis=1) / D
    if CENTERED:
        x = tl.where(inside, x - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / D + eps)


@jit
def _normal_row(x, mean, rstd, weight, bias, like, CENTERED: tl.constexpr):
    """The norm of rows, as the dtype of `like` rounds it, in fp32."""
    if CENTERED:
        y = (x - mean[:, None]) * rstd[:, None] * weight + bias
    else:
        y = x * rstd[:, None] * weight
    return y.to(like.dtype.element_ty).to(tl.float32)


@jit
def whole_rows_kernel(
    x, branch, weight, bias, scale, total, means, rstds, codes, codes_t, amax, R, eps, D: tl.constexpr,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, mantissa: tl.constexpr, lowest: tl.constexpr,
    limit: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    r0 = tl.program_id(0).to(tl.int64) * ROWS
    columns = tl.arange(0, BLOCK)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    c0 = tl.program_id(0) * 0
    p = _whole_rows(x, branch, total, w, b, means, rstds, 0, r0, eps, D, CENTERED, ROWS, BLOCK)
    q = _whole_rows(x, branch, total, w, b, means, rstds, 1, r0, eps, D, CENTERED, ROWS, BLOCK)
    r = _whole_rows(x, branch, total, w, b, means, rstds, 2, r0, eps, D, CENTERED, ROWS, BLOCK)
    s = _whole_rows(x, branch, total, w, b, means, rstds, 3, r0, eps, D, CENTERED, ROWS, BLOCK)
    _raise(amax, _most(p, q, r, s))
    word = _word(p, q, r, s, _inverse_power(tl.load(scale)), mantissa, lowest, limit, NATIVE)
    _store_rows(word, codes, r0, c0, R, D, ROWS, BLOCK, BLOCK == D)
    _store_words(word, codes_t, r0, c0, D, R // 4, ROWS, BLOCK, BLOCK == D)


@jit
def two_passes_kernel(
    x, branch, weight, bias, scale, total, means, rstds, codes, codes_t, amax, R, eps, D: tl.constexpr,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, mantissa: tl.constexpr, lowest: tl.constexpr,
    limit: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Statistics from sums of squares about the first tile's mean, which keeps what is subtracted small."""
    r0 = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    first = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for c0 in range(0, D, BLOCK):
        place = r0 * D + rows[:, None] * D + (c0 + columns)[None, :]
        mask = (c0 + columns < D)[None, :]
        both = _sum(x, branch, total, place, mask)
        if CENTERED:
            if c0 == 0:
                first = tl.sum(both, axis=1) / BLOCK
            both = tl.where(mask, both - first[:, None], 0.0)
        sums += tl.sum(both, axis=1)
        squares += tl.sum(both * both, axis=1)
    off = sums / D
    variance = squares / D
    if CENTERED:
        variance -= off * off
        tl.store(means + r0 + rows, first + off)
    tl.store(rstds + r0 + rows, 1.0 / tl.sqrt_rn(variance + eps))
    tl.debug_barrier()  # other warps read what this one has written
    inv_scale = _inverse_power(tl.load(scale))
    for c0 in range(0, D, BLOCK):
        p = _normal(total, weight, bias, means, rstds, 0, r0, c0, R, D, CENTERED, CENTERED, ROWS, BLOCK, D % BLOCK == 0)
        q = _normal(total, weight, bias, means, rstds, 1, r0, c0, R, D, CENTERED, CENTERED, ROWS, BLOCK, D % BLOCK == 0)
        r = _normal(total, weight, bias, means, rstds, 2, r0, c0, R, D, CENTERED, CENTERED, ROWS, BLOCK, D % BLOCK == 0)
        s = _normal(total, weight, bias, means, rstds, 3, r0, c0, R, D, CENTERED, CENTERED, ROWS, BLOCK, D % BLOCK == 0)
        _raise(amax, _most(p, q, r, s))
        word = _word(p, q, r, s, inv_scale, mantissa, lowest, limit, NATIVE)
        _store_rows(word, codes, r0, c0, R, D, ROWS, BLOCK, D % BLOCK == 0)
        _store_words(word, codes_t, r0, tl.cast(c0, tl.int32), D, R // 4, ROWS, BLOCK, D % BLOCK == 0)


class Work:
    """One norm: what enters, and what every way of doing it writes."""

    def __init__(self, R: int, D: int, centered: bool) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = partial(torch.randn, device=DEVICE, generator=generator)
        self.R, self.D, self.centered, self.eps = R, D, centered, 1e-5
        dtype = torch.bfloat16 if CUDA else torch.float16
        self.x, self.branch = (draw(R, D).add_(0.5).to(dtype) for _ in range(2))
        self.weight, self.bias = draw(D).add_(1).to(dtype), (draw(D) * centered).to(dtype)
        self.scale = torch.full((1, 1), 2.0**-5, device=DEVICE)
        self.total, self.stats = torch.empty_like(self.x), torch.zeros(2, R, device=DEVICE)
        self.codes = torch.empty(R, D, dtype=torch.float8_e4m3fn, device=DEVICE)
        self.codes_t = torch.empty(D, R, dtype=torch.float8_e4m3fn, device=DEVICE)
        self.amax = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.format = dict(zip(("mantissa", "lowest", "limit"), _constants(E4M3), strict=True))
        self.moved = R * D * (3 * 2 + 2)

    def defined(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum, codes, transposed codes and the largest magnitude as a compiler makes them."""
        total = self.x + self.branch
        mean, rstd = statistics(total, self.eps, self.centered)
        wide = total.float() if mean is None else total.float() - mean
        y = (wide * rstd * self.weight.float() + self.bias.float()).to(total.dtype)
        codes = encode(y, self.scale, E4M3, Granularity(), scales="power-of-two")
        codes_t = torch.empty_like(self.codes_t) if CUDA else codes.t().contiguous()
        if CUDA:
            torch.compiler.disable(turn_into)(codes_t, codes)
        return total, codes, codes_t, y.abs().amax()

    def one_kernel(self, design: Any, rows: int, block: int, warps: int) -> None:
        """`whole_rows_kernel` or `two_passes_kernel`."""
        design[(self.R // rows,)](
            self.x, self.branch, self.weight, self.bias, self.scale, self.total, self.stats[0], self.stats[1], self.codes,
            self.codes_t, self.amax, self.R, self.eps, D=self.D, CENTERED=self.centered, ROWS=rows, BLOCK=block,
            **self.format, NATIVE=CUDA, num_warps=warps,
        )  # fmt: skip

    def two_kernels(self, rows: int, columns: int, warps: int) -> None:
        """What `add_norm_codes` does, with a tile."""
        kernel.BOTH_TILE = (rows, columns, warps)
        bias = self.bias if self.centered else None
        known = Known(self.scale, E4M3, self.amax.view(torch.float32))
        made = kernel.add_norm_codes(self.x, self.branch, self.weight, bias, self.eps, self.centered, known)
        self.total, self.codes, self.codes_t = made[:3]

    def wrong(self, call: Any) -> str:
        """What a way of doing it gets wrong, or ""."""
        for place in (self.total, self.codes.view(torch.uint8), self.codes_t.view(torch.uint8), self.amax):
            place.zero_()
        call()
        total, codes, _, amax = self.defined()
        if not torch.equal(self.codes_t.view(torch.uint8), self.codes.view(torch.uint8).t()):
            return "the layouts differ"
        off = float((self.codes.float() != codes.float()).float().mean())
        close = torch.allclose(self.amax.view(torch.float32), amax.float(), rtol=2.0**-7)
        same = torch.equal(self.total, total)
        # sums in another order may round to a neighbour
        return "" if same and close and off < 2e-3 else f"sum {same}, maximum {close}, codes {off:.2%} off"

    def ways(self) -> dict[str, Any]:
        """Name -> a call."""
        whole = 1 << (self.D - 1).bit_length()
        ways: dict[str, Any] = {}
        for rows, warps in WHOLE_ROWS:
            name = f"whole rows, {rows} x {warps} warps"
            ways[name] = partial(self.one_kernel, whole_rows_kernel, rows, whole, warps)
        for rows, columns, warps in TWO_PASSES:
            name = f"two passes, {rows} x {columns} x {warps} warps"
            ways[name] = partial(self.one_kernel, two_passes_kernel, rows, columns, warps)
        for rows, columns, warps in TWO_KERNELS:
            ways[f"two kernels, {rows} x {columns} x {warps} warps"] = partial(self.two_kernels, rows, columns, warps)
        return ways


def main() -> None:
    """Checks and times every way on every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    shapes = {"small": (128, 96, True), "smaller": (128, 64, False)} if options.smoke else SHAPES
    cold = torch.empty(0 if options.smoke else 64 << 20, dtype=torch.int32, device=DEVICE)  # more than the cache holds
    rows: dict[str, Any] = {}
    for name, shape in shapes.items():
        work = Work(*shape)
        ways = {"compiled": torch.compile(work.defined)} if CUDA else {}
        for way, call in (ways | work.ways()).items():
            try:
                row: dict[str, Any] = {"wrong": "" if way == "compiled" else work.wrong(call)}
                if not options.smoke:
                    row["ms"] = round(milliseconds(call, cold.zero_), 4)
                    row["tb_per_s"] = round(work.moved / row["ms"] / 1e9, 3)
            except Exception as error:  # one that does not fit into the chip
                row = {"error": str(error).splitlines()[0][:120]}
            rows[f"{name}, {way}"] = row
            print(f"{name:10s} {way:40s} {row}", flush=True)
    if options.smoke and any(row.get("error") or row["wrong"] for row in rows.values()):
        raise SystemExit("some ways are wrong")
    if not options.smoke:
        save(
            "norm_codes_h200" if CUDA else "norm_codes",
            {"rows": rows, "shapes": {k: list(v) for k, v in shapes.items()}},
        )


if __name__ == "__main__":
    main()
