"""The loss head on a GPU, the fast twin of numerics/loss.py: logits in 16 bits, gradients written over them.

The logits of a piece are written once by their matmul, read twice by one kernel (mostly from the cache the second time) and
read as gradients by two matmuls: at 32,768 tokens of a vocabulary of 50,304 about 16 GB a step, where fp32 logits with
separate gradients take 36. A vocabulary that 64 does not divide is padded to one that it does, with weights of zero: cuBLAS
takes kernels of half the speed or less where a side is odd (50,257 on an H200: 62 ms for what takes 15). A copy of the
weight, 77 MB there, is small beside that. The softmax does not see the padding, whose gradient is zero.

cuBLAS writes fp16 for fp16 operands only. bf16 operands are copied to fp16 for the logits (hidden states and weight, a
hundredth of the traffic): exact for magnitudes of 2^-17 to 65,504, off by 2^-25 at most below. Beyond 65,504 values are
infinite, and so are logits: the loss is then not finite and the step withheld. The gradients are multiplied in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.kernels.dispatch import probed
from fewbits.kernels.layouts import _constants
from fewbits.kernels.quantize import installed
from fewbits.numerics.loss import IGNORE, Pieces, piece_rows
from fewbits.numerics.loss import softmax_gradient as definition
from fewbits.numerics.loss import softmax_losses as losses_definition
from fewbits.numerics.loss import weight_less_targets_ as add_definition
from fewbits.numerics.quantize import Quantized, carrier
from fewbits.numerics.wide import wide_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ALIGNED = 64  # what the columns of a matmul are padded to: 128 bytes of 16-bit numbers, one line of the cache
_TARGET = 1024  # numbers of a target's row that a program takes at a time


def why_not(logits: Tensor, dtype: torch.dtype) -> str:
    """What keeps the kernel from these logits, or "" where it takes them: a matrix of 16 bits or fp32, rows side by side."""
    if not installed():
        return "triton is not installed"
    if logits.dtype not in _DTYPES or dtype not in _DTYPES:
        return f"logits in {logits.dtype} with gradients in {dtype}; fp16, bf16 and fp32 fit"
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.stride(1) != 1:
        return f"logits of shape {tuple(logits.shape)} and strides {logits.stride()}; a matrix of whole rows fits"
    return ""


def softmax_gradient(
    logits_NV: Tensor,
    labels_N: Tensor,
    factor: Tensor,
    dtype: torch.dtype,
    *,
    block: int = 0,
    warps: int = 0,
) -> tuple[Tensor, Tensor]:
    """`softmax_gradient` of numerics/loss.py by one kernel, up to the order of sums: losses [N] fp32, gradient [N, V].

    The gradient takes the memory of the logits where `dtype` is as wide as they are. Rows with label -100 have a gradient of
    0 whatever their logits; any other label that is no token makes a loss of NaN.

    block, warps: columns read at a time and warps of a program; 0 takes what was fastest.
    Raises FewbitsError for what `why_not` names.
    """
    _refuse(logits_NV, dtype)
    if dtype.itemsize == logits_NV.element_size():
        gradient_NV = logits_NV.view(dtype)
    else:
        gradient_NV = aligned_rows(logits_NV.shape[0], logits_NV.shape[1], dtype, logits_NV.device)
    return _launch(logits_NV, gradient_NV, labels_N, factor.float(), block, warps), gradient_NV


def softmax_codes(
    logits_NV: Tensor,
    labels_N: Tensor,
    factor: Tensor,
    scale: Tensor,
    format: Format,
    *,
    block: int = 0,
    warps: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_codes` of numerics/loss.py by the same kernel; rows of codes lie a multiple of 64 from one another, with zeros
    beside them. format: fp8; scale: fp32 [1, 1], a power of two. block, warps: as `softmax_gradient` takes them."""
    _refuse(logits_NV, logits_NV.dtype)
    N, V = logits_NV.shape
    codes_NV = aligned_rows(N, V, carrier(format), logits_NV.device)
    apart_N = torch.empty(N, dtype=torch.float32, device=logits_NV.device)
    losses_N = _launch(logits_NV, codes_NV, labels_N, factor.float(), block, warps, _Coding(format, scale, apart_N))
    return losses_N, codes_NV, apart_N


def hidden_less_targets(
    product_PD: Tensor, weight: Quantized, labels_P: Tensor, apart_P: Tensor, out_PD: Tensor
) -> None:
    """`hidden_less_targets` of numerics/loss.py in one pass; product fp32, matrices of whole rows, codes of fp8."""
    from fewbits.kernels.loss_triton import hidden_less_targets_kernel

    if len(product_PD):
        hidden_less_targets_kernel[(len(product_PD),)](
            product_PD, weight.codes.view(torch.uint8), weight.scale, labels_P.contiguous(), apart_P, out_PD,
            weight.codes.stride(0), **_decoding(weight), D=product_PD.shape[1], BLOCK=_TARGET, num_warps=4,
        )  # fmt: skip


def weight_less_targets_(total_VD: Tensor, hidden: Quantized, labels_N: Tensor, apart_N: Tensor) -> None:
    """`weight_less_targets_` of numerics/loss.py in one pass, total fp32, up to the order of sums: that of the definition
    where algorithms must be deterministic, else whatever comes first."""
    from fewbits.kernels.loss_triton import weight_less_targets_kernel

    if torch.are_deterministic_algorithms_enabled():
        add_definition(total_VD, hidden, labels_N, apart_N)
    elif len(labels_N):
        weight_less_targets_kernel[(len(labels_N),)](
            total_VD, hidden.codes.view(torch.uint8), hidden.scale, labels_N.contiguous(), apart_N,
            hidden.codes.stride(0), **_decoding(hidden), D=total_VD.shape[1], BLOCK=_TARGET, num_warps=4,
        )  # fmt: skip


def _decoding(q: Quantized) -> dict[str, int]:
    mantissa, lowest, _ = _constants(q.format)
    return {"mantissa": mantissa, "lowest": lowest}


def softmax_losses(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """`softmax_losses` of numerics/loss.py by the same kernel, which then reads the logits once: fp32 [N]."""
    _refuse(logits_NV, logits_NV.dtype)
    return _launch(logits_NV, None, labels_N, None, 0, 0)


class _Coding(NamedTuple):
    """What turns a gradient to codes: their format and scale, and where what they leave out is written."""

    format: Format
    scale: Tensor
    apart: Tensor


def _launch(
    logits: Tensor,
    gradient: Tensor | None,
    labels: Tensor,
    factor: Tensor | None,
    block: int,
    warps: int,
    coding: _Coding | None = None,
) -> Tensor:
    from fewbits.kernels.loss_triton import softmax_gradient_kernel

    (N, V), written = logits.shape, logits if gradient is None else gradient
    fast_block, fast_warps = _shape(V, coding is not None)
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    mantissa, lowest, limit = (0, 0, 0) if coding is None else _constants(coding.format)
    if N:
        softmax_gradient_kernel[(N,)](
            logits, written, losses, labels.contiguous(), losses if factor is None else factor,
            *((losses, losses) if coding is None else coding[1:]), logits.stride(0), written.stride(0),
            V=V, IGNORE=IGNORE, GRADIENT=gradient is not None, BLOCK=block or fast_block, CODES=coding is not None,
            mantissa=mantissa, lowest=lowest, limit=limit, NATIVE=logits.is_cuda, num_warps=warps or fast_warps,
        )  # fmt: skip
    return losses


def _shape(vocabulary: int, codes: bool) -> tuple[int, int]:
    """Columns that a program reads at a time, and its warps: the fastest of bench/loss_head.py on an H200 at 6,400, 32,000,
    50,257 and 50,304 columns. A long row wants so many warps that the rows at work fit into the cache for their second reading,
    and what is left of one that 64 does not divide is read number by number, in blocks that should not be large."""
    if vocabulary < 1 << 14:
        return (2048, 4) if codes else (4096, 8)
    if vocabulary % _ALIGNED:
        return 4096, 16
    return 8192, 16 if codes and vocabulary <= 1 << 15 else 32


def _refuse(logits: Tensor, dtype: torch.dtype) -> None:
    if reason := why_not(logits, dtype):
        raise FewbitsError(f"The Triton twin does not take this: {reason}. Use {definition.__module__}.")


def aligned_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty matrix whose rows lie a multiple of 64 elements apart: a view of one that is a little wider, zero beside it.

    Zero, because some matmuls multiply what lies there by 0 (oneDNN in bf16 does): 0 times leftover memory may be NaN.
    """
    wider = torch.empty(rows, -(-columns // _ALIGNED) * _ALIGNED, dtype=dtype, device=device)
    wider[:, columns:].zero_()
    return wider[:, :columns]


def padded(weight_VD: Tensor) -> Tensor:
    """The weight with rows of zeros up to a multiple of 64, itself where it has as many."""
    missing = -len(weight_VD) % _ALIGNED
    return torch.nn.functional.pad(weight_VD.detach(), (0, 0, 0, missing)) if missing else weight_VD


def with_padding(gradient: Tensor, columns: int) -> Tensor:
    """The matrix of so many columns whose first are `gradient`, zero beside them: in its own memory where that is so wide."""
    rows, mine = gradient.shape
    if mine == columns:
        return gradient
    if gradient.stride() == (columns, 1):
        return gradient.as_strided((rows, columns), (columns, 1))
    return torch.nn.functional.pad(gradient, (0, columns - mine))


def _widened(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    wide = wide_dtype(a.dtype)
    product = torch.mm(a.to(wide), b.to(wide))
    _ = out.add_(product) if add else out.copy_(product)


def _added(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    if add:
        out += torch.mm(a, b, out_dtype=out.dtype)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _in_place(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    if add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _probe(multiply: Callable[[Tensor, Tensor, Tensor, bool], None], dtype: torch.dtype, device: torch.device) -> str:
    """Why `multiply` does not give fp32 sums of `dtype` products here, or "": 2 x 64 x (1 + 2^-7)^2 needs 15 bits."""
    a = torch.full((64, 64), 1 + 2.0**-7, dtype=dtype, device=device)
    out = torch.empty(64, 64, dtype=torch.float32, device=device)
    try:
        multiply(a, a, out, False)
        multiply(a, a, out, True)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return f"refused: {str(error).splitlines()[0][:120]}"
    exact = 2 * 64 * (1 + 2.0**-7) ** 2
    return "" if bool((out == exact).all()) else f"wrong: {float(out[0, 0])} instead of {exact}"


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, with fp32 sums: rounded once where `out` is as narrow as the operands, not at all where
    it is fp32. What this device's torch takes for the latter is asked once a process, the fastest way first."""
    if out.dtype == a.dtype:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    for name, way in (("in place", _in_place), ("then added", _added)):
        question = f"fp32 sums of {str(a.dtype).removeprefix('torch.')} products, {name}"
        if probed(question, a.device, lambda way=way: _probe(way, a.dtype, a.device)).value == "native":  # type: ignore[misc]
            way(a, b, out, add)
            return out
    _widened(a, b, out, add)
    return out


class DeviceHead:
    """The head in pieces on a GPU.

    logits: dtype of the logits that gradients are made from, their fp32 sums rounded once; without gradients (evaluation)
        they are fp32 whatever was chosen, fp64 for fp64.
    kernel: whether the Triton kernel runs; else `pieces`, the definition or a compiled twin of it, between the same matmuls.
    """

    def __init__(self, logits: torch.dtype, kernel: bool = True, pieces: Pieces | None = None):
        self.logits_dtype, self.kernel = logits, kernel
        self.pieces: Pieces = softmax_gradient if kernel else pieces or definition

    def gradients(
        self, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(losses [N] fp32, gradient of hidden, gradient of weight) of `factor * sum(losses)`.

        With one piece the weight gradient is one matmul; with more their fp32 sums are added up and rounded once.
        """
        N, V, dtype, wide = labels_N.shape[0], weight_VD.shape[0], hidden_ND.dtype, wide_dtype(hidden_ND.dtype)
        # bytes of a logit and of its gradient, unless that is written over it; the definition makes wide copies between
        width = self.logits_dtype.itemsize
        width += 0 if self.kernel and width == dtype.itemsize else dtype.itemsize
        rows = piece_rows(N, V, "cuda", width)
        weight_WD = padded(weight_VD)
        W, entering_DW = weight_WD.shape[0], self._entering(weight_WD).t()
        losses_N, grad_hidden_ND = hidden_ND.new_empty(N, dtype=wide), torch.empty_like(hidden_ND)
        grad_weight_WD = torch.empty_like(weight_WD, dtype=wide if rows < N else dtype)
        if N == 0:
            grad_weight_WD.zero_()
        logits_PW = hidden_ND.new_empty(min(rows, N), W, dtype=self.logits_dtype)
        for start in range(0, N, rows):
            piece = slice(start, start + rows)
            hidden = hidden_ND[piece]
            logits = multiply(self._entering(hidden), entering_DW, logits_PW[: len(hidden)])[:, :V]
            losses_N[piece], gradient = self.pieces(logits, labels_N[piece], factor, dtype)
            gradient_PW = with_padding(gradient, W)
            multiply(gradient_PW, weight_WD, grad_hidden_ND[piece])
            multiply(gradient_PW.t(), hidden, grad_weight_WD, add=start > 0)
            del gradient, gradient_PW
        return losses_N, grad_hidden_ND, grad_weight_WD[:V].to(weight_VD.dtype)

    def losses(self, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        """Losses [N] from logits that are not rounded."""
        N, V, wide = labels_N.shape[0], weight_VD.shape[0], wide_dtype(hidden_ND.dtype)
        rows = piece_rows(N, V, "cuda", wide.itemsize)
        weight_WD = padded(weight_VD)
        logits_PW = hidden_ND.new_empty(min(rows, N), weight_WD.shape[0], dtype=wide)
        one_row = softmax_losses if self.kernel else losses_definition
        losses_N = hidden_ND.new_empty(N, dtype=wide)
        for start in range(0, N, rows):
            hidden = hidden_ND[start : start + rows]
            logits = multiply(hidden, weight_WD.t(), logits_PW[: len(hidden)])[:, :V]
            losses_N[start : start + rows] = one_row(logits, labels_N[start : start + rows])
        return losses_N

    def _entering(self, x: Tensor) -> Tensor:
        """Operands of the logits: fp16 ones for fp16 logits."""
        return x.to(torch.float16) if self.logits_dtype == torch.float16 else x
