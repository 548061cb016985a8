"""One training step as one transaction: it is applied as a whole, or it changes nothing.

The loss is the mean over the real targets of all micro-batches: their number is taken first and divides the loss before
backward, so that splitting, padding or packing do not change it. One pass measures norm and finiteness; unscaling and
clipping are one factor inside the update; only then does the loss scale move. On CUDA the host never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.graph import StepGraph, graph_choice
from fewbits.kernels.heap import keep_freed_memory
from fewbits.nn.emulate import emulation, needed
from fewbits.nn.lowbit import held_weights
from fewbits.nn.scale_history import load_scale_history, scale_history, scales_known
from fewbits.nn.transformer import Transformer
from fewbits.numerics.keys import step_key, step_key_from
from fewbits.numerics.loss import IGNORE, gradient_factor
from fewbits.numerics.random import keyed_random, mix_key
from fewbits.numerics.wide import widen
from fewbits.optim.base import Optimizer
from fewbits.optim.clip import check_kind, coefficient
from fewbits.optim.loss_scale import LossScale, parse
from fewbits.optim.schedule import Schedule
from fewbits.precision.precision import Precision
from fewbits.precision.switches import torch_switches
from fewbits.ranges import BACKWARD, FORWARD, UPDATE, ranges_are_recorded, span

MicroBatch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, MicroBatch], Tensor]


class StepResult(NamedTuple):
    """What one step did, as 0-d tensors on the device: read them when you need them, reading waits."""

    loss: Tensor
    """Mean over the real targets of this step, before the update, in nats."""
    grad_norm: Tensor
    """Norm of the unscaled gradient before clipping, in the kind that clips (the 2-norm when clipping by value)."""
    loss_scale: Tensor
    """The scale that multiplied this loss."""
    applied: Tensor
    """Whether the update happened."""


def causal_loss(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Sum of the cross entropies over labels that are not -100, in fp32 or wider; labels are aligned with the outputs."""
    if isinstance(model, Transformer):
        return model.loss_sum(micro_batch)
    output = model(**{key: value for key, value in micro_batch.items() if key != "labels"})
    logits = widen(getattr(output, "logits", output))
    labels = micro_batch["labels"].flatten()
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels, ignore_index=IGNORE, reduction="sum")


def real_targets(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Number of real targets of the step, at least 1, 0-d, on the device: integer labels that are not -100, or all."""
    counts = [
        (labels.new_full((), labels.numel()) if labels.is_floating_point() else (labels != IGNORE).sum()).double()
        for labels in (micro_batch["labels"] for micro_batch in micro_batches)
    ]
    return torch.stack(counts).sum().clamp(min=1)


def check_micro_batches(model: nn.Module, loss: Loss, micro_batches: Sequence[MicroBatch]) -> None:
    """Raises FewbitsError for what no step can take. Nothing in it waits for a device."""
    if isinstance(micro_batches, Mapping):
        raise FewbitsError("a step takes a list of all its micro-batches and got one; write step([micro_batch]).")
    if not micro_batches:
        raise FewbitsError("a step got no micro-batches; give at least one.")
    for micro_batch in micro_batches:
        if "labels" not in micro_batch:
            raise FewbitsError(
                f"a micro-batch holds {', '.join(micro_batch) or 'nothing'} and no labels, by which a step counts its "
                "targets; add labels, aligned with the outputs, -100 where there is none."
            )
        if isinstance(model, Transformer) and loss is causal_loss:  # another loss knows its own labels
            model.check_batch(micro_batch)


class Step:
    """`step(micro_batches)`: forward, backward, unscale, clip, update, and the loss scale, in the only right order.

    Args:
        model: prepared by `fewbits.prepare` (an unprepared fp32 model will do for fp32).
        optimizer: one of fewbits, over the parameters of the model.
        precision: the one the model was prepared for.
        loss: `loss(model, micro_batch)` returns the sum over real targets in fp32 or wider; default `causal_loss`.
        clip: largest norm (or value); None or 0 does not clip.
        clip_kind: "norm" (2-norm), "inf" (largest element; the whole gradient is rescaled) or "value" (each element).
        loss_scale: a loss scale; default is the precision's.
        schedule: factor of the learning rate by number of applied steps; default constant.
        seed: keys the random numbers (dropout) of every micro-batch, together with the attempt.
        graph: "true" records the step as a CUDA graph and replays it, "auto" where that fits (see `graph_choice`). Then
            whoever changes what the host does in a step (hooks, say) after its first calls has to call `graph.forget`.

    Raises:
        FewbitsError: model, optimizer and precision contradict each other.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        precision: str | Precision,
        loss: Loss | None = None,
        clip: float | None = 1.0,
        clip_kind: str = "norm",
        loss_scale: LossScale | None = None,
        schedule: Schedule | None = None,
        seed: int = 0,
        graph: str = "false",
    ):
        self.precision = Precision.parse(precision) if isinstance(precision, str) else precision
        self.model, self.optimizer, self.loss, self.seed = model, optimizer, loss or causal_loss, seed
        self.parameters = check(model, optimizer, self.precision)
        if clip is not None and not 0 <= clip < float("inf"):
            raise FewbitsError(
                f"clip={clip} does not fit; give the largest allowed norm or value, or None to clip nothing."
            )
        self.clip, self.clip_kind = clip or None, check_kind(clip_kind)
        settle_master(optimizer, self.precision)
        self.device = self.parameters[0].device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.scale = loss_scale or parse(self.precision.loss_scale)
        self.scale.init(self.device)
        self.wide = self.precision.reduction.container
        table = [1.0] if schedule is None else schedule.table()
        self.lr_table = torch.as_tensor(table, dtype=torch.float64).to(self.device, self.wide)
        self.latched = torch.zeros((), dtype=torch.bool, device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.attempts = 0
        self.accumulators: dict[nn.Parameter, Tensor] = {}
        self.graph_choice = graph_choice(graph, model, self.device)
        self.graph: StepGraph | None = None
        if self.graph_choice.value:
            self.graph = StepGraph(self._take, self._fingerprint, self.device)
        self.keys: list[Tensor] = []
        """Mixed keys of the micro-batches on the device, where a graph reads them."""

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Takes one step over all micro-batches of it, each {"input_ids", "labels", ...} on the device of the model."""
        check_micro_batches(self.model, self.loss, micro_batches)
        if self.graph is None or ranges_are_recorded():  # what is replayed has no ranges: kernels would be nameless
            result = self._take(micro_batches)
        else:
            self._fill_keys(len(micro_batches))
            result = StepResult(*self.graph(micro_batches))
        self.attempts += 1
        return result

    def _take(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """The step but for its count; nothing in it waits for the device."""
        self._clear()  # what a step that was broken off, or somebody's own backward, has left is no part of this one
        scale = self.scale.value.clone()
        with torch_switches(self.precision, self.device), emulation(needed(self.model)), held_weights(self.model):
            loss = self._forward_backward(micro_batches, scale)
        gradients = self._gradients()
        inv_scale = scale.to(self.wide).reciprocal()
        with span(UPDATE):
            grad_norm = self.optimizer.grad_norm(gradients, self.clip_kind) * inv_scale
        finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
        applied = finite & ~self.latched
        factor, by_value = inv_scale, self.clip if self.clip_kind == "value" else None
        if self.clip is not None and by_value is None:
            factor = inv_scale * coefficient(grad_norm, self.clip)
        with span(UPDATE):
            self.optimizer.apply(
                factor=factor, applied=applied, lr_factor=self.lr_factor(), clip_value=by_value, gradients=gradients
            )
        self.latched |= ~torch.isfinite(loss) | (~finite & ~self.scale.can_cure())
        self.scale.update_(finite, hold=self.latched)
        self.skipped += ~applied
        self._clear()
        return StepResult(loss, grad_norm, scale, applied)

    @property
    def warm(self) -> bool:
        """Whether steps run as they will from now on: a graph is recorded, or none will be."""
        return self.graph is None or self.graph.settled

    @property
    def graph_outcome(self) -> Choice:
        """Whether steps are replayed from a graph, and why (not), as far as it was tried."""
        return self.graph_choice if self.graph is None else self.graph.choice

    def lr_factor(self) -> Tensor:
        """Factor of the learning rate for the next update, 0-d: the schedule at the number of applied steps."""
        index = self.optimizer.applied_steps.to(self.device).clamp(max=len(self.lr_table) - 1)
        return self.lr_table.index_select(0, index.view(1)).squeeze(0)

    def release(self) -> None:
        """Opens the latch: the host has looked at the non-finite loss or gradients and wants to go on."""
        self.latched.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Counters, latch and loss scale as plain numbers. Reading them waits for the device."""
        return {
            "attempts": self.attempts,
            "skipped": int(self.skipped),
            "latched": bool(self.latched),
            "loss_scale": self.scale.state_dict(),
            "scale_history": scale_history(self.model),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave, exactly."""
        self.attempts = int(state["attempts"])
        self.skipped.fill_(int(state["skipped"]))
        self.latched.fill_(bool(state["latched"]))
        self.scale.load_state_dict(state["loss_scale"])
        load_scale_history(self.model, state.get("scale_history", {}))

    def _forward_backward(self, micro_batches: Sequence[MicroBatch], scale: Tensor) -> Tensor:
        count = real_targets(micro_batches)
        factor = (scale.double() / count).to(self.wide)
        total = torch.zeros((), dtype=self.wide, device=self.device)
        for index, micro_batch in enumerate(micro_batches):
            with self._keyed(index), gradient_factor(factor):
                with span(FORWARD):
                    loss_sum = self.loss(self.model, micro_batch)
                if loss_sum.dtype.itemsize < 4:
                    raise FewbitsError(f"the loss came as {loss_sum.dtype}; return the sum over real targets in fp32.")
                # the very number that was announced arrives in the head, which then knows without asking the device
                with span(BACKWARD):
                    loss_sum.backward(factor.to(loss_sum.dtype).expand_as(loss_sum))  # type: ignore[no-untyped-call]
            total += loss_sum.detach()
            if len(micro_batches) > 1:
                self._accumulate()
        return total / count.to(self.wide)

    @contextmanager
    def _keyed(self, index: int) -> Iterator[None]:
        """Within, random numbers come from (seed, attempt, index). What a graph records reads its key from the device."""
        if self.graph is not None and self.graph.recording:
            with step_key_from(self.keys[index]):
                yield
            return
        key = (self.seed, self.attempts, index)
        with keyed_random(self.device, *key), step_key(self.device, *key):
            yield

    def _fill_keys(self, count: int) -> None:
        while len(self.keys) < count:
            self.keys.append(torch.zeros((), dtype=torch.int64, device=self.device))
        for index in range(count):
            self.keys[index].fill_(mix_key(self.seed, self.attempts, index))

    def _fingerprint(self) -> object:
        """What a graph of this step has in it beside the micro-batches: addresses, and numbers of the host."""
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        tensors = [
            *self.parameters,
            *(state for p in self.parameters for state in _tensors(self.optimizer.state.get(p, {}))),
        ]
        addresses = [t.data_ptr() for t in tensors]
        known = scales_known(self.model)
        return addresses, repr(groups), self.clip, self.clip_kind, self.seed, self.model.training, known

    @torch.no_grad()
    def _accumulate(self) -> None:
        """Moves 16-bit gradients into fp32 accumulators: in bf16, 256 + 1 = 256. Wider ones add up in .grad itself."""
        for parameter in self.parameters:
            if parameter.grad is None or parameter.grad.dtype.itemsize >= 4:
                continue
            if parameter in self.accumulators:
                self.accumulators[parameter] += parameter.grad
            else:
                self.accumulators[parameter] = parameter.grad.float()
            parameter.grad = None

    def _gradients(self) -> dict[nn.Parameter, Tensor]:
        """The gradient of every parameter that got one, from its accumulator or its .grad."""
        found = {}
        for parameter in self.parameters:
            if parameter.grad is not None:
                found[parameter] = parameter.grad
            elif parameter in self.accumulators:
                found[parameter] = self.accumulators[parameter]
        if not found:
            raise FewbitsError("no parameter got a gradient; the loss does not depend on the parameters of the model.")
        return found

    def _clear(self) -> None:
        self.accumulators.clear()
        for parameter in self.parameters:
            parameter.grad = None


def _tensors(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def settle_master(optimizer: Optimizer, precision: Precision) -> None:
    """Settles the optimizer's master="auto" on the precision's kind; raises FewbitsError where the two contradict."""
    settled = optimizer.resolve_master(precision.resolved_master().value)
    if "auto" not in (precision.master, settled) and precision.master != settled:
        raise FewbitsError(
            f"{precision} asks for master={precision.master!r} and the optimizer was made with {settled!r}; "
            "use master='auto' for one of them."
        )


def check(model: nn.Module, optimizer: Optimizer, precision: Precision) -> list[nn.Parameter]:
    """The trainable parameters of `model`; raises FewbitsError where model, optimizer and precision contradict."""
    if not isinstance(optimizer, Optimizer):
        raise FewbitsError(
            f"Step got {type(optimizer).__module__}.{type(optimizer).__name__}, which keeps neither master weights nor "
            "fp32 moments; use fewbits.AdamW or fewbits.SGD."
        )
    prepared = getattr(model, "fewbits_precision", None)
    if prepared is None and precision.name not in ("fp32", "tf32"):
        raise FewbitsError(
            f"the model is not prepared; call fewbits.prepare(model, '{precision}') before the optimizer is made."
        )
    if prepared is not None and prepared.working != precision.working:
        raise FewbitsError(
            f"the model is prepared as {prepared} and Step was given {precision}; use one of them for both."
        )
    mine = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not mine:
        raise FewbitsError("the model has no trainable parameter; set requires_grad on what should learn.")
    if len(devices := {parameter.device for parameter in mine}) > 1:
        raise FewbitsError(f"the parameters lie on {', '.join(map(str, devices))}; move the model to one device.")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if missing := [names[id(p)] for p in mine if id(p) not in held]:
        raise FewbitsError(
            f"the optimizer does not hold {missing[0]} (and {len(missing) - 1} more); give it all trainable parameters, "
            "or set requires_grad to False on what should stay."
        )
    if held - set(names):
        raise FewbitsError("the optimizer holds parameters of another model; make it from this model's parameters.")
    return mine
