"""The optimizers on a CUDA device: the same promises as on a CPU, without waiting for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewbits.numerics.update import round_away
from fewbits.optim.adamw import Adam, AdamW
from fewbits.optim.base import Optimizer
from fewbits.optim.clip import coefficient, measure
from fewbits.optim.loss_scale import DynamicScale
from fewbits.optim.sgd import SGD

pytestmark = pytest.mark.gpu
SHAPES = [(512, 257), (7,), (1024, 64), (33, 3), ()]  # two large, one of them with a tail, and a group of small ones
CUDA = "cuda"


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait of the host for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def parameters_of(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(CUDA, dtype)) for shape in SHAPES]


def settings(step: int, parameters: list[nn.Parameter], dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator(CUDA).manual_seed(step)
    gradients = {p: torch.randn(p.shape, device=CUDA, generator=generator).to(dtype) for p in parameters}
    applied = torch.rand((), device=CUDA, generator=generator) > 0.2
    poison = torch.where(applied, 1.0, float("nan")).to(dtype)
    gradients[parameters[0]] = gradients[parameters[0]] * poison
    rates = torch.rand(2, device=CUDA, generator=generator)
    return {"gradients": gradients, "applied": applied, "factor": rates[0], "lr_factor": rates[1]}


EXECUTIONS = {"auto": "kernel", True: "compiled", False: "eager"}


@pytest.mark.parametrize("compile", EXECUTIONS)
@pytest.mark.parametrize("make", [AdamW, Adam, SGD])
def test_split_and_fp32_master_agree_bit_for_bit_on_the_device(make: type[Optimizer], compile: bool | str):
    runs = []
    for kind in ("split", "fp32"):
        parameters = parameters_of(torch.bfloat16)
        runs.append((parameters, make(parameters, lr=1e-2, master=kind, compile=compile)))
    for step in range(200):
        for parameters, optimizer in runs:
            optimizer.apply(**settings(step, parameters, torch.bfloat16))
    (ours, split), (others, whole) = runs
    assert split.execution.value == EXECUTIONS[compile]
    assert 120 < int(split.applied_steps) < 190
    for a, b in zip(ours, others, strict=True):
        exact = split.exact_weight(a)
        assert torch.equal(a, b) and torch.equal(exact, whole.exact_weight(b))
        assert exact.isfinite().all()
        assert torch.equal(a, round_away(exact, torch.bfloat16))
        for name in split.moment_names:
            assert torch.equal(split.state[a][name], whole.state[b][name])


@pytest.mark.parametrize("compile", EXECUTIONS)
@pytest.mark.parametrize(
    "dtype, kind",
    [(torch.bfloat16, "split"), (torch.bfloat16, "none"), (torch.float16, "fp32"), (torch.float32, "none")],
)
@pytest.mark.parametrize("clip_value", [None, 0.5])
def test_a_step_never_waits_for_the_device(
    dtype: torch.dtype, kind: str, compile: bool | str, clip_value: float | None
):
    parameters = parameters_of(dtype)
    optimizer = AdamW(parameters, master=kind, compile=compile)
    scale = DynamicScale(interval=2)
    scale.init(CUDA)
    given = [settings(step, parameters, dtype) for step in range(4)]

    def step(one: dict[str, Any]) -> None:
        norm = measure(one["gradients"].values())
        factor = scale.value.reciprocal() * coefficient(norm, 1.0)
        optimizer.apply(**{**one, "factor": factor}, clip_value=clip_value)
        scale.update_(torch.isfinite(norm))
        scale.can_cure()

    step(given[0])  # compiles, makes state and constants
    with no_waiting():
        for one in given[1:]:
            step(one)
    assert all(p.isfinite().all() for p in parameters)


def test_the_very_first_eager_step_does_not_wait_either():
    parameters = parameters_of(torch.bfloat16)
    optimizer = AdamW(parameters, compile=False)
    given = settings(0, parameters, torch.bfloat16)
    with no_waiting():
        optimizer.apply(**given)


def held(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    tensors = [optimizer.applied_steps, *parameters, *(v for p in parameters for v in optimizer.state[p].values())]
    return [tensor.detach().clone().reshape(-1).view(torch.uint8) for tensor in tensors]


@pytest.mark.parametrize("compile", EXECUTIONS)
@pytest.mark.parametrize("make", [AdamW, SGD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_skipped_step_changes_no_bit_on_the_device(make: type[Optimizer], dtype: torch.dtype, compile: bool | str):
    parameters = parameters_of(dtype)
    optimizer = make(parameters, compile=compile)
    yes, no, one = (torch.tensor(value, device=CUDA) for value in (True, False, 1.0))
    good = {p: torch.randn_like(p) for p in parameters}
    optimizer.apply(factor=one, applied=yes, lr_factor=one, gradients=good)
    before = held(optimizer, parameters)
    for poison in (float("nan"), float("inf")):
        bad = {p: torch.full_like(p, poison) for p in parameters}
        optimizer.apply(factor=one, applied=no, lr_factor=one, gradients=bad)
    assert all(torch.equal(a, b) for a, b in zip(before, held(optimizer, parameters), strict=True))


@pytest.mark.parametrize("compile", ["auto", True])
def test_an_update_stays_within_rounding_of_torchs_fused_adamw(compile: bool | str):
    steps, lr = 100, 1e-2
    ours, theirs = (parameters_of(torch.float32) for _ in range(2))
    mine = AdamW(ours, lr=lr, compile=compile)
    peer = torch.optim.AdamW(theirs, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for step in range(steps):
        generator = torch.Generator(CUDA).manual_seed(step)
        for a, b in zip(ours, theirs, strict=True):
            size = torch.rand(a.shape, device=CUDA, generator=generator) * 1.5 + 0.5
            a.grad = size * (torch.randint(0, 2, a.shape, device=CUDA, generator=generator) * 2 - 1)
            b.grad = a.grad.clone()
        mine.step()
        peer.step()
    # As on the CPU, with up to 2 units in the last place for a division: |g| in [0.5, 2], so each step adds at most
    # lr * U * (2 * 24 * 2 / 0.5 + 2 * 4 * 48) and four roundings of w.
    unit = 2.0**-24
    for a, b in zip(ours, theirs, strict=True):
        bound = steps * (lr * unit * (192 + 384) + 4 * unit * (1 + a.detach().abs().max().item()))
        assert (a - b).abs().max().item() <= bound


@pytest.mark.parametrize("dtype, kind", [(torch.bfloat16, "split"), (torch.float16, "fp32"), (torch.float32, "none")])
def test_2n_steps_equal_n_then_save_load_and_n_bit_for_bit_on_the_device(dtype: torch.dtype, kind: str):
    straight, first, second = (parameters_of(dtype) for _ in range(3))
    whole, optimizer, other = (AdamW(p, master=kind) for p in (straight, first, second))
    for step in range(12):
        whole.apply(**settings(step, straight, dtype))
    for step in range(6):
        optimizer.apply(**settings(step, first, dtype))
    names = [str(i) for i in range(len(first))]
    saved = {k: v.cpu().clone() for k, v in optimizer.named_state(zip(names, first, strict=True)).items()}
    for a, b in zip(first, second, strict=True):
        other.load_exact(b, optimizer.exact_weight(a).cpu())
    other.load_named_state(zip(names, second, strict=True), saved)
    for step in range(6, 12):
        other.apply(**settings(step, second, dtype))
    for a, b in zip(held(whole, straight), held(other, second), strict=True):
        assert torch.equal(a, b)


def test_state_dict_goes_to_the_cpu_and_back_unchanged():
    parameters = parameters_of(torch.bfloat16)
    optimizer = AdamW(parameters)
    optimizer.apply(**settings(1, parameters, torch.bfloat16))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"] = {i: {k: v.cpu() for k, v in one.items()} for i, one in state["state"].items()}
    other = AdamW(parameters)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(held(optimizer, parameters), held(other, parameters), strict=True))
    assert other.state[parameters[0]]["exp_avg"].device.type == CUDA


def test_power_of_two_scale_leaves_no_trace_on_the_device():
    finals = []
    for scale in (1.0, 2.0**12):
        parameters = parameters_of(torch.bfloat16)
        optimizer = AdamW(parameters)
        for step in range(20):
            given = settings(step, parameters, torch.bfloat16)
            given["gradients"] = {p: g * scale for p, g in given["gradients"].items()}
            given["factor"] = torch.tensor(1 / scale, device=CUDA)
            optimizer.apply(**given)
        finals.append([optimizer.exact_weight(p) for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


@pytest.mark.parametrize("kind", ["norm", "inf"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_makes_the_norm_not_finite(kind: str, poison: float, dtype: torch.dtype):
    for place in (0, 5, 300_000):
        gradient = torch.randn(300_001, device=CUDA).to(dtype)
        assert measure([gradient, torch.ones(3, device=CUDA)], kind).isfinite()
        gradient[place] = poison
        assert not measure([torch.ones(3, device=CUDA), gradient], kind).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_is_summed_in_at_least_fp32(dtype: torch.dtype):
    gradients = [torch.randn(10_000_000, device=CUDA).to(dtype), torch.randn(3, 5, device=CUDA).to(dtype)]
    exact = torch.cat([g.double().flatten() for g in gradients]).norm().item()
    assert measure(gradients).item() == pytest.approx(exact, rel=1e-5)  # fp32 sums in a tree: far below 10^7 * 2^-24
    assert measure(gradients, "inf").item() == max(g.abs().max().item() for g in gradients)


def test_torchs_grad_scaler_drives_the_optimizer_without_waiting():
    parameters = parameters_of(torch.float32)
    optimizer = AdamW(parameters)
    scaler = torch.amp.GradScaler(CUDA, init_scale=2.0**4)

    def step(poison: float) -> None:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter) * (16.0 * poison)
        scaler.scale(torch.ones((), device=CUDA))
        scaler.step(optimizer)
        scaler.update()

    step(1.0)
    before = held(optimizer, parameters)
    with no_waiting():
        step(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, held(optimizer, parameters), strict=True))
    assert scaler.get_scale() == 8.0 and int(optimizer.applied_steps) == 1


@pytest.mark.parametrize("compile", EXECUTIONS)
def test_an_update_can_be_captured_in_a_graph_and_replayed(compile: bool | str):
    parameters, others = parameters_of(torch.bfloat16), parameters_of(torch.bfloat16)
    optimizer, plain = (AdamW(p, compile=compile) for p in (parameters, others))
    given = settings(0, parameters, torch.bfloat16)
    given["applied"] = torch.ones((), dtype=torch.bool, device=CUDA)
    given["gradients"] = {p: torch.randn_like(p) for p in parameters}
    same = {**given, "gradients": dict(zip(others, given["gradients"].values(), strict=True))}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        optimizer.apply(**given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.apply(**given)
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        plain.apply(**same)
    assert int(optimizer.applied_steps) == 4
    for a, b in zip(parameters, others, strict=True):
        assert torch.equal(optimizer.exact_weight(a), plain.exact_weight(b))


def test_many_sizes_neither_recompile_nor_fall_back():
    parameters = [nn.Parameter(torch.ones(40_000 + 7 * i, device=CUDA)) for i in range(20)]
    optimizer = AdamW(parameters, compile=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.execution.value == "compiled"
