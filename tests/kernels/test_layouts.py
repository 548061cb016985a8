"""fp8 codes in both layouts are those of the definition, bit for bit (in Triton's interpreter)."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from interpreter import INTERPRETED

import fewbits
from fewbits import AdamW, ModelConfig, Step, Transformer
from fewbits.choice import Choice
from fewbits.formats import Format
from fewbits.kernels import dispatch, layouts
from fewbits.nn.lowbit import held_weights
from fewbits.nn.scale_history import scale_history
from fewbits.numerics import quantize as definition
from fewbits.numerics.scaling import Granularity, power_of_two_scale

pytestmark = INTERPRETED

FORMATS = ("fp8_e4m3", "fp8_e5m2")
E4M3 = Format.parse("fp8_e4m3")
SHAPES = ((1, 1), (3, 5), (130, 3), (2, 300), (129, 257), (16, 48), (128, 64), (128, 70))


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Values over many binades, with zeros, so that subnormal codes, ties and saturation all come up."""
    x = torch.randn(shape) * torch.randn(shape).mul(4).exp()
    return torch.where(torch.rand(shape) < 0.05, 0.0, x).clamp(-6e4, 6e4).to(dtype)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Which NaN it is does not matter, the sign of a zero does."""
    assert ours.dtype == theirs.dtype and ours.is_contiguous()
    mine, other = ours.float(), theirs.float()
    assert torch.equal(mine.isnan(), other.isnan())
    assert torch.equal(*(values.nan_to_num(nan=0.0).contiguous().view(torch.int32) for values in (mine, other)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_reading_gives_the_codes_of_the_definition_in_both_layouts(format, dtype):
    fmt = Format.parse(format)
    for shape in SHAPES:
        x = matrix(shape, dtype)
        own = definition.quantize(x, fmt).scale
        for scale in (own, own * 2.0**-9, own * 2.0**9):  # a delayed scale saturates, or leaves range idle
            assert_defined([x], scale, fmt)


def assert_defined(parts: Sequence[torch.Tensor], scale: torch.Tensor, fmt: Format) -> None:
    """With and without sums and the largest magnitude."""
    wanted, wanted_t, wanted_sums, wanted_amax = definition.encode_both(parts, scale, fmt)
    # 128 numbers in a tile, then the tiles: at most R roundings of fp32, each 2^-24 of a sum of magnitudes
    bound = 2.0**-24 * len(wanted) * sum(torch.cat(parts, 1).float().abs())
    for with_sums, with_amax in itertools.product((False, True), repeat=2):
        maximum = torch.zeros(1, 1) if with_amax else None
        codes, codes_t, sums = layouts.encode_both(parts, scale, fmt, with_sums, maximum)
        same(codes, wanted)
        same(codes_t, wanted_t)
        assert (sums is None) == (not with_sums)
        assert sums is None or bool(((sums - wanted_sums).abs() <= 2 * bound).all())
        assert maximum is None or torch.equal(maximum, wanted_amax)


# read where they lie by tiles of 128 columns, of 64 (grouped heads), or not at all: only the last may end anywhere
SIDE_BY_SIDE = (
    (128, 128, 128), (256, 64, 64), (192, 64, 64), (128, 256), (64, 5), (128, 130, 7), (40, 40, 40), (1, 2, 3),
)  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("widths", SIDE_BY_SIDE, ids=str)
def test_matrices_side_by_side_give_the_codes_of_the_one_that_they_are(format, widths):
    fmt = Format.parse(format)
    for rows, dtype in ((1, torch.float32), (130, torch.bfloat16)):
        # each of a size of its own, the first without the largest, so that none is taken for another
        parts = [matrix((rows, width), dtype) * 4.0**i for i, width in enumerate(widths)]
        scale = definition.quantize(torch.cat(parts, 1), fmt).scale
        for one in (scale, scale * 2.0**-9):
            assert_defined(parts, one, fmt)


@pytest.mark.parametrize("widths", SIDE_BY_SIDE, ids=str)
def test_matrices_are_put_side_by_side_only_where_a_tile_would_lie_in_two(widths, monkeypatch):
    joined, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda *given: joined.append(given) or cat(*given))
    for maximum in (None, torch.zeros(1, 1)):
        layouts.encode_both([matrix((2, width)) for width in widths], torch.ones(1, 1), E4M3, maximum=maximum)
    assert len(joined) == (0 if all(width % 64 == 0 for width in widths[:-1]) else 2)


def test_more_matrices_than_a_kernel_reads_are_put_side_by_side():
    assert_defined([matrix((3, 64)) for _ in range(4)], torch.ones(1, 1), E4M3)


@pytest.mark.parametrize("traced", [False, True])
def test_dispatch_takes_all_matrices_side_by_side_in_compiled_code_too(traced, monkeypatch):
    monkeypatch.setitem(dispatch._choices, ("both layouts of fp8 codes", "cpu"), Choice("kernel", "a test"))
    monkeypatch.setattr(dispatch, "_traced", lambda _: traced)
    parts, scale = [matrix((3, 64)), matrix((3, 40))], torch.ones(1, 1)
    found = dispatch.encode_both(parts, scale, E4M3, Granularity(), "nearest-even", 0, "delayed")
    wanted, wanted_t, *_ = definition.encode_both(parts, scale, E4M3)
    same(found.matrix.codes, wanted)
    same(found.transpose.codes, wanted_t)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_in_any_part_is_nan_in_its_codes_and_shows_in_the_largest_magnitude(value):
    for spoilt, row in ((0, 60), (1, 61), (2, 62), (2, 63)):  # every fourth row is a tile of its own
        parts = [matrix((70, 64)) for _ in range(3)]
        parts[spoilt][row, 40] = value
        maximum = torch.full((1, 1), 3.0)
        codes, codes_t, _ = layouts.encode_both(parts, torch.ones(1, 1), E4M3, maximum=maximum)
        assert not bool(maximum.isfinite())
        assert codes.float().isnan().nonzero().tolist() == [[row, 64 * spoilt + 40]]
        same(codes_t, codes.t().contiguous())


def test_a_maximum_is_raised_and_never_lowered():
    maximum = torch.full((1, 1), 7.0)
    for value, wanted in ((3.0, 7.0), (-9.0, 9.0), (0.0, 9.0)):
        layouts.encode_both([torch.full((2, 2), value)], torch.ones(1, 1), E4M3, maximum=maximum)
        assert float(maximum) == wanted


def test_a_part_that_lies_column_by_column_is_taken_too():
    parts = [matrix((40, 64)), matrix((64, 40)).t(), matrix((40, 128))[:, :64]]
    assert_defined(parts, torch.ones(1, 1), E4M3)


@pytest.mark.parametrize("begin", [0, 6, 7])
def test_turned_codes_are_the_transpose_between_what_else_lies_there(begin):
    for R, C in SHAPES:
        for beside in (0, 1, 2):
            codes = matrix((R, C)).to(torch.float8_e4m3fn)
            wide = torch.full((C, begin + R + beside), 0x55, dtype=torch.uint8)
            layouts.turn_into(wide[:, begin : begin + R].view(codes.dtype), codes)
            assert torch.equal(wide[:, begin : begin + R], codes.view(torch.uint8).t())
            assert bool((wide[:, :begin] == 0x55).all() and (wide[:, begin + R :] == 0x55).all())


@pytest.mark.parametrize("format", FORMATS)
def test_the_largest_and_smallest_scales_are_inverted_exactly(format):
    fmt = Format.parse(format)
    for amax in (0.0, 2.0**-140, 1e-38, 1e38, 3e38):
        x = torch.tensor([[amax, -amax / 3, 0.0]])
        scale = power_of_two_scale(torch.tensor([[amax]]), fmt.max)
        same(layouts.encode_both([x], scale, fmt)[0], definition.encode(x, scale, fmt, Granularity(), scales="delayed"))


def test_a_matrix_that_lies_column_by_column_is_taken_too():
    fmt = Format.parse("fp8_e4m3")
    x = matrix((40, 70))
    scale = definition.quantize(x, fmt).scale
    for ours, theirs in zip(
        layouts.encode_both([x.t()], scale, fmt)[:2], layouts.encode_both([x], scale, fmt)[1::-1], strict=True
    ):
        same(ours, theirs)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shapes", [SHAPES, ((16, 48), (128, 256), (256, 64))], ids=["ragged", "in sixteens"])
def test_matrices_together_get_the_codes_that_each_gets_alone(format, shapes):
    fmt = Format.parse(format)
    matrices = [matrix(shape) for shape in shapes]
    held, amax = layouts.encode_all(matrices, fmt)
    for x, one, largest in zip(matrices, held, amax, strict=True):
        wanted = definition.quantize(x, fmt)
        assert torch.equal(one.scale, wanted.scale)
        assert float(largest) == float(x.abs().max())
        same(one.codes, wanted.codes)
        same(one.codes_t, wanted.codes.t().contiguous())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_matrix_that_is_not_finite_gets_the_scale_nan_and_the_others_their_own(value):
    fmt = Format.parse("fp8_e4m3")
    matrices = [matrix((20, 30)), matrix((140, 20)), matrix((3, 7))]
    matrices[1][135, 3] = value
    earlier = torch.tensor([0.0, 3.0, 5.0])
    for known in (None, earlier):
        held, amax = layouts.encode_all(matrices, fmt, known)
        assert [bool(one.scale.isnan()) for one in held] == [False, True, False]
        assert [bool(largest.isfinite()) for largest in amax] == [True, False, True]
        assert bool(held[1].codes.float().isnan().all()) and bool(held[1].codes_t.float().isnan().all())
        same(held[0].codes, definition.quantize(matrices[0], fmt).codes)


def test_earlier_maxima_scale_where_they_are_known():
    fmt = Format.parse("fp8_e4m3")
    matrices = [matrix((20, 30)), matrix((130, 20))]
    earlier = torch.tensor([[9.0, 0.0], [9.0, 2.0**7]])[:, 1]  # with a stride
    held, amax = layouts.encode_all(matrices, fmt, earlier)
    for x, one, known, own in zip(matrices, held, earlier, amax, strict=True):
        scale = power_of_two_scale((known if known > 0 else own).view(1, 1), fmt.max)
        assert torch.equal(one.scale, scale)
        same(one.codes, definition.encode(x, scale, fmt, Granularity(), scales="delayed"))


def test_codes_of_many_matrices_lie_where_compiled_graphs_take_them_without_a_copy():
    held, _ = layouts.encode_all([matrix((5, 7)), matrix((9, 3)), matrix((2, 2))], Format.parse("fp8_e4m3"))
    for one in held:
        for tensor in one:
            assert (tensor.storage_offset() * tensor.element_size()) % 16 == 0


def test_what_does_not_fit_is_named():
    x, e4m3 = matrix((4, 4)), Format.parse("fp8_e4m3")
    row, tensor = Granularity(1, 0), Granularity()
    assert layouts.why_not(x, e4m3, tensor, "nearest-even", "power-of-two") == ""
    for arguments in (
        (x, Format.parse("int8"), tensor, "nearest-even", "power-of-two"),
        (x, Format.parse("fp6_e2m3"), tensor, "nearest-even", "power-of-two"),
        (x, e4m3, row, "nearest-even", "power-of-two"),
        (x, e4m3, tensor, "stochastic", "power-of-two"),
        (x, e4m3, tensor, "nearest-even", "exact"),
        (x[:0], e4m3, tensor, "nearest-even", "power-of-two"),
        (torch.empty(1, 2**24 + 1, device="meta"), e4m3, tensor, "nearest-even", "power-of-two"),
    ):
        assert layouts.why_not(*arguments)


@pytest.mark.parametrize("precision", ["fp8", "fp8-delayed"])
def test_steps_by_the_kernels_are_those_of_the_definition(precision, monkeypatch):
    """Weights together, and under delayed scaling activations and gradients by `encode_both` too: the same codes, so the
    same steps, histories and weights bit for bit."""
    config = ModelConfig(vocab_size=61, context=16, n_layer=2, n_head=2, n_embd=64, norm="rmsnorm", bias=False)
    ends = []
    activations = Choice("definition", "a test of their codes alone")
    monkeypatch.setitem(dispatch._choices, ("activations between low-bit layers", "cpu"), activations)
    for choice in ("definition", "kernel"):
        monkeypatch.setitem(dispatch._choices, ("both layouts of fp8 codes", "cpu"), Choice(choice, "a test"))
        model = fewbits.prepare(Transformer(config), precision)
        step = Step(model, AdamW(model.named_parameters(), lr=1e-2), precision)
        for i in range(4):  # earlier maxima are known to all from the third on
            ids = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(i))
            result = step([{"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}])
            assert bool(result.applied)
            histories = [m.history for m in model.modules() if getattr(m, "history", None) is not None]
            assert all(h.known == (choice == "kernel" and i >= 2) for h in histories)
        with held_weights(model):
            held = [m.held for m in model.modules() if getattr(m, "recipe", "")]
            assert all(one.grad_input_codes.is_contiguous() == (choice == "kernel") for one in held)
        ends.append(({name: p.detach().clone() for name, p in model.named_parameters()}, scale_history(model)))
    assert ends[0][1] == ends[1][1] and bool(ends[0][1]) == (precision == "fp8-delayed")
    for name, weight in ends[0][0].items():
        assert torch.equal(weight, ends[1][0][name]), name
