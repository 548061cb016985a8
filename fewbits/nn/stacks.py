"""What layers=auto times beside single layers: a short stack of the model's own blocks, with what layers alone chose.

What a layer reads may come as codes from the norm or the activation before it, which a layer alone does not show. Blocks of
a model differ in what `keep` leaves of them: those that are alike are timed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from fewbits.choice import Choice
from fewbits.nn.candidates import BF16
from fewbits.nn.linear import unheard
from fewbits.nn.plan import make_plan
from fewbits.nn.timing import Times
from fewbits.nn.transformer import AT_ONCE, Block, ModelConfig, Transformer
from fewbits.precision.precision import Precision

PICKED, WHOLE = "picked", "whole"
"""The ways of a stack that are timed: as its layers chose alone, and with the whole recipe in all of them."""
BLOCKS = 2  # of a stack: the second has what a block does with the sum that the first leaves to it
_VOCABULARY = 64  # of a stack, which has an embedding and never looks anything up


@dataclass(frozen=True)
class Stack:
    """Blocks of a model that are alike, as few of them as show how a step runs through all.

    config: of the stack, equal for models that differ in nothing that costs time. tokens: rows in one call. recipe:
    canonical text. picks: what each layer that the recipe takes chose alone, canonical text or "bf16", by name within the
    block. formats: that of modules stored in one of their own, by name within the block. at_once: whether the model has so
    few blocks that a compiler takes them all as one graph, where none is in few bits.
    """

    config: ModelConfig
    tokens: int
    recipe: str
    picks: tuple[tuple[str, str], ...]
    formats: tuple[tuple[str, str], ...] = ()
    at_once: bool = False

    @property
    def open(self) -> bool:
        """Whether any layer chose something else than the recipe, so that there is something to decide."""
        return any(value != self.recipe for _, value in self.picks)

    @property
    def in_bf16(self) -> bool:
        """Whether every layer chose bf16."""
        return all(value == BF16 for _, value in self.picks)


MeasureBlocks = Callable[[Stack], Times]
"""What times both ways of a stack: milliseconds, round by round. Raises NoTimes."""


class NoTimes(Exception):
    """A way of a stack does not run here, or not now."""


def stacks(
    model: nn.Module, precision: Precision, tokens: int, keep: Iterable[str], layers: Mapping[str, Choice]
) -> dict[Stack, list[str]]:
    """The stacks of `model` that leave something to decide, each with the names of the model's blocks that are so; none for
    a model that is not exactly ours. layers: what each layer chose alone; the others as `shapes` takes them."""
    if not isinstance(model, Transformer) or not _unchanged(model):
        return {}
    config, exceptions = _short(model.config, tokens), make_plan(model, precision, keep).exceptions
    found: dict[Stack, list[str]] = {}
    for number in range(len(model.blocks)):
        block = f"blocks.{number}"
        picks = _within(block, {name: choice.value for name, choice in layers.items()})
        formats = _within(block, {name: str(format) for name, (format, _) in exceptions.items()})
        stack = Stack(config, tokens, str(precision.recipe), picks, formats, len(model.blocks) <= AT_ONCE)
        if stack.open:
            found.setdefault(stack, []).append(block)
    return found


def _within(block: str, values: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    prefix = f"{block}."
    return tuple((name.removeprefix(prefix), value) for name, value in values.items() if name.startswith(prefix))


def _short(config: ModelConfig, tokens: int) -> ModelConfig:
    """The config of a stack: whatever costs no time is the same for all models."""
    return replace(
        config,
        n_layer=min(BLOCKS, config.n_layer),
        context=min(config.context, tokens),
        n_kv_head=config.kv_heads,
        n_ff=config.ff,
        vocab_size=_VOCABULARY,
        tied=True,
        rope_theta=ModelConfig.rope_theta,
        norm_eps=ModelConfig.norm_eps,
    )


def _unchanged(model: Transformer) -> bool:
    """Whether the model is what its config says: nothing was replaced, and nobody listens."""
    with torch.device("meta"):
        fresh = _parts(Block(model.config))
    return type(model) is Transformer and all(
        _parts(block) == fresh and all(unheard(module) for module in block.modules()) for block in model.blocks
    )


def _parts(block: nn.Module) -> list[tuple[str, type[nn.Module], list[torch.Size]]]:
    return [
        (name, type(module), [parameter.shape for parameter in module.parameters(recurse=False)])
        for name, module in block.named_modules()
    ]
