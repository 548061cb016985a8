"""Steps replayed from a CUDA graph are the steps themselves, bit for bit."""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

import fewbits
from fewbits import AdamW, DynamicScale, ModelConfig, Step, Transformer
from fewbits.optim.schedule import Schedule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

GPT = ModelConfig(vocab_size=512, context=64, n_layer=2, n_head=2, n_embd=128)


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def batch(i: int, rows: int = 8) -> dict[str, torch.Tensor]:
    tokens = torch.randint(512, (rows, 65), generator=torch.Generator().manual_seed(i)).cuda()
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def build(precision: str, graph: str, compiled: bool = False, **options):
    model = fewbits.prepare(Transformer(GPT), precision).cuda()
    if compiled:
        model.compile_blocks()
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    schedule = Schedule("cosine", 4, 20, 0, 0.1)
    return model, Step(model, optimizer, precision, schedule=schedule, graph=graph, **options)


def run(step: Step, first: int, last: int, pieces: int = 2) -> list[float]:
    losses = []
    for i in range(first, last):
        whole = {key: value.chunk(pieces) for key, value in batch(i).items()}
        losses.append(step([{key: whole[key][j] for key in whole} for j in range(pieces)]).loss)
    return torch.stack(losses).tolist()


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-mixed", "fp8", "fp8-delayed", "int8"])
def test_a_replayed_run_is_the_eager_one_bit_for_bit(precision, compiled):
    one_model, one = build(precision, "false", compiled)
    other_model, other = build(precision, "true", compiled)
    eager, replayed = run(one, 0, 12), run(other, 0, 12)
    assert other.warm and other.graph.choice.value, other.graph.choice.reason
    assert eager == replayed
    assert same(one_model, other_model)
    assert one.attempts == other.attempts and one.state_dict() == other.state_dict()


def test_overflows_are_skipped_and_the_scale_moves_in_a_graph_too():
    one_model, one = build("fp16-mixed", "false", loss_scale=DynamicScale(2.0**30, interval=3, ceiling=2.0**40))
    other_model, other = build("fp16-mixed", "true", loss_scale=DynamicScale(2.0**30, interval=3, ceiling=2.0**40))
    assert run(one, 0, 24) == run(other, 0, 24)
    assert int(one.skipped) > 5 and one.state_dict() == other.state_dict() and same(one_model, other_model)


def test_what_the_host_changes_records_the_step_anew():
    one_model, one = build("bf16-mixed", "false")
    other_model, other = build("bf16-mixed", "true")
    run(one, 0, 8), run(other, 0, 8)
    for step in (one, other):
        step.optimizer.param_groups[0]["lr"] = 3e-3
    run(one, 8, 16), run(other, 8, 16)
    saved = [(step.state_dict(), step.optimizer.state_dict()) for step in (one, other)]
    run(one, 16, 24), run(other, 16, 24)
    for step, (state, optimizer) in zip((one, other), saved, strict=True):
        step.load_state_dict(state)
        step.optimizer.load_state_dict(optimizer)
    run(one, 16, 24, pieces=1), run(other, 16, 24, pieces=1)
    assert other.warm and same(one_model, other_model)


def test_a_step_that_waits_for_the_device_stays_eager_and_says_why():
    def loss(model, micro_batch):
        total = fewbits.step.causal_loss(model, micro_batch)
        assert float(total) > 0
        return total

    _, step = build("bf16-mixed", "true", loss=loss)
    losses = run(step, 0, 8)
    assert step.warm and not step.graph.choice.value and "recording failed" in step.graph.choice.reason
    assert all(value > 0 for value in losses) and step.attempts == 8
    assert torch.randn(8, device="cuda").isfinite().all()  # the generator is free again


def test_the_peak_of_a_recorded_step_is_reported():
    _, step = build("bf16-mixed", "true")
    run(step, 0, 6)
    assert step.graph.peak > sum(p.numel() * p.element_size() for p in step.parameters)
