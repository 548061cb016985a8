"""Fake quantization: the value is what codes give back, the gradient passes straight through, the scale learns by LSQ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits import fake_quantize, quantize
from fewbits.errors import FewbitsError
from fewbits.formats import Format
from fewbits.numerics.fake import stored_weight, straight_through
from fewbits.numerics.rounding import cast
from fewbits.numerics.scaling import Granularity

FORMATS = ("int8", "int4", "fp8_e4m3", "fp4_e2m1", "binary")


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group:16", "block(4x24)"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_value_is_what_codes_give_back(format: str, granularity: str, dtype: torch.dtype) -> None:
    x = numbers(3, 5, 40, dtype=dtype)
    y = fake_quantize(x, format, granularity)
    assert y.dtype == dtype and torch.equal(y, quantize(x, format, granularity).dequantize(dtype))


def test_int8_is_the_fake_quantization_of_torch_with_its_gradient() -> None:
    x, scale = 3 * numbers(6, 33), torch.rand(6, generator=torch.Generator().manual_seed(1)) / 50 + 0.005
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    y = fake_quantize(mine, "int8", "row", scale=scale.view(6, 1))
    zero = torch.zeros(6, dtype=torch.int32)
    z = torch.fake_quantize_per_channel_affine(theirs, scale, zero, 0, -127, 127)
    weights = numbers(6, 33, seed=2)
    (y * weights).sum().backward()
    (z * weights).sum().backward()
    assert torch.equal(y, z)
    assert mine.grad is not None and theirs.grad is not None
    # torch passes what rounds into the range, up to 127.5 steps; the range itself ends at 127
    between = ((x / scale.view(6, 1)).abs() - 127.25).abs() < 0.26
    assert 0 < int((mine.grad == 0).sum()) < x.numel() // 2
    assert torch.equal(mine.grad[~between], theirs.grad[~between])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("granularity", ["tensor", "row", "group:8"])
def test_without_a_scale_of_its_own_every_element_gets_its_gradient(format: str, granularity: str) -> None:
    x = (numbers(16, 24) / 5).requires_grad_()  # |x| <= 1, inside what binary passes
    weights = numbers(16, 24, seed=3)
    (fake_quantize(x, format, granularity) * weights).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weights)


def test_the_gradient_stops_beyond_a_given_range_and_nowhere_else() -> None:
    x = torch.tensor([[-3.0, -1.76, -1.75, -0.1, 0.0, 1.75, 1.76, 9.0]], requires_grad=True)
    fake_quantize(x, "int4", "row", scale=0.25).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]


def test_the_largest_element_is_inside_under_the_scale_that_was_made_of_it() -> None:
    x = numbers(2000, 8)
    q = quantize(x, "int8", "row")
    assert bool((straight_through(torch.ones_like(x), x, q.scale, q.format, q.granularity) == 1).all())


def test_binary_is_the_sign_times_the_mean_magnitude_of_a_row_with_a_clipped_gradient() -> None:
    x = torch.tensor([[0.5, -1.5, 0.0, 1.0], [-1.01, 0.25, -0.25, 0.0]], requires_grad=True)
    y = fake_quantize(x, "binary", "row")
    assert torch.allclose(y, torch.tensor([[0.75, -0.75, 0.75, 0.75], [-0.3775, 0.3775, -0.3775, 0.3775]]), rtol=1e-7)
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1, 0, 1, 1], [0, 1, 1, 1]]


def definition(x: Tensor, scale: Tensor, format: Format) -> Tensor:
    """LSQ as its paper writes it, for autograd: rounding is a constant, clamping is not (Esser et al. 2020, eq. 1-3)."""
    steps = x / scale
    if format.kind == "binary":
        return cast(steps.detach(), format) * scale
    inside = steps.clamp(-format.max, format.max)
    return (inside + (cast(inside, format) - inside).detach()) * scale


@pytest.mark.parametrize("granularity", ["tensor", "row", "group:8"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_gradient_of_a_scale_is_that_of_its_definition(format: str, granularity: str) -> None:
    fmt, shared = Format.parse(format), Granularity.parse(granularity)
    x, weights = numbers(6, 32), numbers(6, 32, seed=4)
    grid = shared.grid(x.shape)
    start = torch.full(grid, 1.5 / fmt.max) * (1 + torch.rand(grid, generator=torch.Generator().manual_seed(5)))
    mine, theirs = (start.clone().requires_grad_() for _ in range(2))
    (fake_quantize(x, format, granularity, scale=mine) * weights).sum().backward()
    columns = x.shape[1] // grid[1]
    wide = theirs.expand(6, -1) if grid[0] == 1 else theirs
    (definition(x.double(), wide.double().repeat_interleave(columns, 1), fmt) * weights.double()).sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    N = x.numel() / start.numel()
    expected = theirs.grad / (N * fmt.max) ** 0.5
    # a sum of N fp32 products of at most 5 by max, each off by a few units of 2^-24
    bound = N * 5 * fmt.max * 8 * 2.0**-24 / (N * fmt.max) ** 0.5
    assert float((mine.grad - expected).abs().max()) <= bound


def test_a_learned_scale_moves_to_a_smaller_error() -> None:
    x = numbers(4, 256)
    scale = torch.full((4, 1), 4.0 / 7).requires_grad_()

    def error() -> Tensor:
        return (fake_quantize(x, "int4", "row", scale=scale) - x).square().sum()

    first = float(error().detach())
    for _ in range(200):
        (gradient,) = torch.autograd.grad(error(), scale)
        with torch.no_grad():
            scale -= 2e-3 * gradient
    assert float(error().detach()) < 0.8 * first


def test_a_stored_weight_has_scales_of_its_dtype_and_codes_made_for_them() -> None:
    weight = numbers(48, 64, dtype=torch.bfloat16)
    q = stored_weight(weight, Format.parse("int4"), Granularity(1, 32), "exact")
    assert torch.equal(q.scale, q.scale.bfloat16().float())
    steps = weight.float().view(48, 2, 32) / q.scale.unsqueeze(-1)
    assert float((q.codes.view(48, 2, 32) - steps.clamp(-7, 7)).abs().max()) <= 0.5 * (1 + 2.0**-20)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"format": "int9x"}, "format"),
        ({"granularity": "rows"}, "no granularity"),
        ({"scale": torch.ones(7)}, "7 scales do not fit"),
        ({"format": "fp8_e4m3", "scales": "full-range"}, "only integers"),
    ],
)
def test_a_mistake_is_one_sentence(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(FewbitsError, match=message):
        fake_quantize(numbers(4, 8), **wrong)  # type: ignore[arg-type]
    with pytest.raises(FewbitsError, match="int64 tensor cannot"):
        fake_quantize(torch.arange(8))
