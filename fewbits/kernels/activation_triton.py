"""The device code of kernels/activation.py, in Triton: activations and their gradients, with what fp8 wants of them.

A compiler that is asked for the largest magnitude of what it writes turns an elementwise kernel into a reduction by rows, at
half the speed. Here every program reduces what it has in registers and raises one number.
"""

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # kernels/activation.py is not asked then

    def jit(function=None, **_options):
        return function or jit


from fewbits.kernels.quantize_triton import _fp8, _inverse_power, _load, _magnitude, _store_both


@jit
def activate_kernel(
    a, b, c, first, second, amax, n, GATED: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `_activation` makes of a, b and c, n elements each, rounded to their dtype; amax: int32 bits of fp32 starting from
    0, raised to the largest magnitude of what was written, one number for each result."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
    y = x
    z = x
    if GATED or BACKWARD:
        y = tl.load(b + at, mask=mask, other=0.0).to(tl.float32)
    if GATED and BACKWARD:
        z = tl.load(c + at, mask=mask, other=0.0).to(tl.float32)
    one, two = _activation(x, y, z, GATED, BACKWARD)
    one = one.to(first.dtype.element_ty)
    tl.store(first + at, one, mask=mask)
    tl.atomic_max(amax, tl.max(_magnitude(one.to(tl.float32)), axis=0))
    if GATED and BACKWARD:
        two = two.to(first.dtype.element_ty)
        tl.store(second + at, two, mask=mask)
        tl.atomic_max(amax + 1, tl.max(_magnitude(two.to(tl.float32)), axis=0))


@jit
def activate_both_kernel(
    a, b, c, scale, scale_2, codes, codes_t, sums, amax, R, C, tiles_c, next_codes, next_sums,
    mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr, GATED: tl.constexpr, BACKWARD: tl.constexpr,
    SUMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`activate_kernel` under scales known before, matrices [R, C] row by row: instead of the values their fp8 codes in both
    layouts, and for SUMS the sums of the columns of every BM rows, fp32 [tiles down, C]. The second result lies next_codes and
    next_sums elements behind the first."""
    program = tl.program_id(0)
    r0 = (program // tiles_c).to(tl.int64) * BM
    c0 = (program % tiles_c).to(tl.int64) * BN
    x = _load(a, r0, c0, R, C, C, 1, BM, BN)
    y = x
    z = x
    if GATED or BACKWARD:
        y = _load(b, r0, c0, R, C, C, 1, BM, BN)
    if GATED and BACKWARD:
        z = _load(c, r0, c0, R, C, C, 1, BM, BN)
    one, two = _activation(x, y, z, GATED, BACKWARD)
    place = (program // tiles_c) * C
    one = one.to(a.dtype.element_ty).to(tl.float32)
    _give(one, scale, codes, codes_t, sums + place, amax, r0, c0, R, C, mantissa, lowest, limit, SUMS, BM, BN, NATIVE)
    if GATED and BACKWARD:
        two = two.to(a.dtype.element_ty).to(tl.float32)
        _give(
            two, scale_2, codes + next_codes, codes_t + next_codes, sums + next_sums + place, amax + 1, r0, c0, R, C,
            mantissa, lowest, limit, SUMS, BM, BN, NATIVE,
        )  # fmt: skip


@jit
def _give(
    tile, scale, codes, codes_t, sums, amax, r0, c0, R, C, mantissa: tl.constexpr, lowest: tl.constexpr,
    limit: tl.constexpr, SUMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    tl.atomic_max(amax, tl.max(tl.max(_magnitude(tile), axis=1), axis=0))
    if SUMS:
        columns = c0 + tl.arange(0, BN)
        tl.store(sums + columns, tl.sum(tile, axis=0), mask=columns < C)
    out = _fp8(tile * _inverse_power(tl.load(scale)), codes, mantissa, lowest, limit, NATIVE)
    _store_both(out, codes, codes_t, r0, c0, R, C, BM, BN)


@jit
def _activation(a, b, c, GATED: tl.constexpr, BACKWARD: tl.constexpr):
    """The one result of gelu, gelu_backward or swiglu, or the two of swiglu_backward (numerics/activation.py), in fp32; zeros
    give zeros."""
    if GATED:
        if BACKWARD:
            s = _sigmoid(b)
            one = a * c * (s * (1.0 + b * (1.0 - s)))
            two = a * (b * s)
        else:
            one = a * _sigmoid(a) * b
            two = one
    elif BACKWARD:
        _, slope = _gelu_parts(b)
        one = a * slope
        two = one
    else:
        s, _ = _gelu_parts(a)
        one = a * s
        two = one
    return one, two


@jit
def _gelu_parts(x):
    """gelu(x) / x, and the derivative of gelu."""
    near = tl.where(x > 30.0, 30.0, tl.where(x < -30.0, -30.0, x))  # a NaN stays one
    z = near * (1.5957691216057308 + 0.07135481627260025 * near * near)
    s = _sigmoid(z)
    return s, s + (3.0 * z - 3.1915382432114616 * near) * s * (1.0 - s)


@jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
