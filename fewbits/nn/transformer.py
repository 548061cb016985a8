"""One decoder block for GPT-2, Llama and their relatives, and the language model made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from fewbits.errors import FewbitsError
from fewbits.kernels.dispatch import emulated, fused, norm_execution
from fewbits.nn.attention import Attention, rotary_table
from fewbits.nn.documents import Mask, block_mask, document_mask, fits_blocks
from fewbits.nn.embedding import Embedding
from fewbits.nn.head import compiled_pieces, loss_sum
from fewbits.nn.linear import FORMAT_OF, Linear, linear, unheard
from fewbits.nn.lowbit import Codes, let_compilers_in
from fewbits.nn.mlp import mlp, together
from fewbits.nn.norm import LayerNorm, RMSNorm, add_norm, joined
from fewbits.nn.own_code import own_code
from fewbits.numerics.activation import gelu
from fewbits.numerics.loss import Pieces
from fewbits.numerics.wide import widen
from fewbits.ranges import BLOCK, LOSS_HEAD, span

AT_ONCE = 12  # layers that are compiled as one graph; with more, compiling takes minutes
# Smallest and largest that fit. Beyond, a size is a typing error, not a model (the largest public ones stay a factor of
# 10 below).
LIMITS: dict[str, tuple[float, float]] = {
    "vocab_size": (0, 10_000_000),
    "context": (1, 10_000_000),
    "n_layer": (1, 10_000),
    "n_head": (1, 10_000),
    "n_embd": (1, 1_000_000),
    "dropout": (0.0, 0.99),
    "norm_eps": (0.0, 1.0),
    "rope_theta": (1.0, 1e12),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder. Defaults are GPT-2 small."""

    vocab_size: int = 50304
    """Number of distinct tokens; 0 takes it from the tokenizer."""
    context: int = 1024
    """Longest sequence in tokens."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Number of query heads."""
    n_kv_head: int = 0
    """Number of key and value heads (grouped-query attention); 0 means as many as query heads."""
    n_embd: int = 768
    """Width of the residual stream."""
    n_ff: int = 0
    """Width of the feed-forward layer; 0 means 4 times the width (8/3 rounded up to 64 for swiglu)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalization before attention, feed-forward and head."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Feed-forward nonlinearity (gelu is the tanh approximation of GPT-2)."""
    positions: Literal["learned", "rope"] = "learned"
    """How a token knows its position."""
    bias: bool = True
    """Biases in linear layers and layer norms."""
    tied: bool = True
    """Whether the head shares the weight of the embedding."""
    qk_norm: bool = False
    """RMSNorm on queries and keys."""
    dropout: float = 0.0
    """Probability of dropping an element after embedding, attention and feed-forward."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the variance before its root."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.n_kv_head or self.n_head

    @property
    def ff(self) -> int:
        """Feed-forward width, resolved."""
        if self.n_ff:
            return self.n_ff
        return 4 * self.n_embd if self.activation == "gelu" else 64 * math.ceil(8 * self.n_embd / 3 / 64)

    def check(self) -> ModelConfig:
        """Raises FewbitsError for a shape that cannot be built, else returns itself."""
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise FewbitsError(f"model.{name} is {value}; it must lie between {least} and {most}.")
        for name in ("n_kv_head", "n_ff"):
            if getattr(self, name) < 0:
                raise FewbitsError(
                    f"model.{name} is {getattr(self, name)}; give a positive number, or 0 for the default."
                )
        if self.n_embd % self.n_head:
            heads = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            near = sorted(sorted(heads, key=lambda h: abs(h - self.n_head))[:3])
            raise FewbitsError(
                f"n_head={self.n_head} does not divide the width n_embd={self.n_embd}. "
                f"Choose a number of heads such as {', '.join(map(str, near))}."
            )
        if self.n_head % self.kv_heads:
            raise FewbitsError(
                f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}. Choose a divisor of it."
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise FewbitsError(
                f"rope needs an even head width; n_embd={self.n_embd} over n_head={self.n_head} is {self.head_dim}, which "
                "is odd. Choose other sizes, or --positions learned."
            )
        return self

    def parameter_count(self) -> int:
        """Number of parameters, a tied weight counted once."""
        D, L, bias, hd = self.n_embd, self.n_layer, int(self.bias), self.head_dim
        norm = D * (1 + (bias if self.norm == "layernorm" else 0))
        qkv = (self.n_head + 2 * self.kv_heads) * hd
        attention = D * qkv + D * D + bias * (qkv + D) + (2 * hd if self.qk_norm else 0)
        up = 2 if self.activation == "swiglu" else 1
        mlp = (up + 1) * D * self.ff + bias * (up * self.ff + D)
        ends = self.vocab_size * D * (1 if self.tied else 2) + (self.context * D if self.positions == "learned" else 0)
        return L * (2 * norm + attention + mlp) + norm + ends

    def flops_per_token(self, context: float | None = None, causal: bool = True) -> int:
        """Model FLOPs of forward and backward for one token: 6 N + 6 L D T.

        N counts the weights that are multiplied (every matrix, the head once, no look-ups); the second term is causal
        attention, half of the 12 L D T of full attention (Chowdhery et al. 2022, appendix B). `causal=False` counts it in
        full, as that paper and torch's FlopCounterMode do, which does not know that half of the scores are masked (and sees
        nothing of attention where our own kernel makes it, in eager code on a CPU).
        """
        D, T = self.n_embd, context or self.context
        qkv = (self.n_head + 2 * self.kv_heads) * self.head_dim
        up = 2 if self.activation == "swiglu" else 1
        N = self.n_layer * (D * qkv + D * D + (up + 1) * D * self.ff) + self.vocab_size * D
        return 6 * N + round((6 if causal else 12) * self.n_layer * D * T)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `dataclasses.asdict`; unknown keys are refused."""
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise FewbitsError(f"unknown model option {sorted(unknown)[0]!r}; known are {', '.join(sorted(known))}.")
        return cls(**values)


class MLP(nn.Module):
    """Feed-forward layer: down(gelu(up(x))) or down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = Linear(config.n_embd, config.ff, bias=config.bias)
        self.gate = Linear(config.n_embd, config.ff, bias=config.bias) if config.activation == "swiglu" else None
        self.down = Linear(config.ff, config.n_embd, bias=config.bias)

    def _layers(self) -> tuple[Linear, ...]:
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    def reader(self) -> Linear | None:
        """The layer whose codes of x `forward` takes now, if it takes any."""
        first, *_ = layers = self._layers()
        return first if together(layers) and first.takes_codes() else None

    def forward(self, x: Tensor, again: Tensor | None = None, codes: Codes | None = None) -> Tensor:
        """x [..., D] -> [..., D]. again: x for who reads it second, where the gradients of the two are wanted apart. codes:
        those of x for the `reader`."""
        again = x if again is None else again
        if x.numel() and together(layers := self._layers()):
            return mlp(layers, x, again, codes)
        if self.gate is None:
            up = self.up(x)
            twin = fused(up)
            return self.down(gelu(up) if twin is None else twin.gelu(up))  # type: ignore[no-any-return]
        return self.down(nn.functional.silu(self.gate(x)) * self.up(again))  # type: ignore[no-any-return]


def _norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    if config.norm == "layernorm":
        return LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(config.n_embd, eps=config.norm_eps)


def _reader(module: nn.Module) -> Linear | None:
    """The layer that may have codes of what a module reads; none in a module that replaced ours or that somebody listens to."""
    return module.reader() if type(module) in (Attention, MLP) and unheard(module) else None  # type: ignore[operator]


def _coded(codes: Codes | None) -> dict[str, Codes]:
    return {} if codes is None else {"codes": codes}


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)): the one block of every decoder here."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm1 = _norm(config)
        self.attention = Attention(
            config.n_embd, config.n_head, config.kv_heads, config.bias, config.qk_norm, config.norm_eps, config.dropout
        )
        self.norm2 = _norm(config)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Mask) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x, branch = self.opened(x, rotary, mask)
        return x + branch

    def opened(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Mask) -> tuple[Tensor, Tensor]:
        """The block of x as two, [B, T, D] each, that are still to be added: by who comes next, who has the sum in its norm."""
        return self._branches(x, self.norm1(x), rotary, mask)

    def join(
        self, x: Tensor, branch: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Mask
    ) -> tuple[Tensor, Tensor]:
        """`opened` of x + branch."""
        x, (normal,), codes = joined(self.norm1, x, branch, reader=_reader(self.attention))
        return self._branches(x, normal, rotary, mask, codes)

    def _branches(
        self,
        x: Tensor,
        normal: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Mask,
        codes: Codes | None = None,
    ) -> tuple[Tensor, Tensor]:
        branch = self._drop(self.attention(normal, rotary, mask, **_coded(codes)))
        # a layer may have been replaced, and who listens to it hears one input and the whole of its gradient
        twice = type(self.mlp) is MLP and self.mlp.gate is not None and unheard(self.mlp)
        x, normals, codes = joined(self.norm2, x, branch, twice, _reader(self.mlp))
        return x, self._drop(self.mlp(*normals, **_coded(codes)))

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x


def _train_block(block: Block, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Mask) -> Tensor:
    return block(x, rotary, mask)  # type: ignore[no-any-return]


def _train_joining(
    block: Block, x: Tensor, branch: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Mask
) -> tuple[Tensor, Tensor]:
    return block.join(x, branch, rotary, mask)


class _WithNothing(torch.autograd.Function):
    """x and zeros like it, as two results of one operation, so that the first block has inputs like every other's."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), torch.zeros_like(x)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        return grad


def _train_stack(
    blocks: nn.ModuleList,
    norm: LayerNorm | RMSNorm,
    x: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    mask: Mask,
) -> Tensor:
    first, *others = blocks
    x, branch = first.opened(x, rotary, mask)  # type: ignore[operator]
    for block in others:
        x, branch = block.join(x, branch, rotary, mask)  # type: ignore[operator]
    return joined(norm, x, branch)[1][0]


def _train_norm(norm: LayerNorm | RMSNorm, x: Tensor, branch: Tensor | None = None) -> Tensor:
    return norm(x) if branch is None else joined(norm, x, branch)[1][0]


def _evaluate_block(block: Block, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: Mask) -> Tensor:
    return block(x, rotary, mask)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A decoder-only language model.

    `forward` returns logits; `loss_sum` is what training and evaluation use and never holds the logits of the batch.
    Weights start as GPT-2's: normal with deviation 0.02, divided by sqrt(2 layers) where a branch joins the residual
    stream. They are drawn on the CPU from `seed`, so that every device starts from the same numbers.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config.check()
        if not config.vocab_size:
            raise FewbitsError("model.vocab_size is 0; give the number of tokens, as the tokenizer has it.")
        self.embed = Embedding(config.vocab_size, config.n_embd)
        self.positions = Embedding(config.context, config.n_embd) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = _norm(config)
        self.head = None if config.tied else Linear(config.n_embd, config.vocab_size, bias=False)
        self.rotary_cos: Tensor | None
        self.rotary_sin: Tensor | None
        cos, sin = (
            rotary_table(config.context, config.head_dim, config.rope_theta)
            if config.positions == "rope"
            else (None, None)
        )
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)
        self._run_train: Callable[..., Tensor] = _train_block
        self._run_joining: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._run_norm: Callable[..., Tensor] = _train_norm
        self._run_stack: Callable[..., Tensor] | None = None
        self._run_evaluate: Callable[..., Tensor] = _evaluate_block
        self._pieces: Pieces | None = None
        self.tf32 = False
        self.logits, self.head_format = "auto", "working"  # as Precision.logits and Precision.head
        self._initialize(seed)

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                joins = name.endswith(("attention.output.weight", "mlp.down.weight"))
                deviation = 0.02 / math.sqrt(2 * self.config.n_layer) if joins else 0.02
                parameter.normal_(0.0, deviation, generator=generator)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head [V, D], the embedding's when tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def compile_blocks(self, evaluation: bool = False, at_once: bool | None = None) -> None:
        """Compiles what is trained, and the softmax of the loss head; evaluation gets a callable of its own.

        The block is compiled once for all layers, and makes the last sum of the one before it, for which its norm needs no
        kernel more (unless somebody listens to a block, or has put another in its place). On a GPU, few layers in the working
        format are compiled as one graph, where residual sums join the norms of the next block: 61.5 to 59.9 ms a step at
        gpt2-124m on an H200, for 21 s of compiling instead of 9.

        at_once: whether those are few layers; None counts them. What is compiled is this model's alone (`own_code`): the ninth
        model of a process would run eagerly otherwise.
        """

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(own_code(function), dynamic=False)

        for weight in {p.dtype: p for p in self.parameters() if p.dtype in FORMAT_OF}.values():
            emulated(FORMAT_OF[weight.dtype], weight.device.type)  # asked for now: a compiler cannot
        norm_execution(self.head_weight.device)
        let_compilers_in(add_norm)
        self._run_train = compiled(_train_block)
        self._run_joining = compiled(_train_joining)
        low_bit = any(getattr(module, "recipe", "") for module in self.blocks.modules())
        few = len(self.blocks) <= AT_ONCE if at_once is None else at_once
        if self.head_weight.is_cuda and few and not low_bit:
            self._run_stack = compiled(_train_stack)
        if self.head_weight.is_cuda:  # eager code widens before it normalizes: 1.5 GB read and written for 32,768 x 768
            self._run_norm = compiled(_train_norm)
        self.compile_head()
        if evaluation:
            self._run_evaluate = compiled(_evaluate_block)

    def compile_head(self) -> None:
        """Compiles the softmax of the loss head alone."""
        self._pieces = compiled_pieces()

    def hidden(self, input_ids: Tensor, documents: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Normalized hidden states [B, T, D] for ids [B, T].

        Args:
            documents: int [B, T]; tokens of different documents do not see each other.
            positions: int64 [B, T]; default 0 .. T-1.
        """
        _B, T = input_ids.shape
        if self.config.context < T:
            raise FewbitsError(f"{T} tokens exceed the context of {self.config.context}; shorten the input.")
        x = self.embed(input_ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(T, device=x.device) if positions is None else positions)
        if self.config.dropout:
            x = nn.functional.dropout(x, self.config.dropout, self.training)
        return self.through_blocks(x, documents, positions)

    def through_blocks(self, x: Tensor, documents: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Normalized hidden states [B, T, D] of embedded tokens x [B, T, D]; the others as `hidden` takes them."""
        rotary = self._rotary(x.shape[1], positions)
        mask = None if documents is None else self._mask(documents, x.dtype)
        # who listens to a block hears its sum, and a block that was put in place of one of ours makes it itself
        joining = self.training and all(type(block) is Block and unheard(block) for block in self.blocks)
        if joining and self._run_stack is not None:
            return self._run_stack(self.blocks, self.norm, x, rotary, mask)
        if joining and self._run_joining is not None:
            x, branch = _WithNothing.apply(x)  # type: ignore[no-untyped-call]
            for number, block in enumerate(self.blocks):
                with span(BLOCK, number):
                    x, branch = self._run_joining(block, x, branch, rotary, mask)
            return self._run_norm(self.norm, x, branch)
        run = self._run_train if self.training else self._run_evaluate
        for number, block in enumerate(self.blocks):
            with span(BLOCK, number):
                x = run(block, x, rotary, mask)
        return (self._run_norm if self.training else _train_norm)(self.norm, x)

    def _mask(self, documents: Tensor, dtype: torch.dtype) -> Tensor | BlockMask:
        """What attention is told about documents [B, T], of hidden states in `dtype`: blocks where it can, else every pair."""
        return block_mask(documents) if self._takes_blocks(documents, dtype) else document_mask(documents)

    def _takes_blocks(self, documents: Tensor, dtype: torch.dtype) -> bool:
        """Whether compiled code on a GPU trains, by attention that is ours throughout: another's expects pairs."""
        if not self.training or self._run_joining is None or not documents.is_cuda or self.config.dropout:
            return False
        ours = all(type(block) is Block and type(block.attention) is Attention for block in self.blocks)
        capability = torch.cuda.get_device_capability(documents.device)
        return ours and fits_blocks(self.config.head_dim, documents.shape[1], dtype, capability)

    def _rotary(self, T: int, positions: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if self.rotary_cos is None or self.rotary_sin is None:
            return None
        if positions is None:
            return self.rotary_cos[:T], self.rotary_sin[:T]
        return self.rotary_cos[positions].unsqueeze(1), self.rotary_sin[positions].unsqueeze(1)

    def forward(self, input_ids: Tensor, documents: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] in fp32 (fp64 for fp64)."""
        hidden = self.hidden(input_ids, documents, positions)
        return widen(linear(hidden, self.head_weight, None, self.tf32))

    def check_batch(self, micro_batch: Mapping[str, Tensor]) -> None:
        """Raises FewbitsError for a micro-batch that `loss_sum` cannot take.

        Whether ids lie in the vocabulary is looked up on a CPU only: elsewhere that would wait for the device.
        """
        ids, labels = micro_batch.get("input_ids"), micro_batch.get("labels")
        if ids is None or labels is None or ids.shape != labels.shape or ids.dim() != 2:
            came = " and ".join("none" if x is None else str(list(x.shape)) for x in (ids, labels))
            raise FewbitsError(f"input_ids and labels must be [sequences, tokens], the same for both; they are {came}.")
        if ids.is_floating_point() or labels.is_floating_point():
            raise FewbitsError(
                f"input_ids and labels are token ids, int64; they came as {ids.dtype} and {labels.dtype}."
            )
        if ids.device.type != "cpu" or not ids.numel():
            return
        least, most, size = int(ids.min()), int(ids.max()), self.config.vocab_size
        if least < 0 or most >= size:
            raise FewbitsError(
                f"token id {least if least < 0 else most} is outside the vocabulary of {size} (0 to {size - 1}). Use the "
                "tokenizer that the model was made for, or a larger vocab_size."
            )

    def loss_sum(self, micro_batch: Mapping[str, Tensor]) -> Tensor:
        """Sum of the losses in nats over the real targets of {"input_ids", "labels", "documents"?, "positions"?}."""
        hidden = self.hidden(micro_batch["input_ids"], micro_batch.get("documents"), micro_batch.get("positions"))
        pieces = self._pieces if self.training else None
        with span(LOSS_HEAD):
            return loss_sum(
                hidden, self.head_weight, micro_batch["labels"], self.tf32, pieces, self.logits, self.head_format
            )
