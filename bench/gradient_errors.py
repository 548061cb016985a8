"""What a precision does to the gradient of all parameters at given weights: its error against fp32, kind by kind.

    python bench/gradient_errors.py --recipe nano --cases "precision=bf16-mixed; precision=fp8" [--run RUN] [--name NAME]

A case is overrides of the recipe, separated by commas, and cases by semicolons; `+` stands for the comma inside of a precision.
The weights are those of a run, else fresh ones from the seed; the batches held-out text, the same for all, so many that what
every token gets wrong in a way of its own averages out. error: norm of the difference over norm; gain: the part of the exact
gradient that is in it. Any device, eager; writes bench/results/gradient_errors_NAME.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from blocks import ROOT, changed, save
from torch import Tensor

sys.path.insert(0, str(ROOT))

from fewbits.cli.console import find_model
from fewbits.data.batches import eval_batches
from fewbits.nn.lowbit import held_weights
from fewbits.nn.prepare import prepare
from fewbits.nn.scale_history import scale_history
from fewbits.nn.transformer import Transformer
from fewbits.numerics.loss import gradient_factor
from fewbits.precision.precision import Precision
from fewbits.train.build import open_data
from fewbits.train.config import Config, load_recipe
from fewbits.train.evaluate import open_model

Batch = dict[str, Tensor]


def gradient(
    config: Config, state: dict[str, Tensor], batches: Sequence[Batch], device: torch.device
) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over the targets of all batches, and its gradient with respect to every parameter, in fp32."""
    model = Transformer(config.model)
    model.load_state_dict(state)
    model = prepare(model, Precision.parse(config.precision), config.keep_patterns()).to(device).train()
    targets = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    factor = torch.tensor(1.0 / targets, device=device)
    for step in ([batches[:1]] if scale_history(model) else []) + [batches]:  # delayed scales come from a step before
        loss, total = 0.0, {}
        with held_weights(model):
            for batch in step:
                with gradient_factor(factor):
                    part = model.loss_sum({key: value.to(device) for key, value in batch.items()})
                part.backward(factor)
                loss += float(part.detach())
                for name, parameter in model.named_parameters():
                    assert parameter.grad is not None
                    total[name] = total.get(name, 0.0) + parameter.grad.float()
                    parameter.grad = None
    return loss / targets, total


def compared(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, list[float]]:
    """Kind of parameter, its name without numbers -> [error, gain]; "all" for all of them together."""
    sums: dict[str, list[float]] = {}
    for name, reference in exact.items():
        mine = found[name]
        products = [float((a * b).sum()) for a, b in ((mine - reference,) * 2, (reference,) * 2, (mine, reference))]
        for kind in ("all", ".".join(part for part in name.split(".") if not part.isdigit())):
            sums[kind] = [a + b for a, b in zip(sums.get(kind, [0.0] * 3), products, strict=True)]
    return {kind: [round((off / norm) ** 0.5, 5), round(along / norm, 5)] for kind, (off, norm, along) in sums.items()}


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="nano")
    parser.add_argument("--run", default="")
    parser.add_argument("--set", default="", help="overrides of every case, first of all")
    parser.add_argument("--cases", required=True)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="windows in a batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default="nano")
    options = parser.parse_args()
    config, device = changed(load_recipe(options.recipe), options.set), torch.device(options.device)
    data = open_data(changed(config, "sample_every=0"))
    config = config.resolve_vocabulary(data.tokenizer.vocab_size)
    if options.run:
        model, *_ = open_model(find_model(options.run), "cpu", None)
        config = replace(config, model=model.config)
    else:
        model = Transformer(config.model, seed=config.train.seed)
    state = {name: value.float() for name, value in model.state_dict().items()}
    held_out = eval_batches(
        data.store.val, data.store.val_documents, options.batch, config.model.context, None, config.data.mask_documents
    )
    batches = list(islice(held_out, options.batches))
    loss, exact = gradient(changed(config, "precision=fp32"), state, batches, device)
    rows: dict[str, Any] = {}
    for case in (case.strip() for case in options.cases.split(";")):
        its, found = gradient(changed(config, case), state, batches, device)
        kinds = compared(found, exact)
        rows[case] = {"loss_difference": round(its - loss, 6), "error_and_gain": kinds}
        shown = "  ".join(f"{kind} {error:.2%} ({gain:.3f})" for kind, (error, gain) in kinds.items())
        print(f"{case}: loss {its - loss:+.5f}  {shown}", flush=True)
    targets = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    about = {"recipe": options.recipe, "set": options.set, "run": bool(options.run), "tokens": targets, "loss": loss}
    save(f"gradient_errors_{options.name}", {**about, "rows": rows})


if __name__ == "__main__":
    main()
