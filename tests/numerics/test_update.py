"""The pieces of an update: masters taken apart and put together, and rounding with ties away from zero."""

from __future__ import annotations

import pytest
import torch

from fewbits.numerics.rounding import round_to
from fewbits.numerics.update import adamw_, join_master, round_away, sgd_, split_master


def fp32(bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def interesting_fp32() -> torch.Tensor:
    """Every upper half of an fp32 number with the lower halves around zero, a tie and the end: [65536 * 7]."""
    upper = torch.arange(-32768, 32768, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234], dtype=torch.int32)
    return (upper[:, None] + lower).view(torch.float32).flatten()


def nearest_away(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The definition, in fp64: of the two neighbours in `dtype` the nearer one, the larger if both are as near."""
    top = 2.0 ** (128 if dtype == torch.bfloat16 else 16)  # where the next number would be: what rounds there is inf
    magnitude = exact.abs().double().clamp(max=top)
    near = exact.abs().to(dtype)
    codes = torch.stack([(near.view(torch.int16) + shift).clamp(min=0) for shift in (-1, 0, 1)])
    values = codes.view(dtype).double()
    values = torch.where(values.isinf(), top, values).nan_to_num(nan=float("inf"))
    distance = (values - magnitude).abs()
    nearest = torch.where(distance == distance.amin(0), values, -1).amax(0)
    return torch.where(nearest >= top, float("inf"), nearest).copysign(exact.double()).to(dtype)


def test_split_then_join_gives_back_every_bit_of_every_kind_of_number():
    exact = interesting_fp32()
    finite = ~exact.isnan()
    back = join_master(*split_master(exact))
    assert torch.equal(back[finite].view(torch.int32), exact[finite].view(torch.int32))
    assert back[~finite].isnan().all()


def test_working_half_of_a_split_master_is_the_nearest_bf16_with_ties_away():
    exact = interesting_fp32()
    exact = exact[~exact.isnan()]
    working = split_master(exact)[0]
    assert torch.equal(working.view(torch.int16), nearest_away(exact, torch.bfloat16).view(torch.int16))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, 0xFF800001, 0xFFFFFFFF, 0x7FC00000])
def test_nan_stays_nan_in_working_weight_and_master(bits: int):
    # 0x7FFFFFFF is what CUDA produces: plain bit rounding would make the working weight -0.
    working, remainder = split_master(fp32(bits).view(1))
    assert working.isnan().all()
    assert not remainder.any()
    assert join_master(working, remainder).isnan().all()


def test_master_beyond_the_largest_bf16_works_as_inf_and_is_kept_exactly():
    exact = torch.stack([fp32(0x7F7FFFFF), -fp32(0x7F7F8000)])
    working, remainder = split_master(exact)
    assert torch.equal(working, torch.tensor([float("inf"), -float("inf")], dtype=torch.bfloat16))
    assert torch.equal(join_master(working, remainder), exact)


def test_fp16_rounding_is_nearest_with_ties_away_at_every_code_and_between():
    codes = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()  # all finite magnitudes
    middle = (codes[:-1] + codes[1:]) / 2
    below, above = torch.nextafter(middle, torch.tensor(0.0)), torch.nextafter(middle, torch.tensor(1e9))
    edge = torch.tensor([65519.996, 65520.0, 65536.0, 1e9, float("inf"), 2.0**-25, 2.0**-25 * (1 - 2.0**-23), 1e-45])
    exact = torch.cat([codes, middle, below, above, edge])
    exact = torch.cat([exact, -exact])
    rounded = round_away(exact, torch.float16)
    assert torch.equal(rounded.view(torch.int16), nearest_away(exact, torch.float16).view(torch.int16))
    assert round_away(torch.tensor([float("nan")]), torch.float16).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_agrees_with_the_library_wide_ties_away_rounding(dtype: torch.dtype):
    exact = interesting_fp32()
    exact = exact[exact.abs() <= torch.finfo(dtype).max]
    assert torch.equal(round_away(exact, dtype), round_to(exact, dtype, "nearest-away").to(dtype))


def test_wide_weights_are_their_own_rounding():
    for dtype in (torch.float32, torch.float64):
        exact = torch.randn(5, dtype=dtype)
        assert round_away(exact, dtype) is exact


def test_adamw_first_update_is_lr_times_sign_after_decay():
    # n = 1: the corrected moments are g and g^2, so the step is lr * g / (|g| + eps) and eps is below one ulp of |g|.
    weight, gradient = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -0.25])
    moments = [torch.zeros(2), torch.zeros(2)]
    lr, decay, beta1, beta2 = 0.125, 0.5, 0.875, 0.75
    values = [1 - lr * decay, 0.0, 1 - beta1, beta2, 1 - beta2, (1 - beta2) ** 0.5, 1e-12, lr / (1 - beta1)]
    adamw_(weight, gradient, moments, torch.tensor(values))
    assert torch.equal(weight, torch.tensor([1.0 * 0.9375 - 0.125, -2.0 * 0.9375 + 0.125]))
    assert torch.equal(moments[0], torch.tensor([0.0625, -0.03125]))


def test_sgd_carries_momentum():
    weight, buffer = torch.tensor([1.0]), torch.zeros(1)
    for expected in (0.5, -0.25):  # buffer 1 then 1.5: 1 - 0.5, then 0.5 - 0.75
        sgd_(weight, torch.tensor([1.0]), [buffer], torch.tensor([0.5, 0.0, 0.5]))
        assert weight.item() == expected
