"""What layers=auto chooses for a recipe's model on this device, what it was chosen by, and how long choosing takes.

    python bench/layers_auto.py --recipe gpt2-124m --precision fp8-delayed     # bench/results/layers_auto.json
    python bench/layers_auto.py --smoke                                        # nano, eager; writes nothing

One micro-batch of the recipe, compiled and as a CUDA graph where there is a GPU, from an empty cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

import torch
from blocks import ROOT, save

sys.path.insert(0, str(ROOT))

from fewbits import Transformer, choose_layers
from fewbits.train.build import with_vocabulary
from fewbits.train.config import load_recipe


def main() -> None:
    """Chooses, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="gpt2-124m")
    parser.add_argument("--precision", default="fp8-delayed")
    parser.add_argument("--tokens", type=int, default=0, help="of a micro-batch; 0: as the recipe has it")
    parser.add_argument("--name", default="layers_auto")
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    config = with_vocabulary(load_recipe("nano" if a.smoke else a.recipe), 50304)
    cuda = torch.cuda.is_available()
    tokens = a.tokens or config.train.batch_size // config.train.micro_batches * config.model.context
    with torch.device("meta"):
        model = Transformer(config.model)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        layers = choose_layers(
            model, a.precision, 512 if a.smoke else tokens, mode="compiled" if cuda else "eager", graph=cuda,
            device="cuda" if cuda else "cpu", cache=cache,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s: {layers}")
    for group in layers.groups:
        print(f"  {len(group.names)} of {group.shape}: {group.choice.value}: {group.choice.reason}")
    if not a.smoke:
        chosen = {"precision": a.precision, "tokens": tokens, "seconds": round(seconds, 1), "line": str(layers)}
        save(a.name, {"recipe": a.recipe, **chosen, "layers": layers.to_json()})


if __name__ == "__main__":
    main()
