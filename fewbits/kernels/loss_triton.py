"""The device code of kernels/loss.py, in Triton: one row of logits a program.

A program reads its row twice: once for the maximum and the sum of exponentials, found together (Milakov and Gimelshein 2018,
arXiv 1805.02867), and once more to write the gradient, mostly from the cache. Everything is fp32 between reading and writing.
Offsets are 64 bits: a matrix of logits may have more than 2^31 elements. At 50,304 columns instructions bind as much as bytes:
17 an element in codes, where 29 took 1.3 times as long (an H200).
"""

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # kernels/loss.py says so before it comes here

    def jit(function=None, **_options):
        return function or jit


from fewbits.kernels.layouts_triton import _fp8, _inverse_power
from fewbits.kernels.math_triton import _exp


@jit
def softmax_gradient_kernel(
    logits, gradient, losses, labels, factor, scale, apart, stride, gradient_stride,
    V: tl.constexpr, IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr,
    mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """losses [N] fp32 and, for GRADIENT, gradient [N, V] of factor * sum(losses), which may be the memory of the logits; for
    CODES its fp8 codes under `scale`, a power of two, in memory of their own, with 0 for the target, and apart [N] what the
    codes of a row add up to, 0 where the label is no token.

    logits [N, V] with columns side by side, rows `stride` apart; labels int64, factor one fp32 number. A row whose label is
    IGNORE is not read: its loss and its gradient are 0. A label outside of 0 .. V - 1 makes the loss NaN. V is compiled in:
    a model has one.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * stride
    gradient += row * gradient_stride
    whole: tl.constexpr = V // BLOCK * BLOCK  # loads without a mask are wide ones for every V; the rest has a mask
    columns = tl.arange(0, BLOCK)
    if label == IGNORE:
        tl.store(losses + row, 0.0)
        if CODES:
            tl.store(apart + row, 0.0)
        if GRADIENT:
            zero = _rounded(tl.zeros((BLOCK,), tl.float32), gradient, CODES, mantissa, lowest, limit, NATIVE)
            for start in range(0, whole, BLOCK):
                tl.store(gradient + start + columns, zero)
            tl.store(gradient + whole + columns, zero, mask=whole + columns < V)
    else:
        token = (label >= 0) & (label < V)
        # read before the reductions, whose barriers keep other warps from writing over it first
        target = tl.load(logits + label, mask=token, other=float("nan")).to(tl.float32)
        largest, total = _statistics(logits, V, BLOCK, NATIVE)
        # nothing of the size of the logits is left to round: what is far below the largest does not count
        tl.store(losses + row, (largest - target) + tl.log(total))
        if GRADIENT:
            weight = tl.load(factor)
            if CODES:
                # the power of two once, not for every element: exact, but for what vanishes in any fp8 format
                weight = weight * _inverse_power(tl.load(scale))
            share = weight / total
            sums = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, whole, BLOCK):
                sums += _write(
                    logits, gradient, start + columns, V, largest, share, CODES, False, mantissa, lowest, limit, NATIVE
                )
            if whole < V:
                sums += _write(
                    logits, gradient, whole + columns, V, largest, share, CODES, True, mantissa, lowest, limit, NATIVE
                )
            tl.debug_barrier()  # the target's place is written once more, after everything
            if CODES:
                own = _softmax(target, largest, share, gradient, CODES, mantissa, lowest, limit, NATIVE)
                # out of the few numbers that were added up where it was: out of the sum of all it would leave its rounding,
                # which for a target that is expected is more than all others are
                own = tl.where(columns == label % BLOCK, _value(own, mantissa, lowest, NATIVE), 0.0)
                tl.store(apart + row, tl.where(token, tl.sum(sums - own, axis=0) * tl.load(scale), 0.0))
                own = _rounded(tl.zeros_like(target), gradient, CODES, mantissa, lowest, limit, NATIVE)
            else:
                own = (_exp(target - largest, NATIVE) * share - weight).to(gradient.dtype.element_ty)
            tl.store(gradient + label, own, mask=token)


@jit
def _statistics(logits, V: tl.constexpr, BLOCK: tl.constexpr, NATIVE: tl.constexpr):
    """The largest logit of a row, and the sum of the exponentials of how far all are below it: found together, where eight
    that lie side by side have one running maximum (Milakov and Gimelshein 2018)."""
    whole: tl.constexpr = V // BLOCK * BLOCK
    columns = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    most = tl.full((BLOCK // 8,), -3.0e38, tl.float32)  # finite: -inf - -inf would be NaN
    total = tl.zeros((BLOCK // 8,), tl.float32)
    for start in range(0, whole, BLOCK):
        most, total = _add_exponentials(most, total, tl.load(logits + start + columns).to(tl.float32), NATIVE)
    if whole < V:
        rest = tl.load(logits + whole + columns, mask=whole + columns < V, other=-float("inf")).to(tl.float32)
        most, total = _add_exponentials(most, total, rest, NATIVE)
    largest = tl.max(most, axis=0)
    return largest, tl.sum(total * _exp(most - largest, NATIVE), axis=0)


@jit
def _add_exponentials(most, total, x, NATIVE: tl.constexpr):
    """The running maximum of every eight columns and the sum of exp(x - maximum), with one exponential more for all eight."""
    larger = tl.maximum(most, tl.max(x, axis=1))
    added = tl.sum(_exp(x - larger[:, None], NATIVE), axis=1)
    return larger, total * _exp(most - larger, NATIVE) + added


@jit
def _write(
    logits, gradient, at, V: tl.constexpr, largest, share, CODES: tl.constexpr, MASKED: tl.constexpr,
    mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Writes a part of a row as if no target were in it, and gives what its codes are worth, zeros where there are none."""
    if MASKED:
        x = tl.load(logits + at, mask=at < V, other=-float("inf")).to(tl.float32)
    else:
        x = tl.load(logits + at).to(tl.float32)
    out = _softmax(x, largest, share, gradient, CODES, mantissa, lowest, limit, NATIVE)
    if MASKED:
        tl.store(gradient + at, out, mask=at < V)
    else:
        tl.store(gradient + at, out)
    if CODES:
        return _value(out, mantissa, lowest, NATIVE)
    return tl.zeros_like(x)


@jit
def _softmax(
    x, largest, share, gradient, CODES: tl.constexpr, mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """The gradient of logits that are no targets, with share = weight / sum of exponentials, as elements of `gradient`."""
    return _rounded(_exp(x - largest, NATIVE) * share, gradient, CODES, mantissa, lowest, limit, NATIVE)


@jit
def _rounded(
    x, gradient, CODES: tl.constexpr, mantissa: tl.constexpr, lowest: tl.constexpr, limit: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """fp32 as elements of `gradient`."""
    if CODES:
        return _fp8(x, gradient, mantissa, lowest, limit, NATIVE)
    return x.to(gradient.dtype.element_ty)


@jit
def _value(code, mantissa: tl.constexpr, lowest: tl.constexpr, NATIVE: tl.constexpr):
    """What elements of fp8 are worth, fp32: by the instruction that goes with `_fp8`, else on bits."""
    if NATIVE:
        return code.to(tl.float32)
    return _decoded(code.to(tl.uint8, bitcast=True), mantissa, lowest)


@jit
def _decoded(byte, mantissa: tl.constexpr, lowest: tl.constexpr):
    """The value of fp8 codes that are numbers: their bits as an fp32 number, whose exponent counts from another power."""
    byte = byte.to(tl.int32)
    bits = ((byte & 0x7F) << (23 - mantissa)) | ((byte & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * 2.0 ** (lowest - 1)


@jit
def hidden_less_targets_kernel(
    product, codes, scale, labels, apart, out, stride, mantissa: tl.constexpr, lowest: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out [P, D] of product [P, D] fp32, a row a program, less apart [P] times the row of the weight, fp8 codes under a scale,
    that the label names, which is not read where apart is 0."""
    row = tl.program_id(0).to(tl.int64)
    share = tl.load(apart + row) * tl.load(scale)
    label = tl.load(labels + row)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < D
        x = tl.load(product + row * D + columns, mask=inside)
        if share != 0.0:
            x -= share * _decoded(tl.load(codes + label * stride + columns, mask=inside, other=0), mantissa, lowest)
        tl.store(out + row * D + columns, x.to(out.dtype.element_ty), mask=inside)


@jit
def weight_less_targets_kernel(
    total, codes, scale, labels, apart, stride, mantissa: tl.constexpr, lowest: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Takes apart [N] times hidden [N, D], fp8 codes under a scale, a row a program, from the row of total [V, D] fp32 that the
    label names."""
    row = tl.program_id(0).to(tl.int64)
    share = tl.load(apart + row) * tl.load(scale)
    label = tl.load(labels + row)
    if share != 0.0:
        for start in range(0, D, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < D
            x = _decoded(tl.load(codes + row * stride + columns, mask=inside, other=0), mantissa, lowest)
            tl.atomic_add(total + label * D + columns, -share * x, mask=inside, sem="relaxed")
