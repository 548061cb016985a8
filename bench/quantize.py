"""What it costs to make a trained default model small: held-out loss against the run's own, bytes, tokens a second.

    fewbits train --precision bf16-mixed --out_dir runs/nano
    python bench/quantize.py runs/nano

Losses are those of the same held-out batches before and after, differences paired by batch with a 95 % t-interval. Speeds
are those of greedy generation after 128 tokens, every variant taking its turn in each of several rounds. `--only` does one
of the two (losses are deterministic, speeds want an idle machine). Writes bench/results/quantize_nano.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from blocks import save

from fewbits.checkpoint.hf import load, to_hf
from fewbits.data.batches import Batches, eval_batches
from fewbits.data.corpus import open_corpus
from fewbits.data.tokens import TokenStore
from fewbits.export.measured import generation_speed, measure, paired_difference
from fewbits.export.options import QuantizeOptions
from fewbits.export.quantized import quantize_model
from fewbits.export.run import BATCH, CALIBRATION_BATCHES, CALIBRATION_SEED
from fewbits.kernels.dispatch import int8_execution
from fewbits.nn.transformer import Transformer
from fewbits.train.evaluate import run_config

NAME, RESULTS = "quantize_nano", Path(__file__).parent / "results"
GROUPS = {"format": "int4", "granularity": "group:128"}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"format": "bf16"},
    "int8 row": {"format": "int8"},
    "int8 row, int8 activations": {"format": "int8", "activations": "int8"},
    "fp8 row": {"format": "fp8"},
    "int4 group:128": GROUPS,
    "int4 group:128, mse": {**GROUPS, "method": "mse"},
    "int4 group:128, awq": {**GROUPS, "method": "awq"},
    "int4 group:128, gptq": {**GROUPS, "method": "gptq"},
    "int4 group:128, gptq, left to right": {**GROUPS, "method": "gptq", "act_order": False},
    "int4 row": {"format": "int4", "granularity": "row"},
    "int4 row, gptq": {"format": "int4", "granularity": "row", "method": "gptq"},
    "fp4 group:128": {"format": "fp4", "granularity": "group:128"},
    "binary row": {"format": "binary"},
}


def made_small(
    model: Transformer, options: QuantizeOptions, texts: list[Any]
) -> tuple[Transformer, list[dict[str, Any]], int]:
    """A copy of the model made small, its layers, and the bytes of its tensors."""
    small = copy.deepcopy(model)
    if options.plain:
        small.to(torch.bfloat16)
        return small, [], sum(t.nbytes for t in to_hf(small.config, small.state_dict())[1].values())
    done = quantize_model(small, options, texts)
    return small, done.layers, sum(t.nbytes for t in to_hf(small.config, small.state_dict(), done.scheme)[1].values())


def losses(run: Path, limit: int) -> dict[str, Any]:
    """Every variant, measured on the same batches as the run itself."""
    model, tokenizer = load(run)
    config = run_config(run)
    assert config is not None and tokenizer is not None
    store = TokenStore.open_or_build(open_corpus(config.data.data), tokenizer)
    context, masked = model.config.context, config.data.mask_documents
    held_out = list(eval_batches(store.val, store.val_documents, BATCH, context, limit, masked))
    train = Batches(store.train, store.train_documents, BATCH, context, CALIBRATION_SEED, masked)
    texts = [train.batch(i) for i in range(CALIBRATION_BATCHES)]
    before = measure(model, held_out, tokenizer.token_bytes)
    size = sum(t.nbytes for t in to_hf(model.config, model.state_dict())[1].values())
    found: dict[str, Any] = {}
    for name, given in VARIANTS.items():
        started = time.perf_counter()
        small, layers, small_size = made_small(model, QuantizeOptions(**given).check(), texts)
        spent = time.perf_counter() - started
        after = measure(small, held_out, tokenizer.token_bytes)
        difference = paired_difference(before, after)
        found[name] = {
            **{key: after[key] for key in ("loss", "bits_per_byte", "accuracy")},
            "difference": difference,
            "tensor_bytes": small_size,
            "linear_bytes": sum(row["bytes"] for row in layers) or None,
            **{key: mean([row[key] for row in layers]) for key in ("sqnr_db", "output_sqnr_db")},
            "seconds_to_quantize": round(spent, 1),
        }
        low, high = difference["interval"]
        print(f"{name:<36} {100 * difference['mean']:+.4f} % ({100 * low:+.4f} to {100 * high:+.4f})", flush=True)
    whole = {key: before[key] for key in ("loss", "bits_per_byte", "accuracy", "tokens")}
    return {"before": {**whole, "tensor_bytes": size}, "held_out_batches": len(held_out), "variants": found}


def mean(values: list[float | None]) -> float | None:
    """The mean, None for nothing."""
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 2) if known else None


def speeds(run: Path) -> dict[str, float]:
    """Tokens a second of the run (fp32) and of one variant of each format, in turns."""
    model, _ = load(run)
    plain = {name: given for name, given in VARIANTS.items() if "method" not in given}
    models = {"fp32": model, **{n: made_small(model, QuantizeOptions(**g).check(), [])[0] for n, g in plain.items()}}
    found = generation_speed(models, torch.arange(128) % model.config.vocab_size)
    return {name: round(speed, 1) for name, speed in found.items()}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batches", type=int, default=70, help="held-out batches of 8 sequences; 70 is all of nano's")
    parser.add_argument("--only", choices=("losses", "speeds"))
    arguments = parser.parse_args()
    target = RESULTS / f"{NAME}.json"
    kept = json.loads(target.read_text()) if target.exists() else {}
    document = {key: kept[key] for key in ("losses", "generation_tok_per_s", "int8_matmuls") if key in kept}
    if arguments.only != "speeds":
        document["losses"] = losses(arguments.run, arguments.batches)
    if arguments.only != "losses":
        document["generation_tok_per_s"] = speeds(arguments.run)
        document["int8_matmuls"] = list(int8_execution(torch.device("cpu"), torch.bfloat16))
    save(NAME, {"train": "fewbits train --precision bf16-mixed --out_dir runs/nano", **document})


if __name__ == "__main__":
    main()
