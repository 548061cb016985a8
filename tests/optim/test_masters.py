"""Masters of every kind lead to the same weights, and without one small updates are lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.errors import FewbitsError
from fewbits.nn.remainder import leave
from fewbits.numerics.update import round_away
from fewbits.optim.adamw import Adam, AdamW
from fewbits.optim.base import Optimizer
from fewbits.optim.sgd import SGD

SHAPES = [(33, 65), (7,), ()]
MAKERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": lambda p, **k: AdamW(p, lr=3e-3, **k),
    "adam": lambda p, **k: Adam(p, lr=3e-3, weight_decay=0.01, **k),
    "sgd": lambda p, **k: SGD(p, lr=3e-2, momentum=0.9, weight_decay=0.01, **k),
    "sgd-plain": lambda p, **k: SGD(p, lr=3e-2, momentum=0.0, **k),
}


def weights(dtype: torch.dtype, seed: int = 0, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def random_step(generator: torch.Generator, parameters: list[nn.Parameter], dtype: torch.dtype) -> dict[str, Any]:
    """Random gradients and settings of one step; one in ten overflows and is skipped."""
    scale = 2.0 ** torch.randint(-8, 9, (), generator=generator).item()
    gradients = {p: (torch.randn(p.shape, generator=generator) * scale).to(dtype) for p in parameters}
    applied = torch.rand((), generator=generator) > 0.1
    if not applied:
        worst = [float("inf"), float("nan"), -float("inf")][int(torch.randint(3, (), generator=generator))]
        gradients[parameters[0]].view(-1)[5] = worst
    factor = (
        torch.rand((), generator=generator) if torch.rand((), generator=generator) > 0.5 else torch.tensor(1 / scale)
    )
    return {
        "gradients": gradients,
        "applied": applied,
        "factor": factor,
        "lr_factor": torch.rand((), generator=generator),
    }


@pytest.mark.parametrize("name", MAKERS)
def test_split_and_fp32_master_agree_bit_for_bit_over_1000_steps_with_overflows(name: str):
    runs = []
    for kind in ("split", "fp32"):
        parameters = weights(torch.bfloat16)
        runs.append((parameters, MAKERS[name](parameters, master=kind)))
    generators = [torch.Generator().manual_seed(1) for _ in runs]
    for step in range(1000):
        for (parameters, optimizer), generator in zip(runs, generators, strict=True):
            optimizer.apply(**random_step(generator, parameters, torch.bfloat16))
        if step % 50 == 49:
            (ours, split), (others, whole) = runs
            for a, b in zip(ours, others, strict=True):
                assert torch.equal(a, b)
                assert torch.equal(split.exact_weight(a), whole.exact_weight(b))
    assert 850 < int(split.applied_steps) < 950
    for parameters, optimizer in runs:
        for parameter in parameters:
            exact = optimizer.exact_weight(parameter)
            assert exact.isfinite().all()
            assert torch.equal(parameter, round_away(exact, torch.bfloat16))
            for moment in optimizer.moment_names:
                assert (
                    not optimizer.state[parameter]
                    or optimizer.state[parameter].get(moment, exact).dtype == torch.float32
                )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_master_makes_the_update_that_an_fp32_weight_would_get(dtype: torch.dtype):
    narrow, wide = weights(dtype), [nn.Parameter(p.detach().float()) for p in weights(dtype)]
    pairs = [(narrow, AdamW(narrow)), (wide, AdamW(wide))]
    for step in range(20):
        for parameters, optimizer in pairs:
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype).to(parameter.dtype)
            optimizer.step()
    for a, b in zip(narrow, wide, strict=True):
        assert torch.equal(pairs[0][1].exact_weight(a), b)
        assert torch.equal(a, round_away(b.detach(), dtype))


def test_bf16_weights_without_master_swallow_a_small_update_and_split_keeps_it():
    # Next to 1, bf16 numbers are 2^-8 apart below: an update of 1e-3 is less than half of that and rounds away.
    for kind, expected in (("none", 1.0), ("split", 0.9), ("fp32", 0.9)):
        weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = SGD([weight], lr=1e-3, momentum=0.0, master=kind)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        # 100 subtractions in fp32, each off by at most half an ulp of 1 (2^-25), and lr itself by as much
        assert torch.allclose(optimizer.exact_weight(weight), torch.full((4,), expected), rtol=0, atol=200 * 2.0**-25)


def test_weight_decay_is_swallowed_without_master_and_kept_with_one():
    for kind, moved in (("none", False), ("split", True)):
        weight = nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
        optimizer = AdamW([weight], lr=1e-3, weight_decay=0.1, master=kind)
        for _ in range(1000):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        assert bool((weight < 1).all()) is moved  # 0.9999^1000 = 0.905


def test_true_kind_rounds_the_fp32_result_with_ties_away():
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = SGD([weight], lr=1.0, momentum=0.0, master="none")
    weight.grad = torch.tensor(
        [-(2.0**-8), 2.0**-9], dtype=torch.bfloat16
    )  # both ties: up to 1 + 2^-7, and back up to 1
    optimizer.step()
    assert weight.tolist() == [1 + 2.0**-7, 1.0]


def remainder_of(exact: Tensor, dtype: torch.dtype) -> tuple[nn.Parameter, Tensor]:
    """A parameter as `prepare` leaves it: rounded, with its remainder on it."""
    parameter = nn.Parameter(round_away(exact, dtype))
    high = parameter.detach().view(torch.int16).to(torch.int32) << 16
    bits = (exact.view(torch.int32) - high).to(torch.int16)
    parameter.fewbits_remainder = bits if dtype == torch.bfloat16 else exact.clone()  # type: ignore[attr-defined]
    parameter.fewbits_version = parameter._version  # type: ignore[attr-defined]
    return parameter, exact


@pytest.mark.parametrize("dtype, kind", [(torch.bfloat16, "split"), (torch.bfloat16, "fp32"), (torch.float16, "fp32")])
def test_remainder_that_prepare_kept_is_adopted_exactly_and_then_released(dtype: torch.dtype, kind: str):
    parameter, exact = remainder_of(torch.randn(50), dtype)
    optimizer = SGD([parameter], lr=0.0, master=kind)
    assert torch.equal(optimizer.exact_weight(parameter), exact)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(optimizer.exact_weight(parameter), exact)
    assert not hasattr(parameter, "fewbits_remainder")


def test_remainder_of_a_weight_that_was_changed_since_is_not_used():
    parameter, _ = remainder_of(torch.randn(50), torch.bfloat16)
    with torch.no_grad():
        parameter.mul_(2)
    optimizer = AdamW([parameter])
    assert torch.equal(optimizer.exact_weight(parameter), parameter.float())


def test_a_weight_edited_through_data_is_not_undone_by_its_remainder():
    # parameter.data has a version counter of its own, so only the values can tell
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    leave(parameter, torch.tensor([1.0 + 2.0**-13, 1.0, 1.0 - 2.0**-13]))  # each rounds to 1
    parameter.data[2] = 7.0
    assert AdamW([parameter]).exact_weight(parameter).tolist() == [1.0 + 2.0**-13, 1.0, 7.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("stepped", [False, True])
def test_exact_weight_loads_exactly_before_and_after_the_first_step(dtype: torch.dtype, stepped: bool):
    parameter = nn.Parameter(torch.zeros(64, dtype=dtype))
    optimizer = AdamW([parameter], lr=0.0, weight_decay=0.0)
    if stepped:
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    exact = torch.randn(64, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    optimizer.load_exact(parameter, exact)
    assert torch.equal(optimizer.exact_weight(parameter), exact)
    assert torch.equal(parameter, round_away(exact, dtype))
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(optimizer.exact_weight(parameter), exact)


def test_precision_settles_auto_and_contradictions_are_refused():
    half = weights(torch.bfloat16)
    assert AdamW(half).resolve_master("none") == "none"
    assert AdamW(half).resolve_master("fp32") == "fp32"
    assert AdamW(half, master="fp32").resolve_master("split") == "fp32"  # both exact: the one asked for stands
    with pytest.raises(FewbitsError, match="asks for 'none'"):
        AdamW(half, master="split").resolve_master("none")
    with pytest.raises(FewbitsError, match="asks for 'split'"):
        AdamW(half, master="none").resolve_master("split")
    assert AdamW(weights(torch.float32), master="split").resolve_master("none") == "split"  # fp32 weights keep nothing
    mixed = [*weights(torch.bfloat16), *weights(torch.float16)]
    optimizer = AdamW(mixed)
    optimizer.resolve_master("split")
    assert {optimizer.master_kind(p) for p in mixed} == {"split", "fp32"}
    optimizer = AdamW(half)
    half[0].grad = torch.ones_like(half[0])
    optimizer.step()
    with pytest.raises(FewbitsError, match="has stepped"):
        optimizer.resolve_master("none")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"master": "split8"}, "not in this version"),
        ({"master": "spilt"}, "Did you mean 'split'"),
        ({"moments": "int8"}, "not in this version"),
        ({"moments": "fp23"}, "Did you mean 'fp32'"),
        ({"compile": "yes"}, "'auto', True or False"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"eps": float("inf")}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_sentence(options: dict[str, Any], message: str):
    with pytest.raises(FewbitsError, match=message):
        AdamW(weights(torch.bfloat16), **options)


def test_what_cannot_be_updated_is_refused():
    with pytest.raises(FewbitsError, match="fp16"):
        AdamW(weights(torch.float16), master="split")
    with pytest.raises(FewbitsError, match="complex64"):
        AdamW([torch.zeros(3, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(FewbitsError, match="no parameters"):
        AdamW([])
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(FewbitsError, match="sparse"):
        AdamW(embedding.parameters()).step()
