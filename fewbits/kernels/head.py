"""The loss head in fp8: three matmuls of codes, and between them the softmax in fp32.

Hidden states and weight are e4m3 under a power of two each, from their largest magnitudes; the gradient of the logits is e5m2
under one that is known before there are logits (`gradient_scale`), so that one kernel reads logits and writes codes. What
is largest in it, the entry of the target, is left out of the codes and is minus their sum, so that a row adds up to zero; it
is multiplied exactly, by the same values of weight and hidden states as the codes are. Both matter more than the error of one
token, which they hardly change: what all tokens get wrong the same way adds up (bench/head_gradients.py). The matmuls are
those of the recipe fp8 (formats as in Micikevicius et al. 2022, arXiv 2209.05433): in fp8 where the device has it, elsewhere of
the exact values of the codes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fewbits.kernels import loss as twin
from fewbits.kernels.dispatch import in_layouts, largest, quantize_both, turn_into
from fewbits.kernels.loss import padded, with_padding
from fewbits.kernels.matmul import scaled_matmul
from fewbits.numerics import loss as definition
from fewbits.numerics.loss import IGNORE, gradient_scale, piece_rows
from fewbits.numerics.quantize import Both, Quantized
from fewbits.numerics.wide import wide_dtype
from fewbits.precision.recipe import RECIPES, Operand

_ROWS = 16  # an fp8 instruction wants such multiples of a contraction, as the sum over tokens is; others run in fp32
# Bytes up to which the codes of pieces are kept, turned, for one product with the hidden states: every product more passes
# over the fp32 sum of the weight's gradient. They lie beside the logits and codes of the next piece: 1.0 GiB more at the peak
# of gpt2-124m with 32,768 tokens (docs/performance.md).
_KEPT_BYTES = {"cpu": 16 << 20, "cuda": 1 << 30}


def fp8_gradients(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, factor: Tensor, *, logits: torch.dtype, kernel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [N] fp32, gradient of hidden, gradient of weight) of `factor * sum(losses)`, as `Gradients` says.

    logits: what their fp32 sums are rounded to, once. kernel: whether kernels/loss.py makes what lies between the matmuls, else
    its definition. The gradient of the weight is summed in fp32 over all tokens and rounded once. An operand that is not finite
    makes losses that are not.
    """
    if missing := -len(labels_N) % _ROWS:
        pad = torch.nn.functional.pad
        given = pad(hidden_ND, (0, 0, 0, missing)), weight_VD, pad(labels_N, (0, missing), value=IGNORE), factor
        losses_N, grad_hidden_ND, grad_weight_VD = fp8_gradients(*given, logits=logits, kernel=kernel)
        return losses_N[:-missing], grad_hidden_ND[:-missing], grad_weight_VD
    hidden_ND, weight_VD = hidden_ND.contiguous(), weight_VD.contiguous()  # as kernels read their rows
    output, grad_input, grad_weight = RECIPES["fp8"].matmuls
    assert output is not None and grad_input is not None and grad_weight is not None
    N, V, wide = labels_N.shape[0], weight_VD.shape[0], wide_dtype(hidden_ND.dtype)
    hidden, weight = _both(hidden_ND, output.left), _both(padded(weight_VD), output.right)
    of_gradient, columns = grad_input.left, len(weight.matrix.codes)
    scale = gradient_scale(factor, of_gradient.format)
    losses_N, grad_hidden_ND = hidden_ND.new_empty(N, dtype=wide), torch.empty_like(hidden_ND)
    grad_weight_WD, apart_N, between = None, losses_N.new_empty(N), twin if kernel else definition
    rows, kept = _shares(N, V, hidden_ND.device.type, logits)

    def coded(codes: Tensor) -> Quantized:
        return Quantized(codes, scale, of_gradient.format, of_gradient.granularity, of_gradient.scaling)

    for begin in range(0, N, kept):
        end = min(N, begin + kept)
        for start in range(begin, end, rows):
            piece = slice(start, min(start + rows, end))
            left = replace(hidden.matrix, codes=hidden.matrix.codes[piece])
            logits_PV = scaled_matmul(left, weight.matrix, output.accumulator, logits)[:, :V]
            losses_N[piece], codes_PV, apart_N[piece] = between.softmax_codes(
                logits_PV, labels_N[piece], factor, scale, of_gradient.format
            )
            codes_PW = with_padding(codes_PV, columns)
            del logits_PV, codes_PV
            product_PD = scaled_matmul(coded(codes_PW), weight.transpose, grad_input.accumulator, wide)
            between.hidden_less_targets(
                product_PD, weight.matrix, labels_N[piece], apart_N[piece], grad_hidden_ND[piece]
            )
            if start == begin:  # not before: the memory of the first logits serves
                codes_WK = codes_PW.new_empty(columns, end - begin)
            turn_into(codes_WK[:, start - begin : piece.stop - begin], codes_PW)
            del codes_PW, product_PD
        right = replace(hidden.transpose, codes=hidden.transpose.codes[:, begin:end])
        product_WD = scaled_matmul(coded(codes_WK), right, grad_weight.accumulator, wide)
        grad_weight_WD = product_WD if grad_weight_WD is None else grad_weight_WD.add_(product_WD)
        del codes_WK, product_WD
    if grad_weight_WD is None:  # no token at all
        return losses_N, grad_hidden_ND, torch.zeros_like(weight_VD)
    between.weight_less_targets_(grad_weight_WD, hidden.matrix, labels_N, apart_N)
    return losses_N, grad_hidden_ND, grad_weight_WD[:V].to(weight_VD.dtype)


def _shares(rows: int, vocabulary: int, device_type: str, logits: torch.dtype) -> tuple[int, int]:
    """Rows of one piece, and of all whose codes are kept."""
    piece = piece_rows(rows, vocabulary, device_type, logits.itemsize)
    most = _KEPT_BYTES.get(device_type, _KEPT_BYTES["cpu"])
    return piece, piece * max(1, most // (piece * vocabulary))


def _both(x: Tensor, operand: Operand) -> Both:
    how = (operand.format, operand.granularity, operand.rounding)
    # told the largest magnitude, the kernel of `encode_both` makes the codes; elsewhere `quantize_both` finds it itself
    amax = largest([x], operand.granularity) if in_layouts([x], *how, operand.scaling) else None
    return quantize_both([x], *how, 0, operand.scaling, amax=amax)
