"""What an fp8 head does to its gradients: each operand in fp8 by itself, all of them, and other ways, against fp32.

    fewbits train --precision fp8 --out_dir runs/nano_fp8 && python bench/head_gradients.py runs/nano_fp8

On a trained run and a batch of its held-out text: the relative error of the gradients of hidden states and weight (norm of the
difference over norm), and their gain, the part of the exact gradient that they hold (1.01: too long by 1 %). "target apart",
which is what head=fp8 does, takes the -1 of a target that is expected to less than 1/2 exactly, and quantizes its probability.
Shares of the probability that becomes 0 in a format. Any device, seconds; writes bench/results/head_gradients_NAME.json.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from blocks import ROOT, header, save
from torch import Tensor

sys.path.insert(0, str(ROOT))

from fewbits.cli.console import find_model
from fewbits.data.batches import eval_batches
from fewbits.data.corpus import open_corpus
from fewbits.data.tokens import TokenStore
from fewbits.numerics.quantize import quantize
from fewbits.train.evaluate import open_model, run_config

FORMATS = ("fp8_e5m2", "fp8_e4m3")


def rounded(x: Tensor, format: str | None) -> Tensor:
    """What a tensor is worth as codes under one power of two; itself without a format."""
    return x if format is None else quantize(x, format).dequantize()


def as_gradient(p: Tensor, format: str | None) -> Tensor:
    """What probabilities are worth under the scale of a gradient, which may be 1."""
    return rounded(torch.cat((p, torch.ones_like(p[:1]))), format)[:-1]


def gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, operands: str | None, gradient: str | None, apart: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden [N, D] and weight [V, D], with operands and the gradient of the logits in formats of their own."""
    x, w = rounded(hidden, operands), rounded(weight, operands)
    p = torch.softmax(x @ w.t(), 1)
    if not apart:
        p[torch.arange(len(labels)), labels] -= 1
        g = rounded(p, gradient)
        return g @ w, g.t() @ x
    rows = torch.arange(len(labels))
    aside = (p[rows, labels] < 0.5).float().unsqueeze(1)
    p[rows, labels] += aside.squeeze(1) - 1
    g = as_gradient(p, gradient)
    return g @ w - aside * weight[labels], (g.t() @ x).index_add_(0, labels, -aside * hidden)


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--name", default="nano")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    folder = find_model(options.run)
    model, tokenizer, _, device = open_model(folder, "auto", None)
    config = run_config(folder)
    assert tokenizer is not None and config is not None
    store = TokenStore.open_or_build(open_corpus(config.data.data), tokenizer)
    batch = next(eval_batches(store.val, store.val_documents, options.batch, model.config.context, None, False))
    labels = batch["labels"].reshape(-1).to(device)
    with torch.no_grad():
        hidden = model.hidden(batch["input_ids"].to(device)).reshape(len(labels), -1).bfloat16().float()
        weight = model.head_weight.bfloat16().float()
        hidden, labels = hidden[labels >= 0], labels[labels >= 0]
        exact = gradients(hidden, weight, labels, None, None)
        cases: dict[str, tuple[str | None, str | None, bool]] = {"operands e4m3": ("fp8_e4m3", None, False)}
        for name in FORMATS:
            cases[f"gradient {name}"] = (None, name, False)
            cases[f"all, gradient {name}"] = ("fp8_e4m3", name, False)
            cases[f"all, gradient {name}, target apart"] = ("fp8_e4m3", name, True)
        rows: dict[str, Any] = {}
        for case, how in cases.items():
            found = gradients(hidden, weight, labels, *how)
            rows[case] = {
                what: {
                    "error": round(float((a - b).norm() / b.norm()), 5),
                    "gain": round(float((a * b).sum() / (b * b).sum()), 5),
                }
                for what, a, b in zip(("hidden", "weight"), found, exact, strict=True)
            }
            print(
                f"{case:40s}", "  ".join(f"{k} {v['error']:.2%} (gain {v['gain']:.4f})" for k, v in rows[case].items())
            )
        p = torch.softmax(hidden @ weight.t(), 1)
        flushed = {f: round(float(p[as_gradient(p, f) == 0].sum() / p.sum()), 7) for f in FORMATS}
    print("probability that becomes 0:", {name: f"{share:.3%}" for name, share in flushed.items()})
    shape = {"tokens": len(labels), "vocabulary": len(weight), "width": weight.shape[1]}
    save(f"head_gradients_{options.name}", {**header(), **shape, "rows": rows, "flushed": flushed})


if __name__ == "__main__":
    main()
