"""SGD with momentum."""

from __future__ import annotations

from typing import Any, ClassVar

from fewbits.numerics.update import sgd_
from fewbits.optim.base import Optimizer, Scalar, check_number


class SGD(Optimizer):
    """SGD with momentum as torch.optim.SGD has it (no dampening, no Nesterov), weight decay added to the gradient.

    params, master, compile: as AdamW's. With momentum=0 a parameter keeps no momentum_buffer.
    """

    moment_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    rule = staticmethod(sgd_)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        master: str = "auto",
        moments: str = "fp32",
        compile: bool | str = "auto",
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, master, moments, compile
        )

    def check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            check_number(name, group[name])

    def group_moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.moment_names if group["momentum"] else ()

    def scalars(self, group: dict[str, Any], lr: Scalar, n: Scalar) -> list[Scalar]:
        return [lr, group["weight_decay"], group["momentum"]]
