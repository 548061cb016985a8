"""The device code of kernels/update.py, in Triton: one chunk of BLOCK elements of one tensor a program.

A program finds its tensor in a table of addresses, so that one launch updates all tensors of a bundle. The arithmetic is
that of numerics/update.py, operation by operation, each rounded: the launch forbids the compiler to fuse a multiplication
into an addition, divisions and square roots are the exact ones, and 16-bit weights are rounded on their bits. A kernel
of every master kind, and Triton's interpreter (TRITON_INTERPRET=1), therefore give the same bits.

A row of the table, eight int64: addresses of gradient, working weight, what is kept beside it, first and second moment
(0 where there is none), number of elements, whether all addresses are multiples of 16, and the row of the scalars. A
chunk, two int32: row of the table, number of the chunk within the tensor. Offsets are 64 bits.
"""

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # kernels/update.py says so before it comes here

    def jit(function=None, **_options):
        return function or jit


# Where a scalar happens to lie, and how many there are, is no reason to compile again in the middle of a training
_ANY = ["table", "chunks", "scalars", "factor", "clip_value", "applied"]


@jit(do_not_specialize=_ANY)
def update_kernel(
    table, chunks, scalars, factor, clip_value, applied,
    RULE: tl.constexpr, KIND: tl.constexpr, WORKING: tl.constexpr, GRADIENT: tl.constexpr,
    MOMENTS: tl.constexpr, CLIPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One update in place. table, chunks: see above. scalars: fp32 [rows, 8]. factor, clip_value: 0-d fp32. applied: a byte,
    nothing is written where it is 0.

    RULE: "adamw", "adam" or "sgd". KIND: "split", "fp32" or "none". WORKING, GRADIENT: "bf16", "fp16" or "fp32".
    """
    chunk = chunks + tl.program_id(0).to(tl.int64) * 2
    row = table + tl.load(chunk).to(tl.int64) * 8
    start = tl.load(chunk + 1).to(tl.int64) * BLOCK
    numel = tl.load(row + 5)
    # Of a chunk that is full and aligned the compiler may load 16 bytes at once; a mask would take that away.
    full = (start + BLOCK <= numel) & (tl.load(row + 6) != 0)
    if tl.load(applied) != 0:
        if full:
            _update_chunk(
                row, start, numel, scalars, factor, clip_value, RULE, KIND, WORKING, GRADIENT, MOMENTS, CLIPPED, True, BLOCK
            )  # fmt: skip
        else:
            _update_chunk(
                row, start, numel, scalars, factor, clip_value, RULE, KIND, WORKING, GRADIENT, MOMENTS, CLIPPED, False, BLOCK
            )  # fmt: skip


@jit
def _update_chunk(
    row, start, numel, scalars, factor, clip_value,
    RULE: tl.constexpr, KIND: tl.constexpr, WORKING: tl.constexpr, GRADIENT: tl.constexpr,
    MOMENTS: tl.constexpr, CLIPPED: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    values = scalars + tl.load(row + 7) * 8
    left = numel - start
    gradient = _load(_pointers(row, start, GRADIENT, FULL, BLOCK), left, GRADIENT, FULL, BLOCK)
    exact = _read(row, start, left, KIND, WORKING, FULL, BLOCK)
    gradient = gradient * tl.load(factor)
    if CLIPPED:
        limit = tl.load(clip_value)  # two comparisons, so that NaN stays NaN
        gradient = tl.where(gradient > limit, limit, tl.where(gradient < -limit, -limit, gradient))
    if RULE == "sgd":
        gradient = gradient + exact * tl.load(values + 1)
        if MOMENTS == 1:
            places = _pointers(row + 3, start, "fp32", FULL, BLOCK)
            gradient = _load(places, left, "fp32", FULL, BLOCK) * tl.load(values + 2) + gradient
            _store(places, gradient, left, FULL, BLOCK)
        exact = exact - gradient * tl.load(values)
    else:
        if RULE == "adamw":
            exact = exact * tl.load(values)
        else:
            gradient = gradient + exact * tl.load(values + 1)
        first = _pointers(row + 3, start, "fp32", FULL, BLOCK)
        second = _pointers(row + 4, start, "fp32", FULL, BLOCK)
        exp_avg = _load(first, left, "fp32", FULL, BLOCK)
        exp_avg_sq = _load(second, left, "fp32", FULL, BLOCK)
        exp_avg = exp_avg + (gradient - exp_avg) * tl.load(values + 2)
        exp_avg_sq = exp_avg_sq * tl.load(values + 3) + (gradient * tl.load(values + 4)) * gradient
        denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), _spread(tl.load(values + 5), BLOCK)) + tl.load(values + 6)
        exact = exact - tl.div_rn(exp_avg * tl.load(values + 7), denominator)
        _store(first, exp_avg, left, FULL, BLOCK)
        _store(second, exp_avg_sq, left, FULL, BLOCK)
    _write(exact, row, start, left, KIND, WORKING, FULL, BLOCK)


@jit
def _spread(value, BLOCK: tl.constexpr):
    return tl.broadcast_to(value, (BLOCK,))


@jit
def _pointers(column, start, FORMAT: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to BLOCK elements from `start` on of the tensor whose address stands at `column`.

    bf16 is handled as its bits: the interpreter has no sound arithmetic or conversion for it.
    """
    address = tl.load(column)
    if FORMAT == "fp32":
        base = address.to(tl.pointer_type(tl.float32))
    elif FORMAT == "fp16":
        base = address.to(tl.pointer_type(tl.float16))
    else:
        base = address.to(tl.pointer_type(tl.int16))
    if FULL:
        base = tl.multiple_of(base, 16)
    return base + start + tl.arange(0, BLOCK)


@jit
def _raw(pointers, left, FULL: tl.constexpr, BLOCK: tl.constexpr):
    if FULL:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=tl.arange(0, BLOCK) < left, other=0)


@jit
def _load(pointers, left, FORMAT: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 values."""
    raw = _raw(pointers, left, FULL, BLOCK)
    if FORMAT == "bf16":
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return raw.to(tl.float32)


@jit
def _store(pointers, values, left, FULL: tl.constexpr, BLOCK: tl.constexpr):
    if FULL:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=tl.arange(0, BLOCK) < left)


@jit
def _read(row, start, left, KIND: tl.constexpr, WORKING: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """Exact weights, fp32."""
    if KIND == "fp32":
        return _load(_pointers(row + 2, start, "fp32", FULL, BLOCK), left, "fp32", FULL, BLOCK)
    elif KIND == "split":
        top = _raw(_pointers(row + 1, start, "bf16", FULL, BLOCK), left, FULL, BLOCK).to(tl.int32) << 16
        rest = _raw(_pointers(row + 2, start, "int16", FULL, BLOCK), left, FULL, BLOCK).to(tl.int32)
        return (top + rest).to(tl.float32, bitcast=True)
    else:
        return _load(_pointers(row + 1, start, WORKING, FULL, BLOCK), left, WORKING, FULL, BLOCK)


@jit
def _write(
    exact, row, start, left,
    KIND: tl.constexpr, WORKING: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the working weight, rounded to nearest, ties away from zero, and what is kept beside it."""
    working = _pointers(row + 1, start, WORKING, FULL, BLOCK)
    bits = exact.to(tl.int32, bitcast=True)
    if KIND == "fp32":
        _store(_pointers(row + 2, start, "fp32", FULL, BLOCK), exact, left, FULL, BLOCK)
    if WORKING == "fp32":
        _store(working, exact, left, FULL, BLOCK)
    elif WORKING == "fp16":
        # `round_to`: a lowest bit set makes a tie lie above the halfway point; infinity has to stay what it is
        sticky = tl.where((bits & 0x7FFFFFFF) == 0x7F800000, bits, bits | 1)
        _store(working, sticky.to(tl.float32, bitcast=True).to(tl.float16), left, FULL, BLOCK)
    else:
        nan = exact != exact
        _store(working, tl.where(nan, 0x7FC0, (bits + 0x8000) >> 16).to(tl.int16), left, FULL, BLOCK)
        if KIND == "split":
            kept = _pointers(row + 2, start, "int16", FULL, BLOCK)
            _store(kept, tl.where(nan, 0, bits).to(tl.int16), left, FULL, BLOCK)


@jit(do_not_specialize=[*_ANY[:2], "partials"])
def norm_kernel(
    table, chunks, partials,
    GRADIENT: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """partials [programs], fp32: of every chunk of BLOCK * REPEAT elements the sum of squares, or for INFINITY the largest
    magnitude; NaN and infinity come through. The order of the sum depends on nothing but BLOCK and REPEAT.
    """
    program = tl.program_id(0)
    chunk = chunks + program.to(tl.int64) * 2
    row = table + tl.load(chunk).to(tl.int64) * 8
    start = tl.load(chunk + 1).to(tl.int64) * (BLOCK * REPEAT)
    numel = tl.load(row + 5)
    if (start + BLOCK * REPEAT <= numel) & (tl.load(row + 6) != 0):
        tl.store(partials + program, _measure_chunk(row, start, numel, GRADIENT, INFINITY, True, BLOCK, REPEAT))
    else:
        tl.store(partials + program, _measure_chunk(row, start, numel, GRADIENT, INFINITY, False, BLOCK, REPEAT))


@jit
def _measure_chunk(
    row, start, numel,
    GRADIENT: tl.constexpr, INFINITY: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    squares = tl.zeros((BLOCK,), tl.float32)
    largest = tl.zeros((BLOCK,), tl.int32)
    for turn in tl.static_range(REPEAT):
        at = start + turn * BLOCK
        x = _load(_pointers(row, at, GRADIENT, FULL, BLOCK), numel - at, GRADIENT, FULL, BLOCK)
        if INFINITY:  # magnitudes order as integers, infinity and NaN above all
            largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        else:
            squares += x * x
    if INFINITY:
        return tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    else:
        return tl.sum(squares, axis=0)
