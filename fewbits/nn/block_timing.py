"""How long a short stack of a model's blocks takes as its layers chose alone, and with the whole recipe in all of them.

Both go the way that a training goes, eager or compiled: there a norm or an activation may write the codes that the next
layer reads, and the sum of a block joins the norm of the one after it. Under delayed scales that happens once scales are
known, which they are before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.choice import Choice
from fewbits.kernels.heap import keep_freed_memory
from fewbits.nn.candidates import BF16
from fewbits.nn.plan import takes
from fewbits.nn.prepare import prepare
from fewbits.nn.stacks import PICKED, WHOLE, NoTimes, Stack
from fewbits.nn.timing import (
    MOST_PARTS,
    WARM,
    LayerTimer,
    Times,
    calls_for,
    clock,
    drop_copies,
    flops_limit,
    free,
    own_random_numbers,
    race,
    recorded,
    training_step,
)
from fewbits.nn.transformer import Transformer
from fewbits.precision.precision import Precision
from fewbits.precision.switches import torch_switches


@dataclass(frozen=True)
class BlockTimer:
    """The `MeasureBlocks` that times on a device. layers: says how; what times layers alone."""

    layers: LayerTimer

    def __call__(self, stack: Stack) -> Times:
        """Milliseconds by way. Raises NoTimes for whatever a compiler or a library throws."""
        device = self.layers.device
        if device.type == "cpu":
            keep_freed_memory()
        try:
            with own_random_numbers(device), torch_switches(Precision.parse("bf16-mixed"), device):
                return self._times(stack)
        except Exception as error:
            raise NoTimes(str(error)) from error
        finally:
            free(device)

    def _times(self, stack: Stack) -> Times:
        device, config = self.layers.device, stack.config
        parts, sequences = size(stack, self.layers.micro_batches, device)
        x, grad = (
            torch.randn(sequences, config.context, config.n_embd, device=device).mul_(deviation).to(torch.bfloat16)
            for deviation in (1.0, 1e-3)
        )
        steps = {}
        for way, values in {PICKED: dict(stack.picks), WHOLE: dict.fromkeys(dict(stack.picks), stack.recipe)}.items():
            step = block_step(prepared(stack, values, device, self.layers.mode), x, grad, parts)
            for _ in range(warm_steps(stack)):
                step()
            steps[way] = recorded(step, device) if self.layers.graph else step
        calls = calls_for(steps[PICKED], device)
        clocks = {way: clock(step, calls, device) for way, step in steps.items()}
        return race(clocks, PICKED, self.layers.rounds, hopeless=self.layers.hopeless)


def size(stack: Stack, micro_batches: int, device: torch.device) -> tuple[int, int]:
    """Micro-batches of a timed step, and the sequences of one: halved while their FLOPs are beyond what a call may take,
    sequences first; a weight's codes cost more then, which favours bf16 a little."""
    T = stack.config.context
    parts, sequences = min(micro_batches, MOST_PARTS), max(1, stack.tokens // T)
    limit, flops = flops_limit(device), stack.config.flops_per_token(T) * T
    while parts * sequences * flops > limit and parts * sequences > 1:
        if sequences > 1:
            sequences //= 2
        else:
            parts //= 2
    return parts, sequences


def warm_steps(stack: Stack) -> int:
    """Steps before anything is timed. Under delayed scales the first WARM end with one whose scales are known, which runs
    other code: as many again, so that what it runs is compiled and tuned."""
    return WARM * (1 + Precision.parse(stack.recipe).recipe.delayed)


def prepared(stack: Stack, values: Mapping[str, str], device: torch.device, mode: str) -> Transformer:
    """The stack as a model in training. values: what each layer multiplies in, by name within a block."""
    model, precision = Transformer(stack.config), Precision.parse(stack.recipe).replace(layers="auto")
    keep = [f"blocks.{i}.{name}={format}" for i in range(stack.config.n_layer) for name, format in stack.formats]
    layers = {f"blocks.{i}.{name}": value for i in range(stack.config.n_layer) for name, value in values.items()}
    # what the stack has and `keep` left out of the model's recipe is in bf16
    layers = dict.fromkeys(takes(model, precision, keep), BF16) | layers
    prepare(model.to(device), precision, keep, {name: Choice(value, "timed") for name, value in layers.items()})
    drop_copies(model)
    if mode == "compiled":
        model.compile_blocks(at_once=stack.at_once)
    return model


def block_step(model: Transformer, x: Tensor, grad: Tensor, parts: int) -> Callable[[], None]:
    """What a training step does in a stack."""
    return training_step(model, model.through_blocks, x, grad, parts)
