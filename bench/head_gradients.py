"""What an fp8 head does to its gradients: its operands, the gradient of its logits, and ways to take the target apart.

    fewbits train --precision fp32 --out_dir runs/nano_fp32 && python bench/head_gradients.py runs/nano_fp32

On a trained run and its held-out text, against fp32, norm of the difference over norm: of the gradients of hidden states
token by token ("token"); of their mean over all tokens ("mean"), where what every token gets wrong in a way of its own
averages out and what all get wrong alike stays; and of the gradient of the weight. "drift" is the sum of that gradient's rows
over its norm: 0 in fp32, since raising all logits changes no probability; what is left of it moves all rows one way, and no
loss holds against it. Then the share of the probability that becomes 0 in a format.

"all in codes" quantizes the gradient as it is. "-1 apart" takes the -1 of a target that is expected to less than 1/2 exactly,
times rows that are not rounded (what head=fp8 did until it was seen to cost loss); "zero sum" is what it does.
Any device, a minute; writes bench/results/head_gradients_NAME.json.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from blocks import ROOT, save
from torch import Tensor

sys.path.insert(0, str(ROOT))

from fewbits.cli.console import find_model
from fewbits.data.batches import eval_batches
from fewbits.data.corpus import open_corpus
from fewbits.data.tokens import TokenStore
from fewbits.numerics.quantize import quantize
from fewbits.train.evaluate import open_model, run_config

FORMATS = ("fp8_e5m2", "fp8_e4m3")
Way = Callable[[Tensor, Tensor, Tensor, str], tuple[Tensor, Tensor]]
"""(hidden [N, D], weight [V, D], labels [N], format of the gradient) -> gradients of hidden and of weight."""


def rounded(x: Tensor) -> Tensor:
    """What a tensor is worth as e4m3 codes under one power of two."""
    return quantize(x, "fp8_e4m3").dequantize()


def as_gradient(p: Tensor, format: str) -> Tensor:
    """What probabilities are worth under the scale of a gradient, which may be 1."""
    return quantize(torch.cat((p, torch.ones_like(p[:1]))), format).dequantize()[:-1]


def softmax(x: Tensor, w: Tensor) -> Tensor:
    return torch.softmax((x @ w.t()).half().float(), 1)


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, _: str = "") -> tuple[Tensor, Tensor]:
    """In fp32, but for logits in fp16, as bf16-mixed has them on a GPU."""
    p = softmax(hidden, weight)
    p[torch.arange(len(labels)), labels] -= 1
    return p @ weight, p.t() @ hidden


def all_in_codes(hidden: Tensor, weight: Tensor, labels: Tensor, format: str) -> tuple[Tensor, Tensor]:
    x, w = rounded(hidden), rounded(weight)
    p = softmax(x, w)
    p[torch.arange(len(labels)), labels] -= 1
    g = as_gradient(p, format)
    return g @ w, g.t() @ x


def one_apart(hidden: Tensor, weight: Tensor, labels: Tensor, format: str) -> tuple[Tensor, Tensor]:
    x, w, rows = rounded(hidden), rounded(weight), torch.arange(len(labels))
    p = softmax(x, w)
    aside = (p[rows, labels] < 0.5).float().unsqueeze(1)
    p[rows, labels] += aside.squeeze(1) - 1
    g = as_gradient(p, format)
    return g @ w - aside * weight[labels], (g.t() @ x).index_add_(0, labels, -aside * hidden)


def zero_sum(hidden: Tensor, weight: Tensor, labels: Tensor, format: str) -> tuple[Tensor, Tensor]:
    x, w, rows = rounded(hidden), rounded(weight), torch.arange(len(labels))
    p = softmax(x, w)
    p[rows, labels] = 0
    g = as_gradient(p, format)
    g[rows, labels] = -g.sum(1)
    return g @ w, g.t() @ x


class Errors:
    """Sums over batches of what was found and of what is exact."""

    def __init__(self) -> None:
        self.squares: dict[str, float] = defaultdict(float)
        self.mean: list[Any] = [0.0, 0.0]
        self.weight: list[Any] = [0.0, 0.0]

    def add(self, found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
        """One batch more."""
        difference = found[0] - exact[0]
        self.squares["off"] += float(difference.square().sum())
        self.squares["exact"] += float(exact[0].square().sum())
        for total, part in (
            (self.mean, [x.sum(0) for x in (difference, exact[0])]),
            (self.weight, [found[1], exact[1]]),
        ):
            total[:] = [a + b for a, b in zip(total, part, strict=True)]

    def row(self) -> dict[str, float]:
        """The four numbers of the table."""
        found, exact = self.weight
        return {
            "token": (self.squares["off"] / self.squares["exact"]) ** 0.5,
            "mean": float(self.mean[0].norm() / self.mean[1].norm()),
            "weight": float((found - exact).norm() / exact.norm()),
            "drift": float(found.sum(0).norm() / found.norm()),
        }


def main() -> None:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--name", default="nano")
    parser.add_argument("--batches", type=int, default=8, help="of 2,048 tokens")
    options = parser.parse_args()
    folder = find_model(options.run)
    model, tokenizer, _, device = open_model(folder, "auto", None)
    config = run_config(folder)
    assert tokenizer is not None and config is not None
    store = TokenStore.open_or_build(open_corpus(config.data.data), tokenizer)
    size = max(1, 2048 // model.config.context)
    batches = eval_batches(store.val, store.val_documents, size, model.config.context, None, False)
    ways: dict[str, tuple[Way, str]] = {
        "operands e4m3": (lambda x, w, labels, _: exact(rounded(x), rounded(w), labels), "")
    }
    for format in FORMATS:
        for name, way in (("all in codes", all_in_codes), ("-1 apart", one_apart), ("zero sum", zero_sum)):
            ways[f"{name}, {format}"] = way, format
    errors = {name: Errors() for name in ways}
    flushed, whole, tokens = dict.fromkeys(FORMATS, 0.0), 0.0, 0
    with torch.no_grad():
        weight = model.head_weight.bfloat16().float()
        for batch in islice(batches, options.batches):
            labels = batch["labels"].reshape(-1).to(device)
            hidden = model.hidden(batch["input_ids"].to(device)).reshape(len(labels), -1).bfloat16().float()
            hidden, labels = hidden[labels >= 0], labels[labels >= 0]
            reference = exact(hidden, weight, labels)
            for name, (way, format) in ways.items():
                errors[name].add(way(hidden, weight, labels, format), reference)
            p = softmax(hidden, weight)
            for format in FORMATS:
                flushed[format] += float(p[as_gradient(p, format) == 0].sum())
            whole, tokens = whole + float(p.sum()), tokens + len(labels)
    rows = {name: {key: round(value, 5) for key, value in found.row().items()} for name, found in errors.items()}
    for name, row in rows.items():
        print(f"{name:25s}", "  ".join(f"{key} {value:.2%}" for key, value in row.items()))
    shares = {format: round(share / whole, 7) for format, share in flushed.items()}
    print("probability that becomes 0:", {format: f"{share:.3%}" for format, share in shares.items()})
    shape = {"tokens": tokens, "vocabulary": len(weight), "width": weight.shape[1]}
    save(f"head_gradients_{options.name}", {**shape, "rows": rows, "flushed": shares})


if __name__ == "__main__":
    main()
