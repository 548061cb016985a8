"""Which of our tensors is stored under which name or names of transformers, and in which order of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.nn.transformer import ModelConfig

GPT2 = ("gpt2", "gpt_bigcode")  # the two classes of transformers for the shape of GPT-2


class Rule(NamedTuple):
    """One of our tensors and the tensor or tensors it is stored as."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    """GPT-2's Conv1D keeps its weight as [in, out]."""
    rows: tuple[int, ...] = ()
    """How many rows of ours go to each of theirs, when there are several."""
    heads: int = 0
    """GPTBigCode keeps query, key and value of one head together: this many heads; 0 for a tensor of another kind."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Ours as theirs. Rows move whole, so codes and scales can be split as well as weights."""
        if self.heads:
            tensor = _swap(tensor, 3, self.heads)
        parts = torch.split(tensor, list(self.rows)) if self.rows else (tensor,)
        return tuple(part.t() if self.transposed else part for part in parts)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Theirs as ours."""
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.heads:
            whole = _swap(whole, self.heads, 3)
        return whole.t().contiguous() if self.transposed else whole


def _swap(tensor: Tensor, outer: int, inner: int) -> Tensor:
    """Rows numbered (outer, inner, rest) renumbered (inner, outer, rest)."""
    rest = tensor.shape[1:]
    return tensor.reshape(outer, inner, -1, *rest).transpose(0, 1).reshape(-1, *rest)


def rules(config: ModelConfig, kind: str, own: Iterable[str]) -> Iterator[Rule]:
    """Every tensor of the model, ours and theirs, in the order of our state dict. own: the names when they are ours."""
    if kind == "fewbits":
        bases = (name.replace(".codes", ".weight") for name in own if not name.endswith(".scale"))
        return (Rule(name, (name,)) for name in bases)
    return _gpt2_rules(config, kind) if kind in GPT2 else _llama_rules(config)


def _gpt2_rules(config: ModelConfig, kind: str) -> Iterator[Rule]:
    conv = kind == "gpt2"
    yield Rule("embed.weight", ("transformer.wte.weight",))
    yield Rule("positions.weight", ("transformer.wpe.weight",))
    parts = {
        "norm1": ("ln_1", False),
        "attention.qkv": ("attn.c_attn", conv),
        "attention.output": ("attn.c_proj", conv),
        "norm2": ("ln_2", False),
        "mlp.up": ("mlp.c_fc", conv),
        "mlp.down": ("mlp.c_proj", conv),
    }
    for i in range(config.n_layer):
        for ours, (theirs, transposed) in parts.items():
            name, heads = f"transformer.h.{i}.{theirs}", config.n_head if ours == "attention.qkv" and not conv else 0
            yield Rule(f"blocks.{i}.{ours}.weight", (f"{name}.weight",), transposed, heads=heads)
            yield Rule(f"blocks.{i}.{ours}.bias", (f"{name}.bias",), heads=heads)
    yield Rule("norm.weight", ("transformer.ln_f.weight",))
    yield Rule("norm.bias", ("transformer.ln_f.bias",))
    if not config.tied:
        yield Rule("head.weight", ("lm_head.weight",))


def _llama_rules(config: ModelConfig) -> Iterator[Rule]:
    kinds = ("weight", "bias") if config.bias else ("weight",)
    rows = tuple(heads * config.head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads))
    yield Rule("embed.weight", ("model.embed_tokens.weight",))
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        yield Rule(f"{ours}.norm1.weight", (f"{theirs}.input_layernorm.weight",))
        for kind in kinds:
            heads = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
            yield Rule(f"{ours}.attention.qkv.{kind}", heads, rows=rows)
            yield Rule(f"{ours}.attention.output.{kind}", (f"{theirs}.self_attn.o_proj.{kind}",))
        if config.qk_norm:
            yield Rule(f"{ours}.attention.query_norm.weight", (f"{theirs}.self_attn.q_norm.weight",))
            yield Rule(f"{ours}.attention.key_norm.weight", (f"{theirs}.self_attn.k_norm.weight",))
        yield Rule(f"{ours}.norm2.weight", (f"{theirs}.post_attention_layernorm.weight",))
        for part in ("up", "gate", "down"):
            for kind in kinds:
                yield Rule(f"{ours}.mlp.{part}.{kind}", (f"{theirs}.mlp.{part}_proj.{kind}",))
    yield Rule("norm.weight", ("model.norm.weight",))
    if not config.tied:
        yield Rule("head.weight", ("lm_head.weight",))
