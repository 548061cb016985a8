"""Our optimizers inside torch's habits: a plain loop, its schedulers, its GradScaler."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fewbits.optim.adamw import Adam, AdamW
from fewbits.optim.base import Optimizer
from fewbits.optim.sgd import SGD


def problem(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)
    x = torch.randn(64, 6).to(dtype)
    return model, x, (x.sum(1, keepdim=True) * 0.3).tanh()


@pytest.mark.parametrize("make, lr", [(AdamW, 3e-3), (Adam, 3e-3), (SGD, 3e-2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_loop_learns(make: type[Optimizer], lr: float, dtype: torch.dtype):
    model, x, y = problem(dtype)
    optimizer = make(model.parameters(), lr=lr)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert int(optimizer.applied_steps) == 80


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned():
    weight = nn.Parameter(torch.ones(1))
    optimizer = SGD([weight], lr=0.5, momentum=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (3 * weight).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert weight.item() == -0.5


def test_torchs_schedulers_set_the_rate_of_every_step():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = SGD([weight], lr=1.0, momentum=0.0)
    first = torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, 1.0, total_iters=3)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [first, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)], milestones=[3]
    )
    total = 0.0
    for step in range(8):
        weight.grad = torch.ones(1)
        rate = scheduler.get_last_lr()[0]
        assert rate == pytest.approx(0.25 * (step + 1) if step < 3 else (1 + math.cos(math.pi * (step - 3) / 10)) / 2)
        optimizer.step()
        scheduler.step()
        total += rate
    # eight fp32 roundings of a sum below 8, and of the eight rates
    assert -weight.item() == pytest.approx(total, abs=16 * 2.0**-22)


def test_a_learning_rate_that_is_a_tensor_works():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = SGD([weight], lr=torch.tensor(0.5), momentum=0.0)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == -0.5


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_grad_scaler_scales_skips_and_leaves_no_other_trace(unscale_first: bool, dtype: torch.dtype):
    results = []
    for scaled in (True, False):
        model, x, y = problem(dtype)
        optimizer = AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=scaled)
        for step in range(12):
            overflow = step in (4, 5, 9)
            if overflow and not scaled:
                continue  # what the scaler must have the effect of
            optimizer.zero_grad()
            scaler.scale((model(x) - y).square().mean()).backward()
            if overflow:
                model[0].weight.grad[0, 0] = float("inf")
            if unscale_first:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        results.append((model, optimizer))
    (scaled_model, optimizer), (model, _) = results
    assert int(optimizer.applied_steps) == 9
    for a, b in zip(scaled_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)  # powers of two are exact while nothing leaves the normal range


def test_grad_scaler_takes_fp16_weights():
    model, x, y = problem(torch.float16)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = optimizer.exact_weight(model[0].weight)
    scaler.scale((model(x) - y).square().mean()).backward()
    scaler.step(optimizer)  # "Attempting to unscale FP16 gradients" is for optimizers without masters
    scaler.update()
    assert int(optimizer.applied_steps) == 1
    assert not torch.equal(optimizer.exact_weight(model[0].weight), before)
