"""What prepare changes in a model, what it leaves, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fewbits
from fewbits import AdamW, FewbitsError, Step
from fewbits.kernels.dispatch import matmul_execution


class Foreign(nn.Module):
    """Float inputs, a convolution, attention by torch, a recurrent layer and a buffer: nothing of ours."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(3, 16, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.out = nn.Linear(16, 1)
        self.register_buffer("shift", torch.tensor(1 / 3))

    def forward(self, x):
        y = self.norm(self.convolution(x.transpose(1, 2)).transpose(1, 2))
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.out(self.recurrent(y)[0]).squeeze(-1) + self.shift.to(y.dtype)


def squared_error(model, batch):
    return (model(batch["x"]).float() - batch["labels"]).square().sum()


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-mixed", "bf16-true"])
def test_a_foreign_model_with_float_inputs_learns(precision):
    torch.manual_seed(0)
    model = fewbits.prepare(Foreign(), precision)
    step = Step(model, AdamW(model.parameters(), lr=1e-2), precision, loss=squared_error)
    x = torch.randn(8, 10, 3)
    data = {"x": x, "labels": x.sum(-1)}
    losses = [float(step([data]).loss) for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]
    assert model.shift.dtype == torch.float32 and float(model.shift) == float(torch.tensor(1 / 3))


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_an_fp32_checkpoint_loses_nothing(precision):
    torch.manual_seed(0)
    model = Foreign()
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = fewbits.prepare(model, precision)
    optimizer = AdamW(model.named_parameters(), lr=0.0, weight_decay=0.0)
    step = Step(model, optimizer, precision, loss=squared_error)
    step([{"x": torch.randn(2, 4, 3), "labels": torch.zeros(2, 4)}])
    for name, p in model.named_parameters():
        assert torch.equal(optimizer.exact_weight(p), exact[name]), name
        assert p.dtype.itemsize == 2


def test_working_weights_are_rounded_with_ties_away_from_zero():
    model = nn.Linear(4, 1, bias=False)
    # 1 + 2^-8 lies half-way between 1 and 1 + 2^-7 in bf16; to even it would fall to 1
    model.weight.data = torch.tensor([[1 + 2.0**-8, -1 - 2.0**-8, 1 + 3 * 2.0**-8, 0.0]])
    fewbits.prepare(model, "bf16-mixed")
    assert model.weight.tolist() == [[1 + 2.0**-7, -1 - 2.0**-7, 1 + 2.0**-6, 0.0]]


def test_tf32_rounds_the_operands_of_all_three_matmuls_on_a_cpu():
    # tf32 keeps 10 bits: 1 + 2^-12 is 1 there, and fp32 would keep it
    near_one = torch.tensor([[1 + 2.0**-12]])
    model = nn.Linear(1, 1, bias=False)
    model.weight.data = near_one.clone()
    fewbits.prepare(model, "tf32")
    x = near_one.clone().requires_grad_()
    y = model(x)
    y.backward(near_one)
    assert [y.item(), x.grad.item(), model.weight.grad.item()] == [1.0, 1.0, 1.0]
    assert torch.equal(model.weight, near_one), "the weight itself stays fp32"


def test_tied_weights_stay_tied_and_are_counted_once():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    fewbits.prepare(model, "bf16-mixed")
    assert model[0].weight is model[1].weight
    assert (model.fewbits_report.rounded, model.fewbits_report.parameters) == (1, 1)


def test_kept_modules_stay_in_their_format_and_the_model_still_learns():
    torch.manual_seed(0)
    model = fewbits.prepare(Foreign(), "bf16-mixed", keep=["out", "norm=fp32"])
    assert model.out.weight.dtype == model.norm.weight.dtype == torch.float32
    assert model.convolution.weight.dtype == torch.bfloat16
    assert {row[0] for row in model.fewbits_report.kept} == {"out", "norm"}
    step = Step(model, AdamW(model.parameters(), lr=1e-2), "bf16-mixed", loss=squared_error)
    x = torch.randn(8, 10, 3)
    losses = [float(step([{"x": x, "labels": x.sum(-1)}]).loss) for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]


def test_16_bit_matmuls_of_foreign_modules_are_right_wherever_they_run():
    torch.manual_seed(0)
    model, exact = Foreign(), Foreign()
    exact.load_state_dict(model.state_dict())
    fewbits.prepare(model, "bf16-mixed")
    x = torch.randn(4, 10, 3)
    # bf16 keeps 8 bits: a few per cent after five layers
    torch.testing.assert_close(model(x).float(), exact(x), rtol=0.05, atol=0.05)


def test_the_way_of_multiplying_comes_with_a_reason():
    choice = matmul_execution(fewbits.Format.parse("fp16"), torch.device("cpu"))
    assert choice.value in ("native", "emulated") and len(choice.reason) > 10


def test_a_keep_that_asks_for_what_fp32_does_anyway_is_granted_and_another_format_refused():
    model = fewbits.prepare(Foreign(), "fp32", keep=["out", "norm=fp32"])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(FewbitsError, match="keeps every parameter in fp32, and keep asks for bf16"):
        fewbits.prepare(Foreign(), "fp32", keep=["out=bf16"])


def test_a_keep_that_matches_nothing_says_what_there_is_and_how_much_more():
    config = fewbits.ModelConfig(vocab_size=61, context=16, n_layer=2, n_head=2, n_embd=32)
    with pytest.raises(FewbitsError, match=r"Its head is tied: it multiplies the weight of 'embed'"):
        fewbits.prepare(fewbits.Transformer(config), "bf16-mixed", keep=["head"])
    with pytest.raises(FewbitsError, match=r"mlp\.down and \d+ more"):
        fewbits.prepare(fewbits.Transformer(config), "bf16-mixed", keep=["zzzzzz"])


@pytest.mark.parametrize(
    ("keep", "said"),
    [(["lm_haed"], "matches no module"), (["out=int3"], "format|stored"), (["out=fp8_e4m3"], "stored in")],
)
def test_a_pattern_that_does_nothing_is_refused(keep, said):
    with pytest.raises(FewbitsError, match=said):
        fewbits.prepare(Foreign(), "bf16-mixed", keep=keep)


def test_not_finite_and_too_large_weights_are_named():
    model = Foreign()
    model.out.weight.data[0, 0] = float("nan")
    with pytest.raises(FewbitsError, match=r"out\.weight"):
        fewbits.prepare(model, "bf16-mixed")
    model.out.weight.data[0, 0] = 1e5
    with pytest.raises(FewbitsError, match=r"out\.weight.*beyond fp16"):
        fewbits.prepare(model, "fp16-mixed")
