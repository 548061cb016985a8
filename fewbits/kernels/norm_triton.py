"""The device code of kernels/norm.py, in Triton."""

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # kernels/norm.py is not asked then

    def jit(function=None, **_options):
        return function or jit


from fewbits.kernels.layouts_triton import (
    _fourth,
    _inverse_power,
    _most,
    _raise,
    _store_rows,
    _store_words,
    _word,
)


@jit
def add_statistics_kernel(
    x, branch, total, mean, rstd, N, eps, D: tl.constexpr, CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total [N, D] = x + branch, rounded, and fp32 [N] each `statistics` of it (numerics/norm.py)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    there = rows < N
    inside = (columns < D)[None, :]
    mask = there[:, None] & inside
    place = rows.to(tl.int64)[:, None] * D + columns[None, :]
    both = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) + tl.load(branch + place, mask=mask, other=0.0)
    both = both.to(total.dtype.element_ty)
    tl.store(total + place, both, mask=mask)
    both = both.to(tl.float32)
    if CENTERED:
        center = tl.sum(both, axis=1) / D
        tl.store(mean + rows, center, mask=there)
        both = tl.where(inside, both - center[:, None], 0.0)
    variance = tl.sum(both * both, axis=1) / D
    # eps is fp64 where a compiler hands it over, and so would be the sum, of which Triton takes no root
    tl.store(rstd + rows, 1.0 / tl.sqrt_rn(variance + tl.cast(eps, tl.float32)), mask=there)


@jit
def encode_norm_kernel(
    total, weight, bias, mean, rstd, scale, codes, codes_t, maximum, N, quads, D: tl.constexpr,
    CENTERED: tl.constexpr, BIASED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
    mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """What `encode_both_kernel` makes of the norm of total [N, D], which is not written."""
    across: tl.constexpr = (D + BN - 1) // BN
    program = tl.program_id(0)
    r0 = (program // across).to(tl.int64) * BM
    c0 = (program % across) * BN
    p = _normal(total, weight, bias, mean, rstd, 0, r0, c0, N, D, CENTERED, BIASED, BM, BN, WHOLE)
    q = _normal(total, weight, bias, mean, rstd, 1, r0, c0, N, D, CENTERED, BIASED, BM, BN, WHOLE)
    r = _normal(total, weight, bias, mean, rstd, 2, r0, c0, N, D, CENTERED, BIASED, BM, BN, WHOLE)
    s = _normal(total, weight, bias, mean, rstd, 3, r0, c0, N, D, CENTERED, BIASED, BM, BN, WHOLE)
    _raise(maximum, _most(p, q, r, s))
    word = _word(p, q, r, s, _inverse_power(tl.load(scale)), mantissa, lowest, limit, NATIVE)
    _store_rows(word, codes, r0, c0, N, D, BM, BN, WHOLE)
    _store_words(word, codes_t, r0, c0, D, quads, BM, BN, WHOLE)


@jit
def _normal(
    total, weight, bias, mean, rstd, first: tl.constexpr, r0, c0, N, D: tl.constexpr, CENTERED: tl.constexpr,
    BIASED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Every fourth row of a tile of the norm, rounded to the dtype of total, in fp32; zeros beyond the edges."""
    y = _fourth(total, first, r0, c0, N, D, BM, BN, WHOLE)
    rows = r0 + 4 * tl.arange(0, BM // 4) + first
    columns = c0 + tl.arange(0, BN)
    there = rows < N
    inside = columns < D
    if CENTERED:
        y = y - tl.load(mean + rows, mask=there, other=0.0)[:, None]
    y = y * tl.load(rstd + rows, mask=there, other=0.0)[:, None]
    y = y * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if BIASED:
        y = y + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if not WHOLE:
            y = tl.where(there[:, None], y, 0.0)
    return y.to(total.dtype.element_ty).to(tl.float32)


@jit
def norm_backward_kernel(
    grad, other, along, x, weight, mean, rstd, out, parts, N, D: tl.constexpr, TURNS: tl.constexpr, TWO: tl.constexpr,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [N, D] as `norm_backward` of numerics/norm.py has it, ROWS rows at a time, every so many as there are programs; parts
    fp32 [1 or 2, programs, D]: what the rows of a program add to the gradients of weight and, if CENTERED, bias. TWO: the
    gradient is the sum of grad and other. STAGES: turns whose loads are under way at once."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    by_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    by_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for turn in tl.range(0, TURNS, num_stages=STAGES):
        rows = (program + turn * programs) * ROWS + tl.arange(0, ROWS)
        there = rows < N
        mask = there[:, None] & inside[None, :]
        place = rows.to(tl.int64)[:, None] * D + columns[None, :]
        g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        if TWO:
            g += tl.load(other + place, mask=mask, other=0.0).to(tl.float32)
        normal = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        beside = tl.load(along + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + rows, mask=there, other=0.0)[:, None]
        if CENTERED:
            normal = normal - tl.load(mean + rows, mask=there, other=0.0)[:, None]
            by_bias += g
        normal = normal * scale
        by_weight += g * normal
        g = g * factor
        back = g - normal * (tl.sum(g * normal, axis=1) / D)[:, None]
        if CENTERED:
            back -= (tl.sum(g, axis=1) / D)[:, None]
        tl.store(out + place, (back * scale + beside).to(out.dtype.element_ty), mask=mask)
    parts += program * D + columns
    tl.store(parts, tl.sum(by_weight, axis=0), mask=inside)
    if CENTERED:
        tl.store(parts + programs * D, tl.sum(by_bias, axis=0), mask=inside)


@jit
def totals_kernel(parts, out, P: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out [matrices, D]: the sums of the columns of parts fp32 [matrices, P, D], rounded once."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    matrix = tl.program_id(1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, P, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < P)[:, None] & (columns < D)[None, :]
        total += tl.load(parts + (matrix * P + rows)[:, None] * D + columns[None, :], mask=mask, other=0.0)
    tl.store(out + matrix * D + columns, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=columns < D)
