"""The device code of kernels/norm.py, in Triton."""

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # kernels/norm.py is not asked then

    def jit(function=None, **_options):
        return function or jit


@jit
def norm_backward_kernel(
    grad, other, along, x, weight, mean, rstd, out, parts, N, D: tl.constexpr, TURNS: tl.constexpr, TWO: tl.constexpr,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [N, D] as `norm_backward` of numerics/norm.py has it, ROWS rows at a time, every so many as there are programs; parts
    fp32 [1 or 2, programs, D]: what the rows of a program add to the gradients of weight and, if CENTERED, bias. TWO: the
    gradient is the sum of grad and other."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    by_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    by_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for turn in range(0, TURNS):
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
