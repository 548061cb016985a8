"""AdamW and Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.errors import FewbitsError
from fewbits.numerics.update import adam_, adamw_
from fewbits.optim.base import Optimizer, Scalar, check_number
from fewbits.optim.engine import Rule


class _AdamLike(Optimizer):
    """What AdamW and Adam share: everything but where the weight decay goes. Not for use by itself."""

    moment_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    fused: ClassVar[str]
    """The name of torch's kernel for a CPU."""

    def check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay", "eps"):
            check_number(name, group[name])
        betas = group["betas"]
        if len(betas) != 2 or not all(isinstance(beta, float | int) and 0 <= beta < 1 for beta in betas):
            raise FewbitsError(f"betas={betas!r} do not fit; use two numbers from 0 to below 1, such as (0.9, 0.95).")

    def cpu_rule(self, group: dict[str, Any], lr: float, n: int) -> Rule | None:
        return _fused(self.fused, group, lr, n)

    def scalars(self, group: dict[str, Any], lr: Scalar, n: Scalar) -> list[Scalar]:
        beta1, beta2 = group["betas"]
        correction1, correction2 = 1 - beta1**n, 1 - beta2**n
        decay = group["weight_decay"]
        return [1 - lr * decay, decay, 1 - beta1, beta2, 1 - beta2, correction2**0.5, group["eps"], lr / correction1]


class AdamW(_AdamLike):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    params: parameters, named parameters or groups; decay applies to all it is given: group them to spare norms.
    master: "auto" (split for bf16, fp32 for fp16, none for fp32 and fp64), "fp32", "split", "none". moments: "fp32".
    compile: "auto" updates by one Triton kernel on CUDA; True compiles the definition with torch.compile, False runs it.
    """

    rule = staticmethod(adamw_)
    fused = "_fused_adamw_"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        master: str = "auto",
        moments: str = "fp32",
        compile: bool | str = "auto",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, master, moments, compile)


class Adam(_AdamLike):
    """Adam (Kingma & Ba 2015), weight decay added to the gradient. Arguments as AdamW's."""

    rule = staticmethod(adam_)
    fused = "_fused_adam_"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        master: str = "auto",
        moments: str = "fp32",
        compile: bool | str = "auto",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, master, moments, compile)


def _fused(name: str, group: dict[str, Any], lr: float, n: int) -> Rule | None:
    """torch's fused CPU kernel as a rule: the arithmetic of `rule` in one pass, rounded a little differently.

    It treats whole vectors and the tail of a tensor alike only up to rounding: the engine gives it no tails.
    """
    kernel = getattr(torch, name, None)
    if kernel is None:
        return None
    beta1, beta2 = group["betas"]
    options = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"], "eps": group["eps"]}
    step = torch.tensor(float(n))

    def rule(weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], scalars: Tensor) -> None:
        lists = [[weight], [gradient], [moments[0]], [moments[1]], [], [step]]
        kernel(*lists, **options, amsgrad=False, maximize=False)

    return rule
