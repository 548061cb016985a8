"""How good a model is on text it has not seen: loss in nats a token, perplexity, bits per byte of text.

Evaluation runs without gradients or dropout, and never through a callable compiled for training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from fewbits.checkpoint.manifest import STATE
from fewbits.checkpoint.schema import load_json
from fewbits.data.batches import eval_batches
from fewbits.data.corpus import open_corpus
from fewbits.data.ratios import compression_baseline
from fewbits.data.tokens import TokenStore
from fewbits.errors import FewbitsError
from fewbits.numerics.loss import IGNORE
from fewbits.precision.switches import torch_switches
from fewbits.train.config import Config, DataConfig
from fewbits.train.opened import open_model, running_precision
from fewbits.train.rundir import SMALL, run_of


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within: evaluation mode, no gradients. The mode of the model is put back afterwards."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def evaluate(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], token_bytes: npt.NDArray[Any] | Tensor | None = None
) -> dict[str, Any]:
    """Mean loss over the real targets of `batches`: {"loss", "perplexity", "bits_per_byte", "tokens", "bytes"}.

    Args:
        model: has `loss_sum(micro_batch)`, the sum of losses in nats, as `fewbits.nn.transformer.Transformer`.
        batches: {"input_ids", "labels", ...} int64 [B, T], labels aligned, -100 ignored; moved to the model's device.
        token_bytes: int [V], bytes of text that each token stands for (0 for special tokens, whose loss still counts);
            without it "bits_per_byte" is None.

    Every value is None when there is no target at all.
    """
    device = next(model.parameters()).device
    sums: list[Tensor] = []
    tokens = count = 0
    lengths = None if token_bytes is None else torch.as_tensor(token_bytes).to(torch.int64)
    loss_sum: Any = model.loss_sum
    with evaluating(model):
        for batch in batches:
            real = batch["labels"][batch["labels"] != IGNORE].cpu()
            tokens += real.numel()
            count += 0 if lengths is None else int(lengths[real].sum())
            sums.append(loss_sum({key: value.to(device) for key, value in batch.items()}).double())
    if not tokens:
        return {"loss": None, "perplexity": None, "bits_per_byte": None, "tokens": 0, "bytes": 0}
    total = float(torch.stack(sums).sum())
    loss = total / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": total / math.log(2) / count if count else None,
        "tokens": tokens,
        "bytes": count,
    }


def evaluate_run(
    run: Path | str, data: str | None = None, device: str = "auto", precision: str | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """How good the model in `run` (a run, a checkpoint, a Hugging Face folder) is on text: as `evaluate`, and more.

    data: a corpus; None takes the run's. Of the corpus it was trained on the held-out part counts, all of it; of any
    other corpus both parts. precision: runs the model in it; None in the format that is stored.
    Raises FewbitsError.
    """
    model, tokenizer, chosen, place = open_model(run, device, precision)
    if tokenizer is None:
        raise FewbitsError(f"{run} holds no tokenizer.json, so it cannot read text.")
    config = run_config(Path(run))
    own = DataConfig() if config is None else config.data
    if data is None and config is None:
        raise FewbitsError(f"{run} does not say what it was trained on; name the text with --data.")
    corpus = open_corpus(own.data if data is None else data, own.encoding if data is None else None)
    cache = own.cache
    store = TokenStore.open_or_build(corpus, tokenizer, cache)
    store.check_vocabulary(model.config.vocab_size)
    held_out = config is not None and (data is None or corpus.fingerprint() == _trained_on(own))
    parts = [(store.val, store.val_documents)]
    if not held_out:
        parts.append((store.train, store.train_documents))
    batches = (
        batch
        for tokens, documents in parts
        if len(tokens) > 1
        for batch in eval_batches(tokens, documents, batch_size, model.config.context, None, own.mask_documents)
    )
    with torch_switches(chosen, place):
        found = evaluate(model, batches, tokenizer.token_bytes)
    texts: Iterable[str] = corpus.documents("val")
    baseline = compression_baseline(texts if held_out else chain(texts, corpus.documents("train")))
    what = {"data": corpus.name, "part": "held out" if held_out else "all"}
    how = {"precision": running_precision(model, chosen), "device": str(place)}
    return {**found, **what, **how, "gzip": baseline["gzip"], "xz": baseline["xz"]}


def _trained_on(data: DataConfig) -> str | None:
    try:
        return open_corpus(data.data, data.encoding).fingerprint()
    except FewbitsError:  # the corpus of the run is gone: whatever is read now is another one
        return None


def run_config(path: Path) -> Config | None:
    """The config of the run that `path` (a run, its checkpoints folder or a checkpoint) belongs to, or None.

    What `fewbits quantize` wrote stands alone, and carries the config of its run in its state."""
    if (path / SMALL).is_file() and (path / STATE).is_file():
        text = load_json((path / STATE).read_bytes())["state"].get("config")
        return None if text is None else Config.from_toml(text, source=str(path / STATE))
    if (folder := run_of(path)) is None:
        return None
    file = folder / "config.toml"
    return Config.from_toml(file.read_text(encoding="utf-8"), source=str(file))
