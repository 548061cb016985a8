"""The compiled update: the same code for every master kind, so the same bits."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import pytest
import torch
from torch import nn

from fewbits.choice import Choice
from fewbits.errors import FewbitsError
from fewbits.optim import engine
from fewbits.optim.adamw import AdamW

ONE = torch.ones(())
needs_compiler = pytest.mark.skipif(
    sys.platform == "win32" or not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


def run(kind: str, compile: bool | str, steps: int = 25) -> tuple[AdamW, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 203), (7,), (129, 300), (33, 3)]  # two large, with tails, and a group of small ones
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]
    optimizer = AdamW(parameters, lr=1e-2, master=kind, compile=compile)
    for step in range(steps):
        given = {p: torch.randn(p.shape, generator=generator).bfloat16() for p in parameters}
        if step % 5 == 3:
            given[parameters[0]][0, 0] = float("nan")
        applied = torch.tensor(step % 5 != 3)
        optimizer.apply(factor=torch.tensor(0.3), applied=applied, lr_factor=ONE, gradients=given)
    return optimizer, parameters


@needs_compiler
def test_compiled_split_and_fp32_master_agree_bit_for_bit_and_eager_agrees_within_rounding():
    torch._dynamo.reset()
    results = {kind: run(kind, True) for kind in ("split", "fp32")}
    for kind in results:
        assert results[kind][0].execution == Choice("compiled", "compile=True was given")
    (split, ours), (whole, others) = results["split"], results["fp32"]
    eager, plain = run("split", False)
    for a, b, c in zip(ours, others, plain, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(split.exact_weight(a), whole.exact_weight(b))
        for name in split.moment_names:
            assert torch.equal(split.state[a][name], whole.state[b][name])
        # 20 updates of at most 3 * lr, each with a relative error of a few 2^-24 (the square root), on weights below 8
        difference = (split.exact_weight(a) - eager.exact_weight(c)).abs().max().item()
        assert difference <= 20 * (3e-2 * 16 * 2.0**-24 + 8 * 2.0**-24)


@needs_compiler
def test_recompilation_limit_of_torch_is_not_reached_by_many_sizes():
    torch._dynamo.reset()
    parameters = [nn.Parameter(torch.ones(engine.SMALL + 1 + 7 * i)) for i in range(12)]
    optimizer = AdamW(parameters, compile=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.execution.value == "compiled"


def failing(*arguments: Any) -> None:
    raise torch._dynamo.exc.TorchDynamoException("no compiler on this machine")


def test_a_missing_compiler_falls_back_to_eager_and_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "compiled_update", lambda *variant: failing)
    monkeypatch.setattr(engine, "choose_execution", lambda compile, device: Choice("compiled", "for the test"))
    weight = nn.Parameter(torch.ones(4))
    optimizer = AdamW([weight], compile="auto")
    weight.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.execution == Choice("eager", "torch.compile failed here: no compiler on this machine")
    assert int(optimizer.applied_steps) == 1 and (weight < 1).all()
    with pytest.raises(FewbitsError, match="no compiler on this machine"):
        optimizer = AdamW([weight], compile=True)
        optimizer.step()


def test_an_error_of_the_update_itself_is_not_taken_for_a_compiler_failure(monkeypatch: pytest.MonkeyPatch):
    def broken(*arguments: Any) -> None:
        raise RuntimeError("a real bug")

    monkeypatch.setattr(engine, "compiled_update", lambda *variant: broken)
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="a real bug"):
        AdamW([weight], compile=True).step()


def test_execution_is_chosen_with_a_reason():
    assert engine.choose_execution("auto", torch.device("cpu")).value == "eager"
    assert engine.choose_execution(False, torch.device("cuda")) == Choice("eager", "compile=False was given")
    assert engine.choose_execution("auto", torch.device("cuda")).reason


def test_a_compiler_that_fails_late_makes_no_parameter_update_twice(monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    calls = []

    def failing(*variant):
        def update(*arguments):
            calls.append(1)
            if len(calls) > 1:
                raise TorchDynamoException("no compiler")
            engine.update_flat(*arguments)

        return update

    def trained(compile):
        parameters = [torch.nn.Parameter(torch.ones(engine.SMALL * 2)) for _ in range(3)]
        optimizer = AdamW(parameters, lr=0.1, compile=compile)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        if compile == "auto":
            optimizer.execution = Choice("compiled", "planted")
        optimizer.step()
        return parameters, optimizer

    expected, _ = trained(False)
    monkeypatch.setattr(engine, "compiled_update", failing)
    found, optimizer = trained("auto")
    assert optimizer.execution.value == "eager" and len(calls) == 2
    for a, b in zip(expected, found, strict=True):  # the fused CPU kernel rounds an ulp apart; twice would be 0.1 off
        torch.testing.assert_close(a, b, rtol=0, atol=2.0**-23)
