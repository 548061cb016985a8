"""A stack of linear layers in bf16 and in RECIPE with layers=auto, side by side: never more than 2 % slower, at any width.

    OUT=/tmp python bench/never_slower.py --seconds 80 --modes eager
    OUT=/tmp python bench/never_slower.py --seconds 80 --modes compiled+graph --widths 1024,4096
    python bench/never_slower.py --smoke        # tiny widths, any machine, writes nothing

For each width a transformer's block without its attention: norm, qkv, output, norm, up, GELU, down, on 8,192 tokens,
forward and backward, with weights quantized once a step. `fewbits.choose_layers` decides as a training would, in a cache
folder of its own. Then bf16 and what was chosen take turns; with --whole the recipe in every layer joins them. A ratio is
time over bf16's time of the same round: its median and a distribution-free 95 % interval, which allows for five looks.
A row is "ok" when the upper end is at most 1.02, "slower" when the lower end is above it; until then it is repeated, each time
with twice the rounds, while its share of --seconds lasts ("open" after that). Rows are printed and saved as they come.
"""

from __future__ import annotations

import argparse
import gc
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from blocks import device_name, header, save
from torch import Tensor, nn

import fewbits
from fewbits.kernels.heap import keep_freed_memory
from fewbits.nn.lowbit import held_weights
from fewbits.nn.timing import ROUNDS, WARM, Interval, clock, compiled, paired, race, recorded
from fewbits.numerics.keys import step_key
from fewbits.precision.switches import torch_switches

WIDTHS = (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
MODES = ("eager", "compiled", "eager+graph", "compiled+graph")
LIMIT = 1.02
LOOKS = 5
CONFIDENCE = 1 - 0.05 / LOOKS  # of one look: whenever it stops, all five together hold with 95 % (Bonferroni)
SAMPLE_S = 0.02  # steps are queued until a sample lasts so long


class Block(nn.Module):
    """x [N, D] -> [N, D]: the linear layers of a transformer's block; products stand in for attention."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.output(q * k + v)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


def stack(width: int, depth: int, device: torch.device) -> nn.Sequential:
    """`depth` blocks on `device`, the same weights every time."""
    torch.manual_seed(0)
    with torch.device(device):
        return nn.Sequential(*(Block(width) for _ in range(depth)))


def stepper(model: nn.Module, x: Tensor, grad: Tensor, mode: str) -> Callable[[], None]:
    """Forward and backward of a prepared model, as a step does them: warm, and recorded where the mode ends in +graph."""
    parameters, leaf = list(model.parameters()), x.detach().requires_grad_()
    run = compiled(model) if mode.startswith("compiled") else model

    def step() -> None:
        with step_key(x.device, 0, 0, 0), held_weights(model):
            leaf.grad = None
            for parameter in parameters:
                parameter.grad = None
            run(leaf).backward(grad)

    for _ in range(WARM):
        step()
    return recorded(step, x.device) if mode.endswith("+graph") else step


def measure(options: argparse.Namespace, width: int, mode: str, device: torch.device, cache: str) -> dict[str, Any]:
    """One row."""
    share, began = options.seconds / (len(options.widths) * len(options.modes)), time.perf_counter()
    auto = f"{options.recipe}, layers=auto"
    base, _, graph = mode.partition("+")
    outline = stack(width, options.depth, torch.device("meta"))
    layers = fewbits.choose_layers(
        outline, auto, options.tokens, mode=base, graph=bool(graph), device=device, cache=cache
    )
    choosing = time.perf_counter() - began
    cases = {"bf16": ("bf16-mixed", None), "auto": (auto, layers)}
    cases |= {"whole": (options.recipe, None)} if options.whole else {}
    x, grad = (torch.randn(options.tokens, width, device=device).mul_(size).bfloat16() for size in (1.0, 1e-3))
    steps = {}
    for name, (precision, chosen) in cases.items():
        model = fewbits.prepare(stack(width, options.depth, device), precision, layers=chosen)
        for attribute in ("fewbits_remainders", "fewbits_undo"):  # copies of the weights that only a training needs
            model.__dict__.pop(attribute)
        steps[name] = stepper(model, x, grad, mode)
    once = clock(steps["bf16"], 3, device)() / 1e3
    calls = max(1, min(64, round(SAMPLE_S / once)))
    clocks = {name: clock(step, calls, device) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for look in range(LOOKS):
        rounds = options.rounds * 2 ** max(0, look - 1)  # every look has twice the rounds of the one before
        for name, found in race(clocks, "bf16", rounds, max(share, 2 * choosing), seed=look).items():
            times[name] += found
        ratio = paired(times["auto"], times["bf16"], CONFIDENCE)
        if verdict(ratio) != "open" or time.perf_counter() - began > max(share, 2 * choosing):
            break
    row = {"width": width, "mode": mode, "verdict": verdict(ratio), "ratio": cell(ratio)}
    if options.whole:
        row["whole"] = cell(paired(times["whole"], times["bf16"], CONFIDENCE))
    row |= {"bf16_ms": round(sorted(times["bf16"])[len(times["bf16"]) // 2], 4), "rounds": len(times["bf16"])}
    return {**row, "choosing_s": round(choosing, 1), "line": str(layers), "choices": layers.to_json()}


def verdict(ratio: Interval) -> str:
    """ok, slower, or open while the interval holds the limit."""
    return "ok" if ratio.high <= LIMIT else "slower" if ratio.low > LIMIT else "open"


def cell(ratio: Interval) -> list[float | None]:
    """Median and ends as JSON has them: an end that too few rounds leave open is null."""
    return [round(r, 4) if math.isfinite(r) else None for r in ratio]


def show(row: dict[str, Any]) -> None:
    """One line, at once."""
    if "ratio" not in row:
        print(f"{row['mode']:15}{row['width']:6}  {row.get('error') or row.get('skipped')}", flush=True)
        return
    both = [name for name in ("ratio", "whole") if name in row]
    shown = {name: "{} ({} to {})".format(*row[name]) for name in both}
    whole = f"  whole recipe {shown['whole']}" if "whole" in shown else ""
    print(
        f"{row['mode']:15}{row['width']:6}{row['bf16_ms']:10.3f} ms  {shown['ratio']}  {row['verdict']:6}{whole}"
        f"  {row['rounds']} rounds, chosen in {row['choosing_s']:.1f} s: {row['line']}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fp8", help="a precision with a recipe")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--modes", default="eager,compiled", help="each with +graph for steps that are CUDA graphs")
    parser.add_argument("--seconds", type=float, default=60, help="no further row is begun after this long")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--depth", type=int, default=2, help="blocks of the stack")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--whole", action="store_true", help="time the recipe in every layer, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny widths, nothing written")
    options = parser.parse_args()
    if options.smoke:
        options.widths, options.modes, options.tokens, options.rounds = "64,128", "eager", 128, 8
    options.widths = [int(width) for width in options.widths.split(",")]
    options.modes = options.modes.split(",")
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"there is no mode {sorted(unknown)[0]!r}; there are {', '.join(MODES)}")
    try:
        recipe = fewbits.Precision.parse(options.recipe).recipe
    except fewbits.FewbitsError as error:
        parser.error(str(error))
    if not recipe:
        parser.error(f"{options.recipe} has no recipe, so there is nothing to choose; try fp8")
    return options


def main() -> int:
    """Times every width and mode, prints a line each, saves after each; 1 where a row is slower or failed."""
    options = parse()
    device, began, rows = torch.device(options.device), time.perf_counter(), []
    if device.type == "cpu":
        keep_freed_memory()
    name = re.sub(r"[^a-z0-9]+", "_", device_name().lower()).strip("_")
    name = f"never_slower_{name}_{options.recipe}_{'_'.join(options.modes).replace('+', '-')}"
    print(f"{'mode':15}{'width':>6}{'bf16':>13}  auto over bf16 (95 %)")
    with tempfile.TemporaryDirectory() as cache, torch_switches(fewbits.Precision.parse("bf16"), device):
        for mode in options.modes:
            for width in options.widths:
                row: dict[str, Any] = {"width": width, "mode": mode}
                if time.perf_counter() - began > options.seconds:
                    row["skipped"] = f"not begun: {options.seconds:.0f} s are over"
                else:
                    try:
                        row = measure(options, width, mode, device, cache)
                    except Exception as error:
                        row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                rows.append(row)
                show(row)
                results = {"recipe": options.recipe, "tokens": options.tokens, "depth": options.depth, "rows": rows}
                if not options.smoke:
                    save(name, {"seconds": round(time.perf_counter() - began, 1), "limit": LIMIT, **results})
    counts = {v: sum(row.get("verdict") == v for row in rows) for v in ("ok", "slower", "open")}
    print(f"{len(rows)} rows: {counts}; on {header()['device']}, {time.perf_counter() - began:.0f} s")
    return int(any("error" in row or row.get("verdict") == "slower" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
