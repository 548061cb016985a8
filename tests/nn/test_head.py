"""Which head runs where, and that choices which must not matter do not."""

from __future__ import annotations

import pytest
import torch

import fewbits
from fewbits import ModelConfig, Transformer
from fewbits.kernels import dispatch
from fewbits.nn.head import loss_sum

CPU = torch.device("cpu")


def test_a_cpu_runs_the_definition_on_logits_that_are_not_rounded(monkeypatch):
    monkeypatch.setattr(dispatch, "_choices", {})
    choice = dispatch.loss_execution(CPU)
    assert choice.value == "definition" and "CUDA" in choice.reason
    assert dispatch.logits_format("auto", torch.bfloat16, CPU).value == "fp32"
    assert dispatch.logits_format("auto", torch.float64, CPU).value == "fp64"
    assert dispatch.logits_format("fp16", torch.bfloat16, CPU) == ("fp16", "asked for")
    recorded = dispatch.recorded()
    assert {"loss on cpu", "logits of bf16 on cpu"} <= set(recorded)
    monkeypatch.setattr(dispatch, "_choices", {})
    dispatch.replay(recorded)
    assert dispatch.recorded() == recorded


def test_a_gpu_with_triton_runs_the_kernel_on_fp16_logits(monkeypatch):
    cuda = torch.device("cuda")
    for there, value in ((True, "kernel"), (False, "definition")):
        monkeypatch.setattr(dispatch, "_choices", {})
        monkeypatch.setattr(dispatch.cuda_twin, "installed", lambda there=there: there)
        assert dispatch.loss_execution(cuda).value == value
        assert dispatch.logits_format("auto", torch.bfloat16, cuda).value == "fp16"
        assert dispatch.logits_format("auto", torch.float32, cuda).value == "fp32"


def test_prepare_hands_the_logits_of_the_precision_to_the_model_and_unprepare_takes_them_back():
    from fewbits.nn.prepare import unprepare

    config = ModelConfig(vocab_size=61, context=16, n_layer=1, n_head=2, n_embd=16)
    ids = torch.randint(61, (2, 16))
    losses = {}
    for precision in ("bf16", "bf16, logits=fp32", "bf16, logits=fp16", "bf16, logits=bf16"):
        model = fewbits.prepare(Transformer(config), precision)
        losses[precision] = model.loss_sum({"input_ids": ids, "labels": ids}).item()
        with torch.no_grad():  # an evaluation is the same for all of them
            losses["evaluation"] = model.loss_sum({"input_ids": ids, "labels": ids}).item()
            assert losses["evaluation"] == pytest.approx(losses["bf16"], rel=1e-6)
    assert unprepare(model).logits == "auto"
    assert losses["bf16, logits=fp32"] == losses["bf16"]
    assert len(set(losses.values())) >= 3  # rounding shows, here already
    # 32 losses whose logits, under 1, are off by 2^-12 in fp16 and by 2^-9 in bf16 at most
    assert losses["bf16, logits=fp16"] == pytest.approx(losses["bf16"], abs=32 * 2 * 2.0**-12)
    assert losses["bf16, logits=bf16"] == pytest.approx(losses["bf16"], abs=32 * 2 * 2.0**-9)


def test_a_head_kept_in_fp32_takes_hidden_states_in_bf16():
    hidden, weight = torch.randn(2, 8, 16).bfloat16().requires_grad_(), torch.randn(30, 16, requires_grad=True)
    labels = torch.randint(30, (2, 8))
    loss_sum(hidden, weight, labels, False, None).backward()
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
