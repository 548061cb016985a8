"""The loss head in fp8: three matmuls of codes, and between them the softmax in fp32.

Hidden states and weight are e4m3 under a power of two each, from their largest magnitudes; the gradient of the logits is e5m2
under one that is known before there are logits (`gradient_scale`), so that one kernel reads logits and writes codes. What
is largest in it, the -1 of a target that is not expected yet, is left out of the codes and taken exactly: a row of the weight,
and one of the hidden states. The matmuls are those of the recipe fp8 (formats as in Micikevicius et al. 2022, arXiv
2209.05433): in fp8 where the device has it, elsewhere of the exact values of the codes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewbits.kernels.dispatch import quantize_both, turned
from fewbits.kernels.loss import padded, softmax_codes, with_padding
from fewbits.kernels.matmul import scaled_matmul
from fewbits.numerics.loss import IGNORE, gradient_scale, piece_rows
from fewbits.numerics.loss import softmax_codes as definition
from fewbits.numerics.quantize import Both, Quantized
from fewbits.numerics.wide import wide_dtype
from fewbits.precision.recipe import RECIPES, Operand

_ROWS = 16  # an fp8 instruction wants such multiples of a contraction, as the sum over tokens is; others run in fp32
_CODES = 1  # byte of a gradient beside its logit: the codes of the other layout take the memory of the logits


def fp8_gradients(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, factor: Tensor, *, logits: torch.dtype, kernel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [N] fp32, gradient of hidden, gradient of weight) of `factor * sum(losses)`, as `Gradients` says.

    logits: what their fp32 sums are rounded to, once. kernel: whether `softmax_codes` of kernels/loss.py reads them, else its
    definition. The gradient of the weight is summed in fp32 over all tokens and rounded once. An operand that is not finite
    makes losses that are not.
    """
    if missing := -len(labels_N) % _ROWS:
        pad = torch.nn.functional.pad
        given = pad(hidden_ND, (0, 0, 0, missing)), weight_VD, pad(labels_N, (0, missing), value=IGNORE), factor
        losses_N, grad_hidden_ND, grad_weight_VD = fp8_gradients(*given, logits=logits, kernel=kernel)
        return losses_N[:-missing], grad_hidden_ND[:-missing], grad_weight_VD
    output, grad_input, grad_weight = RECIPES["fp8"].matmuls
    assert output is not None and grad_input is not None and grad_weight is not None
    N, V, wide = labels_N.shape[0], weight_VD.shape[0], wide_dtype(hidden_ND.dtype)
    hidden, weight = _both(hidden_ND, output.left), _both(padded(weight_VD), output.right)
    columns, scale = len(weight.matrix.codes), gradient_scale(factor, grad_input.left.format)
    losses_N, grad_hidden_ND = hidden_ND.new_empty(N, dtype=wide), torch.empty_like(hidden_ND)
    grad_weight_WD: Tensor | None = None
    rows = piece_rows(N, V, hidden_ND.device.type, logits.itemsize + _CODES)
    for start in range(0, N, rows):
        piece = slice(start, start + rows)
        left, right = (
            replace(q, codes=q.codes[at]) for q, at in ((hidden.matrix, piece), (hidden.transpose, (..., piece)))
        )
        logits_PV = scaled_matmul(left, weight.matrix, output.accumulator, logits)[:, :V]
        losses_N[piece], gradient, apart_P1 = _softmax(
            logits_PV, labels_N[piece], factor, scale, grad_input.left, columns, kernel
        )
        del logits_PV
        target_P = labels_N[piece].clamp(min=0)
        product_PD = scaled_matmul(gradient, weight.transpose, grad_input.accumulator, wide)
        grad_hidden_ND[piece] = product_PD.sub_(apart_P1 * weight_VD[target_P])
        gradient = replace(gradient, codes=turned(gradient.codes))
        product_WD = scaled_matmul(gradient, right, grad_weight.accumulator, wide)
        product_WD.index_add_(0, target_P, -apart_P1 * hidden_ND[piece])
        grad_weight_WD = product_WD if grad_weight_WD is None else grad_weight_WD.add_(product_WD)
        del gradient, product_PD, product_WD
    if grad_weight_WD is None:  # no token at all
        return losses_N, grad_hidden_ND, torch.zeros_like(weight_VD)
    return losses_N, grad_hidden_ND, grad_weight_WD[:V].to(weight_VD.dtype)


def _softmax(
    logits_PV: Tensor, labels_P: Tensor, factor: Tensor, scale: Tensor, operand: Operand, columns: int, kernel: bool
) -> tuple[Tensor, Quantized, Tensor]:
    """Losses [P], the gradient of the logits as the left operand of grad_input, [P, columns] with zero beside the logits, and
    what is taken apart of it at the target, [P, 1]."""
    make = softmax_codes if kernel else definition
    losses_P, codes_PV, apart_P = make(logits_PV, labels_P, factor, scale, operand.format)
    codes_PW = with_padding(codes_PV, columns)
    gradient = Quantized(codes_PW, scale, operand.format, operand.granularity, operand.scaling)
    return losses_P, gradient, apart_P.unsqueeze(1)


def _both(x: Tensor, operand: Operand) -> Both:
    return quantize_both([x], operand.format, operand.granularity, operand.rounding, 0, operand.scaling)
