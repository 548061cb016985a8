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


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    params: parameters, named parameters or groups; decay applies to all it is given: group them to spare norms.
    master: "auto" (split for bf16, fp32 for fp16, none for fp32 and fp64), "fp32", "split", "none". moments: "fp32".
    compile: "auto" compiles the update on CUDA where Triton is installed; True and False force it.
    """

    moment_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    rule = staticmethod(adamw_)

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

    def check_group(self, group: dict[str, Any]) -> None:
        _check_adam(group)

    def cpu_rule(self, group: dict[str, Any], lr: float, n: int) -> Rule | None:
        return _fused("_fused_adamw_", group, lr, n)

    def scalars(self, group: dict[str, Any], lr: Scalar, n: Scalar) -> list[Scalar]:
        return [1 - lr * group["weight_decay"], 0.0, *_adam_scalars(group, lr, n)]


class Adam(Optimizer):
    """Adam (Kingma & Ba 2015), weight decay added to the gradient. Arguments as AdamW's."""

    moment_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    rule = staticmethod(adam_)

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

    def check_group(self, group: dict[str, Any]) -> None:
        _check_adam(group)

    def cpu_rule(self, group: dict[str, Any], lr: float, n: int) -> Rule | None:
        return _fused("_fused_adam_", group, lr, n)

    def scalars(self, group: dict[str, Any], lr: Scalar, n: Scalar) -> list[Scalar]:
        return [1.0, group["weight_decay"], *_adam_scalars(group, lr, n)]


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


def _adam_scalars(group: dict[str, Any], lr: Scalar, n: Scalar) -> list[Scalar]:
    beta1, beta2 = group["betas"]
    correction1, correction2 = 1 - beta1**n, 1 - beta2**n
    return [1 - beta1, beta2, 1 - beta2, correction2**0.5, group["eps"], lr / correction1]


def _check_adam(group: dict[str, Any]) -> None:
    check_number("lr", group["lr"])
    check_number("weight_decay", group["weight_decay"])
    check_number("eps", group["eps"])
    betas = group["betas"]
    if len(betas) != 2 or not all(isinstance(beta, float | int) and 0 <= beta < 1 for beta in betas):
        raise FewbitsError(f"betas={betas!r} do not fit; use two numbers from 0 to below 1, such as (0.9, 0.95).")
