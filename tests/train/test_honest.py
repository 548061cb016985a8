"""MFU and tokens a second are honest: FLOPs as torch counts them, and tokens over the time that really passed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fewbits.nn.transformer import ModelConfig, Transformer
from fewbits.train.config import Config
from fewbits.train.record import read_lines
from fewbits.train.trainer import train

SHAPES = {
    "gpt": ModelConfig(vocab_size=320, context=64, n_layer=2, n_head=4, n_embd=64),
    "llama": ModelConfig(
        vocab_size=256, context=48, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, n_ff=176, norm="rmsnorm",
        activation="swiglu", positions="rope", bias=False, tied=False,
    ),
    "long": ModelConfig(vocab_size=64, context=512, n_layer=1, n_head=2, n_embd=32),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_that_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of the logits; torch counts attention in full, so `causal=False` is what must agree.

    The attention is the one written out in matmuls: flash attention's backward multiplies the scores once more, which is
    work that ran and not work that the model needs.
    """
    # torch does not count the products of our kernel
    monkeypatch.setattr("fewbits.nn.attention.attention_by_kernel", lambda *_: None)
    config, rows = SHAPES[name], 2
    model = Transformer(config)
    tokens = torch.randint(config.vocab_size, (rows, config.context))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    per_token = counter.get_total_flops() / tokens.numel()
    assert config.flops_per_token(causal=False) == pytest.approx(per_token, rel=0.02)
    attention = 6 * config.n_layer * config.n_embd * config.context
    assert config.flops_per_token(causal=False) - config.flops_per_token() == attention


def test_tokens_over_wall_time_are_the_mean_that_is_reported(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """The times of the logged lines add up to those of the summary, and these to the time that passed outside."""
    config = tiny(max_steps=40, log_every=7, n_embd=64, n_layer=2, context=64, batch_size=8)
    began = time.perf_counter()
    summary = train(config, quiet=True)
    passed = time.perf_counter() - began
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    before = [0, *(line["step"] for line in lines)]
    logged_s = sum(line["ms"] / 1e3 * (line["step"] - step) for line, step in zip(lines, before, strict=False))
    tokens = 8 * 64 * 40
    assert summary["tokens"] == tokens == lines[-1]["tokens"]
    # one step of the 40 is measured for memory, apart from the timed ones, where other steps stand for it
    assert tokens / logged_s == pytest.approx(summary["step_tok_per_s"], rel=0.01)
    assert tokens / summary["wall_s"] == pytest.approx(summary["tok_per_s"], rel=0.01)
    assert summary["wall_s"] <= passed and summary["step_tok_per_s"] >= tokens / passed


def test_mfu_goes_by_the_tokens_a_second_that_are_reported(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewbits.train.trainer.device_peak", lambda *_: 1e12)
    config = tiny(max_steps=6)
    summary = train(config, quiet=True)
    flops = summary["mfu"] * 1e12 / summary["step_tok_per_s"]
    assert flops == pytest.approx(config.resolve_vocabulary(summary["data"]["vocab_size"]).model.flops_per_token())


def test_mfu_counts_what_a_token_may_see_of_its_window(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fewbits.train.trainer.device_peak", lambda *_: 1e12)
    text = tmp_path / "short.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(400)))
    config = tiny(max_steps=4, data=str(text), mask_documents=True, context=64)
    summary = train(config, quiet=True)
    flops = summary["mfu"] * 1e12 / summary["step_tok_per_s"]
    model = config.resolve_vocabulary(summary["data"]["vocab_size"]).model
    # documents of 11 to 13 bytes with their end, some cut by a window
    assert model.flops_per_token(9) < flops < model.flops_per_token(13) < model.flops_per_token()


def test_steps_that_were_measured_apart_do_not_raise_the_reported_speed(tiny: Callable[..., Config]) -> None:
    """Half of these steps are profiled, so their tokens must not count among those of the timed half."""
    summary = train(tiny(max_steps=10, log_every=1, n_embd=64, context=64), quiet=True, profile=5)
    per_step = summary["tokens"] / summary["steps"]
    assert summary["step_tok_per_s"] == pytest.approx(1e3 * per_step / summary["ms_per_step"], rel=0.9)
    assert summary["step_tok_per_s"] < 1.5 * 1e3 * per_step / summary["ms_per_step"]
