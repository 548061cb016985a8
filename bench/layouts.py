"""Codes in both layouts, by the tile of a program: `activate_backward` of every activation and `encode_both`, in TB/s: its
codes and sums, of one matrix and of three side by side, and with the largest magnitude ("maximum"); and codes row by row of
every activation, which have no tiles.

    OUT=/tmp python bench/layouts.py [--only gelu,maximum] [--name NAME] [--compile]      # a GPU; 60 s
    python bench/layouts.py --smoke                                          # tiny matrices, the interpreter, writes nothing

A tile is rows x columns x warps, for gradients of activations also x tiles that a program takes one after the other x how many
of them are on their way at once. Bytes are those that must be moved: every input once in bf16, and every code. --compile only
compiles, so that processes can share the work before.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import Any

import torch
from blocks import milliseconds, save

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

from fewbits.formats import Format  # noqa: E402
from fewbits.kernels import activation, layouts  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
SHAPES = {"gelu": (32768, 3072), "swiglu": (16384, 5632), "codes": (32768, 2304), "maximum": (32768, 2304)}
TILES = (
    (64, 64, 4), (32, 128, 4), (64, 128, 4), (128, 64, 4), (64, 64, 2), (64, 64, 8), (32, 64, 4), (32, 64, 2), (128, 32, 4),
    (128, 64, 8), (64, 128, 8), (32, 256, 8),
)  # fmt: skip
TURNS = (
    (64, 64, 4, 1, 1), (32, 128, 4, 1, 1), (64, 64, 4, 8, 1), (64, 64, 4, 8, 2), (64, 64, 4, 8, 3), (64, 64, 4, 16, 3),
    (64, 64, 4, 4, 3), (32, 64, 4, 16, 3), (64, 64, 8, 8, 3), (64, 128, 8, 8, 3), (32, 128, 4, 8, 3), (64, 32, 4, 8, 3),
)  # fmt: skip
E5M2, E4M3 = Format.parse("fp8_e5m2"), Format.parse("fp8_e4m3")


def get_ahead() -> None:
    """A millisecond in which the host gets ahead."""
    torch.cuda._sleep(2_000_000)


def under(name: str, tile: tuple[int, ...], call: Any) -> None:
    """Calls with a tile of that activation, or of `encode_both`."""
    if name in activation.TILES:
        activation.TILES[name] = tile  # type: ignore[assignment]
    else:
        layouts.BOTH_TILE = tile  # type: ignore[assignment]
    call()


def main() -> None:
    """Every kernel with every tile; one that does not compile is a row with its error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--name", default="layouts_h200" if CUDA else "layouts")
    parser.add_argument("--only", default="codes,maximum," + ",".join(activation.NAMES))
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    for name in options.only.split(","):
        shape = (128, 384) if options.smoke else SHAPES[name.removesuffix("_backward")]
        takes, makes = activation.NAMES.get(name, (1, 1))
        given = [torch.randn(shape, device=DEVICE).to(torch.bfloat16) for _ in range(takes)]
        one = torch.ones(1, 1, device=DEVICE)
        codes = 1 if name in ("gelu", "swiglu") else 2 * makes + (name in activation.TILES)
        moved = shape[0] * shape[1] * (2 * takes + codes)
        noted = torch.zeros(makes, device=DEVICE)
        hidden = activation.Known(one, E4M3, noted)
        gradients = [activation.Known(one, E5M2, noted[i : i + 1]) for i in range(makes)]
        calls: dict[str, Any] = {}
        if name in activation.TILES:
            sums = name == "gelu_backward"  # models with gates have no biases
            calls[""] = partial(activation.activate_backward, name, one, E4M3, gradients, sums, *given)
        elif name in activation.NAMES:
            calls[""] = partial(activation.activate_codes, name, hidden, *given)
        else:
            thirds = [part.contiguous() for part in given[0].chunk(3, 1)]
            maximum = noted if name == "maximum" else None
            for label, parts in (("", given), ("three parts, ", thirds)):
                calls[label] = partial(layouts.encode_both, parts, one, E5M2, True, maximum)
        tiles: tuple[tuple[int, ...], ...] = TURNS if name in activation.TILES else TILES
        tiles = tiles[:4] if options.smoke else tiles
        cases = {
            label + " x ".join(map(str, tile)): partial(under, name, tile, call)
            for label, call in calls.items()
            for tile in tiles
        }
        if codes == 1:
            cases = {"row by row": calls[""]}
        for case, call in cases.items():
            try:
                if options.compile:
                    call()
                    continue
                ms = milliseconds(call, get_ahead)
                rows[f"{name}, {case}"] = {"ms": round(ms, 4), "tb_per_s": round(moved / ms / 1e9, 3)}
            except Exception as error:  # one that does not fit into the chip
                rows[f"{name}, {case}"] = {"error": str(error).splitlines()[0][:120]}
            print(f"{name:16s} {case:28s} {rows[f'{name}, {case}']}", flush=True)
    if not (options.smoke or options.compile):
        save(options.name, {"rows": rows, "shapes": {k: list(v) for k, v in SHAPES.items()}})


if __name__ == "__main__":
    main()
