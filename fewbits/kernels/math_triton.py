"""Functions of numbers in device code, by the instructions of the hardware where there are any (NATIVE)."""

from __future__ import annotations

try:
    import triton.language as tl
    from triton import jit
except ImportError:  # the modules that launch kernels say so before it comes here

    def jit(function=None, **_options):
        return function or jit


@jit
def _exp(x, NATIVE: tl.constexpr):
    """exp(x) in fp32, 0 where it is below 2^-126: to have the numbers there too takes three instructions beside two."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp(x)


@jit
def _reciprocal(x, NATIVE: tl.constexpr):
    """1 / x in fp32 within a unit in the last place, for x from 2^-126 to 2^126: Triton's own division takes a sixth of the
    time of SwiGLU's gradient."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x
