"""Where a step may be recorded as a CUDA graph, and where it says no."""

from __future__ import annotations

import pytest
import torch

from fewbits import FewbitsError, ModelConfig, Transformer
from fewbits.graph import StepGraph, graph_choice

GPT = ModelConfig(vocab_size=64, context=16, n_layer=1, n_head=2, n_embd=32)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_auto_records_where_nothing_changes_on_the_host():
    assert graph_choice("auto", Transformer(GPT), CUDA).value is True
    assert graph_choice("false", Transformer(GPT), CUDA).value is False
    dropout = ModelConfig(vocab_size=64, context=16, n_layer=1, n_head=2, n_embd=32, dropout=0.1)
    for model, device in ((Transformer(GPT), CPU), (Transformer(dropout), CUDA), (torch.nn.Linear(2, 2), CUDA)):
        assert graph_choice("auto", model, device).value is False


def test_true_where_it_cannot_be_is_refused_with_the_reason():
    with pytest.raises(FewbitsError, match="graph=true does not fit: CUDA graphs are for CUDA; this is cpu"):
        graph_choice("true", Transformer(GPT), CPU)
    with pytest.raises(FewbitsError, match="use auto, true or false"):
        graph_choice("yes", Transformer(GPT), CPU)


def test_other_inputs_and_another_fingerprint_begin_anew():
    calls, mark = [], [0]

    def take(micro_batches):
        calls.append(len(micro_batches))
        return (micro_batches[0]["x"].sum(),)

    graph = StepGraph(take, lambda: mark[0], CPU)
    one, other = [{"x": torch.ones(2)}], [{"x": torch.ones(3)}]
    for _ in range(graph.WARM):
        graph(one)
    assert graph._calls == graph.WARM and not graph.settled
    assert float(graph(other)[0]) == 3.0 and graph._calls == 1
    mark[0] = 1
    graph(other)
    assert graph._calls == 1 and len(calls) == graph.WARM + 2
