"""The linear layer that multiplies in the format of its weight, natively or emulated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewbits.kernels.dispatch import emulated
from fewbits.nn.fake import LEARNED, fake_linear, hold_fake
from fewbits.nn.lowbit import Codes, HeldWeight, hold, lowbit_linear, recipe_of
from fewbits.nn.scale_history import Delayed, ScaleHistory
from fewbits.numerics.keys import current_key
from fewbits.numerics.matmul import emulated_linear

FORMAT_OF = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, tf32: bool = False) -> Tensor:
    """x [..., K] times weight [O, K] plus bias [O]: [..., O], in the format and dtype of the weight.

    What enters is cast to that format. Where the device does not multiply it at a useful speed, operands are widened and
    multiplied in fp32. `tf32` rounds fp32 operands to tf32 on a CPU; on CUDA torch's switch does it.
    """
    x = x.to(weight.dtype)
    name = FORMAT_OF.get(weight.dtype)
    tf32 = tf32 and weight.dtype == torch.float32 and x.device.type == "cpu"
    if tf32 or (name is not None and emulated(name, x.device.type)):
        return emulated_linear(x, weight, bias, tf32=tf32)
    return nn.functional.linear(x, weight, bias)


def unheard(layer: nn.Module) -> bool:
    """Whether nobody listens to the calls of a layer, so that what it does may become part of something larger. Who listens to
    all modules there are, as a FLOP counter does, is not asked: it would change what it counts."""
    heard = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not heard


class Linear(nn.Linear):
    """`nn.Linear` whose three matmuls run in the format of the weight, as `linear` says, or in few bits by a recipe."""

    tf32: bool = False
    recipe: str = ""
    """Canonical text of a `Recipe` for the three matmuls; "" multiplies in the working format."""
    fake: bool = False
    """Whether the recipe is one of quantization-aware training."""
    held: HeldWeight | None = None
    """Codes of the weight as long as a step holds it still (see `held_weights`)."""
    chained: bool = False
    """Whether what makes its operands may hand over more than values within that step (see `chains`)."""
    history: ScaleHistory | None = None
    """What recipes with delayed scaling look back on."""

    def forward(self, x: Tensor, codes: Codes | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features], in the dtype of the weight. codes: those of x, for one that
        `takes_codes`."""
        if not self.recipe:
            return linear(x, self.weight, self.bias, self.tf32)
        if self.fake:
            held, learned = self.held or HeldWeight(), getattr(self, LEARNED, None)
            return fake_linear(x, self.weight, self.bias, learned, *held[:2], self.recipe)
        return self._lowbit(x, codes=codes)  # type: ignore[no-any-return]

    def takes_codes(self) -> bool:
        """Whether who makes the input may make its codes instead, under the scale of the history: in training, within a step,
        from the third on."""
        return self.chained and self.knows_scales() and self.learns_unheard()

    def knows_scales(self) -> bool:
        """Whether its delayed scales were known before this step."""
        return self.history is not None and self.history.known

    def learns_unheard(self) -> bool:
        """Whether it is in training and nobody listens to it."""
        return torch.is_grad_enabled() and self.weight.requires_grad and unheard(self)

    def splits(self, x: Tensor) -> bool:
        """Whether `split` takes x now: in few bits, in training, nobody listening to the whole product."""
        return bool(self.recipe) and not self.fake and x.numel() > 0 and self.learns_unheard()

    def split(self, x: Tensor, widths: tuple[int, ...], codes: Codes | None = None) -> tuple[Tensor, ...]:
        """`forward` in parts [..., width] of its last axis, views of one product: as one node of autograd, so that a kernel may
        read their gradients where they lie."""
        return self._lowbit(x, widths, codes)  # type: ignore[no-any-return]

    def _lowbit(self, x: Tensor, widths: tuple[int, ...] = (), codes: Codes | None = None) -> Any:
        site = getattr(self, "site", None)  # a buffer, 0-d int64, of layers whose recipe draws random numbers
        key = None if site is None else current_key(x.device) ^ site
        held = self.held or HeldWeight()
        # outside a step there is nothing to look back on, and operands are scaled by what they are
        history = self.history if self.held is not None else None
        delayed = Delayed() if history is None else history.delayed
        ours, turned = codes or (None, None)
        inputs = (x, self.weight, self.bias, *held, key, *delayed)
        return lowbit_linear(*inputs, self.recipe, widths, ours, turned)

    def hold(self) -> HeldWeight:
        """The codes of the weight as it is now."""
        if self.fake:
            return hold_fake(self.weight, getattr(self, LEARNED, None), self.recipe)
        return hold(self.weight, recipe_of(self.recipe), Delayed() if self.history is None else self.history.of_weight)
