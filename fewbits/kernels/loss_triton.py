"""The device code of kernels/loss.py, in Triton: one row of logits a program.

A program reads its row twice: once for the maximum and the sum of exponentials, found together in every lane (Milakov and
Gimelshein 2018, arXiv 1805.02867), and once more to write the gradient, mostly from the cache. Everything is fp32 between
reading and writing. Offsets are 64 bits: a matrix of logits may have more than 2^31 elements.
"""

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # kernels/loss.py says so before it comes here

    def jit(function=None, **_options):
        return function or jit


@jit
def softmax_gradient_kernel(
    logits, gradient, losses, labels, factor, stride, gradient_stride,
    V: tl.constexpr, IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [N] fp32 and, for GRADIENT, gradient [N, V] of factor * sum(losses), which may be the memory of the logits.

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
        if GRADIENT:
            zero = tl.zeros((BLOCK,), tl.float32).to(gradient.dtype.element_ty)
            for start in range(0, whole, BLOCK):
                tl.store(gradient + start + columns, zero)
            tl.store(gradient + whole + columns, zero, mask=whole + columns < V)
    else:
        # read before the reductions, whose barriers keep other warps from writing over it first
        target = tl.load(logits + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
        most = tl.full((BLOCK,), -3.0e38, tl.float32)  # finite: -inf - -inf would be NaN
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, whole, BLOCK):
            most, total = _add_exponentials(most, total, tl.load(logits + start + columns).to(tl.float32))
        if whole < V:
            rest = tl.load(logits + whole + columns, mask=whole + columns < V, other=-float("inf")).to(tl.float32)
            most, total = _add_exponentials(most, total, rest)
        largest = tl.max(most, axis=0)
        total_of_row = tl.sum(total * tl.exp(most - largest), axis=0)
        # nothing of the size of the logits is left to round: what is far below the largest does not count
        tl.store(losses + row, (largest - target) + tl.log(total_of_row))
        if GRADIENT:
            weight = tl.load(factor)
            share = weight / total_of_row
            for start in range(0, whole, BLOCK):
                x = tl.load(logits + start + columns).to(tl.float32)
                out = _gradient_of(x - largest, share, start + columns == label, weight)
                tl.store(gradient + start + columns, out.to(gradient.dtype.element_ty))
            if whole < V:
                inside = whole + columns < V
                x = tl.load(logits + whole + columns, mask=inside, other=-float("inf")).to(tl.float32)
                out = _gradient_of(x - largest, share, whole + columns == label, weight)
                tl.store(gradient + whole + columns, out.to(gradient.dtype.element_ty), mask=inside)


@jit
def _add_exponentials(most, total, x):
    """The running maximum of every lane and the sum of exp(x - maximum): one exponential, because the other one is of 0."""
    smaller = tl.exp(-tl.abs(x - most))
    total = tl.where(x > most, total * smaller + 1.0, total + smaller)
    return tl.maximum(most, x), total


@jit
def _gradient_of(x, share, is_target, weight):
    """(softmax - one hot) * weight, with x below the largest logit and share = weight / sum of exponentials."""
    return tl.exp(x) * share - tl.where(is_target, weight, 0.0)
