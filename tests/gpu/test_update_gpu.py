"""The update kernel on a CUDA device: the bits of the eager definition there, one launch, no waiting, no tensor kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from update_rows import MASTERS, SCALARS, bf16, bits, copied, fp16, fp32, row_from, spread, stored
from update_rows import table_of as rows_table

from fewbits.kernels import update as kernel
from fewbits.numerics.update import adam_, adamw_, sgd_
from fewbits.optim.adamw import AdamW
from fewbits.optim.clip import measure
from fewbits.optim.engine import update_flat

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not kernel.installed(), reason="needs Triton")]
CUDA = torch.device("cuda")
SHAPES = [(512, 257), (7,), (1024, 64), (33, 3), (), (0,)]


def row_of(shape: tuple[int, ...], *rest: Any) -> kernel.Row:
    exact = spread(shape, CUDA)
    if exact.numel() > 20:
        exact.view(-1)[:6] = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, float("inf"), float("nan")])
    return row_from(exact, *rest)


def table_of(rule: Callable[..., None], kind: str, rows: list[kernel.Row]) -> kernel.Table:
    return rows_table(rule, kind, rows, kernel.Cut())


def test_the_kernel_is_what_runs_here():
    assert kernel.failure(CUDA) == ""
    assert AdamW([nn.Parameter(torch.ones(3, device=CUDA))]).execution.value == "kernel"


@pytest.mark.parametrize("rule, moments", [(adamw_, 2), (adam_, 2), (sgd_, 1), (sgd_, 0)])
@pytest.mark.parametrize("dtype, kind", MASTERS)
def test_one_launch_gives_every_tensor_the_bits_of_the_eager_definition(rule, moments, dtype: torch.dtype, kind: str):
    """Division and square root are exact in both, and neither fuses: there is nothing to tolerate."""
    scalars, third = torch.tensor(SCALARS, device=CUDA), torch.tensor(0.3, device=CUDA)
    yes, no = torch.tensor(True, device=CUDA), torch.tensor(False, device=CUDA)
    for gradient, clip in ((dtype, None), (fp32, torch.tensor(0.25, device=CUDA))):
        rows = [row_of(shape, dtype, kind, gradient, moments, i % 2) for i, shape in enumerate(SHAPES)]
        expected = [copied(row) for row in rows]
        table = table_of(rule, kind, rows)
        table.update(scalars, third, clip, no)
        for row, other in zip(rows, expected, strict=True):
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(stored(row), stored(other), strict=True))
        table.update(scalars, third, clip, yes)
        for row, other in zip(rows, expected, strict=True):
            own = scalars[row.scalars][: 3 if rule is sgd_ else 8]
            update_flat(rule, kind, other.working, other.gradient, other.kept, other.moments, third, clip, None, own)
            for ours, theirs in zip(stored(row), stored(other), strict=True):
                assert torch.equal(bits(ours), bits(theirs)), (row.working.shape, ours.dtype)


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
def test_norm_of_one_launch_is_the_norm_and_the_same_every_time(dtype: torch.dtype):
    rows = [row_of(shape, fp32, "none", dtype, 0, 0) for shape in [*SHAPES, (3000, 1001)]]
    tables = [table_of(sgd_, "none", rows)]
    every = torch.cat([row.gradient.double().flatten() for row in rows])
    found = kernel.norm(tables, "norm")
    # Within a piece of 2,048 * 8: one rounding of the square, 8 of the repeats, 2,048 in whatever order at most; far less
    # in a tree, which 16 roundings and their random signs describe. The root halves them.
    assert found.item() == pytest.approx(every.norm().item(), rel=32 * 2.0**-24)
    assert kernel.norm(tables, "inf").item() == every.abs().max().item()
    assert all(torch.equal(found, kernel.norm(tables, "norm")) for _ in range(5))
    for poison in (float("nan"), float("inf")):
        rows[-1].gradient.view(-1)[2_999_999] = poison
        assert not any(kernel.norm(tables, kind).isfinite() for kind in ("norm", "inf"))


def test_moving_gradients_neither_waits_nor_goes_wrong():
    a, b = ([nn.Parameter(torch.ones(shape, device=CUDA, dtype=bf16)) for shape in SHAPES] for _ in range(2))
    ours, plain = AdamW(a, lr=1e-2), AdamW(b, lr=1e-2, compile=False)
    one, yes = torch.ones((), device=CUDA), torch.ones((), device=CUDA, dtype=torch.bool)
    ours.apply(factor=one, applied=yes, lr_factor=one, gradients={p: torch.ones_like(p) for p in a})
    plain.apply(factor=one, applied=yes, lr_factor=one, gradients={p: torch.ones_like(p) for p in b})
    keep = []
    for step in range(6):
        given = {p: torch.full_like(p, step - 2.5) for p in a}
        keep.append(given)  # so that every step finds its gradients elsewhere
        ours.param_groups[0]["lr"] = 1e-2 / (step + 2)
        plain.param_groups[0]["lr"] = 1e-2 / (step + 2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            norm = ours.grad_norm(given)
            ours.apply(factor=one, applied=yes, lr_factor=one, gradients=given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert norm.item() == pytest.approx(measure(list(given.values())).item(), rel=1e-6)
        plain.apply(factor=one, applied=yes, lr_factor=one, gradients=dict(zip(b, given.values(), strict=True)))
    for p, q in zip(a, b, strict=True):
        assert torch.equal(ours.exact_weight(p), plain.exact_weight(q))  # the same scalars, from columns or one by one


def test_tensors_of_more_than_2_to_the_31_elements_are_updated_to_their_end():
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB")
    size = 2**31 + 100
    weight, gradient = (torch.full((size,), value, device=CUDA, dtype=bf16) for value in (1.0, 0.5))
    table = table_of(sgd_, "none", [kernel.Row(gradient, weight, None, (), 0)])
    one, scalars = torch.ones((), device=CUDA), torch.tensor([[1.0, *[0.0] * 7]], device=CUDA)
    table.update(scalars, one, None, one.bool())
    assert all((part == 0.5).all() for part in weight.split(2**28))
    gradient[-1] = float("inf")
    assert kernel.norm([table], "norm").isinf()
