"""Shapes of a model and a batch that cost speed on a device, said before the training starts, with what to do."""

from __future__ import annotations

import torch

from fewbits.kernels.dispatch import loss_execution
from fewbits.nn.transformer import ModelConfig
from fewbits.precision.precision import Precision

FAST_HEADS = (64, 128)
"""Head dimensions that flash and cuDNN attention were built for first; others run, padded to the next one or slower."""
MULTIPLE_16BIT, MULTIPLE_8BIT = 8, 16
"""Elements in the 16 bytes that a tensor-core matmul reads at once: a side that is no multiple leaves the fast kernels."""
VOCABULARY = 64


def slow_shapes(
    model: ModelConfig, batch: int, device: torch.device | str, precision: Precision | None = None
) -> list[str]:
    """A sentence for everything about these shapes that costs speed on `device` and that nothing here pads away.

    batch: sequences in one micro-batch. On a CPU the list is empty: the multiples are those of tensor cores.
    model.vocab_size is known (or 0).
    """
    device = torch.device(device)
    if device.type != "cuda":
        return []
    few_bits = precision is not None and bool(precision.recipe)
    multiple = MULTIPLE_8BIT if few_bits else MULTIPLE_16BIT
    kind = "fp8 and int8" if few_bits else "16-bit"
    found = []
    if model.vocab_size % VOCABULARY and loss_execution(device).value == "definition":  # the kernel aligns its rows
        larger = -(-model.vocab_size // VOCABULARY) * VOCABULARY
        found.append(
            f"a vocabulary of {model.vocab_size:,} is no multiple of {VOCABULARY}: --vocab_size {larger} spares the head "
            "unaligned rows of logits"
        )
    found += _heads(model)
    tokens = batch * model.context
    if tokens % multiple:
        found.append(
            f"{batch} x {model.context} = {tokens:,} tokens at once are no multiple of {multiple}, which {kind} matmuls of "
            f"weight gradients want: choose a --context that is one"
        )
    for name, width in (("n_embd", model.n_embd), ("n_ff", model.ff)):
        if width % multiple:
            larger = -(-width // multiple) * multiple
            stays = "; such layers stay in 16 bits" if few_bits else ""
            found.append(f"{name}={width} is no multiple of {multiple}, which {kind} matmuls want: {larger} is{stays}")
    return found


def _heads(model: ModelConfig) -> list[str]:
    size = model.head_dim
    if size in FAST_HEADS:
        return []
    counts = [model.n_embd // fast for fast in FAST_HEADS if model.n_embd % fast == 0]
    fits = [count for count in counts if count % model.kv_heads == 0 or model.kv_heads == model.n_head]
    advice = f"; --n_head {' or '.join(map(str, fits))} gives a fast size" if fits else ""
    if size % 8:
        return [f"heads of {size} are no multiple of 8, which the fast attention kernels need{advice}"]
    return [f"heads of {size} are none of the sizes that attention is fastest for (64, 128){advice}"]
