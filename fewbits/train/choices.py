"""What was decided for a run where the user left it open, with reasons: recorded, shown, reused on resume."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.kernels import dispatch
from fewbits.nn.layers import Layers


@dataclass(frozen=True)
class Choices:
    """How a training is executed. `matmuls` maps e.g. "bf16 on cpu" to native or emulated, as it was decided here."""

    device: Choice
    """Text that torch.device takes: "cpu", "cuda:0"."""
    precision: Choice
    """Name, such as "bf16-mixed"."""
    compile: Choice
    """Whether the model's blocks are compiled: bool."""
    deterministic: Choice
    """Whether the same bits come out every time: bool."""
    threads: Choice
    """CPU threads of torch: int. More or fewer of them add in another order."""
    matmuls: dict[str, Choice] = field(default_factory=dict)
    layers: Layers = field(default_factory=Layers)
    """What each linear layer multiplies in under layers=auto; empty otherwise."""

    def torch_device(self) -> torch.device:
        """The device as torch takes it."""
        return torch.device(self.device.value)

    def to_json(self) -> list[dict[str, Any]]:
        """[{"what", "value", "reason"}], with every matmul choice of this process, and one entry for each group of layers."""
        named = [(name, getattr(self, name)) for name in _named()]
        matmuls = {**self.matmuls, **{key: Choice(*pair) for key, pair in dispatch.recorded().items()}}
        named += [(f"matmul {key}", choice) for key, choice in sorted(matmuls.items())]
        entries = [{"what": what, "value": choice.value, "reason": choice.reason} for what, choice in named]
        return [*entries, *self.layers.to_json()]

    @classmethod
    def from_json(cls, entries: Iterable[Mapping[str, Any]]) -> Choices:
        """The inverse of `to_json`. Raises FewbitsError when one is missing."""
        entries = list(entries)
        found = {entry["what"]: Choice(entry["value"], entry["reason"]) for entry in entries}
        names = _named()
        if missing := [name for name in names if name not in found]:
            raise FewbitsError(f"The recorded choices lack {missing[0]!r}: the run is of another version of fewbits.")
        matmuls = {key.removeprefix("matmul "): c for key, c in found.items() if key.startswith("matmul ")}
        return cls(**{name: found[name] for name in names}, matmuls=matmuls, layers=Layers.from_json(entries))

    def replay(self) -> None:
        """Puts the recorded matmul and thread choices into force: nothing is timed again."""
        dispatch.replay({key: [choice.value, choice.reason] for key, choice in self.matmuls.items()})
        if torch.get_num_threads() != self.threads.value:
            torch.set_num_threads(self.threads.value)


def _named() -> list[str]:
    """The fields that are one choice each."""
    return [f.name for f in fields(Choices) if f.name not in ("matmuls", "layers")]
