"""The Triton twin of the update gives the bits of the definition, for many tensors in one launch (in the interpreter)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED
from torch import Tensor
from update_rows import MASTERS, ExactRoots, bf16, bits, copied, fp16, fp32, row_from, spread, stored
from update_rows import SCALARS as rows_scalars
from update_rows import table_of as rows_table

from fewbits.kernels import update as kernel
from fewbits.numerics.update import adam_, adamw_, sgd_
from fewbits.optim import master
from fewbits.optim.engine import update_flat

pytestmark = INTERPRETED

CUT = kernel.Cut(block=64, norm_block=32, norm_repeat=4)
SHAPES = [(3, 64), (130,), (1,), (0,), (), (7, 9)]  # whole chunks, a tail, less than a chunk, nothing at all
SCALARS = torch.tensor(rows_scalars)
YES, THIRD = torch.tensor(True), torch.tensor(0.3)


def row_of(shape: tuple[int, ...], *rest: Any) -> kernel.Row:
    return row_from(spread(shape), *rest)


def table_of(rule: Callable[..., None], kind: str, rows: list[kernel.Row]) -> kernel.Table:
    return rows_table(rule, kind, rows, CUT)


def assert_like_the_definition(rule, kind: str, rows: list[kernel.Row], clip: Tensor | None = None) -> None:
    expected = [copied(row) for row in rows]
    table_of(rule, kind, rows).update(SCALARS, THIRD, clip, YES)
    for row, other in zip(rows, expected, strict=True):
        scalars = SCALARS[row.scalars][: 3 if rule is sgd_ else 8]
        with ExactRoots():
            update_flat(
                rule, kind, other.working, other.gradient, other.kept, other.moments, THIRD, clip, None, scalars
            )
        for ours, theirs in zip(stored(row), stored(other), strict=True):
            assert torch.equal(bits(ours), bits(theirs)), (row.working.shape, ours.dtype)


@pytest.mark.parametrize("rule, moments", [(adamw_, 2), (adam_, 2), (sgd_, 1), (sgd_, 0)])
@pytest.mark.parametrize("dtype, kind", MASTERS)
def test_one_launch_gives_every_tensor_the_bits_of_the_definition(rule, moments: int, dtype: torch.dtype, kind: str):
    for gradient, clip in ((dtype, None), (fp32, torch.tensor(0.25))):
        rows = [row_of(shape, dtype, kind, gradient, moments, i % 2) for i, shape in enumerate(SHAPES)]
        assert_like_the_definition(rule, kind, rows, clip)


@pytest.mark.parametrize("dtype, kind", MASTERS)
def test_numbers_at_the_edges_round_as_in_the_definition(dtype: torch.dtype, kind: str):
    """Ties, subnormals, overflow to infinity, infinity and NaN in the weight; gradients that are not finite, applied."""
    edges = [0.0, -0.0, 1e-45, -1e-40, 6e-8, 65519.0, 65520.0, -65536.0, 3.3961e38, 3.4028e38, -3.4e38]
    edges += [1.00390625, -1.01171875, 1.00048828125, 2.0**-25, 3 * 2.0**-26, float("inf"), -float("inf"), float("nan")]
    exact = torch.tensor(edges)
    for poison in (0.0, -0.0, float("inf"), float("nan")):
        working, kept = master.rounded(kind, exact, dtype)
        moments = tuple(torch.zeros_like(exact) for _ in range(2))
        kept = None if kept is None else kept.clone()
        row = kernel.Row(torch.full_like(exact, poison).to(dtype), working.clone(), kept, moments, 0)
        assert_like_the_definition(adamw_, kind, [row])


def test_tensors_that_start_at_odd_addresses_are_updated_too():
    rows = [row_of((200,), bf16, "split", bf16, 2, 0) for _ in range(2)]
    odd = [
        row._replace(
            gradient=row.gradient[1:], working=row.working[1:], kept=row.kept[1:], moments=tuple(m[1:] for m in row.moments)
        )
        for row in rows
    ]  # fmt: skip
    before = [copied(row) for row in rows]
    assert_like_the_definition(adamw_, "split", odd)
    for row, old in zip(rows, before, strict=True):
        assert all(torch.equal(a[:1], b[:1]) for a, b in zip(stored(row), stored(old), strict=True))


@pytest.mark.parametrize("rule, moments", [(adamw_, 2), (sgd_, 1)])
def test_split_and_fp32_masters_agree_bit_for_bit_over_many_updates(rule, moments: int):
    split = [row_of((150,), bf16, "split", bf16, moments, 0)]
    whole = [copied(row)._replace(kept=master.read("split", row.working, row.kept)) for row in split]
    tables = [table_of(rule, kind, rows) for kind, rows in (("split", split), ("fp32", whole))]
    for _ in range(30):
        split[0].gradient.copy_(torch.randn(150))
        whole[0].gradient.copy_(split[0].gradient)
        for table in tables:
            table.update(SCALARS, THIRD, None, YES)
    exact = master.read("split", split[0].working, split[0].kept)
    assert torch.equal(split[0].working, whole[0].working) and torch.equal(exact, whole[0].kept)
    assert all(torch.equal(a, b) for a, b in zip(split[0].moments, whole[0].moments, strict=True))


@pytest.mark.parametrize("dtype, kind", MASTERS)
def test_an_update_that_is_not_applied_changes_no_bit(dtype: torch.dtype, kind: str):
    rows = [row_of(shape, dtype, kind, dtype, 2, 0) for shape in SHAPES]
    rows[1].gradient[3] = float("nan")
    before = [copied(row) for row in rows]
    table_of(adamw_, kind, rows).update(SCALARS, torch.tensor(float("nan")), None, torch.tensor(False))
    for row, old in zip(rows, before, strict=True):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(stored(row), stored(old), strict=True))


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32])
def test_norm_is_that_of_all_gradients_and_finite_when_they_are(dtype: torch.dtype):
    tables = []
    for gradient in (dtype, fp32):
        rows = [row_of(shape, dtype, "none", gradient, 2, 0) for shape in [*SHAPES, (2, 400)]]
        tables.append((table_of(adamw_, "none", rows), rows))
    every = torch.cat([row.gradient.double().flatten() for _, rows in tables for row in rows])
    found = kernel.norm([table for table, _ in tables], "norm").item()
    # A square is rounded once, joins a sum of 4 and then one of 32 in whatever order: at most 1 + 4 + 31 roundings of
    # 2^-24 in a sum of positive numbers; the root halves them and the result is rounded once more.
    assert found == pytest.approx(every.norm().item(), rel=(36 / 2 + 1) * 2.0**-24, abs=0)
    assert kernel.norm([table for table, _ in tables], "inf").item() == every.abs().max().item()
    for poison in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 130, 799):
            (gradient := tables[0][1][-1].gradient.view(-1))[place] = poison
            assert not any(kernel.norm([tables[0][0]], kind).isfinite() for kind in ("norm", "inf"))
            gradient[place] = 0.0


def test_tables_follow_gradients_that_move():
    rows = [row_of((70,), bf16, "split", bf16, 2, i) for i in range(2)]
    table = table_of(adamw_, "split", rows)
    moved = [row._replace(gradient=row.gradient.flip(0).contiguous()) for row in rows]
    table.move_gradients([row.gradient.data_ptr() for row in moved])
    expected = [copied(row) for row in moved]
    for row in rows:
        row.gradient.fill_(float("nan"))
    table.update(SCALARS, THIRD, None, YES)
    assert_like_the_definition(adamw_, "split", expected)
    for row, other in zip(moved, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(stored(row), stored(other), strict=True))


def test_what_no_table_takes_is_named():
    row = row_of((4, 6), bf16, "split", bf16, 2, 0)
    assert kernel.why_not(adamw_, "split", row) == ""
    assert "contiguous" in kernel.why_not(adamw_, "split", row._replace(gradient=row.gradient.t().contiguous().t()))
    assert "float64" in kernel.why_not(adamw_, "none", row_of((4,), torch.float64, "none", torch.float64, 2, 0))
    assert "no kernel" in kernel.why_not(update_flat, "split", row)
    assert "class of its own" in kernel.why_not(
        adamw_, "split", row._replace(gradient=row.gradient.as_subclass(type("Own", (Tensor,), {})))
    )


def test_the_probe_finds_the_update_right():
    assert kernel.failure(torch.device("cpu")) == ""
