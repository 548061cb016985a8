"""Optimizers that run the update kernel: tables are kept while nothing moves, and give what the definition gives."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED
from torch import Tensor, nn

from fewbits.choice import Choice
from fewbits.kernels.update import Cut
from fewbits.optim.adamw import Adam, AdamW
from fewbits.optim.base import Optimizer
from fewbits.optim.clip import measure
from fewbits.optim.sgd import SGD
from fewbits.precision.precision import Precision
from fewbits.step import Step

pytestmark = INTERPRETED
ONE, YES = torch.ones(()), torch.tensor(True)
SHAPES = [(40, 3), (7,), (0,), (), (65,)]


def by_kernel(optimizer: Optimizer) -> Optimizer:
    optimizer.execution, optimizer.cut = Choice("kernel", "for the test"), Cut(64, 4, 32, 2, 4)
    return optimizer


def weights(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients_of(parameters: list[nn.Parameter], step: int) -> dict[Any, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {p: torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters}


def apply(optimizer: Optimizer, gradients: dict[Any, Tensor], applied: Tensor = YES, **options: Any) -> None:
    optimizer.apply(factor=ONE * 0.5, applied=applied, lr_factor=ONE * 0.75, gradients=gradients, **options)


def held(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    tensors = [optimizer.applied_steps, *parameters, *(v for p in parameters for v in optimizer.state[p].values())]
    return [tensor.detach().clone().reshape(-1).view(torch.uint8) for tensor in tensors]


def close(ours: Optimizer, a: list[nn.Parameter], theirs: Optimizer, b: list[nn.Parameter], steps: int) -> bool:
    """Within `steps` updates of at most 3e-2 with a relative error of 16 roundings each, on weights below 8."""
    bound = steps * (3e-2 * 16 * 2.0**-24 + 8 * 2.0**-24)
    pairs = [(ours.exact_weight(p), theirs.exact_weight(q)) for p, q in zip(a, b, strict=True) if p.numel()]
    return all((p - q).abs().max().item() <= bound for p, q in pairs)


@pytest.mark.parametrize("make", [AdamW, Adam, SGD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernel_and_definition_agree_within_rounding(make: type[Optimizer], dtype: torch.dtype):
    a, b = weights(dtype), weights(dtype)
    groups = [{"params": a[:2], "weight_decay": 0.3}, {"params": a[2:], "lr": 3e-3}]
    ours = by_kernel(make(groups, lr=1e-2))
    theirs = make(
        [{**group, "params": q} for group, q in zip(groups, (b[:2], b[2:]), strict=True)], lr=1e-2, compile=False
    )
    for step in range(8):
        clip = 0.2 if step % 2 else None
        for optimizer, parameters in ((ours, a), (theirs, b)):
            apply(optimizer, gradients_of(parameters, step), torch.tensor(step != 3), clip_value=clip)
    assert int(ours.applied_steps) == 7 and close(ours, a, theirs, b, 8)


def test_tables_live_as_long_as_nothing_moves_and_follow_gradients_that_do():
    parameters, others = weights(), weights()
    optimizer, plain = by_kernel(AdamW(parameters, lr=1e-2)), AdamW(others, lr=1e-2, compile=False)
    given = gradients_of(parameters, 0)
    apply(optimizer, given)
    tables = optimizer._tables
    assert tables is not None and len(tables.tables) == 1
    uploaded = tables.tables[0]._table
    apply(optimizer, given)
    assert optimizer._tables is tables and tables.tables[0]._table is uploaded
    moved = {p: g + 1 for p, g in given.items()}
    apply(optimizer, moved)
    assert optimizer._tables is tables and tables.tables[0]._table is not uploaded
    for gradients in (given, given, moved):
        apply(plain, dict(zip(others, gradients.values(), strict=True)))
    assert close(optimizer, parameters, plain, others, 3)
    apply(optimizer, {p: g.float() for p, g in given.items()})
    assert optimizer._tables is not tables


def test_tables_keep_no_gradient_alive():
    parameters = weights()
    optimizer = by_kernel(AdamW(parameters))
    given = gradients_of(parameters, 0)
    apply(optimizer, given)
    last = weakref.ref(given[parameters[-1]].untyped_storage())
    del given
    assert last() is None


def test_parameters_without_a_gradient_stay_and_late_ones_count_from_their_birth():
    parameters, others = weights(), weights()
    optimizer, plain = by_kernel(AdamW(parameters, lr=1e-2)), AdamW(others, lr=1e-2, compile=False)
    for step in range(5):
        for one, own in ((optimizer, parameters), (plain, others)):
            given = gradients_of(own, step)
            if step < 2:
                del given[own[0]]
            apply(one, given)
    assert int(optimizer.state[parameters[0]]["since"]) == 2
    assert close(optimizer, parameters, plain, others, 5)


def test_options_of_a_group_may_change_between_steps_and_lr_may_be_a_tensor():
    parameters, others = weights(), weights()
    optimizer, plain = by_kernel(AdamW(parameters, lr=1e-2)), AdamW(others, lr=1e-2, compile=False)
    for step in range(6):
        for one, own in ((optimizer, parameters), (plain, others)):
            one.param_groups[0]["lr"] = torch.tensor(1e-2 / (step + 1)) if step % 2 else 1e-2 / (step + 1)
            one.param_groups[0]["betas"] = (0.8 + step / 100, 0.9)
            apply(one, gradients_of(own, step))
    assert close(optimizer, parameters, plain, others, 6)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_state_goes_through_every_door_and_training_goes_on_bit_for_bit(way: str):
    parameters = weights()
    optimizer = by_kernel(AdamW(parameters, lr=1e-2))
    for step in range(3):
        apply(optimizer, gradients_of(parameters, step))
    if way == "state_dict":
        others = [nn.Parameter(p.detach().clone()) for p in parameters]
        other = by_kernel(AdamW(others, lr=1.0))
        apply(other, gradients_of(others, 9))  # its tables know the options from before
        for p, q in zip(parameters, others, strict=True):
            q.data.copy_(p.data)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        other = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        others = other.param_groups[0]["params"]
        assert other.cut == optimizer.cut and other.execution.value == "kernel"
    for step in range(3, 6):
        apply(optimizer, gradients_of(parameters, step))
        apply(other, gradients_of(others, step))
    assert all(torch.equal(x, y) for x, y in zip(held(optimizer, parameters), held(other, others), strict=True))


def test_what_no_table_takes_goes_the_other_way():
    shapes = [((6, 40), torch.bfloat16), ((6, 40), torch.bfloat16), ((5,), torch.float64)]
    a, b = ([nn.Parameter(torch.ones(shape, dtype=dtype)) for shape, dtype in shapes] for _ in range(2))
    optimizer, plain = by_kernel(AdamW(a, lr=1e-2)), AdamW(b, lr=1e-2, compile=False)
    for step in range(3):
        for one, own in ((optimizer, a), (plain, b)):
            given = gradients_of(own, step)
            given[own[1]] = given[own[1]].t().contiguous().t()
            apply(one, given)
            norm = one.grad_norm(given)
            assert norm.dtype == torch.float64 and torch.equal(norm, measure(list(given.values())))
        assert optimizer._tables is None  # it would hold the gradients of the rest
    assert int(optimizer.applied_steps) == 3 and close(optimizer, a, plain, b, 3)


def test_a_backward_that_needs_old_weights_is_refused_as_by_torchs_optimizers():
    weight = nn.Parameter(torch.ones(3))
    optimizer = by_kernel(AdamW([weight]))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_measures_and_updates_through_the_tables():
    results = []
    for kernel in (True, False):
        model = nn.Linear(9, 5, bias=True)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
        optimizer = AdamW(model.parameters(), lr=1e-2, compile=False)
        by_kernel(optimizer) if kernel else None
        step = Step(
            model, optimizer, Precision.parse("fp32"), loss=lambda m, b: (m(b["x"]) - b["labels"]).square().sum()
        )
        batch = {"x": torch.linspace(0, 1, 27).view(3, 9), "labels": torch.ones(3, 5)}
        given = [step([batch]) for _ in range(3)]
        bad = step([{**batch, "x": batch["x"] * float("inf")}])
        assert not bad.applied and int(optimizer.applied_steps) == 3
        results.append((model.weight.detach(), torch.stack([one.grad_norm for one in given])))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
