"""Plain PyTorch, made as strong as we can: the GPT and the Llama that a careful person writes without a library.

fp32 weights under bf16 autocast, a residual stream in bf16, fused query-key-value and gate-up matmuls, the loss inside
the compiled graph, torch's fused AdamW and clip_grad_norm_. Needs torch alone; `shape` has the fields of
fewbits.ModelConfig. Half of `bench/train_step.py` is measured against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """By hand: F.rms_norm leaves its fused kernel when input and weight differ in dtype, as they do under autocast."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def norm(shape: Any, width: int) -> nn.Module:
    return RMSNorm(width, shape.norm_eps) if shape.norm == "rmsnorm" else nn.LayerNorm(width, shape.norm_eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, hd], cos and sin [T, hd / 2]."""
    left, right = x.float().chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Any):
        super().__init__()
        D, hd = shape.n_embd, shape.n_embd // shape.n_head
        self.heads, self.kv, self.gated = shape.n_head, shape.n_kv_head or shape.n_head, shape.activation == "swiglu"
        self.norm1, self.norm2 = norm(shape, D), norm(shape, D)
        self.qkv = nn.Linear(D, (self.heads + 2 * self.kv) * hd, bias=shape.bias)
        self.output = nn.Linear(D, D, bias=shape.bias)
        inner = shape.n_ff or 4 * D
        self.up = nn.Linear(D, inner * (2 if self.gated else 1), bias=shape.bias)
        self.down = nn.Linear(inner, D, bias=shape.bias)
        self.q_norm = RMSNorm(hd, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(hd, shape.norm_eps) if shape.qk_norm else nn.Identity()

    def attention(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        B, T, D = x.shape
        parts = self.qkv(x).view(B, T, self.heads + 2 * self.kv, -1).transpose(1, 2)
        q, k, v = parts.split((self.heads, self.kv, self.kv), 1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv != self.heads)
        return self.output(y.transpose(1, 2).reshape(B, T, D))

    def mlp(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))


class Plain(nn.Module):
    """ids and labels [B, T] -> the mean cross entropy. `dtype` is that of the residual stream."""

    def __init__(self, shape: Any, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.embed = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.positions = nn.Embedding(shape.context, shape.n_embd) if shape.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.norm = norm(shape, shape.n_embd)
        self.head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False)
        if shape.tied:
            self.head.weight = self.embed.weight
        hd = shape.n_embd // shape.n_head
        angles = torch.arange(shape.context)[:, None] * shape.rope_theta ** (-torch.arange(0, hd, 2) / hd)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def start(self) -> Plain:
        """GPT-2's initialization, on whatever device the weights are."""
        torch.manual_seed(0)
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                scale = (2 * len(self.blocks)) ** -0.5 if name.endswith(("output.weight", "down.weight")) else 1.0
                nn.init.normal_(p, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        return self

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), labels.flatten())

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x, T = self.embed(ids), ids.shape[1]
        if self.positions is not None:
            x = x + self.positions(torch.arange(T, device=ids.device))
        x, rotary = x.to(self.dtype), (self.cos[:T], self.sin[:T]) if self.positions is None else None
        for block in self.blocks:
            x = block(x, rotary)
        return self.loss(x, labels)


def compile_whole(model: nn.Module) -> Callable[..., Tensor]:
    """The whole model and its loss as one graph."""
    return torch.compile(model, dynamic=False)


def compile_blocks(model: Plain) -> Callable[..., Tensor]:
    """Each block, and the head with its loss: torchtitan's manner, a tenth of the compile time of 22 layers in one graph."""
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False)
    model.loss = torch.compile(model.loss, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    return model


def adamw(model: nn.Module, lr: float, betas: tuple[float, float], eps: float, decay: float) -> torch.optim.AdamW:
    """torch's fused AdamW; decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def stepper(
    run: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    fold: bool = False,
) -> Callable[[], Tensor]:
    """One whole step on the next batch; returns the loss. `fold` lets the fused update apply the clipping factor (through
    its `grad_scale`) in place of a pass of its own over the gradients."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    zero = torch.zeros((), device=parameters[0].device)

    def step() -> Tensor:
        ids, labels = next(batches)
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            loss = run(ids, labels)
        loss.backward()
        if fold:
            total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            optimizer.grad_scale, optimizer.found_inf = (total + 1e-6).clamp(min=1.0), zero  # type: ignore[attr-defined]
        else:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
