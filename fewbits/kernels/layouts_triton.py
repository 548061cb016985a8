"""The device code of kernels/layouts.py, in Triton: fp8 codes of a matrix and of its transpose, from one reading.

A tile is read as four, each every fourth row of it, so that the codes of four rows are one 32-bit word: transposed as bytes
they would go through shared memory one by one.
"""

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # kernels/layouts.py is not asked then

    def jit(function=None, **_options):
        return function or jit


from fewbits.kernels.quantize_triton import _codes, _load, _magnitude, _scale_of


@jit
def encode_both_kernel(
    a, b, c, scale, codes, codes_t, sums, maximum, R, C, quads, begin_b, begin_c, tiles_c,
    mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr, PARTS: tl.constexpr, SUMS: tl.constexpr,
    NOTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """fp8 codes [R, C] and [C, 4 quads], the R rows padded with zeros, of a matrix under one scale, a power of two; for SUMS
    the sums of the columns of every BM rows, fp32 [tiles down, C]; for NOTE maximum, fp32, is raised to the largest magnitude.
    WHOLE: tiles end where the matrix does.

    The matrix lies row by row, or is 2 or 3 PARTS side by side that do: a, from column begin_b on b, from begin_c on c (C
    where there is none). BN divides where they begin, so that a tile is within one of them.
    """
    program = tl.program_id(0)
    r0 = (program // tiles_c).to(tl.int64) * BM
    c0 = (program % tiles_c) * BN
    x = a
    first = c0
    width = C
    if PARTS > 1:
        width = begin_b
        if c0 >= begin_b:
            x = b
            first = c0 - begin_b
            width = begin_c - begin_b
    if PARTS > 2:  # noqa: SIM102  this is decided by the compiler, the other by a program
        if c0 >= begin_c:
            x = c
            first = c0 - begin_c
            width = C - begin_c
    p = _fourth(x, 0, r0, first, R, width, BM, BN, WHOLE)
    q = _fourth(x, 1, r0, first, R, width, BM, BN, WHOLE)
    r = _fourth(x, 2, r0, first, R, width, BM, BN, WHOLE)
    s = _fourth(x, 3, r0, first, R, width, BM, BN, WHOLE)
    if NOTE:
        _raise(maximum, _most(p, q, r, s))
    if SUMS:
        _store_sums((p + q) + (r + s), sums + (program // tiles_c) * C, c0, C, BN)
    word = _word(p, q, r, s, _inverse_power(tl.load(scale)), mantissa, lowest, limit, NATIVE)
    _store_rows(word, codes, r0, c0, R, C, BM, BN, WHOLE)
    _store_words(word, codes_t, r0, c0, C, quads, BM, BN, WHOLE)


@jit
def _fourth(x, first: tl.constexpr, r0, c0, R, C, BM: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr):
    """Every fourth row of a tile of a matrix [R, C], from its `first` on, widened to fp32 at once; zeros beyond the edges."""
    rows = 4 * tl.arange(0, BM // 4) + first
    columns = tl.arange(0, BN)
    place = x + (r0 * C + c0) + (rows[:, None] * C + columns[None, :])
    if WHOLE:
        return tl.load(place).to(tl.float32)
    return tl.load(place, mask=_inside(rows, columns, r0, c0, R, C), other=0.0).to(tl.float32)


@jit
def _inside(rows, columns, r0, c0, R, C):
    return (r0 + rows < R)[:, None] & (c0 + columns < C)[None, :]


@jit
def _most(p, q, r, s):
    """The largest magnitude in every place of four tiles; a NaN is above all."""
    return _larger(_larger(tl.abs(p), tl.abs(q)), _larger(tl.abs(r), tl.abs(s)))


@jit
def _raise(maximum, most):
    """Raises a number, fp32 and not negative, to the largest of a tile of magnitudes."""
    _raise_bits(maximum, tl.max(tl.max(_magnitude(most), axis=1), axis=0))


@jit
def _raise_bits(maximum, bits):
    tl.atomic_max(maximum.to(tl.pointer_type(tl.int32), bitcast=True), bits)


@jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _store_sums(x, sums, c0, C, BN: tl.constexpr):
    columns = c0 + tl.arange(0, BN)
    tl.store(sums + columns, tl.sum(x, axis=0), mask=columns < C)


@jit
def _word(
    p, q, r, s, inv_scale, mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """fp8 codes, e4m3 or e5m2, of four tiles times inv_scale, saturated and rounded once, what is not finite NaN, the first in
    the lowest byte: by the instructions of sm_89 and newer, which make two at a time, else on bits. int32."""
    p = _marked(p) * inv_scale
    q = _marked(q) * inv_scale
    r = _marked(r) * inv_scale
    s = _marked(s) * inv_scale
    if NATIVE and mantissa == 3:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
            "mov.b32 $0, {low, high}; }",
            "=r,f,f,f,f", [p, q, r, s], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    if NATIVE:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; cvt.rn.satfinite.e5m2x2.f32 low, $2, $1; cvt.rn.satfinite.e5m2x2.f32 high, $4, $3; "
            "mov.b32 $0, {low, high}; }",
            "=r,f,f,f,f", [p, q, r, s], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    low = _bits(p, mantissa, lowest, limit) | (_bits(q, mantissa, lowest, limit) << 8)
    return low | (_bits(r, mantissa, lowest, limit) << 16) | (_bits(s, mantissa, lowest, limit) << 24)


@jit
def _marked(x):
    """x, but NaN for an infinity, which saturating would hide."""
    return x * 0.0 + x


@jit
def _bits(scaled, mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr):
    return _codes(
        scaled, tl.zeros(scaled.shape, dtype=tl.uint32), mantissa, lowest, limit, False, False, False, False
    )  # fmt: skip


@jit
def _store_rows(word, codes, r0, c0, R, C, BM: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr):
    """The codes of a tile, row by row."""
    columns = tl.arange(0, BN)
    place = codes.to(tl.pointer_type(tl.uint8), bitcast=True) + (r0 * C + c0)
    for k in tl.static_range(4):
        rows = 4 * tl.arange(0, BM // 4) + k
        local = rows[:, None] * C + columns[None, :]
        code = (word >> (8 * k)).to(tl.uint8)
        if WHOLE:
            tl.store(place + local, code)
        else:
            tl.store(place + local, code, mask=_inside(rows, columns, r0, c0, R, C))


@jit
def _store_words(word, codes_t, r0, c0, C, quads, BM: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr):
    """The codes of a tile, column by column, into columns of `quads` words."""
    rows = tl.arange(0, BM // 4)
    columns = tl.arange(0, BN)
    start = r0 // 4
    place = codes_t.to(tl.pointer_type(tl.int32), bitcast=True) + (c0.to(tl.int64) * quads + start)
    local = columns[None, :] * quads + rows[:, None]
    if WHOLE:
        tl.store(place + local, word)
    else:
        tl.store(place + local, word, mask=_inside(rows, columns, start, c0, quads, C))


@jit
def turn_kernel(codes, codes_t, R, C, stride, tiles_c, BM: tl.constexpr, BN: tl.constexpr, PAIRS: tl.constexpr):
    """codes_t [C, R], rows `stride` apart, of one-byte codes [R, C] row by row.

    PAIRS, for even R and stride from an even address on: two rows at a time as 16-bit words, which the matrix instructions of
    shared memory turn; bytes would be stored there one by one.
    """
    program = tl.program_id(0)
    columns = (program % tiles_c).to(tl.int64) * BN + tl.arange(0, BN)
    if PAIRS:
        half = R // 2
        pairs = (program // tiles_c).to(tl.int64) * (BM // 2) + tl.arange(0, BM // 2)
        mask = (pairs < half)[:, None] & (columns < C)[None, :]
        first = codes + 2 * pairs[:, None] * C + columns[None, :]
        low = tl.load(first, mask=mask).to(tl.uint8, bitcast=True).to(tl.uint16)
        high = tl.load(first + C, mask=mask).to(tl.uint8, bitcast=True).to(tl.uint16)
        words = codes_t.to(tl.pointer_type(tl.uint16), bitcast=True)
        tl.store(words + columns[None, :] * (stride // 2) + pairs[:, None], low | (high << 8), mask=mask)
    else:
        rows = (program // tiles_c).to(tl.int64) * BM + tl.arange(0, BM)
        mask = (rows < R)[:, None] & (columns < C)[None, :]
        tile = tl.load(codes + rows[:, None] * C + columns[None, :], mask=mask)
        tl.store(codes_t + columns[None, :] * stride + rows[:, None], tile, mask=mask)


@jit
def amax_all_kernel(like, table, owners, amax, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr):
    """amax [matrices], int32 bits of fp32 starting from 0: raised to the largest magnitude of each matrix of `encode_all`."""
    owner = tl.load(owners + tl.program_id(0))
    x, _, R, C, r0, c0 = _place(like, table, owner, BM, BN, EVEN)
    bits = _load(x, r0, c0, R, C, C, 1, BM, BN).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(amax + owner, tl.max(tl.max(bits, axis=1), axis=0))


@jit
def encode_all_kernel(
    like, table, owners, amax, earlier, codes, codes_t, scale, stride_e, stride_s, largest, top, fraction,
    mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr, DELAYED: tl.constexpr,
):  # fmt: skip
    """Codes of all matrices of a table in both layouts, and their scales: of amax, or of `earlier` where that is known."""
    owner = tl.load(owners + tl.program_id(0))
    x, at, R, C, r0, c0 = _place(like, table, owner, BM, BN, EVEN)
    bits = tl.load(amax + owner)
    value = _scale_of(bits, "power-of-two", largest, top, fraction)
    if DELAYED:
        known = tl.load(earlier + owner * stride_e).to(tl.int32, bitcast=True)
        value = tl.where(
            (known > 0) & (bits < 0x7F800000), _scale_of(known, "power-of-two", largest, top, fraction), value
        )
    if (r0 == 0) & (c0 == 0):
        tl.store(scale + owner * stride_s, value)
    out = _fp8(
        _load(x, r0, c0, R, C, C, 1, BM, BN) * _inverse_power(value), codes, mantissa, lowest, limit, NATIVE
    )  # fmt: skip
    _store_both(out, codes + at, codes_t + at, r0, c0, R, C, BM, BN)


@jit
def _place(like, table, owner, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr):
    """Where the tile of this program lies: matrix, its place among all codes, its shape, and the first row and column.

    table: int64 [matrices, 5] of address, place, rows, columns and first program. EVEN: all of them in sixteens.
    """
    row = table + owner * 5
    x = tl.load(row).to(like.dtype)
    at = tl.load(row + 1)
    R = tl.load(row + 2)
    C = tl.load(row + 3)
    if EVEN:
        x = tl.multiple_of(x, 16)
        at = tl.multiple_of(at, 16)
        R = tl.multiple_of(R, 16)
        C = tl.multiple_of(C, 16)
    local = tl.program_id(0) - tl.load(row + 4)
    tiles_c = (C + BN - 1) // BN
    return x, at, R, C, (local // tiles_c) * BM, (local % tiles_c) * BN


@jit
def _inverse_power(scale):
    """1 / scale of powers of two from 2^-126 to 2^126, on the bits; a NaN stays one."""
    inv_scale = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.where(scale == scale, inv_scale, scale)


@jit
def _fp8(scaled, codes, mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 values as elements of `codes`, saturated and rounded once: by the instruction of sm_89 and newer, else on bits
    (the interpreter of Triton rounds fp8 otherwise)."""
    if NATIVE:
        return scaled.to(codes.dtype.element_ty)
    return _bits(scaled, mantissa, lowest, limit).to(tl.uint8).to(codes.dtype.element_ty, bitcast=True)


@jit
def _store_both(out, codes, codes_t, r0, c0, R, C, BM: tl.constexpr, BN: tl.constexpr):
    rows = r0 + tl.arange(0, BM)
    columns = c0 + tl.arange(0, BN)
    mask = (rows < R)[:, None] & (columns < C)[None, :]
    tl.store(codes + rows[:, None] * C + columns[None, :], out, mask=mask)
    tl.store(codes_t + columns[None, :] * R + rows[:, None], out, mask=mask)
