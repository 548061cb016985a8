"""What the linear layers of a model see on a text, block by block, each block after those before it were rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.nn.transformer import Block, Transformer


@dataclass
class Inputs:
    """Sums over the inputs x [K] of one linear layer."""

    squares_KK: Tensor
    """Sum of x x^T, fp32."""
    magnitude_K: Tensor
    """Sum of |x|, fp32."""
    tokens: int = 0

    @property
    def hessian(self) -> Tensor:
        """Mean of x x^T, fp32 [K, K]."""
        return self.squares_KK / max(1, self.tokens)

    @property
    def magnitude(self) -> Tensor:
        """Mean of |x|, fp32 [K]."""
        return self.magnitude_K / max(1, self.tokens)

    def add(self, x: Tensor) -> None:
        """Takes x [..., K] in."""
        x_NK = x.detach().reshape(-1, x.shape[-1]).float()
        self.squares_KK.addmm_(x_NK.t(), x_NK)
        self.magnitude_K += x_NK.abs().sum(0)
        self.tokens += len(x_NK)


Visit = Callable[[int, Block, dict[str, Inputs]], None]


@torch.no_grad()
def walk_blocks(model: Transformer, batches: Iterable[Mapping[str, Tensor]], visit: Visit) -> None:
    """Calls visit(i, block, inputs) for every block in order; inputs by the name of the linear layer in the block.

    `visit` may change the block, also its layers: what follows sees the outputs of the changed one. Only the activations
    between two blocks are held, one tensor a batch. batches: as `Transformer.loss_sum` takes them.
    """
    states = [_enter(model, batch) for batch in batches]
    for i, module in enumerate(model.blocks):
        block: Any = module
        with _listening(block) as inputs:
            for state in states:
                block(*state)
        visit(i, block, inputs)
        states = [(block(x, rotary, mask), rotary, mask) for x, rotary, mask in states]


class _Entered(Exception):
    """Carries what the first block is called with out of the model."""


def _enter(model: Transformer, batch: Mapping[str, Tensor]) -> tuple[Any, Any, Any]:
    """(x [B, T, D], rotary, mask) as the first block gets them."""

    def stop(module: nn.Module, arguments: Any) -> None:
        raise _Entered(*arguments)

    handle = model.blocks[0].register_forward_pre_hook(stop)
    place = next(model.parameters()).device
    found = {key: value.to(place) for key, value in batch.items()}
    try:
        model.hidden(found["input_ids"], found.get("documents"), found.get("positions"))
    except _Entered as entered:
        x, rotary, mask = entered.args
        return x, rotary, mask
    finally:
        handle.remove()
    raise AssertionError("a model without blocks")


@contextmanager
def _listening(block: nn.Module) -> Iterator[dict[str, Inputs]]:
    """Within, the inputs of every linear layer of the block are summed up."""
    found: dict[str, Inputs] = {}

    def listen(inputs: Inputs) -> Callable[[nn.Module, Any], None]:
        return lambda module, arguments: inputs.add(arguments[0])

    handles = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            zeros = torch.zeros(module.in_features, device=module.weight.device)
            found[name] = Inputs(torch.diag_embed(zeros), zeros.clone())
            handles.append(module.register_forward_pre_hook(listen(found[name])))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
