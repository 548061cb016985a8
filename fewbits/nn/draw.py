"""What quantizing operands takes and gives beside them: random numbers, the maxima of earlier steps, and those of this one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.kernels.activation import activate_backward, activate_codes
from fewbits.kernels.dispatch import encode_both, encode_noting, in_layouts, largest, quantize, quantize_both
from fewbits.kernels.layouts import Known
from fewbits.nn.scale_history import ACTIVATION, GRADIENT, WEIGHT, Delayed
from fewbits.numerics.hadamard import random_hadamard
from fewbits.numerics.quantize import Both, Key, Quantized, encode
from fewbits.numerics.scaling import power_of_two_scale
from fewbits.precision.recipe import Operand

# added to a layer's key, so that each of its operands draws its own numbers; the Hadamard signs of a pair are the same
_SITES = {"output": 0x1F3, "grad_input": 0x2E5, "grad_weight": 0x4C9, "hadamard": 0x8B7}


class Draw(NamedTuple):
    """What quantizing an operand draws from beside the operand: random numbers, and the maxima of earlier steps."""

    key: Tensor | None = None
    delayed: Delayed = Delayed()

    @staticmethod
    def of(key: Tensor | None, *delayed: Tensor | None) -> Draw:
        """Of tensors, one by one as they go through autograd."""
        return Draw(key, Delayed(*delayed))

    @staticmethod
    def of_backward(grad_maximum: Tensor | None, key: Tensor | None, *earlier: Tensor | None) -> Draw:
        """Of what autograd keeps, and of the maximum, which it must not keep: another backward pass may have raised it."""
        return Draw(key, Delayed(None, grad_maximum, *earlier))

    @property
    def known(self) -> bool:
        """Whether scales were known before the step."""
        return self.delayed.scale is not None

    def quantized(self, x: Tensor, operand: Operand, site: str, role: int) -> Quantized:
        """A matrix as an operand of the matmul named `site`, in the role ACTIVATION, WEIGHT or GRADIENT."""
        if operand.hadamard and self.key is not None:
            x = random_hadamard(x, self.key ^ _SITES["hadamard"])
        how = (operand.format, operand.granularity, operand.rounding, self._seed(site), operand.scaling)
        if operand.scaling not in ("delayed", "unit"):
            return quantize(x, *how)
        early, scale = self._scales(x.shape, largest([x], operand.granularity), operand, site, role)
        return Quantized(encode(x, early, *how), scale, operand.format, operand.granularity, operand.scaling)

    def both(
        self,
        parts: Sequence[Tensor],
        operand: Operand,
        site: str,
        role: int,
        sums: bool = False,
        amax: Tensor | None = None,
    ) -> Both:
        """`quantized` with its transpose, for operands that two matmuls share; parts, sums, amax: see `quantize_both`. Under a
        known scale the codes are made without asking for the largest magnitude, which comes with them."""
        how = (operand.format, operand.granularity, operand.rounding, self._seed(site), operand.scaling)
        if operand.scaling not in ("delayed", "unit"):
            return quantize_both(parts, *how, sums, amax)
        if self.known and operand.scaling == "delayed" and in_both_layouts(parts, operand):
            scale, format, maximum = self.known_to_kernel(operand, role)
            return encode_noting(parts, scale, format, operand.granularity, operand.scaling, sums, maximum)
        amax = largest(parts, operand.granularity) if amax is None else amax
        early, scale = self._scales(parts[0].shape, amax, operand, site, role)
        return encode_both(parts, early, *how, sums).under(scale)

    def _seed(self, site: str) -> Key:
        return 0 if self.key is None else self.key ^ _SITES[site]

    def _scales(
        self, shape: Sequence[int], amax: Tensor, operand: Operand, site: str, role: int
    ) -> tuple[Tensor, Tensor]:
        """The scale under which an operand is encoded that is not scaled by its own maximum, amax, noting that one; and the
        scale of its codes: the same, but `honest`. shape: of a weight.

        Where it is `known` that there is an earlier maximum, the first does not depend on this one.
        """
        if operand.scaling == "unit":
            contraction = max(1, shape[1 - (site == "grad_input")])
            scale = torch.full_like(amax, 2.0 ** round(-0.5 * math.log2(contraction)) if role == WEIGHT else 1.0)
        elif self._maximum(role) is None:
            scale = power_of_two_scale(amax, operand.format.max)
        else:
            self.raise_maximum(amax, role)
            scale = self.early(operand, role)
            if self.delayed.largest is not None:  # nothing is before the first step
                found = self.delayed.largest[role] > 0
                scale = torch.where(found, scale, power_of_two_scale(amax, operand.format.max))
        marked = honest(scale, amax)
        return scale if self.known else marked, marked

    def early(self, operand: Operand, role: int) -> Tensor:
        """The delayed scale of a role, of the maxima of the steps before: fp32 [1, 1]."""
        known = self.delayed.grad_scale if role == GRADIENT else self.delayed.scale
        if known is None:
            assert self.delayed.largest is not None
            known = power_of_two_scale(self.delayed.largest[role].view(1, 1), operand.format.max)
        return known

    def raise_maximum(self, amax: Tensor, role: int) -> None:
        """Notes a maximum of this step, where scales are delayed."""
        maximum = self._maximum(role)
        if maximum is not None:
            maximum.copy_(torch.maximum(maximum, amax))

    def copy_maximum(self, other: Draw, role: int) -> None:
        """Notes what another layer has noted of an operand that is the same."""
        amax = other._maximum(role)
        if amax is not None:
            self.raise_maximum(amax, role)

    def _maximum(self, role: int) -> Tensor | None:
        return self.delayed.grad_maximum if role == GRADIENT else self.delayed.maximum

    def known_to_kernel(self, operand: Operand, role: int) -> Known:
        """What a kernel is told that makes codes under a known scale."""
        maximum = self._maximum(role)
        assert maximum is not None
        return Known(self.early(operand, role), operand.format, maximum)

    def of_kernel(
        self, codes: Tensor, codes_t: Tensor, operand: Operand, role: int, sums: Tensor | None = None
    ) -> Both:
        """Codes that a kernel has made under a known scale, in which what is not finite is NaN."""
        scale = self.early(operand, role)
        return Both.of(Quantized(codes, scale, operand.format, operand.granularity, operand.scaling), codes_t, sums)


def coded(name: str, inputs: Sequence[Tensor], operand: Operand, draw: Draw) -> Quantized:
    """The result of an activation as an operand whose delayed scale is known: codes that are written without its values."""
    known = draw.known_to_kernel(operand, ACTIVATION)
    codes = activate_codes(name, known, *inputs)
    return Quantized(codes, known.scale, operand.format, operand.granularity, operand.scaling)


def coded_backward(
    name: str, inputs: Sequence[Tensor], hidden: Operand, its: Draw, operand: Operand, draws: Sequence[Draw], sums: bool
) -> tuple[Tensor, list[Both]]:
    """The codes that `coded` made of an activation as the operand `hidden`, transposed, and its gradients as operands of
    `draws`, likewise written without their values; names of activations with "_backward" behind them."""
    known = [draw.known_to_kernel(operand, GRADIENT) for draw in draws]
    scale = its.early(hidden, ACTIVATION)
    hidden_t, made = activate_backward(name, scale, hidden.format, known, sums, *inputs)
    gradients = [
        draw.of_kernel(one.codes, one.codes_t, operand, GRADIENT, one.sums)
        for draw, one in zip(draws, made, strict=True)
    ]
    return hidden_t, gradients


def honest(scale: Tensor, amax: Tensor) -> Tensor:
    """The scale of codes of something whose largest magnitude is amax: NaN where that is not finite, because saturating must
    not hide an infinity."""
    return torch.where(amax.isfinite(), scale, math.nan)


def in_both_layouts(parts: Sequence[Tensor], operand: Operand) -> bool:
    """Whether a kernel makes the codes of an operand, or of parts of its columns, in both layouts."""
    return in_layouts(parts, operand.format, operand.granularity, operand.rounding, operand.scaling)
