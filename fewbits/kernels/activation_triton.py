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


from fewbits.kernels.layouts_triton import (
    _fourth,
    _fp8,
    _inverse_power,
    _larger,
    _marked,
    _most,
    _raise,
    _raise_bits,
    _store_rows,
    _store_sums,
    _store_words,
    _word,
)
from fewbits.kernels.math_triton import _exp, _reciprocal
from fewbits.kernels.quantize_triton import _magnitude


@jit
def activate_kernel(
    a, b, c, first, second, scale, maxima, n, GATED: tl.constexpr, BACKWARD: tl.constexpr, CODES: tl.constexpr,
    mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """What `_forward` makes of a and b, or `_backward` of a, b and c, n elements each, rounded to their dtype, for CODES the
    fp8 codes of that under a scale; maxima: fp32, one number for each result, raised to the largest magnitude of what was
    rounded."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
    y = x
    z = x
    if GATED or BACKWARD:
        y = tl.load(b + at, mask=mask, other=0.0).to(tl.float32)
    if GATED and BACKWARD:
        z = tl.load(c + at, mask=mask, other=0.0).to(tl.float32)
    two = x
    if BACKWARD:
        _, one, two = _backward(x, y, z, GATED, NATIVE)
    else:
        one = _forward(x, y, GATED, NATIVE)
    one = one.to(a.dtype.element_ty)
    _raise_bits(maxima, tl.max(_magnitude(one.to(tl.float32)), axis=0))
    if CODES:
        scaled = _marked(one.to(tl.float32)) * _inverse_power(tl.load(scale))
        tl.store(first + at, _fp8(scaled, first, mantissa, lowest, limit, NATIVE), mask=mask)
    else:
        tl.store(first + at, one, mask=mask)
    if GATED and BACKWARD:
        two = two.to(a.dtype.element_ty)
        tl.store(second + at, two, mask=mask)
        _raise_bits(maxima + 1, tl.max(_magnitude(two.to(tl.float32)), axis=0))


@jit
def activate_backward_kernel(
    grad, x, up, scale, scale_2, hidden_scale, codes, codes_t, hidden_t, sums, maximum, maximum_2,
    R, C, quads, tiles_c, next_codes, next_codes_t, next_sums,
    mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr, hidden_mantissa: tl.constexpr,
    hidden_lowest: tl.constexpr, hidden_limit: tl.constexpr, GATED: tl.constexpr, SUMS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TURNS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """What `_backward` makes of matrices [R, C] that lie row by row, rounded to their dtype, as fp8 codes under scales known
    before: of the gradients in both layouts, [R, C] and [C, 4 quads], the R rows padded with zeros, for SUMS with the sums of
    the columns of every TURNS * BM rows, fp32 [groups down, C]; of the activation transposed. The second gradient lies `next_`
    elements behind the first. The maxima are raised to their largest magnitudes.

    A program takes TURNS tiles, one below the other, STAGES of which are on their way from memory at once. WHOLE: tiles end
    where the matrices do.
    """
    group = tl.program_id(0) // tiles_c
    c0 = (tl.program_id(0) % tiles_c) * BN
    to_hidden = _inverse_power(tl.load(hidden_scale))
    to_one = _inverse_power(tl.load(scale))
    to_two = _inverse_power(tl.load(scale_2))
    most = tl.zeros((BM // 4, BN), tl.float32)
    total = tl.zeros((BM // 4, BN), tl.float32)
    most_2 = tl.zeros((BM // 4, BN), tl.float32)
    total_2 = tl.zeros((BM // 4, BN), tl.float32)
    for turn in tl.range(0, TURNS, num_stages=STAGES):
        r0 = (group * TURNS + turn).to(tl.int64) * BM
        p, p_one, p_two = _results(grad, x, up, 0, r0, c0, R, C, GATED, BM, BN, WHOLE, NATIVE)
        q, q_one, q_two = _results(grad, x, up, 1, r0, c0, R, C, GATED, BM, BN, WHOLE, NATIVE)
        r, r_one, r_two = _results(grad, x, up, 2, r0, c0, R, C, GATED, BM, BN, WHOLE, NATIVE)
        s, s_one, s_two = _results(grad, x, up, 3, r0, c0, R, C, GATED, BM, BN, WHOLE, NATIVE)
        word = _word(p, q, r, s, to_hidden, hidden_mantissa, hidden_lowest, hidden_limit, NATIVE)
        _store_words(word, hidden_t, r0, c0, C, quads, BM, BN, WHOLE)
        most = _larger(most, _most(p_one, q_one, r_one, s_one))
        total += (p_one + q_one) + (r_one + s_one)
        word = _word(p_one, q_one, r_one, s_one, to_one, mantissa, lowest, limit, NATIVE)
        _store_rows(word, codes, r0, c0, R, C, BM, BN, WHOLE)
        _store_words(word, codes_t, r0, c0, C, quads, BM, BN, WHOLE)
        if GATED:
            most_2 = _larger(most_2, _most(p_two, q_two, r_two, s_two))
            total_2 += (p_two + q_two) + (r_two + s_two)
            word = _word(p_two, q_two, r_two, s_two, to_two, mantissa, lowest, limit, NATIVE)
            _store_rows(word, codes + next_codes, r0, c0, R, C, BM, BN, WHOLE)
            _store_words(word, codes_t + next_codes_t, r0, c0, C, quads, BM, BN, WHOLE)
    _raise(maximum, most)
    if SUMS:
        _store_sums(total, sums + group * C, c0, C, BN)
    if GATED:
        _raise(maximum_2, most_2)
        if SUMS:
            _store_sums(total_2, sums + next_sums + group * C, c0, C, BN)


@jit
def _results(
    grad, x, up, first: tl.constexpr, r0, c0, R, C, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WHOLE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`_backward` of every fourth row of a tile, each as its dtype rounds it, in fp32."""
    g = _fourth(grad, first, r0, c0, R, C, BM, BN, WHOLE)
    a = _fourth(x, first, r0, c0, R, C, BM, BN, WHOLE)
    b = a
    if GATED:
        b = _fourth(up, first, r0, c0, R, C, BM, BN, WHOLE)
    hidden, one, two = _backward(g, a, b, GATED, NATIVE)
    dtype = grad.dtype.element_ty
    return hidden.to(dtype).to(tl.float32), one.to(dtype).to(tl.float32), two.to(dtype).to(tl.float32)


@jit
def _forward(x, up, GATED: tl.constexpr, NATIVE: tl.constexpr):
    """gelu of x, or swiglu of gate x and up (numerics/activation.py), in fp32; zeros give zeros."""
    if GATED:
        return x * _sigmoid(x, NATIVE) * up
    s, _ = _gelu_parts(x, NATIVE)
    return x * s


@jit
def _backward(grad, x, up, GATED: tl.constexpr, NATIVE: tl.constexpr):
    """`_forward` bit for bit, gelu_backward or the first result of swiglu_backward, and the second."""
    if GATED:
        s = _sigmoid(x, NATIVE)
        silu = x * s
        return silu * up, grad * up * (s * (1.0 + x * (1.0 - s))), grad * silu
    s, slope = _gelu_parts(x, NATIVE)
    one = grad * slope
    return x * s, one, one


@jit
def _gelu_parts(x, NATIVE: tl.constexpr):
    """gelu(x) / x, and the derivative of gelu."""
    near = tl.clamp(x, -30.0, 30.0, propagate_nan=tl.PropagateNan.ALL)
    z = near * (1.5957691216057308 + 0.07135481627260025 * near * near)
    s = _sigmoid(z, NATIVE)
    return s, s + (3.0 * z - 3.1915382432114616 * near) * s * (1.0 - s)


@jit
def _sigmoid(x, NATIVE: tl.constexpr):
    return _reciprocal(1.0 + _exp(-x, NATIVE), NATIVE)
