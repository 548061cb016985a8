"""layers=auto: which linear layer multiplies in how many bits, by a timing of this model's shapes and blocks on this device.

One timing for each distinct shape, then one of whole blocks for each kind of them; what was found stays in the cache
folder, for this device, these versions and this shape or kind of block. A run records what was chosen, and goes on with it
without timing again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits import __version__
from fewbits.checkpoint.load import load_checkpoint
from fewbits.choice import Choice
from fewbits.data.cache import Progress, cache_folder, entry, silent
from fewbits.errors import FewbitsError
from fewbits.graph import graph_choice
from fewbits.nn.block_timing import BlockTimer
from fewbits.nn.candidates import BF16, candidates, shapes
from fewbits.nn.layers import LayerGroup, Layers, pick, settle_in_blocks
from fewbits.nn.stacks import MeasureBlocks, NoTimes, Stack, stacks
from fewbits.nn.timing import LayerTimer, Measure, Times
from fewbits.nn.transformer import Transformer
from fewbits.precision.hardware import cpu_name, describe, native_matmul
from fewbits.precision.precision import Precision
from fewbits.train.build import with_vocabulary
from fewbits.train.config import Config

BLOCKS_S = 120.0  # no further kind of block is begun after so long; one takes some 36 s where a compiler starts cold
_TIMED = ("numerics", "precision", "kernels", "nn")  # the rooms whose source decides how fast a layer is


def choose_layers(
    model: nn.Module,
    precision: str | Precision,
    tokens: int,
    *,
    keep: Iterable[str] = (),
    mode: str = "eager",
    graph: bool = False,
    micro_batches: int = 1,
    device: torch.device | str | None = None,
    cache: Path | str | None = None,
    measure: Measure | None = None,
    measure_blocks: MeasureBlocks | None = None,
    progress: Progress = silent,
) -> Layers:
    """The fastest way of multiplying for every linear layer that the recipe of `precision` takes, by a short timing.

        layers = fewbits.choose_layers(model, "fp8-auto", tokens=16384)
        model = fewbits.prepare(model, "fp8-auto", layers=layers)

    A way in few bits takes the place of bf16 only where the slow end of a 95 % interval says that it wins at least 2 %: first
    for layers alone, by shape. In a `fewbits.Transformer` norms and activations can write the codes that layers read, which a
    layer alone does not show: there whole blocks are timed next, with the recipe in all of their layers beside what those
    chose, and have to win as much.

    Args:
        model: not prepared yet; only its shapes matter, so it may lie on the meta device.
        precision: a name or a value with a recipe; layers=auto is not needed.
        tokens: rows that enter a linear layer in one forward call: sequences of a micro-batch times their length.
        keep: as for `prepare`.
        mode: "eager" or "compiled", as the model will run.
        graph: whether its steps will be recorded as CUDA graphs (`Step(graph=...)`): then nothing waits for the host.
        micro_batches: forward calls of one step; a weight is quantized once for all of them.
        device: where the model will run; None is where its parameters are.
        cache: folder that keeps what was found; None takes FEWBITS_CACHE, or ~/.cache/fewbits.
        measure: what times the candidates of a shape; None times on the device.
        measure_blocks: what times a stack of blocks; None times on the device, unless `measure` is given: then no block is.
        progress: called with the number of shapes that are done, and of all; then with that of kinds of blocks.

    Raises FewbitsError for a precision without a recipe, or a model of which the recipe takes no layer.
    """
    precision = Precision.parse(precision) if isinstance(precision, str) else precision
    precision = precision.replace(layers="auto")  # refused here where it cannot be
    if tokens < 1 or micro_batches < 1:
        raise FewbitsError(f"tokens={tokens} and micro_batches={micro_batches} must be 1 or more.")
    place = torch.device(device) if device is not None else next(model.parameters()).device
    keep = tuple(keep)
    found = shapes(model, precision, tokens, keep)
    if measure is None and (why := emulated_everywhere(precision, place)):
        return Layers(tuple(LayerGroup(shape, tuple(names), Choice(BF16, why), 0.0) for shape, names in found.items()))
    if measure is None:
        measure = LayerTimer(place, mode, micro_batches, graph=graph)
        measure_blocks = measure_blocks or BlockTimer(measure)
    facts = {**where(place), "mode": mode, "graph": graph, "micro_batches": micro_batches}
    groups, folder = [], cache_folder(cache)
    for number, (shape, names) in enumerate(found.items()):
        progress(number, len(found), "timing linear layers")
        ways = candidates(precision.recipe, shape)
        times = cached(folder, {**facts, "shape": list(shape), "ways": list(ways)}, partial(measure, shape, ways))
        groups.append(pick(shape, names, times))
    progress(len(found), len(found), "timing linear layers")
    layers = Layers(tuple(groups))
    if measure_blocks is None:
        return layers
    kinds = stacks(model, precision, tokens, keep, layers)
    return settle_in_blocks(layers, _timed(kinds, measure_blocks, folder, facts, progress))


def _timed(
    kinds: Mapping[Stack, Sequence[str]],
    measure: MeasureBlocks,
    folder: Path,
    facts: dict[str, Any],
    progress: Progress,
) -> dict[Stack, tuple[Sequence[str], Times]]:
    """For each kind of blocks those that are so and its times, the most frequent first; empty where it does not run, or time is
    over."""
    found: dict[Stack, tuple[Sequence[str], Times]] = {}
    began = time.perf_counter()
    for number, (stack, blocks) in enumerate(sorted(kinds.items(), key=lambda kind: -len(kind[1]))):
        progress(number, len(kinds), "timing whole blocks")
        times: Times = {}
        if time.perf_counter() - began < BLOCKS_S:
            with suppress(NoTimes):  # and kept nowhere: another time it may run
                times = cached(folder, {**facts, "stack": asdict(stack)}, partial(measure, stack))
        found[stack] = blocks, times
    if kinds:
        progress(len(kinds), len(kinds), "timing whole blocks")
    return found


def emulated_everywhere(precision: Precision, device: torch.device) -> str:
    """Why no matmul of a recipe can be faster than bf16 on `device`: it multiplies the values of codes in 16 bits or more.
    "" where one of them runs natively, which has to be timed."""
    answers = [native_matmul(matmul, describe(device)) for matmul in precision.recipe.matmuls if matmul is not None]
    return "" if any(answer.value for answer in answers) else f"nothing to win: {answers[0].reason}"


def cached(folder: Path, facts: dict[str, Any], measure: Callable[[], Times]) -> Times:
    """What `measure` finds, from the cache where it has been timed under the same facts. A damaged entry is timed again; a
    second process that wants the same waits for the first."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]

    def build(_: Path) -> dict[str, Any]:
        return {"under": facts, "ms": {way: list(found) for way, found in measure().items()}}

    times: dict[str, list[float]] = entry(folder, f"layers-{key}", build)[1]["ms"]
    return times


def where(device: torch.device) -> dict[str, Any]:
    """What decides about times beside the shape: the device, the versions of torch and CUDA, our own source, threads."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{device.type} {cpu_name()}",
        "threads": None if cuda else torch.get_num_threads(),
        "dtype": BF16,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "fewbits": __version__,
        "source": source_hash(),
    }


@cache
def source_hash() -> str:
    """SHA-256 of our own source that decides how fast a layer is."""
    found, package = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for room in _TIMED:
        for path in sorted(p for p in (package / room).rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def check_layers(config: Config) -> None:
    """Raises FewbitsError, in a moment, where layers=auto has nothing to decide in the model of `config`."""
    if config.precision != "auto" and (precision := config.resolve_precision()).layers == "auto":
        shapes(_outline(config), precision, 1, config.keep_patterns())


def layers_of_run(
    config: Config,
    precision: Precision,
    device: torch.device,
    compile: bool,
    measure: Measure | None = None,
    progress: Progress = silent,
) -> Layers:
    """What the linear layers of a run multiply in; empty where its precision leaves nothing to decide."""
    if precision.layers != "auto":
        return Layers()
    parts, model = config.train.micro_batches, _outline(config)
    return choose_layers(
        model,
        precision,
        config.train.batch_size // parts * config.model.context,
        keep=config.keep_patterns(),
        mode="compiled" if compile else "eager",
        graph=graph_choice(config.train.graph, model, device).value,
        micro_batches=parts,
        device=device,
        cache=config.data.cache,
        measure=measure,
        progress=progress,
    )


def _outline(config: Config) -> Transformer:
    """The model of a config without numbers: its shapes and names."""
    with torch.device("meta"):
        return Transformer(with_vocabulary(config, 256).model)


def recorded_layers(run: Path | str, precision: Precision) -> Layers | None:
    """What the run in `run` chose for layers=auto; None where `precision` needs no choice. Raises FewbitsError."""
    if precision.layers != "auto":
        return None
    layers = Layers.from_json(load_checkpoint(run).state.get("choices", ()))
    if not layers:
        raise FewbitsError(
            f"{run} was not trained with layers=auto, so it does not say which layers are in few bits. Use "
            f"'{precision.replace(layers='all')}' or the precision it was trained in."
        )
    return layers
