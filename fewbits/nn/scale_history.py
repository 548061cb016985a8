"""Delayed scaling: what the layers of a model look back on, and what the host may take for granted of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.kernels.dispatch import layouts_execution
from fewbits.numerics.scaling import power_of_two_scale

ACTIVATION, WEIGHT, GRADIENT = range(3)
"""The roles of a layer's operands: rows of its history."""


class Delayed(NamedTuple):
    """What a layer with delayed scaling gives and takes, all fp32, and each a tensor of its own (`_alone`), because a compiled
    graph copies one that both a forward and a backward pass change, and hands no part of one to a matmul.

    maximum, grad_maximum: [1, 1], raised to the largest magnitude of the activation (of the weight, where it is quantized)
    and of the gradient. largest: [3] by role, those of earlier steps; or, where they are known, scale, grad_scale: [1, 1],
    scales that were made of them.
    """

    maximum: Tensor | None = None
    grad_maximum: Tensor | None = None
    largest: Tensor | None = None
    scale: Tensor | None = None
    grad_scale: Tensor | None = None


class ScaleHistory:
    """Delayed scaling: the largest magnitudes of a layer's activation, weight and gradient over the last steps.

    Within a step, operands are scaled by the largest of the steps before it and the maxima of this one are noted (NVIDIA's
    delayed scaling, as in Micikevicius et al. 2022). window: fp32 [3, steps], newest last; largest: fp32 [3]; maxima: fp32
    [1, 1] by role. A maximum of 0 says nothing about a scale, no more than one that is not finite: the largest of the window
    joins it in its place, so that a role that once had a maximum always has one.
    From the first step on, they lie in the tensors of a `ScaleStore`, which says when all of its largest are `known` to be
    there: kernels then write codes as they go, and need no look at the whole tensor first. limits: the largest number of the
    format that each role is in, 0 where its operands differ; where there are limits, what is known is known as scales, fp32
    [1, 1] by role, made for all layers at once.
    """

    STEPS = 16

    def __init__(self, window: Tensor | None = None, limits: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        self.window = torch.zeros(3, self.STEPS) if window is None else window
        self.limits = limits
        self.largest = torch.zeros(3)
        self.scales = [torch.zeros(1, 1) for _ in range(3)]
        self.maxima = [torch.zeros(1, 1) for _ in range(3)]
        self.known = False
        self.store: ScaleStore | None = None

    def __reduce__(self) -> tuple[type[ScaleHistory], tuple[Tensor, tuple[float, float, float]]]:
        return ScaleHistory, (self.window.clone(), self.limits)  # a copy of a layer looks back on its own

    @property
    def delayed(self) -> Delayed:
        """What the matmuls of the layer give and take."""
        notes = (self.maxima[ACTIVATION], self.maxima[GRADIENT])
        if self.known:
            return Delayed(*notes, None, self.scales[ACTIVATION], self.scales[GRADIENT])
        return Delayed(*notes, self.largest)

    @property
    def of_weight(self) -> Delayed:
        """What quantizing the weight gives and takes."""
        return Delayed(self.maxima[WEIGHT], None, self.largest)


class ScaleStore:
    """The histories of many layers in one tensor a kind, so that a step begins and ends in a handful of launches for all of
    them: fp32 window [layers, 3, steps], largest [layers, 4], scales and maxima [layers, 4, 4] (16 bytes from one tensor of a
    layer to the next, without which a compiled graph would copy them; what lies between is not used)."""

    def __init__(self, histories: list[ScaleHistory], device: torch.device) -> None:
        self.histories = histories
        self.window = torch.stack([history.window.to(device) for history in histories])
        self.largest = torch.zeros(len(histories), 4, device=device)
        self.scales, self.maxima = torch.zeros(2, len(histories), 4, 4, device=device)
        for i, history in enumerate(histories):
            history.store, history.window = self, self.window[i]
            history.largest = self.largest[i, :3].data  # .data counts changes of its own, as what is `_alone` does
            history.scales, history.maxima = (
                [_alone(places[i, role, 0]) for role in range(3)] for places in (self.scales, self.maxima)
            )
        self._given = [scale for history in histories for scale in history.scales]
        self._know(False)
        limited = all(all(history.limits) for history in histories)
        self._watching = limited and layouts_execution(device).value == "kernel"  # others gain nothing by it
        self._limits = torch.tensor([[*history.limits, 0.0] for history in histories], device=device)
        self._formats = sorted({limit for history in histories for limit in history.limits if limit})
        self._watched: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._looked = False

    @staticmethod
    def of(histories: list[ScaleHistory], device: torch.device) -> ScaleStore:
        """The store of these histories in this order on `device`: the one they have, or a new one with their windows."""
        store = histories[0].store
        strange = any(history.store is not store for history in histories)  # one may have moved on to another store
        if store is None or strange or store.window.device != device or store.histories != histories:
            store = ScaleStore(histories, device)
        return store

    def begin(self) -> None:
        """A step begins: its scales come from the windows."""
        if not self._looked and not self._recording():  # what is recorded goes on with what was known when it began
            self.look()
        self._looked = False
        self.largest[:, :3].copy_(self.window.amax(2))
        self.maxima.zero_()
        if not self.known:
            return
        # who goes backward after another step has begun would multiply codes under the scales of that one
        torch.autograd.graph.increment_version(self._given)
        places = self.scales[:, :, 0]
        for limit in self._formats:
            places.copy_(torch.where(self._limits == limit, power_of_two_scale(self.largest, limit), places))

    def end(self) -> None:
        """A step is over: its maxima join the windows, but for those that are not finite, or 0."""
        maxima = self.maxima[:, :, 0]
        size = torch.where(maxima.isfinite() & (maxima > 0), maxima, self.largest)[:, :3]
        self.window.copy_(torch.cat((self.window[:, :, 1:], size.unsqueeze(2)), 2))

    def look(self) -> None:
        """Finds whether every role of every layer has an earlier maximum; once a step, before it, also before one that is
        replayed. Once they have, they always will, and there is nothing more to find.

        What counts is the window at the end of the step before the last, always, so that a run repeats, also a resumed one,
        which finds it in the window that it loads. It has long arrived, unless the host is two steps ahead.
        """
        self._looked = True
        if self.known or not self._watching:
            return
        if not self._watched:
            self._watch(self.window[:, :, :-1])
        self._watch(self.window)
        flag, event = self._watched.pop(0)
        if event is not None:
            event.synchronize()
        if bool(flag):
            self._watched.clear()
            self._know(True)

    def forget(self) -> None:
        """The windows have been written from outside: what is known is to be found in them anew."""
        self._watched.clear()
        self._know(False)

    def _know(self, known: bool) -> None:
        self.known = known
        for history in self.histories:
            history.known = known

    def _recording(self) -> bool:
        return self.window.is_cuda and torch.cuda.is_current_stream_capturing()

    def _watch(self, window: Tensor) -> None:
        """Sends for whether every role of every layer has a maximum in the window, without waiting."""
        found = (window.amax(2) > 0).all()
        if not found.is_cuda:
            self._watched.append((found, None))
            return
        flag, event = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        flag.copy_(found, non_blocking=True)
        event.record()
        self._watched.append((flag, event))


def _alone(number: Tensor) -> Tensor:
    """The memory of a number as [1, 1], in a storage that begins and ends with it.

    To a compiler, tensors of one storage are parts of one. Where a kernel changes two, it has the second copied, and inductor
    2.11 then looks for the copy as far behind its beginning as the number lies behind that of the storage.
    """
    begin = number.storage_offset() * number.itemsize
    storage = number.untyped_storage()[begin : begin + number.itemsize]
    return torch.empty(0, dtype=number.dtype, device=number.device).set_(storage, 0, (1, 1), (1, 1))


def scales_known(model: nn.Module) -> list[bool]:
    """Whether the earlier maxima of the layers with delayed scaling are known to be there, a look at every store: what a
    recorded step depends on. To be called once a step, before it."""
    stores = {
        id(history.store): history.store
        for module in model.modules()
        if (history := getattr(module, "history", None)) is not None and history.store is not None
    }
    for store in stores.values():
        store.look()
    return [store.known for store in stores.values()]


def scale_history(model: nn.Module) -> dict[str, list[list[float]]]:
    """The windows of all layers with delayed scaling by name, as plain numbers (exact: fp32 in Python's floats)."""
    return {
        name: module.history.window.tolist()
        for name, module in model.named_modules()
        if isinstance(getattr(module, "history", None), ScaleHistory)
    }


def load_scale_history(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Restores what `scale_history` gave. Raises FewbitsError where it is of another model."""
    for name, module in model.named_modules():
        history = getattr(module, "history", None)
        if isinstance(history, ScaleHistory):
            if name not in saved:
                raise FewbitsError(
                    f"the saved state has no scale history of {name}; resume with the model that wrote it."
                )
            history.window.copy_(torch.tensor(saved[name]))
            if history.store is not None:
                history.store.forget()
