"""Which of our tensors is stored under which name or names of transformers, and in which order of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fewbits.nn.transformer import ModelConfig

OPT_OFFSET = 2  # rows that OPT keeps in front of its positions, and that no token reads


class Rule(NamedTuple):
    """One of our tensors and the tensor or tensors it is stored as."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    """GPT-2's Conv1D keeps its weight as [in, out]."""
    rows: tuple[int, ...] = ()
    """How many rows of ours go to each of theirs, when there are several."""
    before: int = 0
    """How many rows of zeros theirs has in front."""

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Ours as theirs. Rows move whole, so codes and scales can be split as well as weights."""
        if self.before:
            tensor = torch.cat((tensor.new_zeros(self.before, *tensor.shape[1:]), tensor))
        parts = torch.split(tensor, list(self.rows)) if self.rows else (tensor,)
        return tuple(part.t() if self.transposed else part for part in parts)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Theirs as ours."""
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        whole = whole[self.before :].clone() if self.before else whole
        return whole.t().contiguous() if self.transposed else whole


def rules(config: ModelConfig, kind: str, own: Iterable[str]) -> Iterator[Rule]:
    """Every tensor of the model, ours and theirs, in the order of our state dict. own: the names when they are ours."""
    if kind == "fewbits":
        bases = (name.replace(".codes", ".weight") for name in own if not name.endswith(".scale"))
        return (Rule(name, (name,)) for name in bases)
    return {"gpt2": _gpt2_rules, "opt": _opt_rules}.get(kind, _llama_rules)(config)


def _gpt2_rules(config: ModelConfig) -> Iterator[Rule]:
    yield Rule("embed.weight", ("transformer.wte.weight",))
    yield Rule("positions.weight", ("transformer.wpe.weight",))
    parts = {
        "norm1": ("ln_1", False),
        "attention.qkv": ("attn.c_attn", True),
        "attention.output": ("attn.c_proj", True),
        "norm2": ("ln_2", False),
        "mlp.up": ("mlp.c_fc", True),
        "mlp.down": ("mlp.c_proj", True),
    }
    for i in range(config.n_layer):
        for ours, (theirs, matrix) in parts.items():
            yield Rule(f"blocks.{i}.{ours}.weight", (f"transformer.h.{i}.{theirs}.weight",), transposed=matrix)
            yield Rule(f"blocks.{i}.{ours}.bias", (f"transformer.h.{i}.{theirs}.bias",))
    yield Rule("norm.weight", ("transformer.ln_f.weight",))
    yield Rule("norm.bias", ("transformer.ln_f.bias",))
    if not config.tied:
        yield Rule("head.weight", ("lm_head.weight",))


def _opt_rules(config: ModelConfig) -> Iterator[Rule]:
    decoder, rows = "model.decoder", (config.n_embd,) * 3
    yield Rule("embed.weight", (f"{decoder}.embed_tokens.weight",))
    yield Rule("positions.weight", (f"{decoder}.embed_positions.weight",), before=OPT_OFFSET)
    parts = {
        "norm1": ("self_attn_layer_norm",),
        "attention.qkv": tuple(f"self_attn.{part}_proj" for part in "qkv"),
        "attention.output": ("self_attn.out_proj",),
        "norm2": ("final_layer_norm",),
        "mlp.up": ("fc1",),
        "mlp.down": ("fc2",),
    }
    for i in range(config.n_layer):
        for ours, theirs in parts.items():
            for kind in ("weight", "bias"):
                names = tuple(f"{decoder}.layers.{i}.{name}.{kind}" for name in theirs)
                yield Rule(f"blocks.{i}.{ours}.{kind}", names, rows=rows if len(names) > 1 else ())
    for kind in ("weight", "bias"):
        yield Rule(f"norm.{kind}", (f"{decoder}.final_layer_norm.{kind}",))
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
