"""The update of weights on a CPU in one pass has the bits of the definition."""

from __future__ import annotations

import pytest
import torch
from update_rows import MASTERS, SCALARS, ExactRoots, bf16, bits, copied, fp16, fp32, row_from, spread, stored

from fewbits.kernels import dispatch, update_cpu
from fewbits.numerics.update import adam_, adamw_, round_away, sgd_
from fewbits.optim import engine

pytestmark = pytest.mark.skipif(update_cpu.library().value is None, reason="no C++ compiler")

ODD = [torch.inf, -torch.inf, torch.nan, -torch.nan, 3.4e38, 1e-45, 0.0, -0.0, 3.3961e38, 1.00390625, -1.01171875]
ODD += [65519.0, 65520.0, -65536.0, 1.00048828125, 2.0**-25, 3 * 2.0**-26, 2.0**-14 - 2.0**-25, 2.0**-25 - 2.0**-49]


def assert_like_the_definition(rule, kind, row, clip):
    scalars, factor = torch.tensor(SCALARS[0][: 3 if rule is sgd_ else 8]), torch.tensor(0.37)
    other, given = copied(row), row.gradient.clone()
    with ExactRoots():
        engine.update_flat(
            rule, kind, other.working, given.clone(), other.kept, other.moments, factor, clip, None, scalars
        )
    versions = [one._version for one in stored(row)]
    item = engine.Item(row.working, row.gradient, row.kept, row.moments)
    engine.run([item], engine.Settings(rule, kind, factor, clip, None, scalars), False)
    assert torch.equal(bits(row.gradient), bits(given))
    for one, wanted, version in zip(stored(row), stored(other), versions, strict=True):
        assert torch.equal(bits(one), bits(wanted)) and one._version > version


@pytest.mark.parametrize(
    ("rule", "moments"), [(adamw_, 2), (adam_, 2), (sgd_, 1), (sgd_, 0)], ids=["adamw", "adam", "momentum", "sgd"]
)
@pytest.mark.parametrize(("dtype", "kind"), MASTERS)
def test_every_rule_and_master_has_the_bits_of_the_definition(rule, moments, dtype, kind):
    for size in (1, 63, 1000, 100_003):
        for gradient in (bf16, fp16, fp32):
            for clip in (None, torch.tensor(0.5)):
                exact = spread((size,))
                if size > 100:
                    exact[50 : 50 + len(ODD)] = torch.tensor(ODD)
                row = row_from(exact, dtype, kind, gradient, moments, 0)
                if size > 100:
                    row.gradient[70 : 70 + len(ODD)] = torch.tensor(ODD).to(gradient)
                    if gradient == fp32:  # a NaN whose low bits are set: what is kept of it is 0 all the same
                        row.gradient.view(torch.int32)[90] = 0x7FC00001
                assert_like_the_definition(rule, kind, row, clip)


def test_rounding_weights_is_that_of_the_definition_for_every_number_near_a_tie():
    """All 16-bit numbers, their halfway points, and the numbers next to those, as what is stored when nothing is updated."""
    for dtype in (bf16, fp16):
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
        every = every[every.isfinite()].sort().values
        ties = (every[:-1].double() + every[1:].double()).div(2).float()
        near = [torch.nextafter(ties, torch.tensor(to)) for to in (torch.inf, -torch.inf)]
        exact = torch.cat([every, ties, *near])
        working, zero = torch.empty_like(exact, dtype=dtype), torch.zeros_like(exact)
        scalars = torch.zeros(3)  # sgd with a rate of 0
        update_cpu.update(sgd_, "fp32", working, zero, exact.clone(), (), torch.tensor(1.0), None, scalars)
        assert torch.equal(bits(working), bits(round_away(exact, dtype)))


def test_the_number_of_threads_does_not_show(monkeypatch):
    scalars = torch.tensor([0.999, 0.1, 0.1, 0.95, 0.05, 0.3, 1e-8, 1e-2])
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        torch.manual_seed(0)
        row = row_from(spread((200_001,)), bf16, "split", bf16, 2, 0)
        given = row.working, row.gradient, row.kept, row.moments, torch.tensor(1.0), None, scalars
        update_cpu.update(adamw_, "split", *given)
        found.append(stored(row))
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("working", "gradient", "rule"), [(torch.float64, fp32, adamw_), (bf16, torch.float64, sgd_)])
def test_what_has_no_kernel_is_named_and_updated_by_the_definition(working, gradient, rule):
    assert update_cpu.why_not(rule, working, gradient)
    assert not dispatch.updates_in_one_pass(rule, torch.ones(2, dtype=working), torch.ones(2, dtype=gradient))
    assert "has no kernel" in update_cpu.why_not(lambda *_: None, bf16, bf16)


def test_without_a_compiler_torchs_operators_update(monkeypatch):
    monkeypatch.setattr(dispatch, "_choices", {("update in one pass", "cpu"): dispatch.Choice("pieces", "a test")})
    assert not dispatch.updates_in_one_pass(adamw_, torch.ones(2), torch.ones(2))
    assert dispatch.recorded() == {"update in one pass on cpu": ["pieces", "a test"]}
