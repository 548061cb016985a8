"""The device code of kernels/quantize.py, in Triton: one tile [BM, BN] of a matrix a program.

Everything is 32-bit integer arithmetic on the bits of fp32, which no compiler reorders, so that the interpreter of Triton
(TRITON_INTERPRET=1) and a GPU give the same codes as the definition. Exact scales divide in fp64, rounded to nearest.

A tile is cut into parts of SR x SC elements that never straddle blocks; where a part is a whole block, its maximum never
leaves the program. Offsets are 64 bits: a matrix may have more than 2^31 elements.
"""

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # kernels/quantize.py says so before it comes here

    def jit(function=None, **_options):
        return function or jit


# a kernel for all formats and grids: only what lays out memory makes it compile again
_ANY = ["block_r", "block_c", "grid_c", "tiles_c", "largest", "top", "fraction", "mantissa", "lowest", "limit"]


@jit(do_not_specialize=_ANY[:4])
def amax_kernel(
    x, amax, R, C, stride_r, stride_c, block_r, block_c, grid_c, tiles_c,
    BM: tl.constexpr, BN: tl.constexpr, SR: tl.constexpr, SC: tl.constexpr,
):  # fmt: skip
    """amax [grid rows, grid columns], int32 bits of fp32 starting from 0: raised to the largest magnitude of each block."""
    program = tl.program_id(0)
    r0 = (program // tiles_c).to(tl.int64) * BM
    c0 = (program % tiles_c).to(tl.int64) * BN
    bits = _part_amax(_load(x, r0, c0, R, C, stride_r, stride_c, BM, BN), BM, BN, SR, SC)
    rows = r0 + tl.arange(0, BM // SR) * SR
    columns = c0 + tl.arange(0, BN // SC) * SC
    place = (rows // block_r)[:, None] * grid_c + (columns // block_c)[None, :]
    tl.atomic_max(amax + place, bits, mask=(rows < R)[:, None] & (columns < C)[None, :])


@jit(do_not_specialize=_ANY)
def encode_kernel(
    x, codes, codes_t, amax, scale, key, R, C, stride_r, stride_c, block_r, block_c, grid_c, tiles_c,
    largest, top, fraction, mantissa, lowest, limit,
    BM: tl.constexpr, BN: tl.constexpr, SR: tl.constexpr, SC: tl.constexpr,
    FROM: tl.constexpr, KIND: tl.constexpr, INTEGER: tl.constexpr, CARRIED: tl.constexpr, STOCHASTIC: tl.constexpr,
    INFINITE: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Codes of x / scale as bytes, row by row and, for BOTH, column by column too.

    largest: the format's, top its exponent, fraction its fraction in fp32 and limit its bits. mantissa: its mantissa bits,
    lowest: biased fp32 exponent of its smallest normal number (an integer is a float that is always subnormal).
    FROM: where the scale comes from: "tile" (a part is a block), "amax" (bits of amax_kernel) or "scale" (given, fp32).
    The others write it. KIND: "power-of-two" or "exact". CARRIED: its codes are e4m3 codes of the same values. INFINITE:
    an infinity under a given scale stays one.
    """
    program = tl.program_id(0)
    r0 = (program // tiles_c).to(tl.int64) * BM
    c0 = (program % tiles_c).to(tl.int64) * BN
    tile = _load(x, r0, c0, R, C, stride_r, stride_c, BM, BN)
    part_r = r0 + tl.arange(0, BM // SR) * SR
    part_c = c0 + tl.arange(0, BN // SC) * SC
    inside = (part_r < R)[:, None] & (part_c < C)[None, :]
    place = (part_r // block_r)[:, None] * grid_c + (part_c // block_c)[None, :]
    if FROM == "scale":
        value = tl.load(scale + place, mask=inside, other=1.0)
    else:
        if FROM == "tile":
            bits = _part_amax(tile, BM, BN, SR, SC)
        else:
            bits = tl.load(amax + place, mask=inside, other=0)
        value = _scale_of(bits, KIND, largest, top, fraction)
        first = (part_r % block_r == 0)[:, None] & (part_c % block_c == 0)[None, :]
        tl.store(scale + place, value, mask=inside & first)
    inv_scale = (1.0 / value.to(tl.float64)).to(tl.float32)
    spread = tl.broadcast_to(inv_scale[:, None, :, None], (BM // SR, SR, BN // SC, SC))
    scaled = tile * tl.reshape(spread, (BM, BN))
    rows = r0 + tl.arange(0, BM)
    columns = c0 + tl.arange(0, BN)
    draws = tl.zeros((BM, BN), dtype=tl.uint32)
    if STOCHASTIC:
        draws = _random_bits(tl.load(key), rows[:, None] * C + columns[None, :])
    out = _codes(scaled, draws, mantissa, lowest, limit, INTEGER, CARRIED, STOCHASTIC, INFINITE).to(tl.uint8)
    mask = (rows < R)[:, None] & (columns < C)[None, :]
    tl.store(codes + rows[:, None] * C + columns[None, :], out, mask=mask)
    if BOTH:
        tl.store(codes_t + columns[None, :] * R + rows[:, None], out, mask=mask)


@jit
def _load(x, r0, c0, R, C, stride_r, stride_c, BM: tl.constexpr, BN: tl.constexpr):
    """A tile, widened to fp32 at once; zeros beyond the edges."""
    rows = r0 + tl.arange(0, BM)
    columns = c0 + tl.arange(0, BN)
    mask = (rows < R)[:, None] & (columns < C)[None, :]
    return tl.load(x + rows[:, None] * stride_r + columns[None, :] * stride_c, mask=mask, other=0.0).to(tl.float32)


@jit
def _part_amax(tile, BM: tl.constexpr, BN: tl.constexpr, SR: tl.constexpr, SC: tl.constexpr):
    """Bits of the largest magnitude of every part."""
    parts = tl.reshape(_magnitude(tile), (BM // SR, SR, BN // SC, SC))
    return tl.max(tl.max(parts, axis=3), axis=1)


@jit
def _magnitude(x):
    """Bits of magnitudes in fp32: they order as integers, infinity and NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def _scale_of(bits, KIND: tl.constexpr, largest, top, fraction):
    """Scales of numerics/scaling.py from the bits of amax; NaN where it is not finite."""
    if KIND == "power-of-two":
        k = (bits >> 23) - 127 - top + ((bits & 0x7FFFFF) > fraction).to(tl.int32)
        k = tl.minimum(tl.maximum(k, -126), 126)
        value = ((k + 127) << 23).to(tl.float32, bitcast=True)
    else:
        quotient = bits.to(tl.float32, bitcast=True).to(tl.float64) / largest
        value = tl.where(bits == 0, 1.0, tl.maximum(quotient.to(tl.float32), 2.0**-126))
    nan = tl.full(bits.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
    return tl.where(bits < 0x7F800000, value, nan)


@jit
def _codes(
    scaled, draws, mantissa, lowest, limit,
    INTEGER: tl.constexpr, CARRIED: tl.constexpr, STOCHASTIC: tl.constexpr, INFINITE: tl.constexpr,
):  # fmt: skip
    """Codes, int32 in the lowest 8 bits, of fp32 values: saturated, rounded once.

    In units of the last place that the format has there, a magnitude is significand / 2^shift; the integer that it rounds
    to, added to the exponent field less one, is the code, and a carry moves into the exponent as it should.
    """
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    is_nan = magnitude > 0x7F800000
    is_infinite = magnitude == 0x7F800000
    magnitude = tl.minimum(magnitude, limit)
    significand = (magnitude & 0x7FFFFF) | 0x800000
    binade = tl.maximum(magnitude >> 23, lowest)
    shift = 23 - mantissa + binade - (magnitude >> 23)
    if STOCHASTIC:
        whole = _stochastic(significand, shift, draws)
    else:
        shift = tl.minimum(shift, 30)  # beyond 25 everything is less than half a unit
        whole = (significand + ((significand >> shift) & 1) + (1 << (shift - 1)) - 1) >> shift
    negative = bits < 0
    if INTEGER:
        return tl.where(is_nan, 0, tl.where(negative, -whole, whole)) & 0xFF
    if CARRIED:
        value = whole.to(tl.float32) * ((binade - mantissa) << 23).to(tl.float32, bitcast=True)  # exact
        magnitude = value.to(tl.int32, bitcast=True)
        # zero is the only value here that e4m3 has no normal number for
        code = tl.where(magnitude == 0, 0, ((magnitude >> 23) - 120 << 3) | ((magnitude >> 20) & 7))
    else:
        code = ((binade - lowest) << mantissa) + whole
    if INFINITE:
        code = tl.where(is_infinite, code + 1, code)
    return tl.where(is_nan, 0x7F, code | tl.where(negative, 0x80, 0))


@jit
def _stochastic(significand, shift, draws):
    """significand / 2^shift, plus a random fraction of 32 bits, cut."""
    fraction = (significand << tl.maximum(32 - shift, 0)).to(tl.uint32)  # what is whole leaves at the top
    fraction = tl.where(shift > 32, (significand >> tl.minimum(tl.maximum(shift - 32, 0), 31)).to(tl.uint32), fraction)
    carry = fraction > (draws ^ 0xFFFFFFFF)
    return (significand >> tl.minimum(shift, 31)) + carry.to(tl.int32)


@jit
def _random_bits(key, index):
    """`random_bits` of numerics/random.py: uint32 of a 64-bit key and 64-bit indices."""
    low = key & 0xFFFFFFFF  # the halves that `spread_key` makes of a key, in 64 bits like there
    high = (key >> 32) & 0xFFFFFFFF
    high = high ^ _middle(low ^ 0x9E3779B9)
    low = low ^ _middle(high ^ 0x3C6EF372)
    high = high ^ _middle(low ^ 0xDAA66D2B)
    first = (index & 0xFFFFFFFF).to(tl.uint32)
    return _scramble(first, low.to(tl.uint32), high.to(tl.uint32) + (index >> 32).to(tl.uint32) * 0x9E3779B9)


@jit
def _middle(half):
    half = ((half * 0x7FEB352D) >> 16) & 0xFFFFFFFF
    return ((half * 0x31848BAB) >> 16) & 0xFFFFFFFF


@jit
def _scramble(h, a, b):
    h = h ^ a
    h = (h ^ (h >> 17)) * 0xED5AD4BB
    h = h + b
    h = (h ^ (h >> 11)) * 0xAC4C1B51
    h = (h ^ (h >> 15)) * 0x31848BAB
    return h ^ (h >> 14)


@jit
def encode_both_kernel(
    a, b, c, scale, codes, codes_t, sums, amax, R, C, begin_b, begin_c, tiles_c,
    mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr, PARTS: tl.constexpr, SUMS: tl.constexpr,
    MAXIMUM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """fp8 codes [R, C] and [C, R] of a matrix under one scale, a power of two, for SUMS the sums of the columns of every BM
    rows, fp32 [tiles down, C], and for MAXIMUM the largest magnitude as `amax_kernel` has it.

    The matrix lies row by row, or is 2 or 3 PARTS side by side that do: a, from column begin_b on b, from begin_c on c (C
    where there is none). BN divides where they begin, so that a tile is within one of them.
    """
    program = tl.program_id(0)
    r0 = (program // tiles_c).to(tl.int64) * BM
    c0 = (program % tiles_c).to(tl.int64) * BN
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
    tile = _load(x, r0, first, R, width, width, 1, BM, BN)
    if MAXIMUM:
        tl.atomic_max(amax, tl.max(tl.max(_magnitude(tile), axis=1), axis=0))
    out = _fp8(tile * _inverse_power(tl.load(scale)), codes, mantissa, lowest, limit, NATIVE)
    _store_both(out, codes, codes_t, r0, c0, R, C, BM, BN)
    if SUMS:
        columns = c0 + tl.arange(0, BN)
        tl.store(sums + (program // tiles_c) * C + columns, tl.sum(tile, axis=0), mask=columns < C)


@jit
def turn_kernel(codes, codes_t, R, C, half, tiles_c, BM: tl.constexpr, BN: tl.constexpr, PAIRS: tl.constexpr):
    """codes_t [C, R] of one-byte codes [R, C], each row by row; half: R / 2.

    PAIRS, for even R: two rows at a time as 16-bit words, which the matrix instructions of shared memory turn; bytes would be
    stored there one by one.
    """
    program = tl.program_id(0)
    columns = (program % tiles_c).to(tl.int64) * BN + tl.arange(0, BN)
    if PAIRS:
        pairs = (program // tiles_c).to(tl.int64) * (BM // 2) + tl.arange(0, BM // 2)
        mask = (pairs < half)[:, None] & (columns < C)[None, :]
        first = codes + 2 * pairs[:, None] * C + columns[None, :]
        low = tl.load(first, mask=mask).to(tl.uint8, bitcast=True).to(tl.uint16)
        high = tl.load(first + C, mask=mask).to(tl.uint8, bitcast=True).to(tl.uint16)
        words = tl.multiple_of(codes_t.to(tl.pointer_type(tl.uint16), bitcast=True), 16)  # a fresh tensor is aligned
        tl.store(words + columns[None, :] * half + pairs[:, None], low | (high << 8), mask=mask)
    else:
        rows = (program // tiles_c).to(tl.int64) * BM + tl.arange(0, BM)
        mask = (rows < R)[:, None] & (columns < C)[None, :]
        tile = tl.load(codes + rows[:, None] * C + columns[None, :], mask=mask)
        tl.store(codes_t + columns[None, :] * R + rows[:, None], tile, mask=mask)


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
    draws = tl.zeros(scaled.shape, dtype=tl.uint32)
    out = _codes(scaled, draws, mantissa, lowest, limit, False, False, False, False)
    return out.to(tl.uint8).to(codes.dtype.element_ty, bitcast=True)


@jit
def _store_both(out, codes, codes_t, r0, c0, R, C, BM: tl.constexpr, BN: tl.constexpr):
    rows = r0 + tl.arange(0, BM)
    columns = c0 + tl.arange(0, BN)
    mask = (rows < R)[:, None] & (columns < C)[None, :]
    tl.store(codes + rows[:, None] * C + columns[None, :], out, mask=mask)
    tl.store(codes_t + columns[None, :] * R + rows[:, None], out, mask=mask)
