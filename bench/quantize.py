"""What it costs to make a trained default model small: held-out loss against the run's own, bytes, tokens a second.

    fewbits train --precision bf16-mixed --out_dir runs/nano
    python bench/quantize.py runs/nano

Losses are those of the same held-out batches before and after, differences paired by batch with a 95 % t-interval. Speeds
are those of greedy generation after 128 tokens, every variant taking its turn in each of several rounds. `--only` does one
of the two (losses are deterministic, speeds want an idle machine). Writes bench/results/quantize_nano.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from blocks import save

from fewbits.checkpoint.hf import load
from fewbits.export.measured import generation_speed
from fewbits.export.options import QuantizeOptions
from fewbits.export.run import quantize_run
from fewbits.kernels.dispatch import int8_execution

NAME, RESULTS = "quantize_nano", Path(__file__).parent / "results"
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"format": "bf16"},
    "int8 row": {"format": "int8"},
    "int8 row, int8 activations": {"format": "int8", "activations": "int8"},
    "fp8 row": {"format": "fp8"},
    "int4 group:128": {"format": "int4", "granularity": "group:128"},
    "int4 group:128, mse": {"format": "int4", "granularity": "group:128", "method": "mse"},
    "int4 group:128, awq": {"format": "int4", "granularity": "group:128", "method": "awq"},
    "int4 group:128, gptq": {"format": "int4", "granularity": "group:128", "method": "gptq"},
    "int4 group:128, gptq, left to right": {
        "format": "int4", "granularity": "group:128", "method": "gptq", "act_order": False,
    },
    "int4 row": {"format": "int4", "granularity": "row"},
    "int4 row, gptq": {"format": "int4", "granularity": "row", "method": "gptq"},
    "fp4 group:128": {"format": "fp4", "granularity": "group:128"},
    "binary row": {"format": "binary"},
}  # fmt: skip


def folder(variant: str) -> str:
    """The name of a variant as a folder."""
    return variant.replace(" ", "-").replace(":", "").replace(",", "")


def losses(run: Path, work: Path, batches: int) -> dict[str, dict[str, Any]]:
    """Every variant quantized from `run`, measured and saved under `work`."""
    found = {}
    for name, options in VARIANTS.items():
        out = work / folder(name)
        small = quantize_run(run, QuantizeOptions(**options), out=out, eval_batches=batches)
        small.save(out)
        document = small.document
        layers = document["layers"]
        before, after = document["before"], document["after"]
        found[name] = {
            "loss_before": before["loss"],
            "loss_after": after["loss"],
            "difference": document["difference"],
            "bits_per_byte_after": after["bits_per_byte"],
            "accuracy_before": before["accuracy"],
            "accuracy_after": after["accuracy"],
            "bytes_before": document["bytes_before"],
            "bytes_after": document["bytes_after"],
            "linear_bytes_after": sum(row["bytes"] for row in layers),
            "mean_sqnr_db": sum(row["sqnr_db"] for row in layers) / len(layers) if layers else None,
            "mean_output_sqnr_db": (
                sum(row["output_sqnr_db"] for row in layers) / len(layers)
                if layers and layers[0]["output_sqnr_db"] is not None
                else None
            ),
        }
        print(
            f"{name:<36} {100 * document['difference']['mean']:+.4f} %  {document['difference']['interval']}",
            flush=True,
        )
    return found


def speeds(run: Path, folders: dict[str, Path]) -> dict[str, float]:
    """Tokens a second of the run (fp32) and of every variant, in turns."""
    models = {"fp32": load(run)[0], **{name: load(folder)[0] for name, folder in folders.items()}}
    window = torch.arange(128) % models["fp32"].config.vocab_size
    return generation_speed(models, window)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batches", type=int, default=70, help="held-out batches of 8 x 256 tokens")
    parser.add_argument("--work", type=Path, help="where checkpoints are written; a temporary folder if left out")
    parser.add_argument("--only", choices=("losses", "speeds"))
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    document: dict[str, Any] = {"train": "fewbits train --precision bf16-mixed --out_dir runs/nano"}
    if arguments.only == "speeds":
        document["variants"] = json.loads((RESULTS / f"{NAME}.json").read_text())["variants"]
    else:
        document["variants"] = losses(arguments.run, work, arguments.batches)
    if arguments.only != "losses":
        document["generation_tok_per_s"] = speeds(arguments.run, {name: work / folder(name) for name in VARIANTS})
        document["int8_matmuls"] = list(int8_execution(torch.device("cpu"), torch.bfloat16))
    save(NAME, document)


if __name__ == "__main__":
    main()
