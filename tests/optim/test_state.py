"""State saved and restored: exactly, each tensor in its own dtype, and never into the wrong place."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.optim.adamw import Adam, AdamW
from fewbits.optim.base import Optimizer
from fewbits.optim.sgd import SGD

ONE = torch.ones(())
KINDS = [
    (torch.bfloat16, "split"),
    (torch.bfloat16, "fp32"),
    (torch.bfloat16, "none"),
    (torch.float16, "fp32"),
    (torch.float16, "none"),
    (torch.float32, "none"),
    (torch.float64, "none"),
]


class Two(nn.Module):
    """Two parameters; the second gets its first gradient at step 3."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.early = nn.Parameter(torch.randn(20, 5, generator=generator).to(dtype))
        self.late = nn.Parameter(torch.randn(4, generator=generator).to(dtype))


def train(model: Two, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if step < 3:
            model.late.grad = None
        applied = torch.tensor(step % 4 != 2)
        optimizer.apply(factor=torch.tensor(0.5), applied=applied, lr_factor=ONE)


def everything(model: Two, optimizer: Optimizer) -> list[Tensor]:
    tensors = [optimizer.applied_steps]
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        tensors += [parameter.detach(), optimizer.exact_weight(parameter), *(state[key] for key in sorted(state))]
    return tensors


def by_torch_save(model: Two, optimizer: Optimizer, fresh: Two, other: Optimizer) -> None:
    stored = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), stored)
    stored.seek(0)
    weights, state = torch.load(stored, weights_only=True)
    fresh.load_state_dict(weights)
    other.load_state_dict(state)


def by_names_and_exact_weights(model: Two, optimizer: Optimizer, fresh: Two, other: Optimizer) -> None:
    saved = {name: tensor.clone() for name, tensor in optimizer.named_state(model.named_parameters()).items()}
    assert not any(name.endswith("/master") for name in saved)
    exact = {name: optimizer.exact_weight(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in fresh.named_parameters():
        other.load_exact(parameter, exact[name])
    other.load_named_state(fresh.named_parameters(), saved)


def by_names_with_masters(model: Two, optimizer: Optimizer, fresh: Two, other: Optimizer) -> None:
    saved = {k: v.clone() for k, v in optimizer.named_state(model.named_parameters(), masters=True).items()}
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_named_state(fresh.named_parameters(), saved)


@pytest.mark.parametrize("carry", [by_torch_save, by_names_and_exact_weights, by_names_with_masters])
@pytest.mark.parametrize("make", [AdamW, Adam, SGD])
@pytest.mark.parametrize("dtype, kind", KINDS)
def test_2n_steps_equal_n_then_save_load_and_n_bit_for_bit(
    dtype: torch.dtype, kind: str, make: type[Optimizer], carry: Callable[..., None]
):
    straight, model, fresh = Two(dtype), Two(dtype), Two(dtype)
    whole = make(straight.parameters(), lr=1e-2, master=kind)
    train(straight, whole, range(12))
    optimizer, other = (make(m.parameters(), lr=1e-2, master=kind) for m in (model, fresh))
    train(model, optimizer, range(6))
    carry(model, optimizer, fresh, other)
    for a, b in zip(everything(model, optimizer), everything(fresh, other), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    train(fresh, other, range(6, 12))
    for a, b in zip(everything(straight, whole), everything(fresh, other), strict=True):
        assert torch.equal(a, b)


def test_state_saved_before_the_second_parameter_was_born_is_restored_over_a_later_one():
    model = Two(torch.bfloat16)
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(2))
    saved = {name: tensor.clone() for name, tensor in optimizer.named_state(model.named_parameters()).items()}
    train(model, optimizer, range(2, 6))
    exact = optimizer.exact_weight(model.late)
    optimizer.load_named_state(model.named_parameters(), saved)
    assert not optimizer.state.get(model.late)
    assert torch.equal(optimizer.exact_weight(model.late), exact)  # not born yet, and still exact


def test_loaded_state_shares_no_memory_with_what_was_loaded():
    model = Two(torch.bfloat16)
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(4))
    state = optimizer.state_dict()
    other = AdamW(Two(torch.bfloat16).parameters())
    other.load_state_dict(state)
    other.state[other.param_groups[0]["params"][0]]["exp_avg"].zero_()
    assert optimizer.state[model.early]["exp_avg"].abs().sum() > 0


def test_a_deep_copy_carries_counter_and_kinds():
    model = Two(torch.bfloat16)
    optimizer = AdamW(model.parameters(), master="fp32")
    train(model, optimizer, range(4))
    twin = copy.deepcopy(optimizer)
    assert torch.equal(twin.applied_steps, optimizer.applied_steps)
    assert twin.master == "fp32"
    twin.step()


def refused(optimizer: Optimizer, state: dict[str, Any], message: str) -> None:
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(FewbitsError, match=message):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert torch.equal(before["applied_steps"], after["applied_steps"])
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()


def test_state_of_another_kind_shape_or_optimizer_is_refused_and_nothing_changes():
    model = Two(torch.bfloat16)
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(4))
    state = optimizer.state_dict()
    refused(AdamW(Two(torch.bfloat16).parameters(), master="fp32"), state, "saved master is torch.int16")
    refused(AdamW(Two(torch.bfloat16).parameters(), master="none"), state, "holds exp_avg, exp_avg_sq, master, since")
    refused(AdamW(Two(torch.float32).parameters()), state, "torch.float32 parameter holds")
    refused(SGD(Two(torch.bfloat16).parameters()), state, "optimizer 'AdamW'")
    refused(AdamW([Two(torch.bfloat16).early]), state, r"groups of \[2\] parameters and this optimizer \[1\]")
    wider = Two(torch.bfloat16)
    wider.early = nn.Parameter(torch.zeros(20, 6, dtype=torch.bfloat16))
    refused(AdamW(wider.parameters()), state, r"\(20, 5\)")
    peer = torch.optim.AdamW(Two(torch.bfloat16).parameters())
    refused(optimizer, peer.state_dict(), "applied_steps")


def test_named_state_of_another_model_is_refused():
    model = Two(torch.bfloat16)
    optimizer = AdamW(model.parameters())
    train(model, optimizer, range(4))
    saved = optimizer.named_state(model.named_parameters())
    with pytest.raises(FewbitsError, match="'other'"):
        optimizer.load_named_state(model.named_parameters(), {**saved, "other/exp_avg": torch.zeros(1)})
    with pytest.raises(FewbitsError, match="no applied_steps"):
        optimizer.load_named_state(model.named_parameters(), {})
    with pytest.raises(FewbitsError, match="came for a parameter"):
        optimizer.load_exact(model.early, torch.zeros(3))
