"""The rules against torch's, and what one update may depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.choice import Choice
from fewbits.kernels import dispatch, update_cpu
from fewbits.optim import engine
from fewbits.optim.adamw import Adam, AdamW
from fewbits.optim.base import Optimizer
from fewbits.optim.sgd import SGD

ONE = torch.ones(())
YES, NO = torch.tensor(True), torch.tensor(False)
U = 2.0**-24  # unit roundoff of fp32


def gradients(shape: Any, steps: int, seed: int = 0) -> list[Tensor]:
    """Gradients with magnitudes from 0.5 to 2 and random signs: the bounds below then hold with small constants."""
    generator = torch.Generator().manual_seed(seed)
    size = [torch.rand(shape, generator=generator) * 1.5 + 0.5 for _ in range(steps)]
    return [s * (torch.randint(0, 2, s.shape, generator=generator) * 2 - 1) for s in size]


def follow(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, all_gradients: list[Tensor]) -> None:
    for gradient in all_gradients:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def adam_bound(steps: int, lr: float, unit: float = U, feedback: bool = False) -> float:
    """How far two correct orders of Adam's arithmetic may drift apart over `steps`, for |w| < 2 and 0.3 <= |g| <= 2.2.

    In units of `unit`: exp_avg gains at most 3.1 a step (a subtraction, a product by 0.1, a sum) and forgets at 0.9:
    31 on each side, over a root of at least 0.3: 207. exp_avg_sq gains a relative 2 a step and forgets at 0.95: 42,
    halved by the root, plus its own rounding (2), two for the denominator and two for the quotient: 27 on each side,
    times an update of at most 2.2 / 0.3: 400. The weight is rounded twice a step on each side. With decay in the
    gradient an error e of w comes back as at most 2 * lr * 0.1 e / 0.3 a step: exp(200 * 0.01 * 0.67) < 4 times as
    much in all.
    """
    return (4 if feedback else 1) * steps * (lr * unit * (207 + 400) + 4 * unit * 2)


@pytest.mark.parametrize("rule", ["adamw", "adam"])
def test_adam_and_adamw_stay_within_rounding_of_torchs_single_tensor_code(rule: str):
    steps, lr = 200, 1e-2
    start = 0.3 * torch.randn(1000, generator=torch.Generator().manual_seed(3))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine, peer = (AdamW, torch.optim.AdamW) if rule == "adamw" else (Adam, torch.optim.Adam)
    options = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    follow(mine([ours], **options), ours, gradients(1000, steps))
    follow(peer([theirs], **options, foreach=False), theirs, gradients(1000, steps))
    assert ours.abs().max() < 2 and (ours - start).abs().max() > 0.1
    assert (ours - theirs).abs().max().item() <= adam_bound(steps, lr, feedback=rule == "adam") < 1e-2


def test_sgd_stays_within_rounding_of_torchs():
    steps, lr = 200, 1e-2
    start = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": lr, "momentum": 0.9, "weight_decay": 0.01}
    follow(SGD([ours], **options), ours, gradients(1000, steps))
    follow(torch.optim.SGD([theirs], **options, foreach=False), theirs, gradients(1000, steps))
    # |buffer| <= 20: three roundings of at most 20 U a step, forgotten at 0.9, on each side; then two of w on each.
    bound = steps * (lr * U * 2 * 10 * 60 + 4 * U * max(5.0, ours.detach().abs().max().item()))
    assert (ours - theirs).abs().max().item() <= bound


def test_fp64_parameters_are_updated_in_fp64():
    start = torch.randn(100, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = AdamW([ours], lr=1e-2)
    follow(optimizer, ours, [g.double() / 3 for g in gradients(100, 50)])
    peer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, foreach=False)
    follow(peer, theirs, [g.double() / 3 for g in gradients(100, 50)])
    assert torch.allclose(ours, theirs, rtol=0, atol=50 * 1e-14)  # the fp32 bound above with U = 2^-53
    assert optimizer.state[ours]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", [AdamW, Adam, SGD])
def test_moments_are_never_narrower_than_fp32(dtype: torch.dtype, make: type[Optimizer]):
    parameter = nn.Parameter(torch.randn(10).to(dtype))
    optimizer = make([parameter])
    parameter.grad = torch.randn(10).to(dtype)
    optimizer.step()
    for name in optimizer.moment_names:
        assert optimizer.state[parameter][name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def bits(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Everything an update may change, as copies of raw bytes."""
    held = [optimizer.applied_steps, *parameters]
    held += [value for p in parameters for value in optimizer.state[p].values()]
    return [tensor.detach().clone().reshape(-1).view(torch.uint8) for tensor in held]


@pytest.mark.parametrize("make", [AdamW, Adam, SGD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_skipped_step_changes_no_bit(make: type[Optimizer], dtype: torch.dtype, poison: float):
    parameters = [nn.Parameter(torch.randn(40, 10).to(dtype)), nn.Parameter(torch.randn(3).to(dtype))]
    optimizer = make(parameters)
    given = {p: torch.randn(p.shape) for p in parameters}
    optimizer.apply(factor=ONE, applied=YES, lr_factor=ONE, gradients=given)
    before = bits(optimizer, parameters)
    given = {p: torch.full(p.shape, poison) for p in parameters}
    optimizer.apply(factor=ONE, applied=NO, lr_factor=ONE, clip_value=1.0, gradients=given)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(optimizer, parameters), strict=True))
    assert int(optimizer.applied_steps) == 1


def items_of(optimizer: Optimizer, parameters: list[nn.Parameter], given: dict[Any, Tensor]) -> Any:
    ((key, bundle),) = optimizer._bundles(given).items()
    scalars = torch.tensor(optimizer.scalars(optimizer.param_groups[0], optimizer.param_groups[0]["lr"], 1))
    return key[1], bundle.items, scalars


@pytest.mark.parametrize("make", [AdamW, Adam, SGD])
@pytest.mark.parametrize("dtype, kind", [(torch.bfloat16, "split"), (torch.bfloat16, "fp32"), (torch.float32, "none")])
def test_a_masked_update_equals_the_one_it_lets_through_and_else_changes_no_bit(
    make: type[Optimizer], dtype: torch.dtype, kind: str
):
    start = torch.randn(100).to(dtype)
    given = torch.randn(100)
    results = []
    for applied in (None, YES, NO):
        parameter = nn.Parameter(start.clone())
        optimizer = make([parameter], master=kind)
        gradient = given if applied is not NO else torch.full_like(given, float("nan"))
        kind_used, items, scalars = items_of(optimizer, [parameter], {parameter: gradient})
        before = bits(optimizer, [parameter])
        settings = engine.Settings(type(optimizer).rule, kind_used, ONE, None, applied, scalars)
        for part in engine.parts(items):
            engine.run(part, settings, compiled=False)
        results.append((before, bits(optimizer, [parameter])))
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert not torch.equal(results[0][1][1], results[0][0][1])
    assert all(torch.equal(a, b) for a, b in zip(*results[2], strict=True))


def test_a_power_of_two_in_the_gradients_and_its_inverse_in_the_factor_leave_no_trace():
    finals = []
    for scale in (1.0, 2.0**10, 2.0**-10):
        parameter = nn.Parameter(torch.randn(500, generator=torch.Generator().manual_seed(0)).bfloat16())
        optimizer = AdamW([parameter], lr=1e-2)
        for gradient in gradients(500, 20):
            parameter.grad = gradient.bfloat16() * scale
            optimizer.apply(factor=torch.tensor(1 / scale), applied=YES, lr_factor=ONE)
        finals.append(optimizer.exact_weight(parameter))
    assert torch.equal(finals[0], finals[1])
    assert torch.equal(finals[0], finals[2])


def test_an_element_does_not_depend_on_how_tensors_are_cut_or_grouped():
    # One tensor of three pieces and a tail; the same numbers as many small tensors that are updated together.
    total = 3 * engine.PIECE + 77
    start, given = torch.randn(total), [torch.randn(total) for _ in range(3)]
    sizes = [total - 50_000 - 33 * 100, 50_000, *[33] * 100]
    whole = [nn.Parameter(start.bfloat16())]
    parts = [nn.Parameter(part) for part in start.bfloat16().split(sizes)]
    optimizers = AdamW(whole), AdamW(parts)
    for gradient in given:
        for parameters, optimizer, cut in ((whole, optimizers[0], [total]), (parts, optimizers[1], sizes)):
            pieces = dict(zip(parameters, gradient.split(cut), strict=True))
            optimizer.apply(factor=ONE, applied=YES, lr_factor=ONE, gradients=pieces)
    exact = torch.cat([optimizers[1].exact_weight(p) for p in parts])
    assert torch.equal(optimizers[0].exact_weight(whole[0]), exact)


def test_transposed_scalar_and_empty_parameters_are_updated_like_any_other():
    plain = [torch.randn(300, 200), torch.randn(()), torch.randn(0, 3), torch.randn(2, 3, 4, 4)]
    odd = [plain[0].t().contiguous().t(), plain[1], plain[2], plain[3].to(memory_format=torch.channels_last)]
    results = []
    for tensors in (plain, odd):
        parameters = [nn.Parameter(tensor.clone(memory_format=torch.preserve_format)) for tensor in tensors]
        optimizer = AdamW(parameters)
        given = {p: torch.full(p.shape, 0.5) * (i + 1) for i, p in enumerate(parameters)}
        optimizer.apply(factor=ONE, applied=YES, lr_factor=ONE, gradients=given)
        results.append(parameters)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not results[1][0].is_contiguous()


def test_clip_value_bounds_each_scaled_element():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = SGD([parameter], lr=1.0, momentum=0.0)
    parameter.grad = torch.tensor([20.0, 1.0, -8.0])
    optimizer.apply(factor=torch.tensor(0.5), applied=YES, lr_factor=ONE, clip_value=1.0)
    assert parameter.tolist() == [-1.0, -0.5, 1.0]


def test_a_parameter_born_late_starts_its_bias_correction_at_its_own_first_step():
    early, late, fresh = (nn.Parameter(torch.ones(5)) for _ in range(3))
    optimizer, reference = AdamW([early, late]), AdamW([fresh])
    for step in range(6):
        early.grad = torch.randn(5)
        if step == 4:
            late.grad, fresh.grad = torch.full((5,), 0.3), torch.full((5,), 0.3)
            reference.step()
        if step == 5:
            late.grad, fresh.grad = torch.full((5,), -0.1), torch.full((5,), -0.1)
            reference.step()
        optimizer.step()
    assert torch.equal(late, fresh)
    assert int(optimizer.state[late]["since"]) == 4


def test_only_parameters_with_a_gradient_move():
    moved, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = AdamW([moved, still])
    still.grad = torch.ones(3)  # not used: the gradients are given
    optimizer.apply(factor=ONE, applied=YES, lr_factor=ONE, gradients={moved: torch.ones(3)})
    assert torch.equal(still, torch.ones(3))
    assert not optimizer.state.get(still)
    assert not torch.equal(moved, torch.ones(3))


def test_groups_keep_their_own_options_and_names():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
    others = [(n, p) for n, p in model.named_parameters() if p.ndim != 2]
    optimizer = AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=0.0, weight_decay=0.5)
    optimizer.param_groups[0]["lr"] = 0.5
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * (0.75 if parameter.ndim == 2 else 1.0))
    assert optimizer.param_groups[0]["param_names"] == ["0.weight"]


@pytest.mark.skipif(update_cpu.library().value is None, reason="no C++ compiler")
@pytest.mark.parametrize("make", [AdamW, Adam, SGD])
def test_a_cpu_updates_what_it_can_in_one_pass(make: Any, monkeypatch: pytest.MonkeyPatch):
    updated, update = [], update_cpu.update
    monkeypatch.setattr(update_cpu, "update", lambda *given: updated.append(given[2].dtype) or update(*given))
    types = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    parameters = [nn.Parameter(torch.ones(128, dtype=dtype)) for dtype in types]
    optimizer = make(parameters, lr=1e-2)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert updated == types[:3]
    assert all(bool((parameter < 1).all()) for parameter in parameters)


@pytest.mark.parametrize("make", [AdamW, Adam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torchs_kernel_on_a_cpu_without_ours_equals_the_rule_within_rounding(
    make: type[Optimizer], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(dispatch._choices, ("update in one pass", "cpu"), Choice("pieces", "a test"))
    start = (0.3 * torch.randn(128 * 3)).to(dtype)
    runs = []
    for fast in (True, False):
        parameter = nn.Parameter(start.clone())
        optimizer = make([parameter], lr=1e-2)
        assert optimizer.cpu_rule(optimizer.param_groups[0], 1e-2, 1) is not None
        if not fast:
            optimizer.cpu_rule = lambda group, lr, n: None  # type: ignore[method-assign]
        follow(optimizer, parameter, gradients(start.shape, 100))
        runs.append(optimizer.exact_weight(parameter))
    unit = 2.0**-53 if dtype == torch.float64 else U
    assert (runs[0] - runs[1]).abs().max().item() <= adam_bound(100, 1e-2, unit, feedback=True)
