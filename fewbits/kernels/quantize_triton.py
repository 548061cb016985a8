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
